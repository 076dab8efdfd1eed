"""The fit of the deviation that is stated beside a defocus."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from bench.deviation import (
    COVERED,
    OPTICS,
    Errors,
    covered,
    draw_told,
    fitted,
    left_out,
    with_deviation,
)
from bench.evidence import defocus_errors
from rtfocus.engines.fitted import DeviationCard, stated_variance
from rtfocus.files import resource_folder
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid
from rtfocus.specimens import draw_specimen

TRUE = DeviationCard(spread=1.5, floor=0.3, distance=0.05)


@pytest.fixture(scope="module")
def errors() -> Errors:
    """Errors of which `TRUE` is the variance, of kinds with few tiles and many."""
    rng = np.random.default_rng(5)
    kinds = np.repeat([f"kind {n}" for n in range(8)], [100, 200, 900, 800] * 2)
    level = rng.uniform(-10, 10, kinds.size)
    spread = rng.uniform(0.2, 3, kinds.size)
    deviation = np.sqrt(stated_variance(TRUE, level, spread))
    return Errors(kinds, level, spread, rng.normal(0, deviation))


def test_the_fit_covers_what_it_should_of_kinds_in_it_and_left_out(
    errors: Errors,
) -> None:
    everything = np.ones(len(errors.kind), np.bool_)
    assert covered(TRUE, errors, everything) == pytest.approx(COVERED, abs=0.02)
    fit = fitted(errors, everything)
    assert covered(fit, errors, everything) == pytest.approx(COVERED, abs=0.02)
    assert left_out(errors) == pytest.approx(COVERED, abs=0.03)
    # Near focus and far from it, by sure labels and by unsure ones.
    for some in (
        abs(errors.level) < 3,
        abs(errors.level) > 7,
        errors.spread < 1,
        errors.spread > 2,
    ):
        assert covered(fit, errors, some) == pytest.approx(COVERED, abs=0.06)


def test_kinds_count_alike_however_many_tiles_they_have(errors: Errors) -> None:
    """A kind of 100 tiles with errors ten times as large is an eighth of all."""
    worse = errors.error * np.where(errors.kind == "kind 0", 1000, 1e-3)
    everything = np.ones(len(errors.kind), np.bool_)
    shares = covered(TRUE, errors._replace(error=worse), everything)
    assert shares == pytest.approx([7 / 8, 7 / 8], abs=0.01)


@pytest.mark.parametrize("engine", ["delpnet", "rtfocus-1", "rtfocus-2"])
def test_a_card_gets_the_section_and_keeps_all_else(engine: str) -> None:
    path = resource_folder("engines") / engine / "engine.yaml"
    before = path.read_text("utf-8")
    fits = {"told": TRUE, "blind": TRUE.model_copy(update={"floor": 2.5})}
    after = with_deviation(before, fits)
    assert with_deviation(after, fits) == after
    was, now = yaml.safe_load(before), yaml.safe_load(after)
    found = now.pop("deviation")
    assert {name: DeviationCard(**one) for name, one in found.items()} == fits
    was.pop("deviation", None)
    assert now == was


def test_told_frames_are_blurred_by_the_optics_their_group_names() -> None:
    light = draw_specimen("beads", (96, 96), np.random.default_rng(1))
    light /= light.max()
    rng = np.random.default_rng(2)
    samples = [one for _ in range(12) for one in draw_told("beads", light, rng)]
    assert {int(one.group) for one in samples} == set(range(len(OPTICS)))
    far = [abs(one.defocus_um[0]) for one in samples if one.defocus_um is not None]
    assert min(far) == 0
    for one in samples:
        assert one.defocus_um is not None
        unit_um = OPTICS[int(one.group)].defocus_unit_um
        assert abs(one.defocus_um[0]) <= 10 * 2.2 * unit_um / OPTICS[0].defocus_unit_um


@pytest.mark.parametrize(("signed", "wanted"), [(True, 7.0), (False, 1.0)])
def test_an_engine_that_tells_no_side_errs_by_distance(
    signed: bool, wanted: float
) -> None:
    light = draw_specimen("tissue", (96, 96), np.random.default_rng(1))
    (sample, *_) = draw_told("tissue", light / light.max(), np.random.default_rng(3))
    tiles = np.full((1, 1), 4.0, np.float32)
    found = DefocusMap(
        TileGrid(1, 1, 96, 48, 47.5, signed=signed),
        tiles,
        tiles,
        np.full((1, 1), 4, np.int16),
        tiles,
    )
    away = replace(sample, defocus_um=(-3.0, -3.0))
    assert defocus_errors(away, found, 1.0)[2] == pytest.approx([wanted])
    found.level[:] = BACKGROUND
    assert defocus_errors(away, found, 1.0).size == 0
