"""One suite for every FrameProcessor that this machine can run."""

import os
import signal
import threading

import numpy as np
import pytest
from engine_kit import (
    write_brightness_joint,
    write_constant_wiener,
    write_overflowing_restorer,
    write_smooth_restorer,
)
from scipy.ndimage import uniform_filter

from rtfocus.channel import Channel
from rtfocus.config import parse_config
from rtfocus.config.sections import RestorationConfig
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
from rtfocus.optics.normalisation import PercentileRange, luminance
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.channel_plan import plan_channel
from rtfocus.processing.cpu.device import CpuDevice
from rtfocus.processing.cpu.network_restorer import (
    LearnedWienerRestorer,
    TileRestorer,
)
from rtfocus.processing.device import DEVICES
from rtfocus.processing.gpu.cuda.driver import list_devices
from rtfocus.processing.montage import Montage
from rtfocus.processing.processor import FrameProcessor
from rtfocus.specimens import draw_specimen

OPTICS = {"numerical_aperture": 0.5, "wavelength_nm": 451, "pixel_size_um": 0.65}
SAMPLING = 0.65 * 0.5 / 0.451
SHAPE = (200, 260)
SLOTS = 4
TIMEOUT_S = 60
LOG_SNR = 4.0
LOG_ERROR = -4.0


def config_for(engine_folder, **processing):
    values = {
        "classifier": "sharpness",
        "engine_folders": [str(engine_folder)],
        "precision": "f32",
        "threads": 2,
    }
    return parse_config(
        {
            "processing": values | processing,
            "channels": [
                {"name": "DAPI", "optics": OPTICS},
                {"name": "dark", "optics": None},
            ],
        }
    )


def series_for(shape=SHAPE, dtype="<u2", channels=("DAPI", "dark")):
    return SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid="series",
        name="contract",
        started_ns=0,
        shape=shape,
        dtype=dtype,
        sizes={"t": None, "c": len(channels)},
        channels=[Channel(name) for name in channels],
        positions=[Position("p")],
        pixel_size_um=0.65,
    )


def header_for(sequence, pixels, channel=0):
    return FrameHeader(
        version=PROTOCOL_VERSION,
        series_uid="series",
        sequence=sequence,
        shape=pixels.shape,
        dtype=pixels.dtype.str,
        captured_ns=123,
        exposure_ms=5.0,
        index={"t": sequence, "c": channel},
        z_um=7.5,
        z_offset_um=-1.0,
    )


SEVERAL = "gpus"
"""Two that share the frames."""


@pytest.fixture(params=[*(kind.name for kind in DEVICES), SEVERAL])
def open_kind(request):
    """Opens processors of one kind, which are closed after the test."""
    several = request.param == SEVERAL
    kind = next(k for k in DEVICES if request.param.startswith(k.name))
    if (why := kind.why_unavailable()) is not None:
        pytest.skip(why)
    if several and len(list_devices()) == 1:
        pytest.skip("there is one GPU")

    opened = []

    def open_for(config):
        if several:
            gpu = config.processing.gpu.model_copy(update={"index": [0, 1]})
            processing = config.processing.model_copy(update={"gpu": gpu})
            config = config.model_copy(update={"processing": processing})
        opened.append(FrameProcessor(config, [kind.open_devices(config)]))
        return opened[-1]

    yield open_for
    for processor in opened:
        processor.close()


@pytest.fixture
def processor(open_kind, engine_folder):
    return open_kind(config_for(engine_folder))


@pytest.fixture
def pool():
    return SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])


@pytest.fixture(scope="module")
def frames():
    """Eight different frames of nuclei at different defocus, 16 bit."""
    rng = np.random.default_rng(2)
    sharp = draw_specimen("nuclei", SHAPE, rng)
    system = config_for(".").channels[0].optics
    result = []
    for number in range(8):
        seen = blur(sharp, compute_psf(system, 2.0 * number)) if number else sharp
        counts = rng.poisson(np.maximum(seen, 0) * 3000 + 100)
        result.append(counts.astype("<u2"))
    return result


def submit(processor, pool, sequence, pixels, channel=0, **options):
    slot = pool.acquire(timeout_s=10)
    slot.prepare(header_for(sequence, pixels, channel))[...] = pixels
    return processor.submit(slot, **options)


def processed(processor, pixels, channels=("DAPI", "dark")):
    """Return what a processor makes of the only frame of a series."""
    pool = SlotPool(1, pixels.nbytes)
    processor.start(series_for(pixels.shape, pixels.dtype.str, channels), 1)
    return submit(processor, pool, 0, pixels).result.result(TIMEOUT_S)


def test_estimate_and_result_of_a_frame_are_whole(processor, pool, frames):
    grid = processor.start(series_for(), SLOTS)
    ticket = submit(processor, pool, 3, frames[4])
    estimate, found = ticket.estimate.result(TIMEOUT_S)
    result = ticket.result.result(TIMEOUT_S)
    assert found.grid == grid
    assert found.level.shape == (grid.rows, grid.columns) == found.confidence.shape
    assert found.level.dtype == np.int16
    background = found.level == BACKGROUND
    np.testing.assert_array_equal(np.isnan(found.defocus_um), background)
    assert not background.all()
    assert estimate.sequence == 3
    assert estimate.series_uid == "series"
    assert (estimate.z_um, estimate.z_offset_um) == (7.5, -1.0)
    assert estimate.captured_ns == 123 < estimate.estimated_ns
    assert estimate.foreground == pytest.approx(1 - background.mean())
    assert 0 < estimate.confidence <= 1
    foreground = ~background
    assert estimate.defocus_um == pytest.approx(
        np.average(found.defocus_um[foreground], weights=found.confidence[foreground]),
        rel=1e-4,
    )
    assert estimate.level in found.level
    assert result.estimate == estimate
    assert result.restored.shape == SHAPE
    assert result.restored.dtype == np.dtype("<u2")
    assert result.skipped is None
    assert result.device in {"CPU", "GPU 0", "GPU 1"}
    assert set(result.engines) == {"classifier", "restorer"}
    assert result.engines["classifier"].startswith("sharpness@")
    assert {"classify", "restore"} <= set(result.stage_ms)
    assert all(value >= 0 for value in result.stage_ms.values())


def test_a_frame_that_is_handed_over_cannot_be_taken_back(processor, pool, frames):
    processor.start(series_for(), SLOTS)
    ticket = submit(processor, pool, 0, frames[1])
    assert not ticket.estimate.cancel()
    assert not ticket.result.cancel()
    assert ticket.result.result(TIMEOUT_S).estimate.sequence == 0
    processor.close()
    with pytest.raises(ValueError, match="after close"):
        submit(processor, pool, 1, frames[1])


def test_frames_in_flight_get_their_own_results(processor, pool, frames):
    processor.start(series_for(), SLOTS)

    def alone(pixels):
        ticket = submit(processor, pool, 0, pixels)
        result = ticket.result.result(TIMEOUT_S)
        found = result.restored.copy(), result.defocus.level.copy()
        pool.release(ticket.slot)
        return found

    expected = [alone(pixels) for pixels in frames]
    assert len({levels.tobytes() for _, levels in expected}) > 1
    waiting = []
    for sequence, pixels in enumerate(frames * 3):
        if len(waiting) == SLOTS:
            check_first(processor, pool, waiting, expected)
        waiting.append(submit(processor, pool, sequence, pixels))
    while waiting:
        check_first(processor, pool, waiting, expected)


def check_first(processor, pool, waiting, expected):
    ticket = waiting.pop(0)
    sequence = ticket.slot.frame().sequence
    estimate, found = ticket.estimate.result(TIMEOUT_S)
    result = ticket.result.result(TIMEOUT_S)
    restored, levels = expected[sequence % len(expected)]
    assert estimate.sequence == sequence
    np.testing.assert_array_equal(found.level, levels)
    np.testing.assert_array_equal(result.restored, restored)
    pool.release(ticket.slot)


def test_background_and_focus_come_back_unchanged(processor, pool):
    processor.start(series_for(), SLOTS)
    noise = np.random.default_rng(5).poisson(100, SHAPE).astype("<u2")
    ticket = submit(processor, pool, 0, noise)
    estimate, found = ticket.estimate.result(TIMEOUT_S)
    assert (found.level == BACKGROUND).all()
    assert estimate.level is None
    assert estimate.defocus_um is None
    assert estimate.foreground == 0
    np.testing.assert_array_equal(ticket.result.result(TIMEOUT_S).restored, noise)


def test_channel_without_optics_is_passed_on_with_the_reason(processor, pool, frames):
    assert processor.start(series_for(), SLOTS) is not None
    ticket = submit(processor, pool, 0, frames[3], channel=1)
    assert ticket.estimate.result(TIMEOUT_S) is None
    result = ticket.result.result(TIMEOUT_S)
    assert result.restored is None
    assert result.estimate is None
    assert result.skipped == "channel 'dark' has no optics in the config"


def test_a_channel_that_is_recorded_alone_is_marked_too(processor, pool):
    processor.start(series_for(), SLOTS)
    frame = np.full(SHAPE, 1000, "<u2")
    frame[7, 9] = 65535
    ticket = submit(processor, pool, 0, frame, channel=1)
    assert ticket.result.result(TIMEOUT_S).flags == ("saturated",)
    ticket = submit(processor, pool, 1, np.minimum(frame, 1000), channel=1)
    assert ticket.result.result(TIMEOUT_S).flags == ()


def test_series_without_any_classified_channel_has_no_grid(processor):
    assert processor.start(series_for(channels=("dark",)), SLOTS) is None


def test_raw_only_frames_are_estimated_but_not_restored(processor, pool, frames):
    processor.start(series_for(), SLOTS)
    ticket = submit(processor, pool, 0, frames[5], unrestored="raw_only: slow")
    assert ticket.estimate.result(TIMEOUT_S) is not None
    result = ticket.result.result(TIMEOUT_S)
    assert result.restored is None
    assert result.skipped.startswith("raw_only")


def test_frame_of_another_shape_fails_alone_and_names_its_sequence(
    processor, pool, frames
):
    processor.start(series_for(), SLOTS)
    ticket = submit(processor, pool, 41, frames[0][:100])
    with pytest.raises(EngineError, match=r"frame 41 is \(100, 260\).*new series"):
        ticket.result.result(TIMEOUT_S)
    with pytest.raises(EngineError, match="frame 41"):
        ticket.estimate.result(TIMEOUT_S)
    after = submit(processor, pool, 42, frames[0])
    assert after.result.result(TIMEOUT_S).estimate.sequence == 42


def test_a_new_series_may_have_another_shape_and_type(processor, pool, frames):
    processor.start(series_for(), SLOTS)
    first = submit(processor, pool, 0, frames[2])
    first.result.result(TIMEOUT_S)
    pool.release(first.slot)
    small = (frames[2][:90, :70] >> 4).astype("|u1")
    grid = processor.start(series_for(small.shape, "|u1"), SLOTS)
    assert (grid.rows, grid.columns) == (1, 1)
    ticket = submit(processor, pool, 0, small)
    assert ticket.result.result(TIMEOUT_S).restored.dtype == np.uint8


def test_close_wakes_those_who_wait_and_may_be_called_twice(processor, pool, frames):
    processor.start(series_for(), SLOTS)
    tickets = [submit(processor, pool, i, frames[i]) for i in range(SLOTS)]
    outcomes = []

    def wait():
        for ticket in tickets:
            try:
                outcomes.append(ticket.result.result(TIMEOUT_S))
            except EngineError as error:
                outcomes.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    processor.close()
    waiter.join(timeout=20)
    assert not waiter.is_alive()
    # Some were finished before; whoever was not is told so.
    assert len(outcomes) == SLOTS
    failed = [o for o in outcomes if isinstance(o, EngineError)]
    assert all("closed" in str(error) for error in failed)
    processor.close()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1), "<u2"),
        ((7, 300), "|u1"),
        ((97, 143, 3), "|u1"),
        ((97, 143, 3), "<u2"),
        ((120, 90), "<f4"),
    ],
)
def test_any_shape_and_type_keeps_both(processor, frames, shape, dtype):
    pool = SlotPool(1, 4 * int(np.prod(shape)))
    processor.start(series_for(shape, dtype, ("DAPI",)), 1, any_size=True)
    rng = np.random.default_rng(9)
    image = draw_specimen("tissue", shape[:2], rng) * 200
    if len(shape) == 3:
        image = np.stack([image, image * 0.5, image * 0.8], axis=-1)
    ticket = submit(processor, pool, 0, image.astype(dtype))
    result = ticket.result.result(TIMEOUT_S)
    assert result.restored.shape == shape
    assert result.restored.dtype == np.dtype(dtype)


def test_every_element_type_is_restored_as_the_same_numbers_are(processor, frames):
    counts = (frames[7][40:136, 120:216] // 12).astype(np.float32)
    restored = {}
    for dtype in ("<f4", "|i1", "<i2", "<u4", "<f2", "<f8"):
        # Signed integers have values below 0 too, as after a subtraction.
        lowest = 40 if np.dtype(dtype).kind == "i" else 0
        pixels = (counts - lowest).astype(dtype)
        result = processed(processor, pixels, ("DAPI",))
        assert result.restored.dtype == np.dtype(dtype)
        restored[dtype] = result.restored.astype(np.float64) + lowest
    wanted = restored.pop("<f4")
    assert counts.max() < 127
    assert np.abs(wanted - counts).max() > 2
    for dtype, found in restored.items():
        # Integers are rounded, and their background is judged by whole steps.
        near = np.abs(found - wanted) <= (0.05 if dtype[1] == "f" else 0.6)
        assert near.all(), dtype


@pytest.mark.parametrize("value", [0, 1000, 65535])
def test_constant_frames_are_background_and_unchanged(processor, pool, value):
    processor.start(series_for(), SLOTS)
    constant = np.full(SHAPE, value, "<u2")
    ticket = submit(processor, pool, 0, constant)
    result = ticket.result.result(TIMEOUT_S)
    assert (result.defocus.level == BACKGROUND).all()
    np.testing.assert_array_equal(result.restored, constant)
    assert ("saturated" in result.flags) is (value == 65535)


def test_nan_pixels_are_marked_and_stay_nan_while_the_rest_is_restored(
    processor, frames
):
    pixels = frames[6].astype("<f4")
    pixels[50:53, 60] = np.nan
    result = processed(processor, pixels)
    assert result.flags == ("nan",)
    assert np.isnan(result.restored[50:53, 60]).all()
    assert np.isnan(result.restored).sum() == 3
    assert np.abs(result.restored - pixels)[~np.isnan(pixels)].max() > 1


def test_a_subtracted_background_is_kept_below_zero(processor, frames):
    pool = SlotPool(2, 4 * SHAPE[0] * SHAPE[1])
    processor.start(series_for(dtype="<f4"), 2)
    counts = frames[6].astype("<f4")
    counts -= counts.min()
    tickets = [submit(processor, pool, n, counts - 1500 * n) for n in (0, 1)]
    whole, signed = (one.result.result(TIMEOUT_S).restored for one in tickets)
    assert (signed < 0).mean() > 0.3
    np.testing.assert_allclose(signed + 1500, whole, atol=0.5)


@pytest.mark.parametrize("highest", [32766, 32767])
def test_a_frame_with_negative_values_is_saturated_by_its_own_values(
    processor, pool, highest
):
    processor.start(series_for(dtype="<i2"), SLOTS)
    pixels = np.full(SHAPE, -2000, "<i2")
    pixels[7, 9] = highest
    flags = submit(processor, pool, 0, pixels).result.result(TIMEOUT_S).flags
    assert flags == (("saturated",) if highest == 32767 else ())


def test_frame_of_nothing_but_nan_is_background(processor):
    result = processed(processor, np.full(SHAPE, np.nan, "<f4"))
    assert (result.defocus.level == BACKGROUND).all()
    assert np.isnan(result.restored).all()


def test_restored_frames_are_float32_on_request(open_kind, engine_folder, frames):
    config = config_for(engine_folder)
    store = config.store.model_copy(update={"restored_dtype": "float32"})
    processor = open_kind(config.model_copy(update={"store": store}))
    restored = processed(processor, frames[5]).restored
    assert restored.dtype == np.float32
    assert restored.min() >= 0
    assert np.any(restored != np.rint(restored))


def test_engine_that_does_not_fit_the_optics_is_refused_with_the_remedy(
    open_kind, engine_folder
):
    config = config_for(engine_folder)
    fine = {**OPTICS, "pixel_size_um": 0.1}
    raw = config.model_dump(mode="json")
    raw["channels"] = [{"name": "DAPI", "optics": fine}]
    processor = open_kind(parse_config(raw))
    with pytest.raises(EngineError, match=r"0\.3 to 1\.5 lambda/NA.*ignore_optics"):
        processor.start(series_for(channels=("DAPI",)), 1)
    raw["processing"]["ignore_optics"] = True
    willing = open_kind(parse_config(raw))
    assert willing.start(series_for(channels=("DAPI",)), 1) is not None


class SlowToOpen(CpuDevice):
    """Interrupts who waits for it, as Ctrl-C does, and opens when it is told to."""

    def __init__(self, config):
        super().__init__(config)
        self.done = []
        self.may_open = threading.Event()

    def prepare(self, plans, series, slots):
        self.done.append("prepare")
        if not self.may_open.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert self.may_open.wait(TIMEOUT_S)
        return super().prepare(plans, series, slots)

    def close(self):
        self.done.append("close")
        super().close()


@pytest.mark.skipif(os.name != "posix", reason="a signal to one thread")
def test_a_start_that_is_interrupted_frees_its_device_before_the_next(
    engine_folder, pool, frames
):
    device = SlowToOpen(config_for(engine_folder))
    processor = FrameProcessor(config_for(engine_folder), [device])
    with pytest.raises(KeyboardInterrupt):
        processor.start(series_for(), SLOTS)
    device.may_open.set()
    processor.start(series_for(), SLOTS)
    assert device.done == ["prepare", "close", "prepare"]
    ticket = submit(processor, pool, 0, frames[4])
    assert ticket.result.result(TIMEOUT_S).restored is not None
    processor.close()
    assert device.done[3:] == ["close"]
    threads = {thread.name for thread in threading.enumerate()}
    assert "rtfocus-device" not in threads


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Engines whose results can be computed by hand, see `engine_kit`."""
    folder = tmp_path_factory.mktemp("zoo")
    write_brightness_joint(folder / "brightness")
    write_brightness_joint(folder / "other")
    write_brightness_joint(folder / "weighed", share=0.25, log_error=LOG_ERROR)
    write_brightness_joint(folder / "twice", second_look=True)
    write_smooth_restorer(folder / "smooth")
    write_brightness_joint(folder / "damaged", damaged=True)
    write_overflowing_restorer(folder / "overflowing")
    write_brightness_joint(folder / "dark", more=-np.inf)
    write_brightness_joint(folder / "nothing", more=np.nan)
    write_constant_wiener(folder / "constant", LOG_SNR)
    return folder


@pytest.mark.parametrize(
    ("classifier", "method", "colours"),
    [
        ("brightness", "smooth", 1),
        ("brightness", "smooth", 3),
        ("brightness", "brightness", 1),
        ("brightness", "brightness", 3),
        ("other", "brightness", 1),
        ("other", "weighed", 3),
        ("weighed", "weighed", 1),
        ("twice", "twice", 1),
        ("twice", "twice", 3),
        ("other", "twice", 1),
    ],
)
def test_networks_restore_what_is_out_of_focus_and_nothing_else(
    open_kind, zoo, classifier, method, colours
):
    blind = method in {"weighed", "twice"}
    config = config_for(
        zoo, classifier=classifier, restoration={"method": method}, blind=blind
    )
    store = config.store.model_copy(update={"restored_dtype": "float32"})
    processor = open_kind(config.model_copy(update={"store": store}))
    rng = np.random.default_rng(8)
    # Left flat, so background; then brighter to the right: levels up to 10.
    bright = np.maximum(np.arange(SHAPE[1]) - 150, 0) * 35.0 + 500
    pixels = (bright + rng.normal(0, 9, SHAPE)).astype("<u2")
    pixels[:, :150] = 500
    if colours == 3:
        pixels = np.stack([pixels, pixels // 2, pixels // 3 + 100], axis=-1)
    result = processed(processor, pixels, ("DAPI",))
    assert len(np.unique(result.defocus.level)) > 2
    share = Montage(result.defocus.grid, SHAPE).restored_share(result.defocus.level)
    assert (share == 0).any()
    assert (share == 1).any()
    taken = 0.25 if method == "weighed" else 1.0
    more = SAMPLING / 10
    if method == "twice":
        more += level_told(luminance(pixels.astype(np.float32))) / 10
    planes = np.moveaxis(np.atleast_3d(pixels.astype(np.float32)), -1, 0)
    found = np.moveaxis(np.atleast_3d(result.restored), -1, 0)
    for frame, restored in zip(planes, found, strict=True):
        _, scale = PercentileRange().fit(frame)
        whole = np.maximum(frame + scale * more, 0)
        if method == "smooth":
            whole = uniform_filter(frame, 3, mode="reflect")
        expected = frame + taken * share * (whole - frame)
        # Half precision rounds the image itself to a thousandth of its range.
        np.testing.assert_allclose(restored, expected, atol=2e-3 * scale)
        np.testing.assert_array_equal(restored[share == 0], frame[share == 0])
    assert set(result.engines) == {"classifier", "restorer"}
    assert result.engines["restorer"].startswith(f"{method}@")


@pytest.mark.parametrize("colours", [1, 3])
def test_the_error_left_is_stated_of_every_tile_whatever_was_changed(
    open_kind, zoo, colours
):
    config = config_for(
        zoo, classifier="weighed", restoration={"method": "weighed"}, blind=True
    )
    rng = np.random.default_rng(9)
    # Noise alone, of which nothing is changed; and what gets brighter to the right.
    empty = rng.choice([500, 1500], SHAPE).astype("<u2")
    ramp = np.arange(SHAPE[1]) * 35.0 + 500
    blurred = (ramp + rng.normal(0, 9, SHAPE)).astype("<u2")
    if colours == 3:
        empty, blurred = (np.stack([one] * 3, axis=-1) for one in (empty, blurred))
    processor = open_kind(config)
    pool = SlotPool(1, empty.nbytes)
    processor.start(series_for(empty.shape, channels=("DAPI",)), 1)
    assert processor.expects_error
    for sequence, frame in enumerate([blurred, empty] * 3):
        ticket = submit(processor, pool, sequence, frame)
        result = ticket.result.result(TIMEOUT_S)
        assert np.array_equal(result.restored, frame) == (frame is empty)
        _, scale = PercentileRange().fit(luminance(frame.astype(np.float32)))
        assert result.expected_error.shape == result.defocus.level.shape
        wanted = scale * np.exp(LOG_ERROR / 2)
        np.testing.assert_allclose(result.expected_error, wanted, rtol=1e-3)
        pool.release(ticket.slot)


@pytest.mark.parametrize("colours", [1, 3])
def test_of_tiles_without_a_number_no_error_is_stated(open_kind, zoo, colours):
    config = config_for(
        zoo, classifier="weighed", restoration={"method": "weighed"}, blind=True
    )
    frame = np.random.default_rng(9).normal(500, 9, SHAPE).astype("<f4")
    frame = frame if colours == 1 else np.stack([frame] * 3, axis=-1)
    processor = open_kind(config)
    pool = SlotPool(1, frame.nbytes)
    processor.start(series_for(frame.shape, "<f4", channels=("DAPI",)), 1)
    for sequence, last in enumerate([0, 150, SHAPE[1]]):
        shown = frame.copy()
        shown[:, :last] = np.nan
        ticket = submit(processor, pool, sequence, shown)
        result = ticket.result.result(TIMEOUT_S)
        grid = result.defocus.grid
        ends = grid.centres_px(grid.columns) + (grid.tile_px - 1) / 2
        hidden = np.tile(ends < last, (grid.rows, 1)) | (last == SHAPE[1])
        np.testing.assert_array_equal(np.isnan(result.expected_error), hidden)
        assert hidden.any() == (last > 0)
        assert hidden.all() == (last == SHAPE[1])
        pool.release(ticket.slot)


@pytest.mark.parametrize(
    ("classifier", "method", "blind"),
    [
        ("weighed", "weighed", False),
        ("other", "weighed", True),
        ("weighed", "smooth", True),
        ("brightness", "brightness", True),
    ],
)
def test_no_error_is_stated_by_who_does_not_know_it(
    open_kind, zoo, frames, classifier, method, blind
):
    config = config_for(
        zoo, classifier=classifier, restoration={"method": method}, blind=blind
    )
    processor = open_kind(config)
    result = processed(processor, frames[0], ("DAPI",))
    assert not processor.expects_error
    assert result.restored is not None
    assert result.expected_error is None


def level_told(frame):
    """Return the level that an engine of `write_brightness_joint` finds in a frame."""
    offset, scale = PercentileRange().fit(frame)
    sides = [(0, -side % 48) for side in frame.shape]
    tiles = np.pad((frame - offset) / scale, sides, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(tiles, (96, 96))[::48, ::48]
    brightness = 20 * windows.mean(axis=(2, 3)) - 10
    levels = np.arange(-10, 11)
    shares = np.exp(-((brightness.ravel() - levels[:, None]) ** 2))
    shares = (shares / shares.sum(axis=0)).mean(axis=1)
    return np.sign(shares @ levels) * (shares @ np.abs(levels))


@pytest.mark.parametrize(
    ("classifier", "method", "faulty"),
    [
        ("damaged", "none", "damaged"),
        ("damaged", "damaged", "damaged"),
        ("brightness", "overflowing", "overflowing"),
        ("dark", "dark", "dark"),
        ("brightness", "nothing", "nothing"),
    ],
)
@pytest.mark.parametrize("dtype", ["<u2", "<f4"])
def test_what_a_network_makes_that_is_no_number_is_refused(
    open_kind, zoo, frames, classifier, method, faulty, dtype
):
    config = config_for(zoo, classifier=classifier, restoration={"method": method})
    processor = open_kind(config)
    pixels = frames[0].astype(dtype)
    with pytest.raises(EngineError, match=rf"frame 0 .*'{faulty}@.* NaN or inf.*again"):
        processed(processor, pixels, ("DAPI",))


@pytest.mark.parametrize(
    ("method", "colours"), [("richardson_lucy_tiles", 3), ("constant", 1)]
)
def test_patches_are_those_of_the_reference(
    open_kind, engine_folder, zoo, frames, method, colours
):
    config = config_for(
        engine_folder,
        engine_folders=[str(engine_folder), str(zoo)],
        restoration={"method": method, "iterations": 2, "halo_px": 9},
    )
    store = config.store.model_copy(update={"restored_dtype": "float32"})
    processor = open_kind(config.model_copy(update={"store": store}))
    pixels = frames[6][:150]
    if colours == 3:
        pixels = np.stack([pixels, pixels // 2, pixels[::-1]], axis=-1)
    result = processed(processor, pixels, ("DAPI",))
    level, signal = result.defocus.level, pixels.astype(np.float32)
    levels = set(np.unique(level).tolist()) - {0, BACKGROUND}
    assert len(levels) > 1
    series = series_for(pixels.shape, channels=("DAPI",))
    plan = plan_channel(config, series, series.channels[0])
    montage = plan.montage(result.defocus.grid)
    if method == "constant":
        psfs, _ = plan.band_levels()
        reference = LearnedWienerRestorer(
            montage,
            psfs,
            None,
            lambda tiles, told: np.full((len(tiles), 12), LOG_SNR, np.float32),
            tile_px=192,
            halo_px=32,
            normalisation=PercentileRange(),
        )
    else:
        settings = RestorationConfig(iterations=2, halo_px=9)
        reference = TileRestorer(montage, plan.psfs, settings)
    wanted = reference.restore(signal, level, np.empty_like(signal))
    assert np.abs(wanted - signal).max() > 20
    np.testing.assert_allclose(result.restored, wanted, atol=0.1)


def test_missing_engine_says_what_was_looked_for_and_where(open_kind, engine_folder):
    processor = open_kind(config_for(engine_folder, classifier="nosuch"))
    with pytest.raises(EngineError, match=r"'nosuch' not found.*there: .*sharp"):
        processor.start(series_for(), 1)


def test_estimates_do_not_wait_for_restorations(open_kind, engine_folder, frames):
    config = config_for(
        engine_folder,
        restoration={"method": "richardson_lucy", "iterations": 150},
    )
    processor = open_kind(config)
    pool = SlotPool(SLOTS, 2 * SHAPE[0] * SHAPE[1])
    processor.start(series_for(), SLOTS)
    tickets = [submit(processor, pool, i, frames[5]) for i in range(SLOTS)]
    estimated = [t.estimate.result(TIMEOUT_S)[0].estimated_ns for t in tickets]
    restore_ms = [t.result.result(TIMEOUT_S).stage_ms["restore"] for t in tickets]
    # All estimates together came sooner than the restorations can have ended.
    assert (max(estimated) - min(estimated)) * 1e-6 < sum(restore_ms[:-1]) / 2


class SlowDevice(CpuDevice):
    """Estimates the first frame once as many are enqueued as ever will be."""

    def __init__(self, config):
        super().__init__(config)
        self.lock = threading.Lock()
        self.views, self.most_views = 0, 0
        self.is_full = threading.Event()

    def enqueue(self, job):
        super().enqueue(job)
        with self.lock:
            self.views += 1
        self.most_views = max(self.most_views, self.views)
        # One in the estimate's thread, one that waits for room in the queue.
        if self.views == self.ahead + 2:
            self.is_full.set()

    def estimate(self, job):
        assert self.is_full.wait(TIMEOUT_S)
        found = super().estimate(job)
        with self.lock:
            self.views -= 1
        return found


def test_few_frames_are_normalised_ahead_of_their_estimates(engine_folder, frames):
    slots = 12
    config = config_for(engine_folder)
    device = SlowDevice(config)
    processor = FrameProcessor(config, [device])
    pool = SlotPool(slots, 2 * SHAPE[0] * SHAPE[1])
    processor.start(series_for(), slots)
    tickets = [submit(processor, pool, i, frames[5]) for i in range(slots)]
    for ticket in tickets:
        assert {"normalise", "classify"} <= ticket.result.result(
            TIMEOUT_S
        ).stage_ms.keys()
    assert device.most_views == device.ahead + 2
    processor.close()


def test_a_frame_below_the_cameras_offset_is_marked(
    open_kind, engine_folder, pool, frames
):
    config = config_for(engine_folder)
    camera = config.camera.model_copy(update={"offset_counts": 20_000.0})
    processor = open_kind(config.model_copy(update={"camera": camera}))
    processor.start(series_for(), SLOTS)
    dim = np.minimum(frames[5], 15_000)
    for n, (pixels, flags) in enumerate([(dim, ("below_offset",)), (dim + 20_000, ())]):
        ticket = submit(processor, pool, n, pixels)
        assert ticket.result.result(TIMEOUT_S).flags == flags
