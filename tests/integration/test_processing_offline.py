"""Single images through the live loop's processor, and the shipped engine."""

import gc
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

from rtfocus.batch.findings import tile_rows
from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config import parse_config
from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.fitted import stated_um
from rtfocus.engines.registry import find_engine, fit_frame, step_um
from rtfocus.errors import ConfigError, EngineError, InputError
from rtfocus.frame import PROTOCOL_VERSION, Position, SeriesStart
from rtfocus.offline import ImageProcessor
from rtfocus.processing.channel_plan import ClassifierPlan
from rtfocus.processing.cpu.classifier import FrameClassifier
from rtfocus.processing.processor import open_processor
from rtfocus.specimens import draw_specimen


@pytest.fixture
def config(engine_folder):
    return parse_config(
        {
            "processing": {
                "classifier": "sharpness",
                "engine_folders": [str(engine_folder)],
                "threads": 2,
            }
        }
    )


@pytest.fixture
def images():
    rng = np.random.default_rng(6)
    blocks = np.kron(rng.random((40, 50)), np.ones((5, 5)))
    large = gaussian_filter(blocks, 2.0) * 3000
    return [
        large.astype(np.uint16),
        large[:60, :41].astype(np.uint8),
        np.stack([large[:150, :99]] * 3, axis=-1).astype(np.uint8),
        large[:120] / 3000,
        large[:30, :30].astype(np.int32),
    ]


def test_images_of_every_kind_pass_one_processor(config, images):
    with ImageProcessor(config) as processor:
        results = [processor.restore(image) for image in images]
        again = processor.restore(images[0])
    dtypes = [np.uint16, np.uint8, np.uint8, np.float32, np.float32]
    for image, result, dtype in zip(images, results, dtypes, strict=True):
        assert result.restored.shape == image.shape
        assert result.restored.dtype == dtype
        assert result.defocus is not None
    # Results are the caller's own: later images did not change them.
    np.testing.assert_array_equal(results[0].restored, again.restored)


def test_classify_restores_nothing(config, images):
    with ImageProcessor(config) as processor:
        result = processor.classify(images[0])
    assert result.restored is None
    assert "restore" not in result.stage_ms
    assert result.skipped is None
    assert result.estimate is not None


def test_optics_default_to_those_the_engine_was_calibrated_for(
    config, images, engine_folder
):
    reference = find_engine("sharpness", [engine_folder]).card.optics.reference
    with ImageProcessor(config) as processor:
        by_default = processor.restore(images[0])
    with ImageProcessor(config, optics=reference) as processor:
        given = processor.restore(images[0])
    slower = OpticalSystem(0.4, 451.0, 0.65)
    with ImageProcessor(config, optics=slower) as processor:
        other = processor.restore(images[0])
    np.testing.assert_array_equal(by_default.restored, given.restored)
    assert np.any(by_default.restored != other.restored)
    ratio = other.estimate.defocus_um / given.estimate.defocus_um
    assert ratio == pytest.approx((0.5 / 0.4) ** 2, rel=1e-3)


def test_tiles_are_listed_as_plain_values(config, images):
    with ImageProcessor(config) as processor:
        result = processor.classify(images[0])
    rows = tile_rows(result)
    grid = result.defocus.grid
    assert len(rows) == grid.rows * grid.columns
    assert (rows[0]["y"], rows[0]["x"]) == (0, 0)
    assert (rows[-1]["y"], rows[-1]["x"]) == (
        48 * (grid.rows - 1),
        48 * (grid.columns - 1),
    )
    for row in rows:
        assert (row["level"] is None) == (row["label"] == "bg")
        assert (row["defocus_um"] is None) == (row["level"] is None)


def test_the_deviation_stated_of_tiles_is_the_one_that_the_card_holds(images):
    optics = find_engine("rtfocus-2").card.optics.reference
    said = []
    for given in (optics, None):
        with ImageProcessor(
            parse_config({"processing": {"classifier": "rtfocus-2", "device": "cpu"}}),
            given,
        ) as processor:
            result = processor.classify(images[0])
        card = find_engine("rtfocus-2").card
        step = step_um(card, optics, blind=given is None)
        fit = card.deviation["told" if given else "blind"]
        rows = [row["uncertainty_um"] for row in tile_rows(result)]
        wanted = stated_um(result.defocus, fit, step).ravel()
        np.testing.assert_allclose(np.array(rows, float), wanted)
        said.append(wanted)
    assert not np.allclose(*said, equal_nan=True)


def test_a_blur_beyond_the_levels_is_told_from_smaller_images_by_blind_engines():
    card = find_engine("delpnet").card
    sharp = draw_specimen("nuclei", (256, 256), np.random.default_rng(5))
    frames = [gaussian_filter(sharp / sharp.max(), s) for s in (1, 9, 18, 36)]
    said = {}
    for optics in (None, card.optics.reference):
        settings = {"classifier": "delpnet", "device": "cpu", "threads": 1}
        config = parse_config({"processing": settings})
        with ImageProcessor(config, optics) as processor:
            results = [processor.classify((one * 4e4).astype("u2")) for one in frames]
        said[optics] = [one.estimate.defocus_um for one in results]
        assert all(one.defocus.level.max() <= 10 for one in results)
    range_um = 10 * card.levels.step_um
    blind, told = said.values()
    assert max(told) <= range_um
    assert blind[0] == told[0]
    assert range_um < blind[1] < blind[2] < blind[3]


def test_one_pixel_that_is_no_number_changes_no_defocus_of_a_noisy_image():
    # Whether its finest detail is noise decides if half the size is looked at.
    light = np.kron(np.random.default_rng(1).random((100, 120)), np.ones((4, 4)))
    rng = np.random.default_rng(3)
    frame = rng.poisson(gaussian_filter(light, 1.5) * 20 + 10).astype(np.float32)
    processing = {"classifier": "rtfocus-2", "blind": True, "precision": "f32"}
    config = parse_config({"processing": processing}).without_restoration()
    with ImageProcessor(config) as processor:
        of_all = processor.classify(frame).defocus.defocus_um
        colour = np.stack([frame] * 3, axis=-1)
        of_colour = processor.classify(colour).defocus.defocus_um
        for value in (np.nan, np.inf):
            frame[0, 0] = colour[0, 0, 1] = value
            found = processor.classify(frame).defocus.defocus_um
            np.testing.assert_allclose(found, of_all, atol=0.05)
            found = processor.classify(colour).defocus.defocus_um
            np.testing.assert_allclose(found, of_colour, atol=0.05)
    assert np.nanmax(np.abs(of_all)) > 15


@pytest.mark.parametrize("offset_counts", [0.0, 100.0])
def test_negative_values_are_restored_as_the_same_image_with_a_pedestal(
    config, images, offset_counts
):
    """A subtracted background changes nothing but the level, camera offset or not."""
    data = config.model_dump()
    data["camera"]["offset_counts"] = offset_counts
    whole = images[0].astype(np.float32)
    whole -= whole.min()
    standardised = whole - np.float32(1500)
    holed = standardised.copy()
    holed[7, 9] = np.nan
    with ImageProcessor(config) as processor:
        right = processor.restore(whole).restored
    with ImageProcessor(parse_config(data)) as processor:
        signed = processor.restore(standardised.astype(np.int16)).restored
        with_hole = processor.restore(holed).restored
    assert (signed < 0).mean() > 0.3
    np.testing.assert_allclose(signed + 1500, right, atol=0.5)
    assert np.isnan(with_hole).sum() == 1


def test_negative_values_and_a_flat_field_exclude_each_other(config, images, tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", np.ones(images[0].shape, np.float32))
    data = config.model_dump()
    data["camera"]["flat_field"] = str(tmp_path / "flat.tif")
    with (
        ImageProcessor(parse_config(data)) as processor,
        pytest.raises(InputError, match="flat_field"),
    ):
        processor.restore(images[0].astype(np.float32) - 500)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5, 6)), r"\(4, 5, 6\)"),
        (np.zeros(7), r"\(7,\)"),
        (np.zeros((0, 3)), "has no pixels"),
        (np.ones((4, 5), np.complex64), "the image is complex; save its magnitude"),
        (np.ones((4, 5), "M8[s]"), "type datetime64.*, which is no number"),
        (np.ones((4, 5), "u1,u2"), "which is no number"),
        (np.full((4, 5), 1e300), "beyond the range of float32"),
        (np.full((4, 5), 1e17), r"up to 1e\+17; 1e-15 to 1e\+15 can .*scale it"),
        (np.full((4, 5), -1e-17, np.float32), "up to 1e-17; .*scale it"),
        (np.full((4, 5), 2**60 + 1), "float32 is not exact"),
        (np.ma.masked_less(np.arange(20).reshape(4, 5), 3), "masked pixels.*filled"),
        ([[1, 2], [3]], "this list gives none: setting an array element"),
        ([["a", "b"]], "which is no number"),
        (np.ones((96, 1)), r"\(96, 1\) is too small .*; give at least 16 pixels"),
        (None, "array of numbers, this NoneType gives none|array is "),
    ],
)
def test_arrays_that_are_no_images_are_refused(config, array, message):
    with (
        ImageProcessor(config) as processor,
        pytest.raises(InputError, match=message),
    ):
        processor.classify(array)


def test_an_image_that_the_free_memory_does_not_hold_is_refused(
    config, images, monkeypatch
):
    free = SimpleNamespace(total=2**40, available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with (
        ImageProcessor(config) as processor,
        pytest.raises(InputError, match=r"takes .* GB of memory.*give parts of it"),
    ):
        processor.restore(images[0])


def test_restoring_nothing_says_why(config, images):
    raw = config.model_dump(mode="json")
    raw["processing"]["restoration"]["method"] = "none"
    with (
        ImageProcessor(parse_config(raw)) as processor,
        pytest.raises(EngineError, match=r"restoration\.method is none"),
    ):
        processor.restore(images[0])


def shipped(shape, backend, precision):
    """Open the shipped DelpNet for frames of a shape; skip without it."""
    try:
        found = find_engine("delpnet")
    except EngineError as error:
        pytest.skip(str(error))
    fit = fit_frame(found.card.input, shape)
    settings = ProcessingConfig(backend=backend, precision=precision)
    plan = ClassifierPlan(found, fit, step_um=2.0, quantum=1.0)
    return FrameClassifier(plan, settings)


@pytest.mark.parametrize("precision", ["f32", "auto"])
def test_labels_of_the_shipped_engine_equal_the_reference(shared_data: Path, precision):
    paths = sorted((shared_data / "bbbc006_pairs").glob("*/a1*.tif"))
    frames = [tifffile.imread(path).astype(np.float32) * 13 for path in paths]
    ours = shipped(frames[0].shape, "openvino", precision)
    theirs = shipped(frames[0].shape, "onnxruntime", "f32")
    equal = []
    for frame in frames:
        a = ours.see(ours.prepare(frame)).defocus.level
        b = theirs.see(theirs.prepare(frame)).defocus.level
        equal.append(a == b)
    ours.close()
    theirs.close()
    assert np.concatenate(equal).size > 1000
    assert np.mean(equal) >= 0.99


def test_an_engine_folder_can_name_a_built_in_restoration(config, images, tmp_path):
    (tmp_path / "mine").mkdir()
    card = "name: mine\nkind: restorer\nimplementation: builtin:richardson_lucy\n"
    (tmp_path / "mine" / "engine.yaml").write_text(card, "utf-8")
    raw = config.model_dump(mode="json")
    raw["processing"]["engine_folders"].append(str(tmp_path))
    results = []
    for method in ("mine", "richardson_lucy", "wiener"):
        raw["processing"]["restoration"]["method"] = method
        with ImageProcessor(parse_config(raw)) as processor:
            results.append(processor.restore(images[0]))
    assert results[0].engines["restorer"] == "mine@builtin"
    np.testing.assert_array_equal(results[0].restored, results[1].restored)
    assert np.any(results[0].restored != results[2].restored)


def test_a_classifier_cannot_restore(config, images):
    raw = config.model_dump(mode="json")
    raw["processing"]["restoration"]["method"] = "sharpness"
    with (
        ImageProcessor(parse_config(raw)) as processor,
        pytest.raises(EngineError, match=r"'sharpness' is a classifier.*built in are"),
    ):
        processor.restore(images[0])


def test_a_processor_that_nobody_closed_ends_with_whoever_had_it(config, images):
    before = threading.active_count()
    forgotten = ImageProcessor(config)
    forgotten.classify(images[0])
    assert threading.active_count() > before
    del forgotten
    gc.collect()
    assert threading.active_count() == before


def test_a_script_that_closes_nothing_ends():
    script = """
import numpy as np
import rtfocus

config = rtfocus.Config.model_validate({"processing": {"classifier": "delpnet"}})
forgotten = rtfocus.ImageProcessor(config)
forgotten.classify(np.random.default_rng(1).poisson(200, (96, 96)).astype(np.uint16))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        timeout=60,
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_networks_restore_in_the_mean_over_orientations_where_that_is_asked_for(images):
    processing = {"classifier": "rtfocus-2", "blind": True}

    def restored(image, orientations):
        asked = {"method": "rtfocus-2", "orientations": orientations}
        config = parse_config({"processing": processing | {"restoration": asked}})
        with ImageProcessor(config) as processor:
            return processor.restore(image).restored

    large = images[0].astype(np.float32)  # not square: its turns have another shape
    turned = [np.rot90(restored(np.rot90(large, n), 1), -n) for n in (0, 2, 1, 3)]
    flipped = large[:, ::-1]
    again = [np.rot90(restored(np.rot90(flipped, n), 1), -n) for n in (0, 2, 1, 3)]
    turned += [one[:, ::-1] for one in again]
    assert np.ptp(turned[:2], axis=0).max() > 1
    for number in (2, 4, 8):
        mean = np.mean(turned[:number], axis=0)
        np.testing.assert_allclose(restored(large, number), mean, rtol=1e-5, atol=0.01)
    counts = restored(images[0], 2)
    assert counts.dtype == np.uint16
    assert np.abs(counts - np.mean(turned[:2], axis=0)).max() < 1.5
    colours = np.stack([images[0], images[0] // 2, images[0]], axis=-1)
    assert restored(colours, 4).shape == colours.shape


def test_a_live_run_restores_every_frame_once(config):
    asked = config.processing.restoration.model_copy(update={"orientations": 8})
    series = SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid="live",
        name="live",
        started_ns=0,
        shape=(96, 96),
        dtype="<u2",
        sizes={"t": 1},
        channels=[Channel("default")],
        positions=[Position("p")],
        pixel_size_um=1.0,
    )
    with closing(open_processor(config.with_processing(restoration=asked))) as live:
        with pytest.raises(ConfigError, match="orientations is for images from files"):
            live.start(series, 1)
