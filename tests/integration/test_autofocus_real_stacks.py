"""Searches on recorded real z-stacks: they land, or they refuse; never in silence."""

from pathlib import Path

import pytest

from bench.autofocus_stacks import STACKS, searches


@pytest.mark.parametrize(
    ("name", "starts"),
    [("neubias widefield", [24, 32, 39]), ("dfnn light-sheet", [2, 14])],
)
def test_fluorescence_lands_within_one_plane(
    name: str, starts: list[int], shared_data: Path
) -> None:
    for start, end, verdict in searches(shared_data, name, starts):
        assert verdict.focused, (start, verdict.reason)
        assert min(abs(end - plane) for plane in STACKS[name].reference) <= 1, start


def test_bright_field_that_optics_do_not_explain_is_refused(shared_data: Path) -> None:
    name = "yeast bright field"
    for start, end, verdict in searches(shared_data, name, [2, 20]):
        right = min(abs(end - plane) for plane in STACKS[name].reference) <= 1
        assert right or not verdict.focused, start


@pytest.mark.parametrize(("top", "left", "start"), [(0, 0, 1), (64, 128, 9)])
def test_a_nearly_empty_corner_is_never_in_focus(
    top: int, left: int, start: int, shared_data: Path
) -> None:
    corner = slice(top, top + 128), slice(left, left + 128)
    name = "dfnn light-sheet"
    ((_, _, verdict),) = searches(shared_data, name, [start], region=corner)
    assert not verdict.focused
    assert "no more than by noise" in verdict.reason
