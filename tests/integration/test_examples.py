"""The scripts in ``examples`` do what they say; what they leave is read back.

So does the Python that the pages show.
"""

import io
import re
import runpy
import shutil
import sys
import threading
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

import rtfocus
from rtfocus.config.sections import PreviewConfig
from rtfocus.frame import Estimate
from rtfocus.transport.preview import PreviewPublisher
from rtfocus.writers.check import check_run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def example(name: str, *arguments: object) -> dict[str, object]:
    """Run an example as a script; return its variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested():
    text = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in text


def test_an_array_is_restored(capsys):
    left = example("restore_an_array.py")
    assert left["restored"].shape == left["blurred"].shape
    assert "restored (384, 384) uint16" in capsys.readouterr().out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of the example, opened again."""
    left = example("read_a_run.py", tmp_path_factory.mktemp("runs"))
    return rtfocus.open_run(left["run"].folder)


def test_a_run_is_complete_and_reported(recorded):
    assert recorded.outcome.is_complete
    assert recorded.report["accounting"]["written"] == 5
    assert recorded.positions == ("p0",)
    assert recorded.channels == ("DAPI",)
    assert recorded.pixel_size_um == 0.65
    assert len(repr(recorded)) < 200
    assert "planned={'t': 5" in repr(recorded)
    assert recorded.config["run"]["name"] == "example"


@pytest.mark.parametrize("kind", ["raw", "restored", "defocus"])
def test_images_of_a_run_are_arrays_that_are_read_when_asked(kind, recorded):
    image = getattr(recorded, kind)
    assert image.axes == ("t", "c", "z", "y", "x")
    assert image.shape[:3] == (5, 1, 1)
    assert image.ndim == 5
    assert len(image) == 5
    stored = zarr.open_group(recorded.folder / f"{kind}.ome.zarr", mode="r")["0"]
    assert image.dtype == stored.dtype
    assert np.array_equal(image[2, 0, 0], stored[2, 0, 0], equal_nan=True)
    assert np.array_equal(np.asarray(image), stored[...], equal_nan=True)
    step_um = 0.65 if kind != "defocus" else 48 * 0.65
    assert image.pixel_size_um == pytest.approx((step_um, step_um))


def test_frames_are_a_table(recorded):
    table = recorded.frames
    assert list(table["sequence"]) == list(range(len(table)))
    # The demo holds focus: images of the search for it are rows too.
    assert set(table["status"]) == {"written", "focus"}
    frames = table[table["status"] == "written"]
    assert list(frames["t"]) == [0, 1, 2, 3, 4]
    assert (frames["exposure_ms"] == 10).all()
    assert (frames["durable_ns"] > frames["captured_ns"]).all()
    assert np.isfinite(frames["defocus_um"]).all()
    # The estimate is of the tiles that the map holds.
    tiles = recorded.defocus[0, 0, 0]
    assert np.nanmin(tiles) <= frames["defocus_um"][0] <= np.nanmax(tiles)


@pytest.mark.parametrize(
    ("page", "number", "made"),
    [
        ("README.md", 0, {"restored", "found", "run", "plane", "table"}),
        ("docs/reference/python.md", 0, {"restored", "found"}),
        ("docs/reference/python.md", 1, {"sharp"}),
        ("docs/reference/python.md", 2, {"results", "found"}),
        ("docs/reference/python.md", 3, {"run", "plane", "table"}),
        ("docs/reference/images.md", 0, {"found", "plane"}),
    ],
)
def test_what_a_page_shows_runs(page, number, made, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(1).poisson(500, (96, 96)).astype(np.uint16)
    shutil.copytree(recorded.folder, "runs/demo.rtfocus")
    Path("experiment").mkdir()
    tifffile.imwrite("experiment/cells.tif", image)
    stated = "numerical_aperture: 0.5, wavelength_nm: 520, pixel_size_um: 0.65"
    Path("my.yaml").write_text(
        f"channels: [{{name: DAPI, optics: {{{stated}}}}}]", "utf-8"
    )
    text = (ROOT / page).read_text("utf-8")
    names = {"rtfocus": rtfocus, "image": image, "images": [image]}
    names |= {"stack": [image] * 5, "z_um": range(5)}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number], names)
    assert made <= set(names)


def test_a_script_of_your_own_is_recorded_beside_your_own_file(tmp_path, capsys):
    left = example("stream_from_your_script.py", tmp_path)
    said = capsys.readouterr().out
    assert "10 of 10 planned frames in" in said
    assert "frame " in said
    run = left["run"]
    assert run.outcome.is_complete
    assert run.folder == tmp_path / "streamed.rtfocus"
    assert run.channels == ("DAPI", "FITC")
    assert check_run(run.folder).problems == []
    mine = tifffile.imread(left["mine"])
    assert np.array_equal(run.raw[:, :, 0], mine.reshape(5, 2, 512, 512))


def test_what_a_run_does_not_have_is_named(recorded, tmp_path):
    with pytest.raises(rtfocus.InputError, match=r"no position 'B2'; it has 'p0'"):
        recorded.image("raw", "B2")
    with pytest.raises(rtfocus.InputError, match=r"no image 'sharp'.*'raw'"):
        recorded.image("sharp")
    with pytest.raises(rtfocus.WriterError, match="no run folder"):
        rtfocus.open_run(tmp_path)


@contextmanager
def offering(done: threading.Event):
    """Offer an estimate every 10 ms until `done`; yield where."""
    config = PreviewConfig(endpoint="tcp://127.0.0.1:*", interval_s=0.001)
    publisher = PreviewPublisher(config)
    pixels = np.zeros((8, 8), "u1")

    def offer():
        # A viewer that has just come misses what was sent before.
        number = 0
        while not done.wait(0.01):
            # Each twice, as a frame's comes with its picture again.
            publisher.offer(pixels, estimate(number // 2), {})
            number += 1

    thread = threading.Thread(target=offer)
    thread.start()
    try:
        yield publisher.endpoint
    finally:
        done.set()
        thread.join()
        publisher.close()


def test_estimates_come_in_order_and_stop_when_told():
    stop, seen = threading.Event(), []
    with offering(threading.Event()) as endpoint:
        for one in rtfocus.estimates(endpoint, stop=stop):
            seen.append(one)
            if len(seen) == 3:
                stop.set()
    numbers = [one.sequence for one in seen]
    assert len(numbers) == 3
    assert numbers == sorted(set(numbers))
    assert all(one == estimate(one.sequence) for one in seen)


class Lines(io.StringIO):
    """Text that says when it has three lines."""

    def __init__(self, done):
        super().__init__()
        self._done = done

    def write(self, text):
        number = super().write(text)
        if self.getvalue().count("\n") >= 3:
            self._done.set()
        return number


def test_estimates_are_printed_until_nothing_comes():
    done = threading.Event()
    text = Lines(done)
    with offering(done) as endpoint, redirect_stdout(text):
        example("watch_estimates.py", endpoint, 3)
    assert len(text.getvalue().splitlines()) >= 3
    for line in text.getvalue().splitlines():
        assert line.endswith("2.0 um 50 %")


def test_estimates_end_when_nothing_comes():
    config = PreviewConfig(endpoint="tcp://127.0.0.1:*")
    publisher = PreviewPublisher(config)
    try:
        assert list(rtfocus.estimates(publisher.endpoint, timeout_s=0.05)) == []
    finally:
        publisher.close()


def estimate(number: int) -> Estimate:
    return Estimate(
        series_uid="a",
        sequence=number,
        level=1,
        defocus_um=2.0,
        signed=False,
        confidence=0.5,
        foreground=1.0,
        z_um=None,
        z_offset_um=0.0,
        index={"t": number},
        captured_ns=0,
        estimated_ns=1,
    )
