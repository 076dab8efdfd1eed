"""Canvas: lines, boxes, words and images, as a PNG or as SVG; values as colours.

What is drawn knows neither, so that a picture file and the same picture in a report
look alike. Lengths are points: the PNG has two pixels to a point.
"""

import base64
import html
import io
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Anchor = Literal["start", "middle", "end"]

INK = "ink"
"""Words and axes: black on white, or what the page writes in."""
FAINT = "faint"
"""Grids and what is of less weight."""
BLUE, ORANGE, GREEN, PINK, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
"""Colours that the colour-blind tell apart (Okabe and Ito 2008)."""

TEXT_PT = 12.0
_PIXELS_PER_POINT = 2
_PAPER = {INK: "#1a1a1a", FAINT: "#9a9a9a"}
_PAGE = {INK: "currentColor", FAINT: "#8a8a8a"}


class Canvas(Protocol):
    """Something to draw on."""

    size: tuple[float, float]
    """Width and height in points."""

    def line(
        self, points: Sequence[Point], colour: str, width: float = 1.5, dash: int = 0
    ) -> None:
        """Draw a line through points; `dash`: length of its dashes, 0: none."""

    def box(
        self, box: Box, *, fill: str | None = None, edge: str | None = None
    ) -> None:
        """Draw a rectangle."""

    def dot(self, at: Point, colour: str, radius: float = 3.0) -> None:
        """Draw a filled circle."""

    def text(
        self,
        at: Point,
        words: str,
        *,
        anchor: Anchor = "start",
        colour: str = INK,
        size: float = TEXT_PT,
        upright: bool = False,
    ) -> None:
        """Write words whose middle height is at `at`; `upright`: from below to top."""

    def image(self, box: Box, pixels: NDArray[np.uint8], *, smooth: bool) -> None:
        """Put an image (y, x) or (y, x, 3) into a box; `smooth`: not as squares."""


class PixelCanvas:
    """A canvas that becomes a PNG.

    Parameters
    ----------
    width, height
        In points.
    """

    def __init__(self, width: float, height: float) -> None:
        self.size = width, height
        pixels = (round(_PIXELS_PER_POINT * width), round(_PIXELS_PER_POINT * height))
        self._picture = Image.new("RGB", pixels, "white")
        self._draw = ImageDraw.Draw(self._picture)

    def line(
        self, points: Sequence[Point], colour: str, width: float = 1.5, dash: int = 0
    ) -> None:
        """See `Canvas.line`."""
        fill, thick = _PAPER.get(colour, colour), round(_PIXELS_PER_POINT * width)
        for piece in _dashes(points, dash):
            self._draw.line([_px(p) for p in piece], fill, thick, joint="curve")

    def box(
        self, box: Box, *, fill: str | None = None, edge: str | None = None
    ) -> None:
        """See `Canvas.box`."""
        corners = (*_px(box[:2]), *_px(box[2:]))
        inside = None if fill is None else _PAPER.get(fill, fill)
        around = None if edge is None else _PAPER.get(edge, edge)
        self._draw.rectangle(corners, inside, around, _PIXELS_PER_POINT)

    def dot(self, at: Point, colour: str, radius: float = 3.0) -> None:
        """See `Canvas.dot`."""
        (x, y), r = _px(at), _PIXELS_PER_POINT * radius
        self._draw.ellipse((x - r, y - r, x + r, y + r), _PAPER.get(colour, colour))

    def text(
        self,
        at: Point,
        words: str,
        *,
        anchor: Anchor = "start",
        colour: str = INK,
        size: float = TEXT_PT,
        upright: bool = False,
    ) -> None:
        """See `Canvas.text`."""
        font, fill = _font(size), _PAPER.get(colour, colour)
        (x, y), place = _px(at), {"start": "l", "middle": "m", "end": "r"}[anchor]
        if not upright:
            self._draw.text((x, y), words, fill, font, anchor=f"{place}m")
            return
        width, height = int(font.getlength(words)) + 4, round(2.4 * size)
        strip = Image.new("L", (width, height))
        ImageDraw.Draw(strip).text((2, height / 2), words, 255, font, anchor="lm")
        strip = strip.rotate(90, expand=True)
        shift = {"start": width, "middle": width // 2, "end": 0}[anchor]
        corner = (round(x - height / 2), round(y - shift))
        self._picture.paste(fill, corner, strip)

    def image(self, box: Box, pixels: NDArray[np.uint8], *, smooth: bool) -> None:
        """See `Canvas.image`."""
        (left, top), (right, bottom) = _px(box[:2]), _px(box[2:])
        size = round(right) - round(left), round(bottom) - round(top)
        way = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        resized = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, way)
        self._picture.paste(resized, (round(left), round(top)))

    def save(self, path: Path, words: PngInfo | None = None) -> None:
        """Write the picture as PNG, with `words` in its metadata."""
        self._picture.save(path, format="PNG", pnginfo=words)


class SvgCanvas:
    """A canvas that becomes an ``<svg>`` element of a page.

    Parameters
    ----------
    width, height
        In points; the page may show it smaller.
    label
        What it shows, for those who cannot see it.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.size = width, height
        self._label = label
        self._parts: list[str] = []

    def line(
        self, points: Sequence[Point], colour: str, width: float = 1.5, dash: int = 0
    ) -> None:
        """See `Canvas.line`."""
        through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{through}" fill="none" stroke="{_page(colour)}" '
            f'stroke-width="{width:g}"{dashes}/>'
        )

    def box(
        self, box: Box, *, fill: str | None = None, edge: str | None = None
    ) -> None:
        """See `Canvas.box`."""
        self._parts.append(
            f'<rect {_place(box)} fill="{_page(fill)}" stroke="{_page(edge)}"/>'
        )

    def dot(self, at: Point, colour: str, radius: float = 3.0) -> None:
        """See `Canvas.dot`."""
        self._parts.append(
            f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}" '
            f'fill="{_page(colour)}"/>'
        )

    def text(
        self,
        at: Point,
        words: str,
        *,
        anchor: Anchor = "start",
        colour: str = INK,
        size: float = TEXT_PT,
        upright: bool = False,
    ) -> None:
        """See `Canvas.text`."""
        x, y = at
        fill = _page(colour)
        turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
            f'font-size="{size:g}" dominant-baseline="central" fill="{fill}"{turn}>'
            f"{in_html(words)}</text>"
        )

    def image(self, box: Box, pixels: NDArray[np.uint8], *, smooth: bool) -> None:
        """See `Canvas.image`; a smooth one becomes a JPEG."""
        data = io.BytesIO()
        kind: dict[str, Any] = (
            {"format": "JPEG", "quality": 88}
            if smooth
            else {"format": "PNG", "optimize": True}
        )
        Image.fromarray(np.ascontiguousarray(pixels)).save(data, **kind)
        code = base64.b64encode(data.getvalue()).decode("ascii")
        look = "" if smooth else ' style="image-rendering:pixelated"'
        self._parts.append(
            f'<image {_place(box)} preserveAspectRatio="none"{look} '
            f'href="data:image/{kind["format"].lower()};base64,{code}"/>'
        )

    def element(self) -> str:
        """Return the element."""
        width, height = self.size
        return (
            f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
            f'aria-label="{in_html(self._label)}">' + "".join(self._parts) + "</svg>"
        )


def in_html(words: str) -> str:
    """Escape words for a page, with the micro sign that a PNG's font lacks."""
    return html.escape(re.sub(r"(?:^|(?<=[ (\d]))um\b", "µm", words))


def text_width(words: str, size: float = TEXT_PT) -> float:
    """Return how many points words take across."""
    return float(_font(size).getlength(words)) / _PIXELS_PER_POINT


@lru_cache(maxsize=16)
def _font(size: float) -> Any:  # noqa: ANN401 (Pillow's two kinds of fonts)
    return ImageFont.load_default(size=_PIXELS_PER_POINT * size)


def _px(point: Sequence[float]) -> Point:
    return _PIXELS_PER_POINT * point[0], _PIXELS_PER_POINT * point[1]


def _page(colour: str | None) -> str:
    return "none" if colour is None else _PAGE.get(colour, colour)


def _place(box: Box) -> str:
    left, top, right, bottom = box
    return (
        f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
        f'height="{bottom - top:.1f}"'
    )


def _dashes(points: Sequence[Point], dash: int) -> Sequence[Sequence[Point]]:
    """Cut straight lines into dashes; Pillow has none."""
    if not dash:
        return [points]
    pieces: list[Sequence[Point]] = []
    for (x0, y0), (x1, y1) in pairwise(points):
        length = float(np.hypot(x1 - x0, y1 - y0))
        for start in np.arange(0.0, length, 2 * dash):
            ends = [start / length, min(start + dash, length) / length]
            pieces.append([(x0 + s * (x1 - x0), y0 + s * (y1 - y0)) for s in ends])
    return pieces


Colours = Literal["grey", "even", "around"]
# Anchors of perceptually even scales: from dark blue over green to yellow (viridis),
# and for signed values from blue over white to orange, white at zero: told apart
# with any colour vision, and the hues of napari's map and of the page of `view`.
_EVEN = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_AROUND = (
    (10, 58, 120),
    (31, 109, 181),
    (86, 165, 220),
    (169, 211, 238),
    (244, 244, 244),
    (247, 207, 155),
    (235, 154, 61),
    (192, 101, 15),
    (122, 58, 0),
)
_GREY = ((0, 0, 0), (255, 255, 255))
_SCALES = {
    name: np.array(anchors)
    for name, anchors in (("grey", _GREY), ("even", _EVEN), ("around", _AROUND))
}
_NOTHING = np.array([110, 110, 110])
"""Where there is no value: background, or no frame."""


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
