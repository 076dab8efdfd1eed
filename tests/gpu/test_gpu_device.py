"""On a real GPU: the same frames as on the CPU, with every backend at hand.

The bars are those of the project: labels equal on 99.5 % of the tiles, restoration
within a relative 1e-2 (fp16) or 1e-4 (fp32 without TF32).
"""

import numpy as np
import pytest

from rtfocus.channel import Channel
from rtfocus.config import parse_config
from rtfocus.engines.registry import find_engine
from rtfocus.errors import EngineError
from rtfocus.frame import PROTOCOL_VERSION, FrameHeader, Position, SeriesStart, SlotPool
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.device import CpuDevice
from rtfocus.processing.gpu.cuda.driver import (
    CUFFT,
    NVRTC,
    find_device,
    why_no_gpu,
    why_not_loadable,
)
from rtfocus.processing.gpu.device import GpuDevice
from rtfocus.processing.processor import FrameProcessor
from rtfocus.runtimes.gpu import GPU_BACKENDS
from rtfocus.specimens import draw_specimen

pytestmark = pytest.mark.gpu

SHAPE = (512, 640)
FRAMES = 6
LABELS_EQUAL = 0.995


@pytest.fixture(scope="module")
def device():
    """The first GPU; skips where there is none or a library is missing."""
    why = why_no_gpu() or why_not_loadable(NVRTC) or why_not_loadable(CUFFT)
    if why is not None:
        pytest.skip(why)
    return find_device(0)


@pytest.fixture(scope="module")
def optics():
    return find_engine("delpnet").card.optics.reference


@pytest.fixture(scope="module")
def frames(optics):
    """Nuclei at one defocus after the other."""
    rng = np.random.default_rng(3)
    sharp = draw_specimen("nuclei", SHAPE, rng)
    result = []
    for number in range(FRAMES):
        psf = compute_psf(optics, 0.5 + 3.0 * number)
        seen = np.maximum(blur(sharp, psf), 0)
        result.append(rng.poisson(seen * 2500 + 100).astype("<u2"))
    return result


def config_for(optics, **processing):
    described = {
        "numerical_aperture": optics.numerical_aperture,
        "wavelength_nm": optics.wavelength_nm,
        "pixel_size_um": optics.pixel_size_um,
        "aberrations": {"spherical_waves": optics.aberrations.spherical_waves},
    }
    return parse_config(
        {
            "processing": {"precision": "f32"} | processing,
            "store": {"restored_dtype": "float32"},
            "channels": [{"name": "DAPI", "optics": described}],
        }
    )


def on_gpu(config):
    return FrameProcessor(config, [GpuDevice(config)])


def on_cpu(config):
    return FrameProcessor(config, [CpuDevice(config)])


def results_of(processor, frames, optics):
    series = SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid="series",
        name="device",
        started_ns=0,
        shape=SHAPE,
        dtype="<u2",
        sizes={"t": None, "c": 1},
        channels=[Channel("DAPI")],
        positions=[Position("p")],
        pixel_size_um=optics.pixel_size_um,
    )
    header = FrameHeader(
        version=PROTOCOL_VERSION,
        series_uid="series",
        sequence=0,
        shape=SHAPE,
        dtype="<u2",
        captured_ns=1,
        exposure_ms=5.0,
        index={"t": 0, "c": 0},
    )
    pool = SlotPool(len(frames), frames[0].nbytes)
    processor.start(series, len(frames))
    try:
        tickets = []
        for pixels in frames:
            slot = pool.acquire()
            slot.prepare(header)[...] = pixels
            tickets.append(processor.submit(slot))
        found = [ticket.result.result(60) for ticket in tickets]
        return [(r.defocus.level.copy(), r.restored.copy()) for r in found]
    finally:
        processor.close()


def compare(found, wanted):
    """Return the share of equal labels and the relative L2 of all frames."""
    pairs = list(zip(found, wanted, strict=True))
    equal = np.mean([np.mean(a == b) for (a, _), (b, _) in pairs])
    off = np.concatenate([(a - b).ravel() for (_, a), (_, b) in pairs])
    size = np.concatenate([b.ravel() for _, b in wanted])
    return float(equal), float(np.linalg.norm(off) / np.linalg.norm(size))


@pytest.mark.parametrize("backend", [backend.name for backend in GPU_BACKENDS])
@pytest.mark.parametrize(
    ("precision", "restored_within"), [("fp32", 1e-4), ("auto", 1e-2)]
)
def test_labels_and_frames_are_those_of_the_reference(
    device, optics, frames, backend, precision, restored_within
):
    kind = next(b for b in GPU_BACKENDS if b.name == backend)
    if (why := kind.why_unavailable(device)) is not None:
        pytest.skip(why)
    # The ratio is given: the CPU would estimate it region by region.
    restoration = {"method": "wiener", "noise_to_signal": 0.01, "halo_px": 64}
    gpu = {"backend": backend, "precision": precision, "tf32": False}
    config = config_for(optics, restoration=restoration, gpu=gpu)
    reference = config.processing.model_copy(update={"backend": "onnxruntime"})
    cpu = on_cpu(config.model_copy(update={"processing": reference}))
    wanted = results_of(cpu, frames, optics)
    found = results_of(on_gpu(config), frames, optics)
    equal, distance = compare(found, wanted)
    assert equal >= LABELS_EQUAL
    assert distance <= restored_within


@pytest.mark.parametrize("method", ["richardson_lucy", "richardson_lucy_accelerated"])
def test_richardson_lucy_is_that_of_the_cpu(device, optics, frames, method):
    config = config_for(optics, restoration={"method": method, "halo_px": 64})
    wanted = results_of(on_cpu(config), frames[:2], optics)
    found = results_of(on_gpu(config), frames[:2], optics)
    _, distance = compare(found, wanted)
    assert distance <= 1e-2


def test_recorded_graphs_give_the_same_frames(device, optics, frames):
    config = config_for(optics)
    plain = config.processing.gpu.model_copy(update={"cuda_graphs": False})
    processing = config.processing.model_copy(update={"gpu": plain})
    recorded = results_of(on_gpu(config), frames, optics)
    again = results_of(
        on_gpu(config.model_copy(update={"processing": processing})),
        frames,
        optics,
    )
    for (level, restored), (other_level, other) in zip(recorded, again, strict=True):
        np.testing.assert_array_equal(level, other_level)
        np.testing.assert_allclose(restored, other, rtol=1e-5)


def test_a_gpu_that_does_not_exist_is_an_error_not_the_cpu(device, optics):
    del device  # there is one, but not a hundred
    config = config_for(optics, gpu={"index": 99})
    with pytest.raises(EngineError, match="there is no GPU 99"):
        on_gpu(config)
