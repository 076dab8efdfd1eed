"""Charts and panels: ticks, places, colours, and that PNG and SVG show the same."""

import re
import xml.etree.ElementTree as ElementTree
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtfocus.drawing.canvas import BLUE, PixelCanvas, SvgCanvas, coloured
from rtfocus.drawing.figures import Axis, Chart, Panel, axis_of, save_panels


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis("", 0, 10), ["0", "2", "4", "6", "8", "10"]),
        (Axis("", -0.3, 0.31), ["-0.2", "0.0", "0.2"]),
        (Axis("", 5, -5), ["-4", "-2", "0", "2", "4"]),
        (Axis("", 0.5, 200, log=True), ["1", "10", "100"]),
        (Axis("", -0.5, 1.5, names=("a", "b")), ["a", "b"]),
        (Axis("", 3, 3), ["3"]),
    ],
)
def test_ticks_are_round_and_within(axis: Axis, ticks: list[str]) -> None:
    assert [text for _, text in axis.ticks(5)] == ticks


@pytest.mark.parametrize(
    "values", [[], [np.nan], [0.0], [7.0, 7.0], [-1e9, 1e9], [np.inf, 2.0]]
)
def test_axis_holds_whatever_is_finite(values: list[float]) -> None:
    axis = axis_of("x", values)
    assert axis.low < axis.high
    inside = axis.share([v for v in values if np.isfinite(v)])
    assert ((inside > 0) & (inside < 1)).all()


def test_chart_puts_values_where_the_axes_say() -> None:
    chart = Chart(
        PixelCanvas(200, 100), (20, 10, 120, 60), Axis("", 0, 1), Axis("", 4, 0)
    )
    assert chart.at([0, 0.5, 9], [4, 2, 0]) == [(20, 60), (70, 35), (120, 10)]


def test_curve_breaks_where_a_value_is_missing_and_long_ones_keep_their_peaks() -> None:
    canvas = SvgCanvas(300, 200, "curve")
    values = np.zeros(50_000)
    values[777], values[100] = 9.0, np.nan
    chart = Chart(canvas, (50, 20, 290, 160), Axis("", 0, 5e4), Axis("", 0, 10))
    chart.curve(np.arange(50_000), values)
    root = ElementTree.fromstring(canvas.element())
    drawn = [line for line in root.iter("polyline") if line.get("stroke") == BLUE]
    lines = [line.get("points", "") for line in drawn]
    assert len(lines) == 2
    assert len(lines[1].split()) < 1300
    assert min(float(p.split(",")[1]) for p in lines[1].split()) == 34.0


def test_colours_run_from_end_to_end_and_nothing_is_grey() -> None:
    shown = coloured(np.array([[-9.0, 0.0, 5.0, 10.0, 99.0, np.nan]]), 0, 10)
    assert shown[0, 0].tolist() == shown[0, 1].tolist() == [68, 1, 84]
    assert shown[0, 3].tolist() == shown[0, 4].tolist() == [253, 231, 37]
    assert shown[0, 5].tolist() == [110, 110, 110]
    middle = coloured(np.array([[0.0]]), -3, 3, "around")[0, 0]
    assert middle.min() > 240, "zero is white"


def test_signed_colours_are_those_of_the_page() -> None:
    page = resources.files("rtfocus.view") / "page" / "maps.js"
    line = re.search(r"DIVERGING = \[(.*?)\]", page.read_text(encoding="utf-8"))
    assert line is not None
    theirs = [tuple(bytes.fromhex(one)) for one in re.findall(r'"(\w+)"', line[1])]
    low, high = len(theirs) // 2, -(len(theirs) // 2)
    ours = coloured(np.arange(high, low + 1)[None], high, low, "around")[0]
    assert np.abs(ours.astype(int) - np.array(theirs)).max() <= 2  # 256 steps


def test_panel_has_its_scale_bar_of_a_round_length(tmp_path: Path) -> None:
    grey = np.full((100, 100), 128, np.uint8)
    panel = Panel("a", grey, 0, 255, pixel_um=1.0)
    save_panels(tmp_path / "a.png", [panel], columns=1, side_pt=200)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    # Twice the points: the image is 400 pixels for 100 um; below 22 + 14 points.
    inside = picture[72:472, 28:428]
    white = (inside == 255).all(axis=2)
    assert white.sum(axis=1).max() in range(78, 84), "20 um are a fifth of the width"
    assert (inside[:200] == 128).all()


def test_svg_escapes_words_and_writes_micrometres() -> None:
    canvas = SvgCanvas(10, 10, "a & b")
    canvas.text((0, 0), "<z> (um), 3 um, album")
    root = ElementTree.fromstring(canvas.element())
    assert [t.text for t in root.iter("text")] == ["<z> (µm), 3 µm, album"]
