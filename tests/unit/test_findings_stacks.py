"""Stacks: where focus lies, from how far every plane seems to be from it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.batch.findings import Findings, focus_of_stack
from rtfocus.cli.display import told_of
from rtfocus.errors import InputError


@given(
    planes=st.integers(9, 40),
    where=st.floats(0.3, 0.7),
    power=st.floats(0.5, 2),
    seed=st.integers(0, 2**16),
)
def test_focus_is_found_to_half_a_plane_whatever_the_course_and_the_order(
    planes: int, where: float, power: float, seed: int
) -> None:
    focus = where * (planes - 1)
    z = np.random.default_rng(seed).permutation(planes)
    found = focus_of_stack(z, np.abs(z - focus) ** power)
    assert found.place == "within"
    assert found.z is not None
    assert abs(found.z - focus) <= 0.5
    assert found.low is not None
    assert found.high is not None
    assert found.low <= focus <= found.high
    assert found.explained == pytest.approx(1)


def test_units_signs_and_the_direction_of_z_change_nothing() -> None:
    z = np.arange(12.0)
    distance = np.abs(z - 4.7) + np.random.default_rng(3).uniform(0, 0.4, 12)
    found = focus_of_stack(z, distance)
    scaled = focus_of_stack(50 + 0.3 * z, -7 * distance)
    turned = focus_of_stack(-z, distance)
    assert found.z is not None
    assert scaled.z == pytest.approx(50 + 0.3 * found.z)
    assert turned.z == pytest.approx(-found.z)
    assert turned.explained == pytest.approx(found.explained)


def test_steps_may_be_uneven_and_planes_without_a_specimen_are_left_out() -> None:
    z = np.array([0, 0.4, 1.0, 1.1, 2.0, 3.5, 4.0, 5.5, 7.0])
    distance = np.abs(z - 3.0) * 2
    distance[[1, 5]] = np.nan
    found = focus_of_stack(z, distance)
    assert found.z == pytest.approx(3.0, abs=0.6)
    four = np.where(np.arange(9) < 4, distance, np.nan)
    assert focus_of_stack(z, four).why == "3 planes with a specimen, 5 are needed"


def test_noise_moves_focus_little() -> None:
    rng = np.random.default_rng(5)
    z = np.arange(21)
    for focus in rng.uniform(6, 14, 40):
        distance = np.abs(z - focus) * rng.lognormal(0, 0.2, 21) + 0.3
        found = focus_of_stack(z, distance)
        assert found.z == pytest.approx(focus, abs=1.5)


@pytest.mark.parametrize("beyond", [-4.0, -0.4, 0.2, 10.8, 11.3, 16.0])
def test_focus_at_an_end_is_no_place(beyond: float) -> None:
    z = np.arange(12)
    found = focus_of_stack(z, np.abs(z - beyond))
    assert found.z is None
    if beyond < 5:
        assert (found.place, found.low) == ("below", None)
        assert found.high is not None
        assert max(beyond, 0) <= found.high < 3
    else:
        assert (found.place, found.high) == ("above", None)
        assert found.low is not None
        assert min(beyond, 11) >= found.low > 8


def test_planes_in_focus_at_an_end_do_not_make_a_place() -> None:
    z = np.arange(10)
    flat = np.where(z < 6, 6.0 - z, 0)
    assert focus_of_stack(z, flat).place == "above"
    assert focus_of_stack(-z, flat).place == "below"
    # What an engine says of planes in focus differs by next to nothing, and rises.
    nearly = flat + np.array([0, 0, 0, 0, 0, 0, 0.02, 0.01, 0.02, 0.05])
    assert focus_of_stack(z, nearly).place == "above"


def test_what_no_focus_explains_is_not_known() -> None:
    rng = np.random.default_rng(1)
    z = np.arange(15)
    flat = [focus_of_stack(z, rng.normal(6, 0.5, 15)).place for _ in range(100)]
    mixed = [focus_of_stack(z, rng.permutation(np.abs(z - 7.2))) for _ in range(100)]
    assert flat.count("unknown") == 100
    assert [one.place for one in mixed].count("unknown") >= 98
    assert all(one.why for one in mixed if one.place == "unknown")
    assert focus_of_stack(z, np.zeros(15)).place == "unknown"
    away = focus_of_stack(z, 20 + np.abs(z - 7.2))
    assert away.why == "its planes are nearly equally far from focus"


def test_planes_and_distances_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="give one for each plane"):
        focus_of_stack(range(5), [1.0] * 6)
    with pytest.raises(InputError, match="z has nan; leave planes"):
        focus_of_stack([0, 1, np.nan, 3, 4], [1.0] * 5)
    # As in a column of text, and with a missing value of pandas in one.
    for distances in (["far"] * 5, [1.0, 2.0, object(), 4.0, 5.0]):
        with pytest.raises(InputError, match="numbers, NaN where there is none: "):
            focus_of_stack(range(5), distances)


def stack(**known: Any) -> dict[str, Any]:
    """Return a stack as in the JSON of ``classify``."""
    said = {"place": "within", "focus_plane": 8.6, "focus_offset_um": 0.86}
    said |= {"likely": [8.2, 8.9], "planes": 17, "assumed": False, "why": None}
    said |= {"z_rises": None}
    image = {"path": "s.tif", "name": "s", "index": {"t": 0, "c": 1}}
    return {**image, **said, **known}


def test_a_line_says_where_a_stack_is_in_focus() -> None:
    ends = {"focus_plane": None, "focus_offset_um": None}
    stacks = [
        stack(),
        stack(focus_offset_um=None, likely=[-0.4, 17.2], assumed=True),
        stack(place="below", likely=[None, 1.5], **ends),
        stack(place="above", likely=[14.25, None], **ends),
        stack(place="unknown", likely=[None, None], why="too dark", **ends),
        stack(z_rises=False),
    ]
    assert list(told_of(Findings([], stacks), each=False)) == [
        "s.tif (s t0 c1): in focus at plane 8.6 of 0 to 16, 0.86 um from the first "
        "(likely 8.2 to 8.9)",
        "s.tif (s t0 c1): if its planes are a z-stack: in focus at plane 8.6 of 0 to "
        "16 (likely 0.0 to 16.0)",
        "s.tif (s t0 c1): in focus at its first planes, to 1.5 of 16, or before them",
        "s.tif (s t0 c1): in focus at its last planes, from 14.2 of 16, or after them",
        "s.tif (s t0 c1): where it is in focus is not known: too dark",
        "s.tif (s t0 c1): in focus at plane 8.6 of 0 to 16, 0.86 um from the first "
        "towards lower z (likely 8.2 to 8.9)",
    ]
    (many, more) = told_of(Findings([], stacks * 9), each=True)
    assert many == (
        "54 z-stacks: in focus within 27, at an end or beyond 18, not known of 9"
    )
    assert more == "every stack: --json FILE"
