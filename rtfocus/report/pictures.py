"""Pictures of a report and of ``--picture``: charts, frames before and after."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtfocus.drawing.canvas import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PINK,
    SKY,
    Colours,
    SvgCanvas,
    enlarge,
    in_html,
)
from rtfocus.drawing.figures import (
    Axis,
    Chart,
    Panel,
    axis_of,
    draw_panels,
    figure_size,
    save_panels,
)
from rtfocus.errors import OutputError
from rtfocus.frame import DefocusMap, FrameResult, TileGrid
from rtfocus.image_set import ImageSet
from rtfocus.images.metadata import png_mark
from rtfocus.images.outputs import OutputGuard
from rtfocus.metrics import STEPS
from rtfocus.report.facts import RunFacts, ShownFrame
from rtfocus.transport.viewer import (
    FailureLine,
    FocusLine,
    HoldLine,
    LookLine,
    VerdictLine,
)

if TYPE_CHECKING:
    from rtfocus.offline import Kernels

_WIDTH, _LEFT, _RIGHT = 860.0, 92.0, 16.0
_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY)
_SIDE_PT, _MOST_SIDE_PX, _DETAIL_PX = 190.0, 380, 96
_WINDOW_PX = 512
_LONGEST_MS = 1e12  # longer is an error
_BINS = 40
_EVEN: Colours = "even"
_AROUND: Colours = "around"


def latency_chart(report: dict[str, Any]) -> str:
    """Draw the median, 95 %, 99 % and longest time of every step, as SVG."""
    drawn = ("p50_ms", "p95_ms", "p99_ms", "max_ms")
    stages = [
        (name, times)
        for name, times in report.get("stages", {}).items()
        if all(0 < (times.get(key) or 0) < _LONGEST_MS for key in drawn)
    ]
    if not stages:
        return ""
    times = [s[key] for _, s in stages for key in ("p50_ms", "max_ms")]
    low, high = min(times) / 1.5, max(times) * 1.5
    power = 10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high))
    names = tuple(STEPS.get(name, name) for name, _ in reversed(stages))
    height = 26.0 * len(stages)
    canvas = SvgCanvas(_WIDTH, height + 84, "Time of every step, in ms")
    box = (170.0, 28.0, _WIDTH - _RIGHT, 28.0 + height)
    x = Axis("time (ms), logarithmic", float(power[0]), float(power[1]), log=True)
    chart = Chart(canvas, box, x, Axis("", -0.5, len(stages) - 0.5, names=names))
    for tick, _ in x.ticks():
        chart.upright(tick)
    for row, (_, stage) in enumerate(reversed(stages)):
        chart.curve([stage["p50_ms"], stage["max_ms"]], [row, row], FAINT)
    marks = (
        ("p50_ms", "median", BLUE),
        ("p95_ms", "95 % within", GREEN),
        ("p99_ms", "99 % within", ORANGE),
        ("max_ms", "longest", INK),
    )
    for key, name, colour in marks:
        values = [stage[key] for _, stage in reversed(stages)]
        chart.dots(values, range(len(stages)), colour, name)
    return canvas.element()


def trace_charts(facts: RunFacts) -> str:
    """Draw defocus, z and latency over time below one another, as SVG."""
    rows: list[tuple[str, NDArray[np.float64], bool]] = []
    if np.isfinite(facts.defocus_um).any():
        sign = "defocus (um)" if facts.signed else "distance from focus (um)"
        rows.append((sign, facts.defocus_um, True))
    if np.isfinite(facts.z_um).any():
        rows.append(("stage z (um)", facts.z_um, False))
    if np.isfinite(facts.durable_ms).any():
        rows.append(("saved on disk after (ms)", facts.durable_ms, True))
    if not rows or len(facts.seconds) < 2:
        return ""
    label = "time since the first frame (s)"
    x = Axis(label, 0.0, max(float(facts.seconds.max()), 1e-3))
    canvas = SvgCanvas(_WIDTH, 202.0 * len(rows) + 16, "Focus, z and time until saved")
    for number, (name, values, zero) in enumerate(rows):
        top = 28.0 + 202.0 * number
        box = (_LEFT, top, _WIDTH - _RIGHT, top + 128.0)
        chart = Chart(canvas, box, x, axis_of(name, values, zero=zero))
        _traces(facts, chart, values)
        if values is facts.z_um:
            _moves(facts, chart)
    return canvas.element()


def histogram_chart(facts: RunFacts) -> str:
    """Draw how often which defocus was found, as SVG."""
    known = facts.defocus_um[np.isfinite(facts.defocus_um)]
    if not known.size:
        return ""
    low = min(float(known.min()), 0.0)
    high = max(float(known.max()), 0.1)
    edges = np.linspace(low, high, _BINS + 1)
    heights, _ = np.histogram(known, edges)
    canvas = SvgCanvas(_WIDTH, 240.0, "Distribution of defocus")
    name = "defocus (um)" if facts.signed else "distance from focus (um)"
    box = (_LEFT, 28.0, _WIDTH - _RIGHT, 184.0)
    y = axis_of("frames", heights * facts.every, zero=True)
    chart = Chart(canvas, box, Axis(name, low, high), y)
    chart.bars(edges, heights * facts.every)
    middle = float(np.median(known))
    chart.upright(middle, ORANGE)
    chart.name(f"median {middle:.2f} um", ORANGE)
    return canvas.element()


def frame_pictures(facts: RunFacts, frames: Sequence[ShownFrame]) -> str:
    """Draw every frame before and after, whole and in detail, with its map; as SVG."""
    series, grid = facts.header.series, facts.header.grid
    far = farthest_um(frames)
    parts = []
    for frame in frames:
        panels = frame_panels(frame, series.pixel_size_um, grid, far)
        size = figure_size(panels, len(panels), _SIDE_PT)
        canvas = SvgCanvas(*size, f"{frame.title} frame before and after")
        draw_panels(canvas, panels, columns=len(panels), side_pt=_SIDE_PT)
        parts.append(f"<h3>{_heading(facts, frame)}</h3>{canvas.element()}")
    return "".join(parts)


def frame_panels(
    frame: ShownFrame, pixel_um: float | None, grid: TileGrid | None, far_um: float
) -> list[Panel]:
    """Return raw and restored, whole and in detail, and the defocus map.

    Parameters
    ----------
    frame
        What is known of it.
    pixel_um
        In the specimen; None: not known, there are no scale bars.
    grid
        Of the map.
    far_um
        Distance at the end of the map's colours.
    """
    panels = _pixel_panels(frame, pixel_um)
    if frame.defocus is not None and grid is not None:
        low, colours = (-far_um, _AROUND) if grid.signed else (0.0, _EVEN)
        tile_um = grid.stride_px * pixel_um if pixel_um else None
        unseen = "; grey: background" if np.isnan(frame.defocus).any() else ""
        panels.append(
            Panel(
                f"defocus by tile{unseen}",
                frame.defocus,
                low,
                far_um,
                "um",
                colours,
                tile_um,
            )
        )
    return panels


def _traces(facts: RunFacts, chart: Chart, values: NDArray[np.float64]) -> None:
    """Draw a line, or dots in a colour per position where neighbours differ."""
    sizes = facts.header.series.sizes
    positions = [p.name for p in facts.header.series.positions]
    jumps = (sizes.get("z") or 1) > 1 or (sizes.get("c") or 1) > 1
    if len(positions) == 1 and not jumps:
        chart.curve(facts.seconds, values)
        return
    draw: Callable[..., None] = chart.dots if jumps else chart.curve
    if len(positions) > len(_COLOURS):
        chart.dots(facts.seconds, values)
        return
    for p, name in enumerate(positions):
        mine = facts.position == p
        short = name if len(name) < 24 else f"{name[:22]}.."
        draw(facts.seconds[mine], values[mine], _COLOURS[p], short)


def _moves(facts: RunFacts, chart: Chart) -> None:
    """Mark what autofocus did: moves to hold or find focus, and failed searches."""
    log = facts.focus_log
    moved = [
        line
        for line in log
        if (isinstance(line, HoldLine) and line.step_um)
        or (isinstance(line, LookLine) and line.way_um)
    ]
    kinds = (
        (moved, GREEN, "autofocus moved"),
        (searches_failed(log), ORANGE, "search failed"),
    )
    for lines, colour, name in kinds:
        times = [(line.time_ns - facts.first_ns) / 1e9 for line in lines]
        thinned = times[:: max(1, len(times) // 200)]
        for seconds in thinned:
            chart.upright(seconds, colour, dash=2)
        chart.name(f"{name} ({len(times)})" if times else "", colour)


def searches_failed(log: list[FocusLine]) -> list[FailureLine | VerdictLine]:
    """Return the ends of searches that broke off, or found no focus."""
    ends = [line for line in log if isinstance(line, FailureLine | VerdictLine)]
    return [line for line in ends if isinstance(line, FailureLine) or not line.focused]


def _heading(facts: RunFacts, frame: ShownFrame) -> str:
    place = ", ".join(f"{axis} {n}" for axis, n in frame.index.items() if axis != "p")
    names = [position.name for position in facts.header.series.positions]
    where = names[frame.index["p"]] if frame.index["p"] < len(names) else "?"
    far = "" if frame.defocus_um is None else f": {frame.defocus_um:.2f} um from focus"
    words = f"{frame.title.capitalize()} frame{far} ({place}, position {where})"
    return in_html(words)


def _pixel_panels(frame: ShownFrame, pixel_um: float | None) -> list[Panel]:
    """Return raw and restored, whole and in detail, between the same counts."""
    images = [("raw", _grey(frame.raw))]
    if frame.restored is not None:
        images.append(("restored", _grey(frame.restored)))
    # Of a large frame every n-th pixel: all of them would take most of a report's time.
    step = max(1, min(frame.raw.shape[:2]) // _WINDOW_PX)
    sample = images[0][1][::step, ::step]
    low, high = (float(v) for v in np.nanpercentile(sample, (0.5, 99.8)))
    high = max(high, low + 1.0)
    panels = []
    for name, image in images:
        small, factor = _reduced(image)
        panels.append(Panel(name, small, low, high, pixel_um=_times(pixel_um, factor)))
    window = _detail(images[0][1])
    for name, image in images:
        piece = enlarge(image[window], (4 * _DETAIL_PX, 4 * _DETAIL_PX))
        caption = f"{name}, detail"
        panels.append(
            Panel(caption, piece, low, high, pixel_um=_times(pixel_um, _zoom(image)))
        )
    return panels


def _times(pixel_um: float | None, factor: float) -> float | None:
    return None if pixel_um is None else factor * pixel_um


def _zoom(image: NDArray[Any]) -> float:
    return float(min(_DETAIL_PX, *image.shape)) / (4 * _DETAIL_PX)


def _grey(image: NDArray[Any]) -> NDArray[np.float32]:
    """Return grey values; colours by their mean."""
    grey = image.astype(np.float32)
    return grey if grey.ndim == 2 else np.asarray(grey.mean(axis=-1))


def _reduced(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """Average whole blocks, so that a picture stays small; returns the factor too."""
    factor = max(1, -(-max(image.shape) // _MOST_SIDE_PX))
    rows, columns = (max(1, n // factor) for n in image.shape)
    cut = image[: rows * factor, : columns * factor]
    if min(cut.shape) < factor:
        return image[::factor, ::factor], factor
    blocks = cut.reshape(rows, factor, columns, factor)
    return np.asarray(blocks.mean(axis=(1, 3))), factor


def _detail(image: NDArray[np.float32]) -> tuple[slice, slice]:
    """Return a square piece where there is most contrast."""
    side = min(_DETAIL_PX, *image.shape)
    rows, columns = (n // side for n in image.shape)
    blocks = image[: rows * side, : columns * side].reshape(rows, side, columns, side)
    row, column = np.unravel_index(
        int(blocks.std(axis=(1, 3)).argmax()), (rows, columns)
    )
    return (
        slice(int(row) * side, int(row + 1) * side),
        slice(int(column) * side, int(column + 1) * side),
    )


def farthest_um(frames: Sequence[ShownFrame]) -> float:
    """Return the largest distance from focus on any of their maps."""
    values = [np.abs(f.defocus).ravel() for f in frames if f.defocus is not None]
    joined = np.concatenate(values) if values else np.zeros(0)
    known = joined[np.isfinite(joined)]
    return max(float(known.max()), 0.1) if known.size else 1.0


_MOST_SHOWN = 4
Found = TypeVar("Found")
BesideRaw = tuple[NDArray[np.generic] | None, DefocusMap | None]
"""The restored plane and the defocus map that are shown beside a raw plane."""


class SideBySide:
    """The picture of ``--picture``: the first plane of the first images.

    Parameters
    ----------
    guard
        Refuses the file before the work.
    path
        PNG to write; None: none is wanted.

    Raises
    ------
    OutputError
        If the file may not be written.
    """

    def __init__(self, guard: OutputGuard, path: Path | None) -> None:
        self._guard, self._path = guard, path
        self._frames: list[tuple[ShownFrame, float | None, TileGrid | None]] = []
        if path is not None and path.suffix.lower() != ".png":
            msg = f"--picture '{path}' must be the name of a PNG: FILE.png"
            raise OutputError(msg)
        if path is not None:
            guard.claim(path)

    def restored(
        self, images: ImageSet, number: int, planes: Iterator[NDArray[np.generic]]
    ) -> Iterator[NDArray[np.generic]]:
        """Pass the restored planes of an image on, keeping what is shown."""
        return self._passed(images, number, planes, lambda plane: (plane, None))

    def classified(
        self,
        images: ImageSet,
        number: int,
        results: Iterator[tuple[dict[str, int], FrameResult]],
    ) -> Iterator[tuple[dict[str, int], FrameResult]]:
        """Pass the results of an image on, keeping what is shown."""
        return self._passed(images, number, results, lambda one: (None, one[1].defocus))

    def _passed(
        self,
        images: ImageSet,
        number: int,
        found: Iterator[Found],
        beside_raw: Callable[[Found], BesideRaw],
    ) -> Iterator[Found]:
        for count, one in enumerate(found):
            if count == 0 and self._wants_more:
                self._keep(images, number, *beside_raw(one))
            yield one

    def save(self) -> Path | None:
        """Write the picture and return it; None: not wanted, or nothing to show."""
        if self._path is None or not self._frames:
            return None
        far_um = farthest_um([frame for frame, _, _ in self._frames])
        panels, columns = [], 0
        for frame, pixel_um, grid in self._frames:
            row = frame_panels(frame, pixel_um, grid, far_um)
            row[0] = replace(row[0], caption=f"{frame.title}: {row[0].caption}")
            panels += row
            columns = max(columns, len(row))
        with self._guard.whole(self._path) as part:
            save_panels(part, panels, columns=columns, words=png_mark())
        return self._path

    @property
    def _wants_more(self) -> bool:
        return self._path is not None and len(self._frames) < _MOST_SHOWN

    def _keep(
        self,
        images: ImageSet,
        number: int,
        restored: NDArray[np.generic] | None,
        defocus: DefocusMap | None,
    ) -> None:
        series = images.series[number]
        index = next(iter(series.indices()))
        known = images.optics(number, index.get("c", 0)).system
        pixel_um = series.pixel_size_um or (known.pixel_size_um if known else None)
        values = None if defocus is None else defocus.defocus_um
        raw = series.read(**index)
        frame = ShownFrame(series.name, index, None, raw, restored, values)
        grid = None if defocus is None else defocus.grid
        self._frames.append((frame, pixel_um, grid))


_KERNELS_ENLARGED = 2
"""Times that a picture of kernels is larger than its image."""


def draw_kernels(image: NDArray[np.generic], kernels: "Kernels") -> NDArray[np.uint8]:
    """Draw every kernel, brightest point white, over the middle of its tile.

    Returns
    -------
    NDArray[np.uint8]
        Axes (y, x, colour): the image in grey at twice its size, kernels in green.
    """
    grey = np.asarray(image, np.float32)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    low, high = np.percentile(grey, (0.5, 99.8))
    shade = np.clip((grey - low) / max(high - low, 1e-9), 0, 1) * 160
    shade = np.kron(shade, np.ones((_KERNELS_ENLARGED, _KERNELS_ENLARGED)))
    picture = np.repeat(shade[..., None], 3, axis=2).astype(np.uint8)
    own = kernels.own_px * _KERNELS_ENLARGED
    side = kernels.kernels.shape[-1]
    factor = max(1, own * 2 // 3 // side)
    for row, column in np.ndindex(kernels.kernels.shape[:2]):
        kernel = kernels.kernels[row, column]
        drawn = np.kron(kernel / max(kernel.max(), 1e-9), np.ones((factor, factor)))
        top, left = (
            int((index + 0.5) * own - drawn.shape[0] / 2) for index in (row, column)
        )
        into = picture[max(top, 0) : top + len(drawn), max(left, 0) : left + len(drawn)]
        part = drawn[max(-top, 0) :, max(-left, 0) :][: into.shape[0], : into.shape[1]]
        into[...] = np.maximum(part, 0)[..., None] * (160, 255, 160)
    return picture
