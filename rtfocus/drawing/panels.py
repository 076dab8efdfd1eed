"""Panels: images side by side, each with scale bar or axes and with its colour bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.drawing.canvas import INK, TEXT_PT, Box, Canvas, PixelCanvas, text_width
from rtfocus.drawing.charts import Axis, Chart

Colours = Literal["grey", "even", "around"]

# Anchors of perceptually even scales: from dark blue over green to yellow (viridis),
# and for signed values from blue over white to red, white at zero.
_EVEN = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_AROUND = (
    (33, 102, 172),
    (146, 197, 222),
    (247, 247, 247),
    (244, 165, 130),
    (178, 24, 43),
)
_GREY = ((0, 0, 0), (255, 255, 255))
_SCALES = {
    name: np.array(anchors)
    for name, anchors in (("grey", _GREY), ("even", _EVEN), ("around", _AROUND))
}
_NOTHING = np.array([110, 110, 110])
"""Where there is no value: background, or no frame."""

_GAP_PT, _CAPTION_PT, _FOOT_PT, _BAR_PT, _TICKS_PT = 14.0, 22.0, 12.0, 9.0, 44.0
_AXES_PT, _UNIT_PT = 46.0, 20.0
_SMALL_PT = 11.0
_LEAST_SMOOTH_PX = 64
"""Images of fewer pixels are shown as squares: their pixels are what is looked at."""


@dataclass(frozen=True)
class Panel:
    """One image, or a map of values, with its caption."""

    caption: str
    pixels: NDArray[np.generic]
    """Axes (y, x): values; (y, x, 3): colours as they are, uint8."""
    low: float = 0.0
    """Value of the lower end of the colours."""
    high: float = 255.0
    unit: str = "counts"
    """Of the values; written at the colour bar."""
    colours: Colours = "grey"
    """``grey``; ``even`` for amounts; ``around`` for what has a sign."""
    pixel_um: float | None = None
    """Side of a pixel in the specimen: draws a scale bar. None: draws none."""
    x: Axis | None = None
    """What the columns stand for, where they are no place in the specimen."""
    y: Axis | None = None
    """What the rows stand for, from the lowest row up."""
    mark: tuple[float, float] | None = None
    """Place of a cross: shares of width and height."""
    smooth: bool | None = None
    """Whether it is resampled evenly; None: images are, small maps are not."""

    @property
    def has_bar(self) -> bool:
        """Tell whether values are shown, so that a colour bar says which."""
        return self.pixels.ndim == 2


def coloured(
    values: NDArray[np.generic], low: float, high: float, colours: Colours = "even"
) -> NDArray[np.uint8]:
    """Return colours (y, x, 3) of values; NaN is middle grey."""
    numbers = values.astype(np.float32)
    place = (numbers - low) * (255 / max(high - low, 1e-9)) + 0.5
    known = ~np.isnan(place)
    steps = np.where(known, np.clip(place, 0, 255), 256).astype(np.intp)
    return _table(colours)[steps]


@lru_cache
def _table(colours: Colours) -> NDArray[np.uint8]:
    """Return 256 colours from low to high, and the one of no value."""
    anchors = _SCALES[colours]
    places = np.linspace(0, 255, len(anchors))
    ramp = [np.interp(np.arange(256), places, part) for part in anchors.T]
    return np.vstack([np.stack(ramp, axis=1), _NOTHING]).astype(np.uint8)


def enlarge(values: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Repeat the pixels of a small map up to `shape` (y, x), nearest neighbour."""
    rows = np.arange(shape[0]) * values.shape[0] // shape[0]
    columns = np.arange(shape[1]) * values.shape[1] // shape[1]
    repeated: NDArray[np.generic] = values[rows][:, columns]
    return repeated


def save_panels(
    path: Path, panels: Sequence[Panel], *, columns: int, side_pt: float = 256.0
) -> None:
    """Write panels in rows of `columns` as a PNG; `side_pt`: their longer side."""
    canvas = PixelCanvas(*figure_size(panels, columns, side_pt))
    draw_panels(canvas, panels, columns=columns, side_pt=side_pt)
    canvas.save(path)


def figure_size(
    panels: Sequence[Panel], columns: int, side_pt: float
) -> tuple[float, float]:
    """Return width and height in points of panels in rows of `columns`."""
    width, height = _cell(panels, side_pt)
    rows = -(-len(panels) // columns)
    return columns * width + _GAP_PT, rows * height + _GAP_PT


def draw_panels(
    canvas: Canvas, panels: Sequence[Panel], *, columns: int, side_pt: float
) -> list[Box]:
    """Draw panels in rows of `columns`; all have room of one size.

    Returns
    -------
    list of Box
        Where their images lie.
    """
    boxes = []
    width, height = _cell(panels, side_pt)
    left_margin = _AXES_PT if any(panel.y for panel in panels) else 0.0
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left = _GAP_PT + column * width + left_margin
        top = _GAP_PT + row * height
        boxes.append(_draw(canvas, panel, left, top, side_pt))
    return boxes


def _cell(panels: Sequence[Panel], side_pt: float) -> tuple[float, float]:
    """Return the room a panel takes: the largest of all."""
    sizes = [_size(panel, side_pt) for panel in panels]
    width = max(size[0] for size in sizes) + _GAP_PT
    height = max(size[1] for size in sizes) + _CAPTION_PT + _FOOT_PT
    if any(panel.has_bar for panel in panels):
        width += _BAR_PT + _TICKS_PT + 6
    width += _AXES_PT if any(panel.y for panel in panels) else 0.0
    height += _AXES_PT - _FOOT_PT if any(panel.x for panel in panels) else 0.0
    return width, height


def _size(panel: Panel, side_pt: float) -> tuple[float, float]:
    """Return width and height of the image itself."""
    if panel.x or panel.y:
        return side_pt, side_pt
    rows, columns = panel.pixels.shape[:2]
    scale = side_pt / max(rows, columns)
    return columns * scale, rows * scale


def _draw(canvas: Canvas, panel: Panel, left: float, top: float, side: float) -> Box:
    width, height = _size(panel, side)
    top += _CAPTION_PT
    box = (left, top, left + width, top + height)
    # A long caption is written smaller, never into its neighbour.
    room = (width + _BAR_PT + _TICKS_PT) / max(text_width(panel.caption), 1e-9)
    canvas.text((left, top - 12), panel.caption, size=TEXT_PT * min(1.0, room))
    smooth = panel.smooth
    if smooth is None:
        smooth = (
            panel.colours == "grey" and min(panel.pixels.shape[:2]) >= _LEAST_SMOOTH_PX
        )
    if panel.has_bar:
        pixels = coloured(panel.pixels, panel.low, panel.high, panel.colours)
        # Grey needs one plane only.
        pixels = pixels[..., 0] if panel.colours == "grey" else pixels
    else:
        pixels = panel.pixels.astype(np.uint8)
    canvas.image(box, pixels, smooth=smooth)
    if panel.x and panel.y:
        Chart(canvas, box, panel.x, panel.y)
    if panel.mark is not None:
        _cross(canvas, box, panel.mark)
    if panel.pixel_um:
        _scale_bar(canvas, box, panel.pixel_um * panel.pixels.shape[1])
    if panel.has_bar:
        _colour_bar(canvas, panel, box)
    return box


def _cross(canvas: Canvas, box: Box, place: tuple[float, float]) -> None:
    left, top, right, bottom = box
    x, y = left + place[0] * (right - left), top + place[1] * (bottom - top)
    for dx, dy in ((6, 0), (0, 6)):
        canvas.line([(x - dx, y - dy), (x + dx, y + dy)], "#ff3030", 2.0)


def _scale_bar(canvas: Canvas, box: Box, width_um: float) -> None:
    """Draw a bar of a round length, a tenth to a quarter of the width, on black."""
    left, _, right, bottom = box
    power = 10.0 ** np.floor(np.log10(width_um / 4))
    length = max(n * power for n in (1, 2, 5) if n * power <= width_um / 4)
    long = length / width_um * (right - left)
    words = f"{length:g} um"
    room = max(long, text_width(words, _SMALL_PT)) + 12
    ground = (left + 5, bottom - 29, left + 5 + room, bottom - 5)
    canvas.box(ground, fill="#000000")
    canvas.line(
        [(left + 11, bottom - 10), (left + 11 + long, bottom - 10)], "#ffffff", 3.0
    )
    canvas.text((left + 11, bottom - 20), words, colour="#ffffff", size=_SMALL_PT)


def _colour_bar(canvas: Canvas, panel: Panel, box: Box) -> None:
    """Draw the colours from low to high beside the image, with numbers and unit."""
    _, top, right, bottom = box
    left = right + 6
    ramp = np.linspace(panel.high, panel.low, 128)[:, np.newaxis]
    bar = (left, top + _UNIT_PT, left + _BAR_PT, bottom)
    canvas.image(
        bar, coloured(ramp, panel.low, panel.high, panel.colours), smooth=False
    )
    canvas.text((left, top + 4), panel.unit, size=_SMALL_PT)
    axis = Axis("", panel.low, panel.high)
    for value, words in axis.ticks(max(2, int((bottom - top) / 44))):
        height = bottom - float(axis.share(value)) * (bottom - top - _UNIT_PT)
        canvas.line([(left + _BAR_PT, height), (left + _BAR_PT + 3, height)], INK, 1.0)
        canvas.text((left + _BAR_PT + 5, height), words, size=_SMALL_PT)
