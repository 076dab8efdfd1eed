"""Evidence: corrections are taken back where nothing in the image speaks for them."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from rtfocus.engines.card import EngineCard, read_card
from rtfocus.engines.fitted import (
    ErrorCard,
    Evidence,
    EvidenceCard,
    measures,
    unsettled_um,
)
from rtfocus.files import resource_folder
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid
from rtfocus.optics.normalisation import PercentileRange, luminance, pad_frame
from rtfocus.specimens import draw_specimen

Image = NDArray[np.float32]
SHIPPED = resource_folder("engines") / "rtfocus-2"
STEP_UM = 2.2
MEASURES = 25


def found(shape: tuple[int, ...], level: int = 4, sure: float = 0.7) -> DefocusMap:
    """Return a map that calls a whole frame out of focus."""
    rows, columns = (max(1, side // 48 - 1) for side in shape[:2])
    grid = TileGrid(rows, columns, 96, 48, 47.5, signed=True)
    tiles = np.ones((rows, columns), np.float32)
    return DefocusMap(
        grid,
        tiles * np.float32(level * STEP_UM),
        tiles * np.float32(sure),
        np.full((rows, columns), level, np.int16),
        tiles * np.float32((1 - sure) * 2 * STEP_UM),
    )


def card(log_odds: float) -> EvidenceCard:
    """Return a function that gives the same share everywhere."""
    return EvidenceCard.model_validate(
        {
            "middle": [0.0] * MEASURES,
            "spread": [1.0] * MEASURES,
            "layers": [{"weights": [[0.0] * MEASURES], "bias": [log_odds]}],
        }
    )


def shipped() -> Evidence:
    evidence = read_card(SHIPPED).evidence
    assert evidence is not None
    return Evidence(evidence, PercentileRange(), STEP_UM)


def blurred_nuclei(seed: int = 3) -> tuple[Image, Image]:
    """Return a frame and its light, in counts."""
    rng = np.random.default_rng(seed)
    sharp = 100 + 2000 * draw_specimen("nuclei", (192, 240), rng)
    blurred = gaussian_filter(sharp, 2.5) + rng.normal(0, 8, sharp.shape)
    return blurred.astype(np.float32), sharp.astype(np.float32)


@pytest.mark.parametrize("shape", [(192, 240), (133, 130), (96, 100, 3), (17, 20)])
def test_moves_towards_the_signal_by_the_share_it_gives(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    signal = rng.uniform(100, 900, shape).astype(np.float32)
    restored = signal + rng.normal(0, 50, shape).astype(np.float32)
    restored[:8] = signal[:8]
    for log_odds in (-60.0, 0.0, 60.0):
        share = 1 / (1 + np.exp(-log_odds))
        out = restored.copy()
        Evidence(card(log_odds), PercentileRange(), STEP_UM).weigh(
            signal, found(shape), out
        )
        wanted = signal + np.float32(share) * (restored - signal)
        assert out == pytest.approx(wanted, rel=1e-5, abs=1e-3)
        assert np.array_equal(out[:8], signal[:8])


def test_nothing_corrected_stays_to_the_bit() -> None:
    signal, _ = blurred_nuclei()
    out = signal.copy()
    shipped().weigh(signal, found(signal.shape), out)
    assert np.array_equal(out, signal)


def test_shares_know_neither_counts_nor_offset() -> None:
    signal, sharp = blurred_nuclei()
    shares = []
    for gain, offset in ((1.0, 0.0), (7.5, 300.0)):
        out = sharp * np.float32(gain) + np.float32(offset)
        frame = signal * np.float32(gain) + np.float32(offset)
        shipped().weigh(frame, found(signal.shape), out)
        shares.append((out - frame) / np.float32(gain))
    assert shares[0] == pytest.approx(shares[1], abs=2.0)


def error_card(log_error: float, by_power: float = 0.0) -> ErrorCard:
    """Return a function of the power of what was applied alone."""
    weights = [0.0] * (MEASURES + 1) + [2 * by_power]
    return ErrorCard.model_validate(
        {
            "middle": [0.0] * (MEASURES + 2),
            # Wide: what no correction leaves is not the farthest that counts.
            "spread": [2.0] * (MEASURES + 2),
            "layers": [{"weights": [weights], "bias": [log_error]}],
        }
    )


def test_no_error_is_stated_where_the_card_knows_none() -> None:
    signal, sharp = blurred_nuclei()
    assert shipped().weigh(signal, found(signal.shape), sharp.copy()) is None


def test_an_error_is_stated_of_every_tile_in_the_unit_of_the_signal() -> None:
    signal, sharp = blurred_nuclei()
    tiles = found(signal.shape)
    for gain in (1.0, 7.5):
        evidence = Evidence(card(0.0), PercentileRange(), STEP_UM, error_card(-4.0))
        frame, out = signal * np.float32(gain), sharp * np.float32(gain)
        error = evidence.weigh(frame, tiles, out)
        assert error is not None
        assert error.shape == tiles.level.shape
        assert error.dtype == np.float32
        _, scale = PercentileRange().fit(frame)
        assert error == pytest.approx(scale * np.exp(-2.0), rel=1e-4)


@pytest.mark.parametrize("shape", [(192, 240), (133, 130), (96, 100, 3)])
def test_the_error_of_a_tile_is_the_mean_square_over_its_pixels(
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(2)
    signal = rng.uniform(100, 900, shape).astype(np.float32)
    out = signal.copy()
    out[:, 50:] += rng.normal(0, 50, out[:, 50:].shape).astype(np.float32)
    change = luminance(out) - luminance(signal)
    evidence = Evidence(card(0.0), PercentileRange(), STEP_UM, error_card(0.0, 4.0))
    tiles = found(shape)
    error = evidence.weigh(signal, tiles, out)
    assert error is not None
    # Half the correction was applied; the function gives its power, plus the least.
    _, scale = PercentileRange().fit(luminance(signal))
    power = np.square(change / np.float32(2 * scale))
    height, width = power.shape
    cells = pad_frame(power, 16).reshape(-(-height // 16), 16, -(-width // 16), 16)
    cells = cells.mean(axis=(1, 3))
    square = np.zeros((height, width))
    for y in range(0, height, 32):
        for x in range(0, width, 32):
            block = cells[y // 16 : y // 16 + 2, x // 16 : x // 16 + 2]
            square[y : y + 32, x : x + 32] = block.mean() + 1e-7
    grid = tiles.grid
    for row in range(grid.rows):
        for column in range(grid.columns):
            area = square[row * 48 : row * 48 + 96, column * 48 : column * 48 + 96]
            wanted = scale * np.sqrt(area.mean())
            assert error[row, column] == pytest.approx(wanted, rel=1e-3)


def test_what_stayed_as_it_was_in_focus_is_told_a_smaller_error() -> None:
    both = read_card(SHIPPED)
    assert both.evidence is not None
    evidence = Evidence(both.evidence, PercentileRange(), STEP_UM, both.expected_error)
    signal, sharp = blurred_nuclei()
    restored = evidence.weigh(signal, found(signal.shape, level=4), 1.5 * sharp)
    same = sharp.copy()
    unchanged = evidence.weigh(sharp, found(sharp.shape, level=0, sure=0.95), same)
    assert restored is not None
    assert unchanged is not None
    assert np.array_equal(same, sharp)
    assert (unchanged < restored).all()
    assert unchanged.mean() < restored.mean() / 2


def test_an_expected_error_needs_what_weighs_and_a_joint_engine() -> None:
    content = yaml.safe_load((SHIPPED / "engine.yaml").read_text("utf-8"))
    alone = {key: value for key, value in content.items() if key != "evidence"}
    with pytest.raises(ValidationError, match="add evidence"):
        EngineCard.model_validate(alone)
    for kind in ("classifier", "restorer"):
        with pytest.raises(ValidationError, match=r"cannot have .*expected_error"):
            EngineCard.model_validate(content | {"kind": kind})


def test_labels_that_scatter_speak_against_a_correction() -> None:
    signal, sharp = blurred_nuclei()
    change = sharp - signal
    left = []
    for sure in (0.8, 0.25):
        out = sharp.copy()
        shipped().weigh(signal, found(signal.shape, sure=sure), out)
        left.append(np.vdot(out - signal, change) / np.vdot(change, change))
    assert left[1] < left[0]


def test_background_tiles_and_missing_deviations_have_measures_too() -> None:
    signal, sharp = blurred_nuclei()
    tiles = replace(found(signal.shape), uncertainty_um=None)
    tiles.level[0], tiles.defocus_um[0] = BACKGROUND, np.nan
    measured = measures(
        signal / np.float32(2000), (sharp - signal) / np.float32(2000), tiles, STEP_UM
    )
    assert measured.shape == (MEASURES, 12, 15)
    assert np.isfinite(measured).all()
    assert measured[-1, 0].max() == pytest.approx(1.0)
    assert measured[-1, -1].max() == pytest.approx(0.0)


def narrower(evidence: dict) -> None:  # type: ignore[type-arg]
    evidence["middle"].pop()


def fewer(evidence: dict) -> None:  # type: ignore[type-arg]
    for row in (evidence["middle"], evidence["spread"]):
        row.pop()
    for row in evidence["layers"][0]["weights"]:
        row.pop()


def shorter(evidence: dict) -> None:  # type: ignore[type-arg]
    evidence["layers"][0]["bias"].pop()


def two_answers(evidence: dict) -> None:  # type: ignore[type-arg]
    last = evidence["layers"][-1]
    last["weights"] *= 2
    last["bias"] *= 2


@pytest.mark.parametrize("spoil", [narrower, fewer, shorter, two_answers])
def test_a_function_that_does_not_fit_together_is_refused(
    spoil: Callable[[dict], None],  # type: ignore[type-arg]
) -> None:
    content = yaml.safe_load((SHIPPED / "engine.yaml").read_text("utf-8"))
    for section in ("evidence", "expected_error"):
        spoilt = deepcopy(content)
        spoil(spoilt[section])
        with pytest.raises(ValidationError, match=r"lead from 2[57] measures to one"):
            EngineCard.model_validate(spoilt)


def test_only_what_is_far_is_taken_from_the_frame_of_half_the_size():
    """Tile by tile, at its own place, doubled; the last level stays the last."""
    fine = found((480, 480), level=10)
    coarse = found((240, 240), level=6)
    fine.level[0, 0], fine.defocus_um[0, 0] = 2, 2 * STEP_UM
    fine.level[0, 1], fine.defocus_um[0, 1] = BACKGROUND, np.nan
    fine.level[4, 4], fine.defocus_um[4, 4] = -9, -9 * STEP_UM
    coarse.defocus_um[0, 0] = np.nan
    coarse.defocus_um[3, 3] = -8 * STEP_UM
    coarse.defocus_um[3, 0] = 4 * STEP_UM
    fine.confidence[...], coarse.confidence[...] = 0.5, 0.25
    smooth = np.zeros((480, 480), np.uint16)
    least_um = unsettled_um(fine, smooth, step_um=STEP_UM, farthest=10)
    assert np.isfinite(least_um).sum() == least_um.size - 2
    merged = fine.with_coarser(coarse, least_um, step_um=STEP_UM, farthest=10)
    levels = merged.defocus_um / STEP_UM
    assert levels[0, 0] == 2
    assert merged.level[0, 1] == BACKGROUND
    assert np.isnan(levels[0, 1])
    assert levels[1, 1] == pytest.approx(10), "nothing is seen there at half the size"
    assert levels[4, 4] == pytest.approx(12)
    assert merged.level[4, 4] == 10
    assert levels[8, 8] == pytest.approx(-16)
    assert merged.level[8, 8] == -10
    assert levels[8, 0] == pytest.approx(10), "less far than at full size"
    np.testing.assert_allclose(
        merged.uncertainty_um[4, 4], 2 * coarse.uncertainty_um[1, 1]
    )
    np.testing.assert_array_equal(
        merged.uncertainty_um[0, 0], fine.uncertainty_um[0, 0]
    )
    assert (merged.confidence[0, 0], merged.confidence[4, 4]) == (0.5, 0.25)
    beyond = replace(fine, stated_um=None).with_coarser(
        replace(coarse, stated_um=coarse.uncertainty_um),
        least_um,
        step_um=STEP_UM,
        farthest=30,
    )
    assert (beyond.level[4, 4], beyond.level[8, 8]) == (12, -16)
    assert beyond.stated_um is None
    both = replace(fine, stated_um=fine.uncertainty_um + 1).with_coarser(
        replace(coarse, stated_um=coarse.uncertainty_um + 2),
        least_um,
        step_um=STEP_UM,
        farthest=10,
    )
    assert both.stated_um[0, 0] == fine.uncertainty_um[0, 0] + 1
    assert both.stated_um[4, 4] == 2 * (coarse.uncertainty_um[1, 1] + 2)


def test_noise_that_passes_for_detail_asks_for_half_the_size_and_detail_does_not():
    """At any brightness, in any unit; where only some tiles are noise, those ask."""
    rng = np.random.default_rng(4)
    sharp = 2000 * draw_specimen("nuclei", (192, 240), rng)
    noise = rng.normal(0, 1, sharp.shape)
    calm = found(sharp.shape, level=1)

    def asked(pixels: NDArray[np.generic]) -> NDArray[np.bool_]:
        least_um = unsettled_um(calm, pixels, step_um=STEP_UM, farthest=10)
        noisy = np.isfinite(least_um)
        assert least_um[noisy] == pytest.approx(3 * STEP_UM)
        return noisy

    for gain, offset in ((1.0, 0.0), (0.01, 300.0)):
        clear, dim = (
            offset + gain * light
            for light in (sharp + noise, 0.01 * gaussian_filter(sharp, 3) + 20 * noise)
        )
        assert not asked(clear).any()
        assert asked(dim).all()
        dim[:, :80] = clear[:, :80]
        assert not asked(dim)[:, 0].any()
        assert asked(dim)[:, -1].all()
    assert not asked(np.stack([sharp + noise] * 3, axis=2)).any()
    assert not asked(np.zeros((192, 240), np.uint8)).any()


def test_without_known_sides_defocus_is_a_distance():
    both = found((144, 192), level=3)
    both.level[0, 0], both.defocus_um[0, 0] = -3, -3 * STEP_UM
    both.level[0, 1], both.defocus_um[0, 1] = BACKGROUND, np.nan
    one_sided = both.distances()
    assert not one_sided.grid.signed
    assert np.nanmean(one_sided.defocus_um) == pytest.approx(3 * STEP_UM)
    assert one_sided.level[0].tolist() == [3, BACKGROUND, 3]
