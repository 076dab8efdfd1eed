"""The kernels' arithmetic, run on the host, against the CPU path on the same frames."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from gpu_host_kit import HostTransforms, HostWork, view

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import CameraConfig, RestorationConfig
from rtfocus.frame import BACKGROUND, TileGrid
from rtfocus.optics.formation import blur
from rtfocus.optics.normalisation import (
    ContrastToNoise,
    LocalStandardisation,
    pad_frame,
)
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.camera import CameraCorrection
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer
from rtfocus.processing.gpu.deconvolution import (
    BlindRichardsonLucyDeconvolution as GpuBlind,
)
from rtfocus.processing.gpu.deconvolution import LevelTransfers
from rtfocus.processing.gpu.deconvolution import (
    RichardsonLucyDeconvolution as GpuRichardsonLucy,
)
from rtfocus.processing.gpu.deconvolution import WienerDeconvolution as GpuWiener
from rtfocus.processing.gpu.depth_variant import (
    DepthVariantRestorer as GpuDepthVariantRestorer,
)
from rtfocus.processing.gpu.depth_variant import InFlight
from rtfocus.processing.gpu.preparation import Background as GpuBackground
from rtfocus.processing.gpu.preparation import FrameCorrection as GpuCorrection
from rtfocus.processing.gpu.preparation import Standardisation as GpuStandardisation
from rtfocus.processing.gpu.work import (
    CellStatistics,
    FrameShape,
    RankSearch,
    neighbours,
    ranks_around,
)
from rtfocus.processing.montage import Montage, pad
from rtfocus.processing.restore import gaussian_like, margin_px, padded_shape
from rtfocus.specimens import draw_specimen

OPTICS = OpticalSystem(numerical_aperture=0.5, wavelength_nm=451, pixel_size_um=0.65)
SHAPE = (200, 260)
PADDED = (216, 264)


@pytest.fixture(scope="module")
def frame():
    """Nuclei in focus on the left, blurred on the right, 16 bit with an offset."""
    rng = np.random.default_rng(4)
    sharp = draw_specimen("nuclei", SHAPE, rng)
    seen = np.where(
        np.arange(SHAPE[1]) < 130, sharp, blur(sharp, compute_psf(OPTICS, 8.0))
    )
    return rng.poisson(np.maximum(seen, 0) * 3000 + 100).astype("<u2")


def relative(found, wanted):
    """Relative L2 distance."""
    wanted = np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<f4"])
@pytest.mark.parametrize("colours", [(), (3,)])
def test_correction_is_that_of_the_cpu(work, memory, tmp_path, dtype, colours):
    import tifffile

    rng = np.random.default_rng(1)
    flat = tmp_path / "flat.tif"
    tifffile.imwrite(flat, rng.uniform(90, 110, (20, 30)).astype(np.float32))
    pixels = rng.integers(0, 256, (20, 30, *colours)).astype(dtype)
    camera = CameraConfig(offset_counts=7, flat_field=flat, saturation_counts=254)
    known = CameraCorrection(camera, pixels.shape, pixels.dtype)
    wanted = np.empty(pixels.shape, np.float32)
    marks = known.to_signal(pixels, wanted)
    ours = GpuCorrection(memory, known, pixels.shape)
    signal = memory.allocate(pixels.shape, np.float32, "signal")
    flags = memory.allocate((2,), np.int32, "flags")
    ours.to_signal(work, memory.upload(pixels, "frame"), signal, flags)
    np.testing.assert_allclose(view(signal), wanted, rtol=3e-7)
    assert marks.flags == (("saturated",) if view(flags)[0] else ())
    out = memory.allocate(pixels.shape, dtype, "counts")
    moved = wanted * np.float32(1.7) - 40
    ours.to_counts(work, memory.upload(moved, "restored"), out, flags)
    counts = np.empty_like(pixels)
    known.to_counts(moved.copy(), counts, None)
    np.testing.assert_array_equal(view(out), counts)
    assert not view(flags)[1]
    for strange in (np.nan, np.inf, -np.inf):
        moved.flat[5] = strange
        ours.to_signal(work, memory.upload(pixels, "frame"), signal, flags)
        ours.to_counts(work, memory.upload(moved, "restored"), out, flags)
        assert view(flags)[1] == 1


@pytest.mark.parametrize("count", [1, 2, 255, 5000])
def test_ranks_are_exact_whatever_the_values(work, memory, count):
    rng = np.random.default_rng(count)
    values = np.round(rng.normal(0, 3, count), 1).astype(np.float32)
    ranks = sorted({0, count // 10, count // 2, count - 1})
    search = RankSearch(memory, ranks)
    for turn in range(2):  # the second search must not see the first
        shifted = values * np.float32(-1) ** turn
        search.enqueue(work, memory.upload(shifted, "values"))
        np.testing.assert_array_equal(view(search.found), np.sort(shifted)[ranks])


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.998, 1.0])
def test_ranks_around_a_quantile_are_numpys(quantile):
    values = np.sort(np.random.default_rng(3).normal(size=57))
    low, high, part = ranks_around(quantile, 57)
    found = values[low] + (values[high] - values[low]) * part
    assert found == pytest.approx(np.quantile(values, quantile))


@pytest.mark.parametrize("threads", [1, 4])
def test_blocks_that_work_together_agree_with_one_thread(host_kernels, memory, threads):
    values = np.random.default_rng(2).normal(5, 2, 700).astype(np.float32)
    work = HostWork(host_kernels, cooperative_threads=threads)
    search = RankSearch(memory, [350, 699])
    search.enqueue(work, memory.upload(values, "values"))
    np.testing.assert_array_equal(view(search.found), np.sort(values)[[350, 699]])
    mean = memory.allocate((1,), np.float64, "mean")
    doubles = memory.upload(values.astype(np.float64), "values")
    work.launch("mean_of", 256, doubles, values.size, mean)
    assert view(mean)[0] == pytest.approx(values.mean(dtype=np.float64), rel=1e-12)


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_standardisation_is_that_of_training(work, memory, frame, dtype):
    signal = frame.astype(np.float32)
    rule = LocalStandardisation()
    wanted = rule.apply(pad(signal, PADDED, 0, "symmetric"))
    cells = CellStatistics(memory, FrameShape.of(SHAPE), PADDED)
    device = memory.upload(signal, "signal")
    out = memory.allocate((1, 1, *PADDED), dtype, "input")
    cells.enqueue(work, device)
    GpuStandardisation(memory, rule, cells).enqueue(work, device, out)
    limit = 1e-6 if dtype == "<f4" else 1e-3
    assert relative(view(out)[0, 0].astype(np.float64), wanted) < limit


def test_constant_frames_become_zero(work, memory):
    signal = memory.upload(np.full(SHAPE, 65535, np.float32), "signal")
    cells = CellStatistics(memory, FrameShape.of(SHAPE), PADDED)
    out = memory.allocate((1, 1, *PADDED), np.float32, "input")
    cells.enqueue(work, signal)
    GpuStandardisation(memory, LocalStandardisation(), cells).enqueue(work, signal, out)
    np.testing.assert_array_equal(view(out), 0)


@pytest.mark.parametrize("padded_to", [PADDED, (224, 280), (202, 261)])
@pytest.mark.parametrize("quantum", [1.0, 0.0])
def test_background_is_that_of_the_cpu(work, memory, frame, quantum, padded_to):
    signal = frame.astype(np.float32)
    signal[:, :110] = 100 + np.random.default_rng(0).normal(0, 10, (200, 110))
    padded = pad(signal, padded_to, 0, "symmetric")
    span = float(padded.max() - padded.min())
    rule = ContrastToNoise(quantum=quantum or 1e-4 * span)
    wanted = rule.tiles(padded, tile_px=96, stride_px=48)
    grid = TileGrid(*wanted.shape, 96, 48, 47.5, signed=False)
    cells = CellStatistics(memory, FrameShape.of(SHAPE), padded_to)
    empty = memory.allocate(wanted.shape, np.uint8, "empty tiles")
    cells.enqueue(work, memory.upload(signal, "signal"))
    GpuBackground(memory, rule, cells, grid, quantum).enqueue(work, empty)
    assert 0 < wanted.sum() < wanted.size
    np.testing.assert_array_equal(view(empty), wanted)
    by_cell = pad_frame(padded, 12).reshape(cells.rows, 12, cells.columns, 12)
    means = by_cell.mean(axis=(1, 3), dtype=np.float64).ravel()
    np.testing.assert_allclose(view(cells.mean), means, rtol=1e-6)


NONE = BACKGROUND
GRID = TileGrid(4, 5, 96, 48, 36, signed=False)
LABELS = np.array(
    [[NONE, 0, 1, 2, 3], [1, 1, 1, 2, 3], [0, 2, 3, 3, 1], [NONE, NONE, 2, 1, 0]],
    np.int16,
)


def restore_both(
    work, memory, signal, window, psfs, make, settings, *, starts=None, gain=None
):
    """Return what the GPU path and the CPU path make of a signal."""
    montage = Montage(GRID, SHAPE, window)
    margins = {level: margin_px(psf, None) for level, psf in psfs.items()}
    whole = {level: padded_shape(SHAPE, px) for level, px in margins.items()}
    restorer = GpuDepthVariantRestorer(
        memory,
        make(LevelTransfers(memory, HostTransforms(), starts or psfs, whole), settings),
        montage,
        frame=FrameShape.of(signal.shape),
        margins_px=margins,
    )
    out = memory.allocate(signal.shape, np.float32, "out")
    maps = {"level": memory.upload(LABELS, "labels")}
    given = InFlight(memory.upload(signal, "signal"), maps, None, out)
    # What a frame leaves behind must not be seen in the next: whole frames first.
    for labels in (None, LABELS):
        work.copy(given.out, given.signal)
        for piece in restorer.pieces(labels):
            restorer.enqueue(work, given, piece)
    cpu = DepthVariantRestorer(
        montage, psfs, settings, quantum=1.0, gain_e_per_count=gain
    )
    return view(out), cpu.restore(signal, LABELS, np.empty_like(signal))


@pytest.fixture(scope="module")
def psfs():
    """Three levels, the last one of optics that are not point-symmetric."""
    tilted = replace(OPTICS, aberrations=Aberrations(coma_x_waves=0.2))
    systems = {1: OPTICS, 2: OPTICS, 3: tilted}
    return {
        level: compute_psf(optics, 2.0 * level) for level, optics in systems.items()
    }


@pytest.mark.parametrize("window", ["triangular", "rectangular"])
@pytest.mark.parametrize(
    "options", [{}, {"noise_to_signal": 0.02}, {"gain_e_per_count": 0.3}]
)
def test_wiener_is_that_of_the_cpu(work, memory, frame, psfs, window, options):
    signal = frame.astype(np.float32) - 100
    gain = options.get("gain_e_per_count")
    settings = RestorationConfig(noise_to_signal=options.get("noise_to_signal"))
    found, wanted = restore_both(
        work,
        memory,
        signal,
        window,
        psfs,
        partial(GpuWiener, quantum=1.0, gain_e_per_count=gain),
        settings,
        gain=gain,
    )
    assert relative(wanted, signal) > 0.01
    assert relative(found, wanted) < 1e-4


@pytest.mark.parametrize("method", ["richardson_lucy", "richardson_lucy_accelerated"])
def test_richardson_lucy_is_that_of_the_cpu(work, memory, frame, psfs, method):
    signal = np.stack([frame, frame[::-1] // 2, frame], -1).astype(np.float32) - 100
    found, wanted = restore_both(
        work,
        memory,
        signal,
        "triangular",
        psfs,
        GpuRichardsonLucy,
        RestorationConfig(method=method),
    )
    assert relative(wanted, signal) > 0.01
    assert relative(found, wanted) < 1e-4


def test_blind_richardson_lucy_is_that_of_the_cpu(work, memory, frame, psfs):
    signal = frame.astype(np.float32) - 100
    found, wanted = restore_both(
        work,
        memory,
        signal,
        "triangular",
        psfs,
        GpuBlind,
        RestorationConfig(method="richardson_lucy_blind", iterations=4),
        starts={level: gaussian_like(psf) for level, psf in psfs.items()},
    )
    assert relative(wanted, signal) > 0.01
    assert relative(found, wanted) < 1e-4


@pytest.mark.parametrize("window", ["triangular", "rectangular"])
@pytest.mark.parametrize("rows", [1, 4])
def test_two_tiles_per_axis_tell_all_weights(window, rows):
    montage = Montage(TileGrid(rows, 5, 96, 48, 36, signed=False), SHAPE, window)
    weights, _ = montage.axes
    table = neighbours(weights, montage.step)
    first, second, share = (table[name] for name in ("first", "second", "share"))
    rebuilt = np.zeros((rows, SHAPE[0]), np.float32)
    pixels = np.arange(SHAPE[0])
    np.add.at(rebuilt, (first, pixels), 1 - share)
    np.add.at(rebuilt, (second, pixels), share)
    np.testing.assert_allclose(rebuilt[:: montage.step], weights, atol=1e-6)
