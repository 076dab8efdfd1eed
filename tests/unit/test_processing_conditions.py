"""Conditions: each entry by its definition, and the sign where W is positive."""

from dataclasses import replace

import numpy as np
import pytest
from engine_kit import ENTRIES, write_shift_restorer

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.engines.card import read_card
from rtfocus.engines.registry import check_fit, step_um
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND
from rtfocus.processing.classify import Conditions, is_mirrored, turned

# Half the reference's aperture: a level of 2 um there is 8 um here.
NA = 0.25
STEP_UM = 8.0


def optics(waves):
    aberrations = Aberrations(spherical_waves=waves)
    return OpticalSystem(NA, 451, 0.65, aberrations=aberrations)


@pytest.fixture
def card(tmp_path):
    return read_card(
        write_shift_restorer(tmp_path / "shift", entries=(*ENTRIES, "level"))
    )


def rows(card, waves, defocus_um, *, blind=False, signed=True):
    conditions = Conditions(card, optics(waves), blind=blind, signed=signed)
    found = conditions.rows(np.array(defocus_um, np.float32))
    return [
        dict(zip((*ENTRIES, "level"), map(float, row), strict=True)) for row in found
    ]


def test_every_entry_follows_its_definition(card):
    (row,) = rows(card, -0.4, [1.4 * STEP_UM])
    assert row == pytest.approx(
        {
            "sampling": 0.65 * NA / 0.451,
            "spherical_waves": -0.4,
            "optics_known": 1,
            "defocus_levels": 1.4,
            "defocus_known": 1,
            "level": 1,
        }
    )


def test_positive_aberration_is_told_as_its_mirror_image(card):
    (row,) = rows(card, 0.4, [-3 * STEP_UM])
    (mirrored,) = rows(card, -0.4, [3 * STEP_UM])
    assert row == mirrored
    assert is_mirrored(optics(0.4))
    assert not is_mirrored(optics(-0.4))
    level = np.array([[-3, 0, BACKGROUND]], np.int16)
    defocus = np.array([[-2.9, 0.1, np.nan]], np.float32)
    turned_level, turned_defocus = turned(level, defocus)
    np.testing.assert_array_equal(turned_level, [[3, 0, BACKGROUND]])
    np.testing.assert_array_equal(turned_defocus, -defocus)


def test_blind_engines_are_told_the_sampling_and_no_aberration(card):
    (row,) = rows(card, -0.4, [STEP_UM], blind=True)
    assert row["sampling"] == pytest.approx(0.65 * NA / 0.451)
    assert (row["spherical_waves"], row["optics_known"]) == (0, 0)
    assert row["defocus_known"] == 1


def test_unknown_defocus_is_zero_with_its_flag(card):
    unknown, known = rows(card, -0.4, [np.nan, STEP_UM])
    assert (unknown["defocus_levels"], unknown["defocus_known"]) == (0, 0)
    assert (known["defocus_levels"], known["defocus_known"]) == (1, 1)


def test_a_distance_is_told_as_defocus_only_where_both_sides_look_alike(card):
    (aberrated,) = rows(card, -0.4, [STEP_UM], signed=False)
    assert (aberrated["defocus_levels"], aberrated["defocus_known"]) == (0, 0)
    assert aberrated["level"] == 1
    (even,) = rows(card, 0.0, [STEP_UM], signed=False)
    assert (even["defocus_levels"], even["defocus_known"]) == (1, 1)


def test_levels_end_where_the_engine_ends(card):
    near, far = rows(card, -0.4, [-40 * STEP_UM, 40 * STEP_UM])
    assert (near["level"], far["level"]) == (-10, 10)
    unsigned = card.model_copy(
        update={"levels": card.levels.model_copy(update={"signed": False})}
    )
    assert rows(unsigned, -0.4, [-3 * STEP_UM])[0]["level"] == 3


def test_an_engine_is_told_the_level_that_it_found_itself(card):
    # Its own direction is known, and counted as it counts: nothing is turned.
    conditions = Conditions(card, optics(0.4), blind=True, signed=False)
    told, untold = conditions.told(-2.5, 2), conditions.told(np.nan, 2)
    known = [ENTRIES.index(name) for name in ("defocus_levels", "defocus_known")]
    np.testing.assert_array_equal(told[:, known], [[-2.5, 1]] * 2)
    np.testing.assert_array_equal(untold, conditions.unknown(2))
    told[:, known] = 0
    np.testing.assert_array_equal(told, untold)


def test_engines_without_a_condition_are_told_nothing(card):
    silent = card.model_copy(update={"condition": None})
    conditions = Conditions(silent, optics(0), blind=False, signed=True)
    assert conditions.rows(np.zeros(3, np.float32)) is None
    assert conditions.unknown(3) is None
    assert conditions.told(2.0, 3) is None


def test_an_engine_that_needs_no_optics_is_told_none_when_blind(tmp_path):
    entries = ("sampling", "sampling_known", "defocus_levels", "defocus_known")
    silent = read_card(write_shift_restorer(tmp_path / "silent", entries=entries))
    # Half the aperture and four times the pixel: twice the reference's sampling.
    coarse = replace(optics(-0.4), pixel_size_um=2.6)
    twice_um = step_um(silent, coarse, blind=True)
    assert twice_um == pytest.approx(2 * step_um(silent, coarse))
    sampling = 2.6 * NA / 0.451
    for blind, row in ((True, [0, 0, 1, 1]), (False, [sampling, 1, 2, 1])):
        conditions = Conditions(silent, coarse, blind=blind, signed=True)
        found = conditions.rows(np.array([twice_um], np.float32))
        np.testing.assert_allclose(found, [row], rtol=1e-6)
    far = replace(optics(0), pixel_size_um=20.0)
    check_fit(silent, far, ignore=False, blind=True)
    with pytest.raises(EngineError, match="was trained for pixels"):
        check_fit(silent, far, ignore=False)
