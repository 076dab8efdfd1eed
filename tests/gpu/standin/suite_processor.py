"""What only the GPU processor promises, on the stand-in driver.

Run by ``tests/gpu/test_gpu_standin.py``, which loads the stand-in first.
"""

import ctypes
import gc
import json
import threading
from collections import Counter
from contextlib import closing

import foreign_kit
import numpy as np
import pytest
import tifffile
from engine_kit import (
    write_brightness_joint,
    write_shift_restorer,
    write_smooth_restorer,
)
from gpu_standin_kit import HostContext, HostEngine

from rtfocus.app import run
from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config import parse_config
from rtfocus.errors import EngineError
from rtfocus.frame import (
    BACKGROUND,
    PROTOCOL_VERSION,
    FrameHeader,
    Position,
    SeriesStart,
    SlotPool,
)
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.device import CpuDevice
from rtfocus.processing.gpu.cuda.driver import LostGpuError, current_context
from rtfocus.processing.gpu.cuda.stream import (
    CudaStream,
    LoadedKernels,
    PinnedMemory,
    Replayed,
    new_event,
)
from rtfocus.processing.gpu.depth_variant import DepthVariantRestorer
from rtfocus.processing.gpu.device import GpuDevice
from rtfocus.processing.processor import FrameProcessor, open_processor
from rtfocus.processing.restore import METHODS
from rtfocus.sharing.admission import add_model
from rtfocus.specimens import draw_specimen

SHAPE = (144, 192)
SLOTS = 6
TIMEOUT_S = 120
OPTICS = {"numerical_aperture": 0.5, "wavelength_nm": 451, "pixel_size_um": 0.65}


def config_for(
    engine_folder, *, method="wiener", device="gpu", classifier="sharpness", **gpu
):
    return parse_config(
        {
            "processing": {
                "classifier": classifier,
                "engine_folders": [str(engine_folder)],
                "precision": "f32",
                "threads": 1,
                "device": device,
                # A small halo keeps the stand-in's slow transforms small.
                "restoration": {"method": method, "halo_px": 8, "iterations": 2},
                "gpu": gpu,
            },
            "channels": [{"name": "DAPI", "optics": OPTICS}],
        }
    )


SERIES = SeriesStart(
    version=PROTOCOL_VERSION,
    series_uid="series",
    name="stand-in",
    started_ns=0,
    shape=SHAPE,
    dtype="<u2",
    sizes={"t": None, "c": 1},
    channels=[Channel("DAPI")],
    positions=[Position("p")],
    pixel_size_um=0.65,
)


@pytest.fixture(scope="module")
def frames():
    """Nuclei, in focus on the left and ever more blurred on the right."""
    rng = np.random.default_rng(7)
    sharp = draw_specimen("nuclei", SHAPE, rng)
    system = OpticalSystem(**OPTICS)
    left = np.arange(SHAPE[1]) < 70
    result = []
    for number in range(8):
        blurred = blur(sharp, compute_psf(system, 3.0 + 2 * number))
        seen = np.roll(np.where(left, sharp, blurred), 9 * number, axis=0)
        result.append(rng.poisson(np.maximum(seen, 0) * 3000 + 50))
    return result


def on_gpu(config):
    return FrameProcessor(config, [GpuDevice(config)])


def on_gpus(config):
    gpus = config.processing.gpu.index
    together = tuple(GpuDevice(config, index=index) for index in gpus)
    return FrameProcessor(config, [together])


def on_cpu(config):
    return FrameProcessor(config, [CpuDevice(config)])


def submit(processor, pool, sequence, pixels):
    slot = pool.acquire(timeout_s=10)
    header = FrameHeader(
        version=PROTOCOL_VERSION,
        series_uid="series",
        sequence=sequence,
        shape=SHAPE,
        dtype="<u2",
        captured_ns=1,
        exposure_ms=5.0,
        index={"t": sequence, "c": 0},
    )
    slot.prepare(header)[...] = pixels
    return processor.submit(slot)


def results_of(processor, frames, used=None, started=None):
    """Return level map and restored frame of every frame, six in flight.

    `used` gets the device of each, `started` is called before the first.
    """
    pool = SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])
    processor.start(SERIES, SLOTS)
    if started is not None:
        started()
    waiting, found = [], []

    def take():
        ticket = waiting.pop(0)
        result = ticket.result.result(TIMEOUT_S)
        found.append((result.defocus.level, result.restored.copy()))
        if used is not None:
            used.append(result.device)
        pool.release(ticket.slot)

    for sequence, pixels in enumerate(frames):
        if len(waiting) == SLOTS:
            take()
        waiting.append(submit(processor, pool, sequence, pixels))
    while waiting:
        take()
    processor.close()
    return found


@pytest.fixture(scope="module")
def reference(engine_folder, frames):
    return results_of(on_cpu(config_for(engine_folder)), frames)


@pytest.mark.parametrize("frames_in_flight", [1, 3])
def test_frames_in_flight_are_those_of_the_cpu(
    engine_folder, frames, reference, frames_in_flight
):
    config = config_for(engine_folder, frames_in_flight=frames_in_flight)
    found = results_of(on_gpu(config), frames)
    assert max(level.max() for level, _ in reference) > 2
    for (level, restored), (wanted_level, wanted) in zip(found, reference, strict=True):
        np.testing.assert_array_equal(level, wanted_level)
        # Rounding to counts may fall to either side.
        assert np.abs(restored.astype(int) - wanted).max() <= 1


def test_copies_in_and_estimates_run_ahead_of_restorations(
    driver, engine_folder, frames
):
    driver.standin_log()
    results_of(on_gpu(config_for(engine_folder, frames_in_flight=3)), frames)
    done = driver.standin_log().decode().split()
    size = {"in": 0, "maps": 0, "out": 0}
    copied_ahead = estimated_ahead = 0
    streams = sorted({line for line in done if line.startswith("D2H@")})
    assert len(streams) == 2  # maps and frames leave on streams of their own
    maps_out, frames_out = sorted(streams, key=lambda s: int(s.partition("@")[2]))
    for line in done:
        size["in"] += line.startswith("H2D@")
        size["maps"] += line == maps_out
        # Of each two copies: the restored frame, and whether all of it is numbers.
        size["out"] += (line == frames_out) / 2
        copied_ahead = max(copied_ahead, size["in"] - size["out"])
        estimated_ahead = max(estimated_ahead, size["maps"] - size["out"])
    assert set(size.values()) == {len(frames)}
    assert copied_ahead == 3
    assert estimated_ahead >= 2


def test_recorded_work_gives_the_same_frames(driver, engine_folder, frames):
    driver.standin_log()
    recorded = results_of(on_gpu(config_for(engine_folder)), frames[:4])
    replays = driver.standin_log().decode().count("graph@")
    plain = results_of(on_gpu(config_for(engine_folder, cuda_graphs=False)), frames[:4])
    assert replays >= 2 * 4
    assert "graph@" not in driver.standin_log().decode()
    for (level, restored), (wanted_level, wanted) in zip(recorded, plain, strict=True):
        np.testing.assert_array_equal(level, wanted_level)
        np.testing.assert_array_equal(restored, wanted)


def test_a_network_that_cannot_be_recorded_runs_as_it_is(
    driver, engine_folder, frames, reference, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setattr(
        HostContext, "why_not_capturable", lambda self, stream: "it needs the host"
    )
    driver.standin_log()
    found = results_of(on_gpu(config_for(engine_folder)), frames[:2])
    assert "classification of channel 'DAPI' runs without a CUDA graph: it needs" in (
        caplog.text
    )
    # The restoration has no network and is still recorded.
    assert "graph@" in driver.standin_log().decode()
    np.testing.assert_array_equal(found[1][0], reference[1][0])


def test_a_recording_that_fails_is_given_up_for_good(caplog):
    caplog.set_level("INFO")
    with current_context(0):
        assert replay_what_cannot_be_recorded(3) == (False, 4)
    assert "work runs without a CUDA graph" in caplog.text


def replay_what_cannot_be_recorded(times):
    """Return whether it was recorded, and how often it was enqueued."""
    stream, event = CudaStream(LoadedKernels(b"kernels")), new_event()
    runs = []

    def record_an_event(work):
        runs.append("run")
        work.record(event)

    replayed = Replayed("work", record_an_event, lambda work: None)
    for _ in range(times):
        replayed(stream)
    stream.synchronise()
    recorded = replayed.is_recorded
    replayed.close()
    return recorded, len(runs)


@pytest.mark.parametrize("method", ["richardson_lucy", "richardson_lucy_accelerated"])
def test_richardson_lucy_is_that_of_the_cpu(engine_folder, frames, method):
    config = config_for(engine_folder, method=method)
    found = results_of(on_gpu(config), frames[:2])
    reference = results_of(on_cpu(config), frames[:2])
    for (_, restored), (_, wanted) in zip(found, reference, strict=True):
        assert np.abs(restored.astype(int) - wanted).max() <= 1


@pytest.fixture
def enqueued(monkeypatch):
    """Parts of restorations by levels: looked at, restored, and of odd rectangles."""
    looks, restored, odd = [], [], []
    original = DepthVariantRestorer.enqueue

    def spy(self, work, frame, part):
        # A rectangle is looked at, then restored level by level.
        (restored if part.level else looks).append(part)
        if part.level and not self.recurs(part):
            odd.append(part)
        original(self, work, frame, part)

    monkeypatch.setattr(DepthVariantRestorer, "enqueue", spy)
    return looks, restored, odd


LOOK = ("surround", "light_parts", "light")
NOISE = ("diagonal_power", "rank_begin", *4 * ("rank_count", "rank_narrow"))
LAUNCHES = {
    # Method: of a rectangle, and of each of its levels, with two iterations.
    "wiener": (
        (*LOOK, *NOISE, "below_parts", "library"),
        ("band_parts", "wiener_ratio", "wiener_apply", "library", "blend_level"),
    ),
    "richardson_lucy_accelerated": (
        LOOK,
        (
            *4 * ("project", "library", "library"),
            *2 * ("richardson_lucy_ratio", "richardson_lucy_update"),
            "blend_level",
        ),
    ),
}


@pytest.mark.parametrize("method", LAUNCHES)
def test_a_frame_costs_the_launches_of_its_levels(
    driver, engine_folder, frames, enqueued, method
):
    config = config_for(
        engine_folder, method=method, cuda_graphs=False, frames_in_flight=1
    )
    pool = SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])

    def launches(sequence, pixels):
        for found in enqueued:
            found.clear()
        driver.standin_log()
        submit(processor, pool, sequence, pixels).result.result(TIMEOUT_S)
        done = driver.standin_log().decode().split()
        return Counter(line.partition("@")[0] for line in done)

    both = np.where(np.arange(SHAPE[1]) < SHAPE[1] // 2, frames[0], frames[-1])
    levels = 0
    with closing(on_gpu(config)) as processor:
        processor.start(SERIES, SLOTS)
        empty = launches(0, np.full(SHAPE, 50))
        for sequence, pixels in enumerate((frames[0], both, frames[-1]), 1):
            every = launches(sequence, pixels)
            assert every - empty == wanted_launches(method, *enqueued)
            assert not empty - every
            levels = max(levels, len(enqueued[1]))
    assert levels > 1


def wanted_launches(method, looks, restored, odd):
    """Return the launches of so many parts; odd ones transform their PSF too."""
    of_look, of_level = LAUNCHES[method]
    counts = (looks, of_look), (restored, of_level), (odd, ("place_psf", "library"))
    wanted = Counter()
    for parts, names in counts:
        for name in names:
            wanted[name] += len(parts)
    return wanted


def test_levels_that_no_tile_has_cost_no_transform(
    driver, engine_folder, frames, enqueued
):
    looks, restored, odd = enqueued
    config = config_for(engine_folder, cuda_graphs=False, frames_in_flight=1)
    processor = on_gpu(config)
    driver.standin_log()
    processor.start(SERIES, SLOTS)
    every = {part.level for part in restored}
    # Every PSF once; then the frame once for all levels, and each of them back.
    assert len(every) > 2
    assert len(looks) * len(every) == len(restored)
    transforms = driver.standin_log().decode().count("library@")
    assert transforms == len(every) + len(looks) + len(restored)
    looks.clear()
    restored.clear()
    pool = SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])
    blank = np.full(SHAPE, 50)
    result = submit(processor, pool, 0, blank).result.result(TIMEOUT_S)
    np.testing.assert_array_equal(result.restored, blank)
    assert restored == looks == []
    assert driver.standin_log().decode().count("library@") == 0
    result = submit(processor, pool, 1, frames[0]).result.result(TIMEOUT_S)
    levels = set(result.defocus.level.ravel().tolist())
    found = sorted(part.level for part in restored)
    assert found == sorted(levels - {0, BACKGROUND})
    assert set(found) < every
    transforms = driver.standin_log().decode().count("library@")
    # Of other rectangles than the frame the PSF is transformed too.
    assert transforms == len(looks) + len(restored) + len(odd)
    processor.close()


@pytest.fixture(scope="module")
def networks(engine_folder):
    """The session's engine folder with restorers and a joint engine in it."""
    write_smooth_restorer(engine_folder / "smooth")
    write_smooth_restorer(engine_folder / "anywhere", any_size=True)
    write_brightness_joint(engine_folder / "joint")
    for last in ("level", "defocus_levels"):
        entries = ("defocus_known", last)
        write_shift_restorer(engine_folder / f"by_{last}", entries=entries)
    return engine_folder


@pytest.mark.parametrize(
    "names",
    [
        ("sharpness", "smooth"),
        ("sharpness", "by_level"),
        ("joint", "by_defocus_levels"),
        ("joint", "joint"),
    ],
    ids="-".join,
)
def test_networks_restore_as_on_the_cpu(driver, networks, frames, names):
    # Several batches, the last of which is not full.
    config = config_for(
        networks, classifier=names[0], method=names[1], tiles_per_batch=5
    )
    found = results_of(on_gpu(config), frames[:3], started=driver.standin_log)
    launched = Counter(
        line.partition("@")[0] for line in driver.standin_log().decode().split()
    )
    # Of a frame: classification and restoration are a recording each, whatever the
    # batches; beside them only the way back to counts. To the host come the maps, the
    # restored frame, and whether all of it is numbers.
    assert launched["graph"] == 2 * 3
    assert launched["to_counts"] == 3
    assert launched["H2D"] == 3
    assert launched["D2H"] == 3 * 3
    assert not set(launched) - {"graph", "to_counts", "H2D", "D2H", "record", "wait"}
    reference = results_of(on_cpu(config), frames[:3])
    for (level, restored), (wanted_level, wanted) in zip(found, reference, strict=True):
        np.testing.assert_array_equal(level, wanted_level)
        # Rounding to counts may fall to either side.
        assert np.abs(restored.astype(int) - wanted).max() <= 1
    assert any(
        np.any(wanted != frame)
        for (_, wanted), frame in zip(reference, frames, strict=False)
    )


@pytest.fixture
def seen(monkeypatch):
    """Shapes of the tiles that networks are bound to."""
    shapes = set()
    original = HostContext.bind

    def spy(self, buffers, input_shapes, **options):
        shapes.add(input_shapes["tiles"])
        original(self, buffers, input_shapes, **options)

    monkeypatch.setattr(HostContext, "bind", spy)
    return shapes


WHOLE = (1, 1, SHAPE[0] + 16, SHAPE[1] + 16)


@pytest.mark.parametrize("memory_mb", [None, 40], ids=["roomy", "small"])
def test_a_frame_is_restored_as_one_tile_where_the_memory_holds_it(
    networks, frames, seen, monkeypatch, memory_mb
):
    config = config_for(networks, method="anywhere")
    if memory_mb is not None:
        monkeypatch.setenv("RTFOCUS_STANDIN_MEMORY", str(memory_mb * 10**6))
    found = results_of(on_gpu(config), frames[:2])
    # Of a small card two tiles of 64 x 64 px at once.
    assert {shape for shape in seen if shape[2:] != SHAPE} == (
        {WHOLE} if memory_mb is None else {(2, 1, 64, 64)}
    )
    reference = results_of(on_cpu(config), frames[:2])
    for (_, restored), (_, wanted) in zip(found, reference, strict=True):
        assert np.abs(restored.astype(int) - wanted).max() <= 1


def test_a_network_that_wants_more_memory_than_is_free_sees_less(
    networks, frames, seen, monkeypatch, caplog
):
    # It wants what is not free for as much as the memory of the card suggests.
    monkeypatch.setattr(HostEngine, "context_bytes", property(wanted_bytes))
    config = config_for(networks, method="by_level")
    found = results_of(on_gpu(config), frames[:2])
    assert "engine 'by_level' wants" in caplog.text
    assert {shape[0] for shape in seen if shape[2:] == (64, 64)} == {3}
    monkeypatch.undo()
    for (_, restored), (_, wanted) in zip(
        found, results_of(on_cpu(config), frames[:2]), strict=True
    ):
        assert np.abs(restored.astype(int) - wanted).max() <= 1


def wanted_bytes(engine):
    """Return 400 MB for each of a frame's 12 tiles: a quarter fits in 2 of 4 GB."""
    return 4 * 10**8 * engine.inputs["tiles"].largest[0]


def test_a_restorer_given_as_a_folder_is_reported_by_its_name(networks):
    by_folder = config_for(networks, method=str(networks / "smooth"))
    found = []
    for processor in (on_gpu(by_folder), on_cpu(by_folder)):
        processor.start(SERIES, 2)
        found.append(set(processor.backends()))
        processor.close()
    assert found[0] == found[1] == {"sharpness", "smooth"}


def test_lack_of_memory_means_fewer_frames_in_flight(
    driver, engine_folder, frames, monkeypatch, caplog
):
    peaks = []
    for count in (1, 4):
        driver.standin_peak()
        config = config_for(engine_folder, frames_in_flight=count)
        reference = results_of(on_gpu(config), frames[:3])
        peaks.append(driver.standin_peak())
    monkeypatch.setenv("RTFOCUS_STANDIN_MEMORY", str(sum(peaks) // 2))
    found = results_of(on_gpu(config), frames[:3])
    assert "2 frames in flight instead of 4: GPU 0: " in caplog.text
    assert "lower processing.gpu.frames_in_flight" in caplog.text
    for (_, restored), (_, wanted) in zip(found, reference, strict=True):
        np.testing.assert_array_equal(restored, wanted)
    strict = config_for(engine_folder, on_lack_of_memory="error")
    with pytest.raises(EngineError, match=r"needs .* MB.*frames_in_flight"):
        on_gpu(strict).start(SERIES, SLOTS)
    monkeypatch.setenv("RTFOCUS_STANDIN_MEMORY", "1000000")
    with pytest.raises(EngineError, match=r"needs .* MB"):
        on_gpu(config).start(SERIES, SLOTS)


KINDS = [
    ("sharpness", "wiener"),
    ("sharpness", "by_level"),
    ("joint", "joint"),
]


@pytest.mark.parametrize("names", KINDS, ids="-".join)
def test_starts_and_closes_leave_nothing(driver, networks, names):
    config = config_for(networks, classifier=names[0], method=names[1])
    before = driver.standin_live()
    # The stand-in's transforms are slow, its networks are not.
    for _ in range(2 if names[1] in METHODS else 6):
        processor = on_gpu(config)
        for _ in range(2):
            processor.start(SERIES, SLOTS)
        assert driver.standin_live() > before
        processor.close()
        assert driver.standin_live() == before


@pytest.mark.parametrize("names", KINDS, ids="-".join)
def test_a_start_that_fails_halfway_leaves_nothing(driver, networks, names):
    # Two frames in flight: also the second may find no memory.
    config = config_for(
        networks,
        classifier=names[0],
        method=names[1],
        on_lack_of_memory="error",
        frames_in_flight=2,
    )
    before, failed = driver.standin_live(), 0
    # PyCUDA collects garbage before it says that there is no memory: not of all else.
    gc.collect()
    gc.freeze()
    for number in range(1, 200):
        driver.standin_refuse_memory(ctypes.c_long(number))
        processor = on_gpu(config)
        try:
            processor.start(SERIES, SLOTS)
        except EngineError:
            failed += 1
            assert driver.standin_live() == before, number
            continue
        finally:
            driver.standin_refuse_memory(ctypes.c_long(-1))
            processor.close()
        break
    gc.unfreeze()
    assert 5 < failed < 199


def test_a_gpu_too_full_for_a_context_is_refused_or_left_to_the_cpu(
    engine_folder, frames, monkeypatch, caplog
):
    monkeypatch.setenv("RTFOCUS_STANDIN_MEMORY", "0")
    demanded = on_gpu(config_for(engine_folder))
    with pytest.raises(EngineError, match="GPU 0 has no memory left for opening a"):
        demanded.start(SERIES, SLOTS)
    automatic = open_processor(config_for(engine_folder, device="auto"))
    assert len(results_of(automatic, frames[:1])) == 1
    assert "this series is processed on the CPU: GPU 0" in caplog.text


def test_a_lost_gpu_fails_its_frames_and_refuses_more(driver, engine_folder, frames):
    processor = on_gpu(config_for(engine_folder, frames_in_flight=2))
    pool = SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])
    processor.start(SERIES, SLOTS)
    first = submit(processor, pool, 0, frames[0])
    assert first.result.result(TIMEOUT_S).restored is not None
    lose(driver, 0, steps=3)
    later = [submit(processor, pool, 1, frames[1])]
    try:
        with pytest.raises(EngineError, match=r"frame 1 .*GPU 0 failed while"):
            later[0].result.result(TIMEOUT_S)
        with pytest.raises(LostGpuError, match="illegal memory access"):
            submit(processor, pool, 2, frames[2])
    finally:
        processor.close()
        driver.standin_recover()


def lose(driver, device, *, steps):
    """Let a device fail after some more steps."""
    driver.standin_lose_after(device, ctypes.c_long(steps), 700)


def sharing(networks, gpus):
    """Return a config for GPUs that share the frames, without slow transforms."""
    return config_for(
        networks, classifier="joint", method="joint", index=gpus, frames_in_flight=2
    )


def test_a_lost_gpus_frames_are_done_by_the_others(driver, networks, frames, caplog):
    config = sharing(networks, [1, 0])
    wanted = results_of(on_gpus(config), frames)
    processor = on_gpus(config)
    pool = SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])
    processor.start(SERIES, SLOTS)
    lose(driver, 1, steps=3)
    tickets = [submit(processor, pool, n, frames[n]) for n in range(SLOTS)]
    try:
        found = [ticket.result.result(TIMEOUT_S) for ticket in tickets]
        for ticket, result, (level, restored) in zip(
            tickets, found, wanted, strict=False
        ):
            np.testing.assert_array_equal(ticket.estimate.result()[1].level, level)
            np.testing.assert_array_equal(result.restored, restored)
        assert {result.device for result in found} <= {"GPU 0", "GPU 1"}
        assert found[-1].device == "GPU 0"
        (told,) = processor.lost()
        assert "GPU 1 failed while" in told
        assert f"{told}; the other devices do its frames" in caplog.text
        lose(driver, 0, steps=1)
        pool.release(tickets[0].slot)
        last = submit(processor, pool, SLOTS, frames[0])
        with pytest.raises(EngineError, match=r"frame 6 .*GPU 0 failed while"):
            last.result.result(TIMEOUT_S)
        pool.release(last.slot)
        with pytest.raises(LostGpuError, match=r"GPU 1 failed.*; .*GPU 0 failed"):
            submit(processor, pool, 7, frames[0])
    finally:
        processor.close()
        driver.standin_recover()


@pytest.mark.parametrize("gpus", [2, 4])
def test_the_frames_of_a_series_are_spread_over_gpus(
    networks, frames, monkeypatch, caplog, gpus
):
    monkeypatch.setenv("RTFOCUS_STANDIN_DEVICES", str(gpus))
    one = results_of(on_gpus(sharing(networks, [0])), frames)
    used = []
    processor = on_gpus(sharing(networks, list(range(gpus))))
    several = results_of(processor, frames, used)
    assert set(used) == {f"GPU {index}" for index in range(gpus)}
    # Slots are pinned once, for all GPUs.
    assert "cannot be pinned" not in caplog.text
    for (level, restored), (wanted_level, wanted) in zip(several, one, strict=True):
        np.testing.assert_array_equal(level, wanted_level)
        np.testing.assert_array_equal(restored, wanted)


def test_gpus_that_cannot_all_be_had_are_refused_together(
    driver, networks, monkeypatch
):
    monkeypatch.setenv("RTFOCUS_STANDIN_DEVICES", "3")
    before = driver.standin_live()
    both = sharing(networks, [0, 2])
    driver.standin_refuse_context(2, 46, 0)
    processor = on_gpus(both)
    try:
        with pytest.raises(EngineError, match=r"GPU 2 gives no context.*busy.*-i 2 -c"):
            processor.start(SERIES, SLOTS)
    finally:
        driver.standin_recover()
    assert driver.standin_live() == before
    processor.start(SERIES, SLOTS)
    on_both = "host fp32 on GPU 0 (stand-in); host fp32 on GPU 2 (stand-in)"
    assert processor.backends() == {"joint": on_both}
    processor.close()
    # One slot needs one GPU: the other stays as it is.
    processor.start(SERIES, 1)
    assert processor.backends() == {"joint": "host fp32 on GPU 0 (stand-in)"}
    processor.close()
    with pytest.raises(EngineError, match=r"no GPU 3; there are: 0 .*, 1 .*, 2 "):
        open_processor(sharing(networks, [0, 3]))


def test_a_gpu_that_some_thread_cannot_enter_keeps_nobody_waiting(
    driver, networks, frames
):
    processor = on_gpus(sharing(networks, [0, 1]))
    pool = SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])
    # The thread that owns it has its context, those that wait for frames get none.
    driver.standin_refuse_context(1, 46, 1)
    try:
        processor.start(SERIES, SLOTS)
        tickets = [submit(processor, pool, n, frames[n]) for n in range(4)]
        found = [ticket.result.result(TIMEOUT_S) for ticket in tickets]
        assert {result.device for result in found} == {"GPU 0"}
    finally:
        processor.close()
        driver.standin_recover()


def test_a_run_goes_on_without_a_lost_gpu_and_its_report_says_so(
    driver, networks, frames, tmp_path
):
    config = sharing(networks, [0, 1])
    before = driver.standin_executed(1)
    processor = on_gpus(config)
    processor.start(SERIES, config.transport.slots)
    steps_of_a_start = driver.standin_executed(1) - before
    processor.close()
    images = np.stack(frames).astype("<u2")
    tifffile.imwrite(tmp_path / "played.tif", images, photometric="minisblack")
    source = {"source": "replay", "path": str(tmp_path / "played.tif")}
    settings = config.model_dump(mode="json") | {
        "microscope": source | {"pixel_size_um": 0.65, "repeats": 2},
        "channels": [{"name": "default", "optics": OPTICS}],
        "run": {"folder": str(tmp_path)},
    }
    lose(driver, 1, steps=steps_of_a_start + 2)
    never = threading.Event()
    try:
        folder = run(parse_config(settings), stop=never, abandon=never)
    finally:
        driver.standin_recover()
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["devices"] == {"GPU 0": 16}
    assert report["accounting"]["written"] == 16
    assert report["accounting"]["in_error"] == {}
    assert sum("GPU 1 failed while" in said for said in report["warnings"]) == 1
    page = (folder / "report.html").read_text("utf-8")
    assert "GPU 1 failed while" in page


def test_two_gpus_work_side_by_side(engine_folder, frames, reference):
    processors = [on_gpu(config_for(engine_folder, index=i)) for i in (0, 1)]
    pools = [SlotPool(2, 2 * SHAPE[0] * SHAPE[1]) for _ in processors]
    for processor in processors:
        processor.start(SERIES, 2)
    tickets = [
        submit(processor, pool, number, frames[number])
        for number, (processor, pool) in enumerate(zip(processors, pools, strict=True))
    ]
    for number, (processor, ticket) in enumerate(zip(processors, tickets, strict=True)):
        found = ticket.result.result(TIMEOUT_S).defocus.level
        np.testing.assert_array_equal(found, reference[number][0])
        processor.close()


def test_a_gpu_that_is_not_there_lists_those_that_are(engine_folder):
    with pytest.raises(EngineError, match=r"no GPU 7.*0 \(stand-in\), 1 \(stand-in\)"):
        on_gpu(config_for(engine_folder, index=7))


def test_what_the_gpu_cannot_do_is_refused_or_left_to_the_cpu(
    engine_folder, frames, caplog
):
    demanded = open_processor(config_for(engine_folder, precision="int8"))
    with pytest.raises(EngineError, match=r"'sharpness'.*int8"):
        demanded.start(SERIES, 2)
    demanded.close()
    lenient = config_for(engine_folder, precision="int8", device="auto")
    assert len(results_of(open_processor(lenient), frames[:1])) == 1
    assert "this series is processed on the CPU: engine 'sharpness'" in caplog.text


@pytest.mark.parametrize("classifier", ["sharpness", None])
def test_a_model_of_bioimage_io_is_refused_or_left_to_the_cpu(
    classifier, engine_folder, caplog, tmp_path, monkeypatch
):
    monkeypatch.setenv("RTFOCUS_ENGINES", str(tmp_path / "mine"))
    image = foreign_kit.counts()
    files = foreign_kit.described_05(
        image, foreign_kit.smoothed(image), foreign_kit.network()
    )
    method = add_model(foreign_kit.zipped(tmp_path / "model.zip", files)).name
    options = {"method": method, "classifier": classifier}
    demanded = open_processor(config_for(engine_folder, **options))
    with pytest.raises(EngineError, match=r"steps around its network.*device: cpu"):
        demanded.start(SERIES, 2)
    demanded.close()
    automatic = open_processor(config_for(engine_folder, device="auto", **options))
    automatic.start(SERIES, 2)
    automatic.close()
    assert "this series is processed on the CPU: restoration" in caplog.text


def test_the_bench_measures_what_it_says(monkeypatch):
    monkeypatch.syspath_prepend("bench")
    from bench import gpu

    monkeypatch.setattr(gpu, "WARM_UP", 1)
    row = gpu.measure(gpu.Case(144, "wiener", 2), "delpnet", 0, 4)
    assert set(row["stages_alone_ms"]) == set(gpu.STAGES)
    assert row["frames_per_s"] == pytest.approx(1e3 / row["ms_per_frame"])
    assert {"p50", "p99", "max"} == set(row["latency"]["to_estimate_ms"])
    begins = [stages["copy in"][0] for _, stages in row["timeline_ms"]]
    assert begins == sorted(begins)
    refused = gpu.measure(gpu.Case(144, "nonsense", 2), "delpnet", 0, 4)
    assert "'nonsense' not found" in refused["refused"]


def test_pinned_arrays_outlive_their_pinning():
    with current_context(0):
        pinned = PinnedMemory()
        own = pinned.empty((5, 7), np.float32)
        own[...] = 3
        pool = np.zeros(10000, np.uint8)
        assert pinned.is_pinned(pool[100:200])
        assert pinned.is_pinned(pool[500:])  # known: not pinned twice
        pinned.release()
        pinned.release()
    assert own.ctypes.data % 4096 == 0
    np.testing.assert_array_equal(own, 3)
    assert ctypes.c_float.from_address(own.ctypes.data).value == 3
