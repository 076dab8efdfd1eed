"""Kernels around networks, run on the host, against the CPU path."""

import numpy as np
import pytest
from gpu_host_kit import view
from scipy.ndimage import uniform_filter

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.engines.card import (
    EngineCard,
    InputCard,
    OutputCard,
)
from rtfocus.engines.fitted import ErrorCard, Evidence, EvidenceCard
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.classify import Conditions, LabelDecoder, turned
from rtfocus.processing.cpu.depth_variant import blend
from rtfocus.processing.gpu.depth_variant import Blending as GpuBlending
from rtfocus.processing.gpu.depth_variant import InFlight
from rtfocus.processing.gpu.network_restorer import Weighing
from rtfocus.processing.gpu.preparation import Percentiles as GpuPercentiles
from rtfocus.processing.gpu.preparation import TileConditions as GpuConditions
from rtfocus.processing.gpu.preparation import Tiles
from rtfocus.processing.gpu.work import FrameShape
from rtfocus.processing.montage import FrameTiles, Montage, from_planes, to_planes

SHAPE = (150, 210)
GRID = TileGrid(3, 4, 96, 48, 30, signed=True)
LEVELS = np.array([[0, 1, -2, BACKGROUND], [3, 3, 0, 0], [0, 0, -1, 5]], np.int16)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("turn", [1, -1])
def test_labels_are_those_of_the_cpu(work, memory, rng, turn):
    labels = [*range(-3, 4), "bg"]
    decoder = LabelDecoder(OutputCard(name="logits", labels=labels))
    # More tiles than the grid has, as a network on a padded frame gives.
    logits = rng.normal(0, 3, (1, 8, 4, 6)).astype(np.float32)
    empty = rng.random((3, 4)) < 0.2
    wanted = decoder.decode(logits[0, :, :3, :4])
    level, defocus = wanted.level, wanted.defocus
    if turn < 0:
        level, defocus = turned(level, defocus)
    level = np.where(empty, BACKGROUND, level)
    nothing = level == BACKGROUND
    maps = [memory.allocate((3, 4), kind, "map") for kind in "fffh"]
    work.launch(
        "decode_labels",
        12,
        memory.upload(logits, "logits"),
        *(8, 4, 6, 3, 4),
        memory.upload(decoder.levels, "levels"),
        BACKGROUND,
        turn,
        2.2,
        memory.upload(empty.astype(np.uint8), "empty"),
        *maps,
    )
    found = [view(array) for array in maps]
    np.testing.assert_array_equal(found[3], level)
    np.testing.assert_allclose(found[1], wanted.confidence, rtol=1e-5)
    for array, values in ((found[0], defocus), (found[2], wanted.uncertainty)):
        expected = np.where(nothing, np.nan, values * 2.2)
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("colours", [(), (3,)])
@pytest.mark.parametrize("sample_px", [1 << 16, 3000])
def test_percentiles_are_those_of_training(work, memory, rng, colours, sample_px):
    signal = rng.gamma(2, 300, (*SHAPE, *colours)).astype(np.float32)
    rule = PercentileRange(sample_px=sample_px)
    planes = 3 if colours else 1
    ranges = memory.allocate((planes, 2), np.float32, "ranges")
    ours = GpuPercentiles(memory, rule, FrameShape.of(signal.shape), planes)
    ours.enqueue(work, memory.upload(signal, "signal"), ranges)
    wanted = [rule.fit(plane) for plane in to_planes(signal, planes)[0]]
    np.testing.assert_allclose(view(ranges), wanted, rtol=1e-6)


@pytest.mark.parametrize(("colours", "planes"), [((), 1), ((3,), 3), ((), 3)])
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_tiles_are_cut_and_joined_as_on_the_cpu(
    work, memory, rng, colours, planes, dtype
):
    signal = rng.normal(100, 30, (*SHAPE, *colours)).astype(np.float32)
    card = InputCard(name="tiles", channels=planes, tile_px=64, halo_px=8)
    tiles = FrameTiles(card, SHAPE)
    image = to_planes(signal, planes)[0]
    ranges = np.stack([np.arange(planes) + 3.0, np.arange(planes) + 20.0], 1)
    offset, scale = ranges.astype(np.float32).T[:, :, None, None]
    places = list(np.ndindex(*(axis.count for axis in tiles.windows)))
    wanted = tiles.cut((image - offset) / scale, places)
    ours = Tiles(memory, FrameShape.of(signal.shape), planes, tiles.windows)
    assert ours.count == len(places)
    device = memory.allocate(wanted.shape, dtype, "tiles")
    given = memory.upload(ranges.astype(np.float32), "ranges")
    pixels = memory.upload(signal, "signal")
    ours.cut(work, pixels, given, device)
    tolerance = 1e-6 if dtype == "<f4" else 2e-3
    np.testing.assert_allclose(view(device), wanted, rtol=tolerance, atol=tolerance)
    changed = view(device)
    changed *= rng.uniform(0.5, 1.5, (len(places), 1, 1, 1)).astype(dtype)
    joined = tiles.join(changed.astype(np.float32), places) * scale + offset
    out = memory.allocate(signal.shape, np.float32, "out")
    ours.join(work, device, given, out)
    expected = from_planes(
        joined[None] if planes == 3 else joined[:, None], signal.shape
    )
    np.testing.assert_allclose(view(out), expected, rtol=1e-5)


@pytest.mark.parametrize("colours", [(), (3,)])
@pytest.mark.parametrize("window", ["triangular", "rectangular"])
def test_only_tiles_out_of_focus_are_replaced(work, memory, rng, colours, window):
    signal = rng.uniform(0, 100, (*SHAPE, *colours)).astype(np.float32)
    restored = rng.uniform(-20, 100, signal.shape).astype(np.float32)
    montage = Montage(GRID, SHAPE, window)
    wanted = signal.copy()
    blend(signal, restored, montage.restored_share(LEVELS), wanted)
    out = memory.upload(restored, "restored")
    maps = {"level": memory.upload(LEVELS, "levels")}
    frame = InFlight(memory.upload(signal, "signal"), maps, None, out)
    shape = FrameShape.of(signal.shape)
    GpuBlending(memory, montage, shape).defocused(work, frame)
    np.testing.assert_allclose(view(out), wanted, rtol=1e-4, atol=1e-4)
    unchanged = np.isclose(wanted, signal).mean()
    assert 0.05 < unchanged < 0.9


@pytest.mark.parametrize("spherical_waves", [0.0, -0.4, 0.4])
@pytest.mark.parametrize("signed", [True, False])
def test_conditions_of_tiles_are_those_of_the_cpu(
    work, memory, rng, spherical_waves, signed
):
    optics = OpticalSystem(
        numerical_aperture=0.5,
        wavelength_nm=451,
        pixel_size_um=0.65,
        aberrations=Aberrations(spherical_waves=spherical_waves),
    )
    entries = ["sampling", "spherical_waves", "optics_known"]
    entries += ["level", "defocus_levels", "defocus_known"]
    card = EngineCard.model_validate(
        {
            "name": "told",
            "kind": "restorer",
            "implementation": "onnx",
            "files": {"fp32": "model.onnx"},
            "sha256": {"fp32": "0"},
            "input": {"name": "tiles", "tile_px": 64, "halo_px": 8},
            "condition": {"name": "condition", "entries": entries},
            "output": {"name": "restored"},
            "levels": {"step_um": 2.0, "count": 6, "signed": True},
            "normalisation": {"name": "percentile_range"},
            "optics": {
                "sampling_min": 0.1,
                "sampling_max": 2,
                "reference": {
                    "numerical_aperture": 0.5,
                    "wavelength_nm": 451,
                    "pixel_size_um": 0.65,
                },
            },
        }
    )
    conditions = Conditions(card, optics, blind=False, signed=signed)
    tiles = FrameTiles(card.input, SHAPE)
    confidence = rng.uniform(0.2, 1, LEVELS.shape).astype(np.float32)
    defocus = np.where(LEVELS == BACKGROUND, np.nan, LEVELS * 2.1).astype(np.float32)
    found = DefocusMap(GRID, defocus, confidence, LEVELS)
    places = list(np.ndindex(*(axis.count for axis in tiles.windows)))
    wanted = conditions.rows(tiles.defocus_um(found, places))
    out = memory.allocate(wanted.shape, np.float32, "condition")
    maps = {"level": LEVELS, "confidence": confidence, "defocus_um": defocus}
    GpuConditions(memory, conditions, tiles, GRID).enqueue(
        work, {name: memory.upload(array, name) for name, array in maps.items()}, out
    )
    np.testing.assert_allclose(view(out), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lean", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("background", [-5.0, 2.0, 50.0])
def test_a_frame_is_told_the_level_that_the_cpu_tells(
    work, memory, rng, lean, background
):
    decoder = LabelDecoder(OutputCard(name="logits", labels=[*range(-3, 4), "bg"]))
    logits = rng.normal(0, 2, (8, 17, 23)).astype(np.float32)
    logits[:7] += lean * np.arange(-3, 4, dtype=np.float32)[:, None, None] / 3
    logits[7] += background
    wanted = decoder.level_of_frame(logits)
    untold = np.array([[0.5, 0.0, 0.0, 1.0]], np.float32)
    condition = memory.upload(untold, "condition")
    work.launch(
        "tell_level",
        256,
        memory.upload(logits, "logits"),
        *(8, 17 * 23),
        memory.upload(decoder.levels, "levels"),
        BACKGROUND,
        *(1, 2),
        condition,
    )
    assert np.isnan(wanted) == (background == 50)
    told = untold if np.isnan(wanted) else [[0.5, wanted, 1.0, 1.0]]
    np.testing.assert_allclose(view(condition), told, rtol=1e-5)


def drawn_function(rng, measures, bias, hidden=7):
    """Return a small function of a card."""
    return {
        "middle": rng.normal(0, 0.3, measures).tolist(),
        "spread": rng.uniform(0.5, 2, measures).tolist(),
        "layers": [
            {
                "weights": rng.normal(0, 0.5, (hidden, measures)).tolist(),
                "bias": rng.normal(0, 0.5, hidden).tolist(),
            },
            {"weights": rng.normal(0, 1, (1, hidden)).tolist(), "bias": [bias]},
        ],
    }


@pytest.mark.parametrize("colours", [(), (3,)])
@pytest.mark.parametrize("states_error", [True, False])
def test_corrections_are_weighed_as_on_the_cpu(
    work, memory, rng, colours, states_error
):
    card = EvidenceCard(**drawn_function(rng, 25, -1.5))
    error_card = ErrorCard(**drawn_function(rng, 27, -5)) if states_error else None
    shape = (150, 203, *colours)
    signal = uniform_filter(rng.gamma(2, 300, shape), (5, 5, *(0 for _ in colours)))
    signal = signal.astype(np.float32)
    restored = signal + rng.normal(0, 40, shape).astype(np.float32)
    restored[:60] = signal[:60]
    empty = LEVELS == BACKGROUND
    maps = {
        "level": LEVELS,
        "confidence": rng.uniform(0.2, 1, LEVELS.shape).astype(np.float32),
        "defocus_um": np.where(empty, np.nan, LEVELS * 2.1).astype(np.float32),
        "uncertainty_um": np.where(empty, np.nan, 1.3).astype(np.float32),
    }
    evidence = Evidence(card, PercentileRange(), 2.1, error_card)
    wanted = restored.copy()
    expected = evidence.weigh(signal, DefocusMap(GRID, **maps), wanted)
    out = memory.upload(restored, "restored")
    given = {name: memory.upload(array, name) for name, array in maps.items()}
    frame = FrameShape.of(shape)
    weighing = Weighing(memory, evidence, frame=frame, grid=GRID)
    error = memory.upload(np.full(LEVELS.shape, np.nan, np.float32), "error")
    weighing.enqueue(work, memory.upload(signal, "signal"), given, out, error)
    taken = np.abs(wanted - signal).sum() / np.abs(restored - signal).sum()
    assert 0.1 < taken < 0.9
    np.testing.assert_allclose(view(out), wanted, atol=0.02)
    np.testing.assert_array_equal(view(out)[:60], signal[:60])
    if expected is None:
        assert not states_error
        assert np.isnan(view(error)).all()
    else:
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(view(error), expected, rtol=1e-3)
