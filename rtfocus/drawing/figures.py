"""Figures: charts, and panels of images with scale bar or axes and colour bar."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL.PngImagePlugin import PngInfo

from rtfocus.drawing.canvas import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    TEXT_PT,
    Box,
    Canvas,
    Colours,
    PixelCanvas,
    Point,
    coloured,
    text_width,
)

Floats = NDArray[np.float64]

_TICK_PT = 5.0
_SMALL_PT = 11.0
_MOST_POINTS = 1200
"""Of a curve; longer ones are drawn by the lowest and highest of each stretch."""


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    label: str
    """Quantity and unit, e.g. ``defocus (um)``."""
    low: float
    """At the left or lower end; may be the larger number."""
    high: float
    log: bool = False
    """Decades at equal distances; both ends are positive."""
    names: tuple[str, ...] = ()
    """Categories at 0, 1, 2 ... instead of numbers."""

    def share(self, values: ArrayLike) -> Floats:
        """Return where values lie between the ends, 0 to 1."""
        low, high, numbers = self.low, self.high, np.asarray(values, dtype=np.float64)
        if self.log:
            low, high = np.log10(low), np.log10(high)
            numbers = np.log10(np.maximum(numbers, self.low))
        return np.asarray((numbers - low) / ((high - low) or 1.0))

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Return where ticks are and what stands at them."""
        if self.names:
            return [(float(place), name) for place, name in enumerate(self.names)]
        if self.log:
            ends = np.ceil(np.log10(self.low)), np.floor(np.log10(self.high))
            powers = np.arange(int(ends[0]), int(ends[1]) + 1)
            return [(10.0**n, f"{10.0**n:g}") for n in powers]
        if self.low == self.high:
            return [(self.low, f"{self.low:g}")]
        low, high = sorted((self.low, self.high))
        step = nice_step(high - low, most)
        first = np.ceil(low / step - 1e-9)
        last = np.floor(high / step + 1e-9)
        digits = max(0, int(-np.floor(np.log10(step) + 1e-9)))
        values = [float(n * step) for n in np.arange(first, last + 1)]
        return [(value, f"{value + 0.0:.{digits}f}") for value in values]


def axis_of(label: str, *values: ArrayLike, zero: bool = False) -> Axis:
    """Return an axis that all finite values fit on, with a little room.

    Parameters
    ----------
    label
        Quantity and unit.
    *values
        What is to be shown.
    zero
        Whether 0 has to be on it.
    """
    parts = [np.asarray(one, dtype=np.float64).ravel() for one in values]
    joined = np.concatenate(parts) if parts else np.zeros(0)
    numbers = joined[np.isfinite(joined)]
    if zero or not numbers.size:
        numbers = np.append(numbers, 0.0)
    low, high = float(numbers.min()), float(numbers.max())
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    return Axis(
        label,
        low if zero and low == 0 else low - room,
        high if zero and high == 0 and low < 0 else high + room,
    )


def nice_step(span: float, most: int) -> float:
    """Return 1, 2 or 5 times a power of ten: at most `most` steps lie in `span`."""
    rough = max(span, 1e-12) / max(most, 1)
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(n * power for n in (1, 2, 5, 10) if n * power >= rough * 0.999))


@dataclass
class Chart:
    """A framed area with two axes; what is drawn is cut to it.

    Parameters
    ----------
    canvas
        What to draw on.
    box
        The area between the axes, in points.
    x, y
        The axes; y grows upwards.
    """

    canvas: Canvas
    box: Box
    x: Axis
    y: Axis
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        self._draw_ticks()
        self.canvas.box(self.box, edge=FAINT)
        middle = ((left + right) / 2, bottom + 32)
        self.canvas.text(middle, self.x.label, anchor="middle")
        widest = max(
            (text_width(text, _SMALL_PT) for _, text in self._rows()), default=0
        )
        beside = (left - widest - 20, (top + bottom) / 2)
        self.canvas.text(beside, self.y.label, anchor="middle", upright=True)

    def at(self, x: ArrayLike, y: ArrayLike) -> list[Point]:
        """Return points on the canvas, cut to the area."""
        left, top, right, bottom = self.box
        across = left + np.clip(self.x.share(x), 0, 1) * (right - left)
        down = bottom - np.clip(self.y.share(y), 0, 1) * (bottom - top)
        pairs = zip(np.atleast_1d(across), np.atleast_1d(down), strict=True)
        return [(float(a), float(d)) for a, d in pairs]

    def curve(
        self,
        x: ArrayLike,
        y: ArrayLike,
        colour: str = BLUE,
        name: str = "",
        dash: int = 0,
    ) -> None:
        """Draw a line through values; it breaks where one is not finite."""
        xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        for piece in _pieces(xs, ys):
            points = self.at(*_thinned(xs[piece], ys[piece]))
            if len(points) == 1:
                self.canvas.dot(points[0], colour, 2.0)
            else:
                self.canvas.line(points, colour, dash=dash)
        self.name(name, colour)

    def dots(
        self, x: ArrayLike, y: ArrayLike, colour: str = BLUE, name: str = ""
    ) -> None:
        """Draw a dot per value; of very many, every n-th."""
        points = self.at(x, y)
        for point in points[:: max(1, -(-len(points) // _MOST_POINTS))]:
            self.canvas.dot(point, colour)
        self.name(name, colour)

    def level(self, y: float, colour: str = FAINT, dash: int = 4) -> None:
        """Draw a horizontal line."""
        self.canvas.line(self.at([self.x.low, self.x.high], [y, y]), colour, 1.0, dash)

    def upright(self, x: float, colour: str = FAINT, dash: int = 4) -> None:
        """Draw a vertical line."""
        self.canvas.line(self.at([x, x], [self.y.low, self.y.high]), colour, 1.0, dash)

    def bars(self, edges: Floats, heights: ArrayLike) -> None:
        """Draw bars between neighbouring edges."""
        base = max(self.y.low, 0.0)
        for low, high, tall in zip(edges, edges[1:], np.asarray(heights), strict=False):
            (left, bottom), (right, top) = self.at([low, high], [base, tall])
            if bottom - top > 0:
                self.canvas.box((left, top, right - 1, bottom), fill=BLUE)

    def name(self, name: str, colour: str) -> None:
        """Put a name in its colour above the area, beside those before."""
        if not name:
            return
        left, top = self.box[:2]
        for earlier, _ in self._legend:
            left += text_width(earlier) + 34
        self._legend.append((name, colour))
        self.canvas.line([(left, top - 12), (left + 14, top - 12)], colour, 3.0)
        self.canvas.text((left + 18, top - 12), name)

    def _rows(self) -> list[tuple[float, str]]:
        return self.y.ticks(max(2, int((self.box[3] - self.box[1]) / 24)))

    def _draw_ticks(self) -> None:
        left, top, right, bottom = self.box
        for value, text in self.x.ticks(max(2, int((right - left) / 56))):
            place = left + float(self.x.share(value)) * (right - left)
            self.canvas.line([(place, bottom), (place, bottom + _TICK_PT)], INK, 1.0)
            self.canvas.text(
                (place, bottom + 14), text, anchor="middle", size=_SMALL_PT
            )
        for value, text in self._rows():
            height = bottom - float(self.y.share(value)) * (bottom - top)
            self.canvas.line([(left - _TICK_PT, height), (left, height)], INK, 1.0)
            self.canvas.text(
                (left - _TICK_PT - 3, height), text, anchor="end", size=_SMALL_PT
            )


def _pieces(x: Floats, y: Floats) -> Sequence[slice]:
    """Return the stretches in which both are finite."""
    known = np.concatenate([[False], np.isfinite(x) & np.isfinite(y), [False]])
    starts, stops = (
        np.flatnonzero(np.diff(known.astype(np.int8)) == s) for s in (1, -1)
    )
    return [slice(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Keep the lowest and highest of each stretch of a long curve, in order."""
    if len(x) <= _MOST_POINTS:
        return x, y
    indices: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), _MOST_POINTS // 2):
        indices |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    places = np.array(sorted(indices))
    return x[places], y[places]


_GAP_PT, _CAPTION_PT, _FOOT_PT, _BAR_PT, _TICKS_PT = 14.0, 22.0, 12.0, 9.0, 44.0
_AXES_PT, _UNIT_PT = 46.0, 20.0
_LEAST_SMOOTH_PX = 64
"""Images of fewer pixels are shown as squares: each pixel matters."""


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


def save_panels(
    path: Path,
    panels: Sequence[Panel],
    *,
    columns: int,
    side_pt: float = 256.0,
    words: PngInfo | None = None,
) -> None:
    """Write panels in rows of `columns` as a PNG; `side_pt`: their longer side."""
    canvas = PixelCanvas(*figure_size(panels, columns, side_pt))
    draw_panels(canvas, panels, columns=columns, side_pt=side_pt)
    canvas.save(path, words)


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


def draw_through_focus(z_um: Floats, share: Floats, read_um: Floats) -> PixelCanvas:
    """Draw sharpness and the engine's reading over z.

    Parameters
    ----------
    z_um
        Of the stage from focus, by plane.
    share
        Sharpness of its best, 0 to 1.
    read_um
        Distance from focus that the engine read; NaN: none.
    """
    width, height, left = 560.0, 260.0, 72.0
    canvas = PixelCanvas(width, 2 * height)
    x = axis_of("stage z from focus (um)", z_um)
    upper = (left, 30.0, width - 16, height - 50.0)
    above = Chart(canvas, upper, x, axis_of("sharpness, of its best", share, zero=True))
    above.curve(z_um, share, BLUE, "sharpness")
    above.dots(z_um, share, BLUE)
    lower = (left, 30.0 + height, width - 16, 2 * height - 50.0)
    true_um, known = np.abs(z_um), np.isfinite(read_um)
    y = axis_of("distance from focus (um)", read_um, true_um, zero=True)
    below = Chart(canvas, lower, x, y)
    below.curve(z_um, true_um, FAINT, "true", dash=4)
    below.curve(z_um, read_um, ORANGE, "read by the engine")
    below.dots(z_um[known], read_um[known], ORANGE)
    for chart in (above, below):
        chart.upright(0.0)
    return canvas
