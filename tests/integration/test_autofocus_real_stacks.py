"""Searches on recorded real z-stacks: they land, or they refuse; never in silence."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.autofocus_stacks import planes_off, searches, take


@pytest.mark.parametrize(
    ("name", "starts"),
    [("neubias widefield", [24, 32, 39]), ("dfnn light-sheet", [2, 14])],
)
def test_fluorescence_lands_within_one_plane(
    name: str, starts: list[int], shared_data: Path
) -> None:
    taken = take(shared_data, name)
    for start, end, verdict in searches(taken, starts):
        assert verdict.focused, (start, verdict.reason)
        assert planes_off(taken, end) <= 1, start


def test_bright_field_that_optics_do_not_explain_is_refused(shared_data: Path) -> None:
    taken = take(shared_data, "yeast bright field")
    for start, end, verdict in searches(taken, [2, 20]):
        assert planes_off(taken, end) <= 1 or not verdict.focused, start


@pytest.mark.parametrize(("top", "left", "start"), [(0, 0, 1), (64, 128, 9)])
def test_a_nearly_empty_corner_is_never_in_focus(
    top: int, left: int, start: int, shared_data: Path
) -> None:
    taken = take(shared_data, "dfnn light-sheet")
    planes = taken.planes[:, top : top + 128, left : left + 128]
    ((_, _, verdict),) = searches(replace(taken, planes=planes), [start])
    assert not verdict.focused
    assert "no more than by noise" in verdict.reason
