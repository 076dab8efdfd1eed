"""`import rtfocus`: instant, complete, documented; arrays in, arrays out."""

import importlib
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pymmcore_plus import CMMCorePlus

import rtfocus
from rtfocus.autofocus.execution import Verdict
from rtfocus.channel import OpticalSystem
from rtfocus.config import Config
from rtfocus.frame import BACKGROUND, DefocusMap, SlotPool, TileGrid

STUB = Path(rtfocus.__file__).with_suffix(".pyi")
OPTICS = rtfocus.Optics(0.5, wavelength_nm=520, pixel_size_um=0.65)


def test_importing_it_imports_nothing_that_takes_time():
    code = (
        "import sys, importlib; old = set(sys.modules); import rtfocus; "
        "print(sorted(set(sys.modules) - old))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip() == "['rtfocus']"


def test_a_processor_side_starts_without_what_it_does_not_need():
    code = (
        "import sys, rtfocus.cli.live, rtfocus.app; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    loaded = set(done.stdout.split())
    needless = {"pymmcore_plus", "useq", "scipy", "zarr", "tifffile", "PIL", "torch"}
    assert "rtfocus" in loaded
    assert loaded & needless == set()


def test_help_of_live_commands_and_check_comes_without_the_loop():
    code = "import sys, rtfocus.cli.live, rtfocus.cli.runs; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    loaded = set(done.stdout.split())
    needless = {"rtfocus.app", "rtfocus.monitor", "tensorstore", "yaozarrs", "openvino"}
    assert "rtfocus.cli.live" in loaded
    assert loaded & needless == set()


def test_names_with_types_are_the_names_that_are_offered():
    typed = set(re.findall(r" as (\w+)$", STUB.read_text("utf-8"), re.MULTILINE))
    assert typed | {"__version__"} == set(rtfocus.__all__)
    assert STUB.with_name("py.typed").is_file()
    offered = {name for name in dir(rtfocus) if not name.startswith("_")}
    assert offered == set(rtfocus.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(set(rtfocus.__all__) - {"__version__"}))
def test_every_name_is_there_and_says_what_it_is(name):
    found = getattr(rtfocus, name)
    assert found.__doc__
    home = importlib.import_module(found.__module__)
    assert found.__module__.startswith("rtfocus.")
    assert getattr(home, found.__name__) is found


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'restor'"):
        rtfocus.restor  # noqa: B018 (the look-up is the test)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((96, 100), "u2"),
        ((96, 100), "u1"),
        ((96, 100), "f4"),
        ((96, 100, 3), "u1"),
        ((2, 1, 96, 100), "u2"),
        ((2, 96, 100, 3), "u1"),
    ],
)
def test_restore_keeps_shape_and_type(shape, dtype):
    image = np.random.default_rng(1).poisson(100, shape).astype(dtype)
    before = image.copy()
    restored = rtfocus.restore(image, optics=OPTICS, engine="richardson_lucy")
    assert (restored.shape, restored.dtype) == (shape, np.dtype(dtype))
    assert np.array_equal(image, before)


def test_planes_of_a_stack_are_restored_as_by_themselves():
    stack = np.random.default_rng(2).poisson(500, (2, 96, 96)).astype("u2")
    together = rtfocus.restore(stack, optics=OPTICS)
    for plane, restored in zip(stack, together, strict=True):
        assert np.array_equal(restored, rtfocus.restore(plane, optics=OPTICS))


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 0, 96)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(rtfocus.InputError, match="axes"):
        rtfocus.restore(np.zeros(shape, "u2"), optics=OPTICS)


def test_without_optics_an_engine_runs_blind_and_that_is_told(caplog):
    image = np.full((96, 96), 1000, "u2")
    assert rtfocus.restore(image).shape == image.shape
    assert "no optics are given" in caplog.text
    for engine in ("wiener", "learned_wiener"):
        with pytest.raises(rtfocus.ConfigError, match="optics are unknown"):
            rtfocus.restore(image, engine=engine)
    caplog.clear()
    rtfocus.restore(image, optics=OPTICS)
    rtfocus.restore(image, config=rtfocus.load_config("demo"))
    assert "no optics" not in caplog.text


def test_classify_gives_a_map_of_the_tiles():
    image = np.random.default_rng(3).poisson(500, (200, 260)).astype("u2")
    found = rtfocus.classify(image, optics=OPTICS)
    assert isinstance(found, rtfocus.DefocusMap)
    assert found.defocus_um.shape == (found.grid.rows, found.grid.columns)


def test_configs_are_given_as_they_are_by_path_or_by_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {name: mine}\n", encoding="utf-8")
    assert rtfocus.load_config(path).run.name == "mine"
    assert rtfocus.load_config(str(path)).run.name == "mine"
    assert isinstance(rtfocus.load_config("demo"), Config)
    assert rtfocus.load_config("demo", "run.name=mine").run.name == "mine"
    with pytest.raises(rtfocus.ConfigError, match="demo"):
        rtfocus.load_config("dmeo")


OTHER_OPTICS = replace(OPTICS, numerical_aperture=0.75, pixel_size_um=0.325)


def with_channels(*names):
    """Return a config whose channels have other optics than engines were made for."""
    stated = {
        key: getattr(OTHER_OPTICS, key)
        for key in ("numerical_aperture", "wavelength_nm", "pixel_size_um")
    }
    return Config.model_validate(
        {"channels": [{"name": name, "optics": stated} for name in names]}
    )


@pytest.mark.parametrize("names", [("GFP",), ("default",), ("GFP", "default")])
def test_the_optics_of_a_config_are_used_whatever_the_channel_is_called(names):
    image = np.random.default_rng(4).poisson(500, (96, 96)).astype("u2")
    by_config = rtfocus.classify(image, config=with_channels(*names))
    by_optics = rtfocus.classify(image, optics=OTHER_OPTICS)
    assert np.array_equal(by_config.defocus_um, by_optics.defocus_um, equal_nan=True)


def test_a_channel_that_is_not_the_configs_is_refused_where_its_optics_are_needed():
    image = np.ones((96, 96), np.uint16)
    two = with_channels("GFP", "DAPI")
    for call in (rtfocus.restore, rtfocus.classify):
        with pytest.raises(rtfocus.ConfigError, match=r"channel 'default'.*GFP, DAPI"):
            call(image, config=two)
        with pytest.raises(rtfocus.ConfigError, match=r"no channel 'Dapi'"):
            call(image, config=two, channel="Dapi")
    assert rtfocus.restore(image, config=two, channel="DAPI").shape == image.shape


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"images": "a.tif", "kind": "pairs"}, "sharp, defocused"),
        ({"images": ("a.tif", "b.tif"), "kind": "pairs"}, "defocus_um"),
        ({"images": ("a.tif", "b.tif"), "kind": "beads"}, "one file"),
    ],
)
def test_a_calibration_says_what_it_lacks(arguments, said):
    with pytest.raises(rtfocus.ConfigError, match=said):
        rtfocus.fit_psf(**arguments, optics=OPTICS)


def test_optics_are_those_of_the_configs():
    assert rtfocus.Optics is OpticalSystem


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optics": "NA=0.5"}, r"optics are a str; give rtfocus\.Optics\("),
        ({"optics": {"numerical_aperture": 0.5}}, "optics are a dict"),
        ({"config": {"run": {}}}, "config is of type dict; give a path"),
        ({"config": 3}, "config is of type int"),
    ],
)
def test_what_is_no_optics_and_no_config_is_told(given, said):
    with pytest.raises(rtfocus.ConfigError, match=said):
        rtfocus.restore(np.ones((9, 9), np.uint16), **given)
    with pytest.raises(rtfocus.ConfigError, match=said):
        rtfocus.classify(np.ones((9, 9), np.uint16), **given)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, 520, 0.65), "numerical_aperture=0 must be above 0"),
        ((3, 520, 0.65, 4), "numerical_aperture=3 must be at most 2"),
        ((1.2, 520, 0.65), "numerical_aperture=1.2 is not below refractive_index=1"),
        ((float("nan"), 520, 0.65), "numerical_aperture=nan must be"),
        (("0.5", 520, 0.65), "numerical_aperture='0.5' is of type str; give a number"),
        ((0.5j, 520, 0.65), "numerical_aperture=0.5j is of type complex"),
        ((True, 520, 0.65), "numerical_aperture=True is of type bool"),
        ((0.5, None, 0.65), "wavelength_nm=None is of type NoneType"),
        ((0.5, 0.52, 0.65), "wavelength_nm=0.52 must be at least 10"),
        ((0.5, 10**400, 0.65), "wavelength_nm=.* must be at most"),
        ((0.5, 520, 0), "pixel_size_um=0 must be at least 0.001"),
        ((0.5, 520, 0.65, 1.0, "gauss"), "psf_model='gauss' is none of pupil"),
        ((0.5, 520, 0.65, 1.0, "pupil", -0.3), "aberrations are of type float"),
    ],
)
def test_optics_that_nobody_has_are_told_where_they_are_made(values, said):
    with pytest.raises(rtfocus.ConfigError, match=said) as told:
        rtfocus.Optics(*values)
    assert isinstance(told.value, ValueError)


def test_numbers_of_any_kind_make_the_same_optics():
    assert OPTICS == replace(OPTICS, wavelength_nm=np.float64(OPTICS.wavelength_nm))
    made = rtfocus.Optics(np.float32(0.5), np.int64(520), 0.65)
    assert made == rtfocus.Optics(0.5, 520, 0.65)
    assert type(made.numerical_aperture) is type(made.wavelength_nm) is float


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("cells.tif", "read a file first"),
        (Path("cells.tif"), "read a file first"),
        (np.ones((64, 64, 4), np.uint8), r"image\[\.\.\., :3\]"),
        (np.ones((64, 64, 1), np.uint8), r"image\[\.\.\., 0\]"),
        (np.broadcast_to(np.uint16(5), (10**6, 10**6)), "2000 GB.*GB of memory"),
        (np.broadcast_to(np.uint16(5), (10**8, 99, 99)), "GB of memory.*one by one"),
    ],
)
def test_what_is_almost_an_image_is_told_what_to_give(image, said):
    with pytest.raises(rtfocus.InputError, match=said):
        rtfocus.restore(image, optics=OPTICS, engine="wiener")


def test_what_is_no_path_or_kind_is_told():
    for given in (5, None, b""):
        with pytest.raises(rtfocus.InputError, match=r"run is of type"):
            rtfocus.open_run(given)
        with pytest.raises(rtfocus.InputError, match="images is of type"):
            rtfocus.fit_psf(given, kind="beads", optics=OPTICS)
    with pytest.raises(rtfocus.ConfigError, match="kind 'bead' is none"):
        rtfocus.fit_psf("beads.tif", kind="bead", optics=OPTICS)
    with pytest.raises(rtfocus.ConfigError, match="config is of type str"):
        rtfocus.ImageProcessor("demo")
    for endpoint in (5, None, "tcp://127.0.0.1:99999"):
        with pytest.raises(rtfocus.ConfigError, match="endpoint"):
            list(rtfocus.estimates(endpoint, timeout_s=0))


@pytest.mark.parametrize("timeout_s", [math.nan, -1, "5"])
def test_a_time_to_wait_for_estimates_that_is_none_is_refused(timeout_s):
    with pytest.raises(rtfocus.ConfigError, match="seconds from 0"):
        next(rtfocus.estimates(timeout_s=timeout_s))


def test_an_unknown_restoration_lists_the_built_in_methods():
    with pytest.raises(rtfocus.EngineError, match=r"built in: .*richardson_lucy"):
        rtfocus.restore(np.ones((9, 9), np.uint16), optics=OPTICS, engine="WIENER")


def test_a_config_of_another_type_is_told_by_all_that_read_one():
    for given in ([], {}, b"demo", 5, None):
        with pytest.raises(rtfocus.ConfigError, match="config is of type"):
            rtfocus.load_config(given)
        with pytest.raises(rtfocus.ConfigError, match="config is of type"):
            rtfocus.focus(object(), given)


def test_what_is_no_core_is_told():
    for call in (rtfocus.focus, rtfocus.stream):
        with pytest.raises(rtfocus.ConfigError, match="core is of type NoneType; give"):
            call(None, "demo")


def test_a_verdict_is_shown_without_the_spectra_of_its_images():
    verdict = Verdict(
        True, "in focus", 0.0, 1.5, 3, 2, 0.1, steps=(SimpleNamespace(z_um=7.25),)
    )
    assert "in focus" in repr(verdict)
    assert "7.25" not in repr(verdict)


def test_a_map_and_a_config_are_shown_in_a_few_words(tmp_path):
    grid = TileGrid(2, 3, 96, 48, 47.5, signed=True)
    um = np.full((2, 3), np.nan, np.float32)
    empty = DefocusMap(grid, um.copy(), um, np.full((2, 3), BACKGROUND, np.int16))
    assert repr(empty) == "DefocusMap(2 x 3 tiles, 0 with specimen)"
    um[0] = -1.5, 0.25, 3
    found = repr(replace(empty, defocus_um=um))
    said = "2 x 3 tiles, 3 with specimen, defocus -1.50 to 3.00 um"
    assert found == f"DefocusMap({said})"
    assert "distance from focus" in repr(
        replace(empty, defocus_um=um, grid=replace(grid, signed=False))
    )
    assert repr(rtfocus.Config()) == "Config(None, not_default=[])"
    path = tmp_path / "my.yaml"
    path.write_text("run: {name: day1}\nstore: {restored: false}\n", "utf-8")
    shown = f"Config({str(path)!r}, not_default=['run', 'store'])"
    assert repr(rtfocus.load_config(path)) == shown


def test_a_stack_is_told_to_be_classified_plane_by_plane():
    with pytest.raises(rtfocus.InputError, match="planes of a stack one by one"):
        rtfocus.classify(np.ones((3, 96, 96), np.uint16), optics=OPTICS)


def test_a_focus_engine_takes_a_shipped_config_and_hands_the_core_back():
    core = CMMCorePlus()
    former = core.mda.engine
    with closing(rtfocus.focus(core, "demo")) as engine:
        assert core.mda.engine is engine
    assert core.mda.engine is former
    with closing(rtfocus.focus(core, "demo")):
        core.mda.set_engine(engine)
    # What a script has put there since is its own.
    assert core.mda.engine is engine


def test_an_image_without_pixels_is_told_as_that():
    with pytest.raises(rtfocus.InputError, match=r"of \(0, 9\) has no pixels"):
        rtfocus.restore(np.empty((0, 9)), optics=OPTICS)


def test_an_image_without_a_number_is_refused_a_plane_without_one_is_not():
    planes = np.full((2, 96, 96), np.nan, np.float32)
    for call in (rtfocus.restore, rtfocus.classify):
        with pytest.raises(rtfocus.InputError, match="every pixel is NaN"):
            call(planes[0], optics=OPTICS)
    with rtfocus.ImageProcessor(rtfocus.load_config("demo"), OPTICS) as processor:
        for call in (processor.restore, processor.classify):
            with pytest.raises(rtfocus.InputError, match="every pixel is NaN"):
                call(planes[0])
        assert processor.classify(planes[0], of_stack=True).estimate.level is None
    planes[1] = 100.0
    made = rtfocus.restore(planes, optics=OPTICS)
    assert np.isnan(made[0]).all()
    assert np.isfinite(made[1]).all()


def test_a_closed_processor_refuses_and_says_what_to_do():
    processor = rtfocus.ImageProcessor(rtfocus.load_config("demo"), OPTICS)
    processor.close()
    with pytest.raises(rtfocus.EngineError, match="closed; open a new one"):
        processor.restore(np.ones((96, 96), np.uint16))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_refuses_its_parents_processor_instead_of_waiting_for_ever():
    # Of its own: the test runner's threads are no part of it.
    code = """
import os, numpy as np, rtfocus
image = np.ones((96, 96), np.uint16)
with rtfocus.ImageProcessor(rtfocus.load_config("demo")) as processor:
    processor.classify(image)
    child = os.fork()
    try:
        processor.classify(image)
    except rtfocus.EngineError as error:
        print(error, flush=True)
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    said = "the ImageProcessor is of the process that forked; open a new one here\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_threads_that_share_a_processor_get_their_own_image():
    levels = np.arange(1, 7) * 100
    with rtfocus.ImageProcessor(rtfocus.load_config("demo"), OPTICS) as processor:

        def mean_of(level):
            image = np.full((96, 96), level, np.uint16)
            return processor.restore(image).restored.mean()

        with ThreadPoolExecutor(6) as pool:
            means = list(pool.map(mean_of, levels))
    assert np.allclose(means, levels, rtol=0.01)


def test_an_interrupted_image_keeps_its_slot_until_it_is_done(monkeypatch):
    image = np.random.default_rng(5).integers(0, 4000, (256, 256)).astype("u2")
    release, tickets, released = SlotPool.release, [], []

    def interrupted(ticket):
        tickets.append(ticket)
        raise KeyboardInterrupt

    def noted(pool, slot):
        released.append(not tickets or tickets[-1].result.done())
        release(pool, slot)

    with rtfocus.ImageProcessor(rtfocus.load_config("demo"), OPTICS) as processor:
        expected = processor.restore(image).restored
        with monkeypatch.context() as patch:
            patch.setattr("rtfocus.offline._result_of", interrupted)
            patch.setattr(SlotPool, "release", noted)
            with pytest.raises(KeyboardInterrupt):
                processor.restore(image)
        assert all(released)
        assert np.array_equal(processor.restore(image).restored, expected)
