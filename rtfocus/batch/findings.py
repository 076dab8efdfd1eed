"""Findings: what is found out about images: rows, z-stacks, expected errors.

A row per plane is what ``classify`` found, alone or by many processes. Single planes
err; all planes of a stack together know better where focus is: the distance from it is
the same on both sides, and grows with every plane.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtfocus.errors import InputError
from rtfocus.frame import BACKGROUND, DefocusMap, FrameResult, TileGrid
from rtfocus.image_set import ImageSet
from rtfocus.images.metadata import table_text
from rtfocus.images.outputs import TextKind, json_text
from rtfocus.images.reading import BrokenImage
from rtfocus.images.series import ImageSeries, writable_text

Floats = NDArray[np.float64]

COLUMNS = (
    *("image", "name", "plate", "well", "field", "position", "channel"),
    *("t", "c", "z", "z_um", "z_offset_um"),
    *("level", "defocus_um", "signed", "uncertainty_um", "confidence"),
    *("from_focus_planes", "from_focus_um", "from_focus_z_um"),
    *("foreground", "out_of_focus", "classifier", "optics", "status", "why"),
)
"""Of the table that ``classify`` writes, called as in its JSON and in a run's table."""


LEAST_PLANES, MOST_PLANES = 5, 1000
"""Of a stack that is asked for its focus: fewer say nothing, more are a film."""
_LEAST_RISE = 2.0
"""Times the distance in focus that both ends of a stack are away from it."""
_LEAST_SHARE = 0.02
"""Of the larger one, by which both are farther away: none of them seems in focus."""
_MARGIN = 0.75
"""Of the steps between planes: with it nine of ten foci lay in the range stated."""

Place = Literal["within", "below", "above", "unknown"]


@dataclass(frozen=True, slots=True)
class StackFocus:
    """Where focus lies in a z-stack."""

    place: Place
    """Within the stack, or at its lowest (highest) planes and perhaps beyond."""
    z: float | None = None
    """Of the focus where it lies within, as the planes' z."""
    low: float | None = None
    """Focus is hardly below; None: it may lie anywhere there, or is not known."""
    high: float | None = None
    """Hardly above, likewise."""
    explained: float = 0.0
    """Share of the variance of the distances that such a focus explains."""
    why: str | None = None
    """Why it is not known."""


def focus_of_stack(
    z: ArrayLike, distance: ArrayLike | Sequence[float | None]
) -> StackFocus:
    """Find where focus lies in a z-stack from how far each plane seems to be from it.

    Every z between two planes is tried: by what only grows with the distance from it,
    on both sides alike, the distances are fitted (isotonic regression [1]_ of their
    square roots, as errors grow with them). The z that leaves least is that of focus.
    How much that explains, and how much farther off the ends are, decides whether it is
    believed; the limits are measured, see ``bench/stack_focus.py``.

    Parameters
    ----------
    z
        z of every plane, in um or planes: any steps, any order.
    distance
        Distance of every plane from focus, in any unit; signs are ignored. NaN or
        None: the plane shows nothing.

    Returns
    -------
    StackFocus
        ``unknown`` if fewer than five planes show anything, or if no focus explains
        the distances: all alike, or in no order.

    Raises
    ------
    InputError
        If there is not one distance for every z, or a z is no number.

    References
    ----------
    .. [1] J. de Leeuw, K. Hornik, P. Mair, "Isotone Optimization in R", *J. Stat.
       Softw.* 32(5), 2009.

    Examples
    --------
    >>> found = focus_of_stack(range(8), [9, 6, 3, 0.8, 0.9, 3.2, 6.1, 9.3])
    >>> found.place, found.z
    ('within', 3.25)
    """
    try:
        heights = np.asarray(z, np.float64)
        off_um = np.abs(np.asarray(distance, np.float64))
    except (TypeError, ValueError) as error:
        msg = f"z and distance are numbers, NaN where there is none: {error}"
        raise InputError(msg) from error
    if heights.ndim != 1 or heights.shape != off_um.shape:
        msg = f"{heights.shape} z for {off_um.shape} distances; give one for each plane"
        raise InputError(msg)
    if not np.isfinite(heights).all():
        msg = f"z has {heights[~np.isfinite(heights)][0]}; leave planes without one out"
        raise InputError(msg)
    known = np.isfinite(off_um)
    order = np.argsort(heights[known], kind="stable")
    heights, roots = heights[known][order], np.sqrt(off_um[known][order])
    places = np.unique(heights)
    if len(places) < LEAST_PLANES:
        why = f"{len(places)} planes with a specimen, {LEAST_PLANES} are needed"
        return StackFocus("unknown", why=why)
    best = _Fit(heights, roots)
    if best.explained < max(0.8, 0.97 - 0.01 * (len(heights) - LEAST_PLANES)):
        why = "the distances of its planes do not fall towards one z and rise again"
        return StackFocus("unknown", explained=best.explained, why=why)
    parts = [slice(None, None, 2), slice(1, None, 2)]
    halves = parts if len(heights) >= 2 * LEAST_PLANES else []
    fits = [_Fit(heights[part], roots[part]) for part in halves]
    margin = _MARGIN * float(np.median(np.diff(places)))
    low = min(fit.low for fit in (best, *fits)) - margin
    high = max(fit.high for fit in (best, *fits)) + margin
    least = max(_LEAST_RISE * best.least, best.least + _LEAST_SHARE * max(best.ends))
    rises = [end >= least > 0 for end in best.ends]
    if all(rises) and best.low > places[0] and best.high < places[-1]:
        middle = (best.low + best.high) / 2
        return StackFocus("within", middle, low, high, best.explained)
    if rises[1]:
        return StackFocus("below", high=high, explained=best.explained)
    if rises[0]:
        return StackFocus("above", low=low, explained=best.explained)
    why = "its planes are nearly equally far from focus"
    return StackFocus("unknown", explained=best.explained, why=why)


class _Fit:
    """The focus that leaves least of some distances, by their roots, in rising z."""

    def __init__(self, heights: Floats, roots: Floats) -> None:
        places = np.unique(heights)
        gaps = np.diff(places)
        # Which of two planes is nearer changes at planes and, of even steps, half-way.
        tried = np.sort(np.concatenate([places[:-1] + gaps / 4, places[1:] - gaps / 4]))
        reach = np.repeat(gaps / 4, 2)
        fits = [_unimodal_fit(heights, roots, one) for one in tried]
        left = np.array([np.square(roots - fit).sum() for fit in fits])
        spread = float(np.square(roots - roots.mean()).sum())
        equal = np.flatnonzero(left <= left.min() + 1e-9 * spread)
        self.low = float((tried - reach)[equal[0]])
        self.high = float((tried + reach)[equal[-1]])
        """From `low` to here nothing fits better."""
        self.explained = 1 - float(left.min()) / spread if spread else 0.0
        fit = np.square(fits[int(np.argmin(left))])
        self.least, self.ends = float(fit.min()), (float(fit[0]), float(fit[-1]))


def _unimodal_fit(heights: Floats, roots: Floats, focus: float) -> Floats:
    # Here, because it takes long to import, and few images are stacks.
    from scipy.optimize import isotonic_regression

    order = np.argsort(np.abs(heights - focus), kind="stable")
    fit = np.empty_like(roots)
    fit[order] = isotonic_regression(roots[order]).x
    return fit


class Findings(msgspec.Struct):
    """What ``classify`` found in images, as plain values; unknown is None."""

    planes: list[dict[str, Any]] = []
    """See `plane_row`."""
    stacks: list[dict[str, Any]] = []
    """See `stack_row`."""

    def add(self, other: "Findings") -> None:
        """Take in what was found in other images."""
        self.planes += other.planes
        self.stacks += other.stacks

    def text(
        self,
        kind: TextKind,
        *,
        engine: str | None,
        broken: Sequence[BrokenImage],
        root: Path,
    ) -> str:
        """Return all of it as JSON, or as a table.

        Parameters
        ----------
        kind
            Of the text.
        engine
            That found it.
        broken
            Images that cannot be read.
        root
            The input, as paths begin.
        """
        if kind == "csv":
            return self._table(broken, root)
        content: dict[str, Any] = {"engine": engine, "images": self.planes}
        content["stacks"] = self.stacks
        if broken:
            content["broken"] = [one.reason for one in broken]
        return json_text(content)

    def _table(self, broken: Sequence[BrokenImage], root: Path) -> str:
        """Return a row for every plane, and for every image that cannot be read."""
        file = io.StringIO()
        table = csv.DictWriter(
            file, COLUMNS, extrasaction="ignore", lineterminator="\n"
        )
        table.writeheader()
        for row in self.planes:
            known = {**row, **row["index"], **(row["estimate"] or {})}
            known["image"] = _within(Path(row["path"]), root)
            table.writerow({**known, "status": "classified"})
        for one in broken:
            known = {} if one.image is None else image_row(one.image)
            known |= {"image": _within(one.path, root), "why": one.reason}
            table.writerow({**known, "status": "broken"})
        return table_text(writable_text(file.getvalue()))


def _within(path: Path, root: Path) -> str:
    """Return where an image lies in the input, with the same slashes everywhere."""
    if path == root or not path.is_relative_to(root):
        return path.absolute().name
    return path.relative_to(root).as_posix()


def find_in(
    images: ImageSet,
    number: int,
    planes: Iterable[tuple[dict[str, int], FrameResult]],
    on_plane: Callable[[], None] = lambda: None,
    *,
    with_tiles: bool,
) -> Findings:
    """Return what was found in the planes of an image, and in the stacks they make.

    Parameters
    ----------
    images, number
        The image.
    planes
        Indices and results of all its planes.
    on_plane
        Called after each.
    with_tiles
        Their tiles, too.
    """
    series, stacks = images.series[number], []
    rows = []
    for index, result in planes:
        rows.append(plane_row(images, number, index, result, with_tiles=with_tiles))
        on_plane()
    axis = "t" if series.sizes["z"] == 1 and "t" in series.unnamed_axes else "z"
    if LEAST_PLANES <= series.sizes[axis] <= MOST_PLANES:
        others = [one for one in ("t", "c", "z") if one != axis]
        rows.sort(key=lambda row: [row["index"][one] for one in (*others, axis)])
        for _, stack in groupby(rows, lambda row: [row["index"][o] for o in others]):
            stacks.append(stack_row([*stack], series, axis))
        rows.sort(key=lambda row: [row["index"][one] for one in ("t", "c", "z")])
    return Findings(rows, stacks)


def stack_row(
    planes: Sequence[dict[str, Any]], series: ImageSeries, axis: str
) -> dict[str, Any]:
    """Return what is known of the focus of a stack, and note it in its planes.

    Parameters
    ----------
    planes
        Rows of its planes along `axis`, 0 first.
    series
        The image.
    axis
        ``z``, or ``t`` where the file does not say what it is.
    """
    distances = [(row["estimate"] or {}).get("defocus_um") for row in planes]
    fit = focus_of_stack(np.arange(len(planes)), np.array(distances, np.float64))
    step_um = series.z_step_um if axis == "z" else None
    focus = None if fit.z is None else round(fit.z, 2)
    rises = series.z_rises if axis == "z" else None
    if focus is not None:
        for number, row in enumerate(planes):
            row["from_focus_planes"] = round(number - focus, 2)
            if step_um is not None:
                row["from_focus_um"] = round((number - focus) * step_um, 6)
            if step_um is not None and rises is not None:
                signed_um = step_um if rises else -step_um
                row["from_focus_z_um"] = round((number - focus) * signed_um, 6)
    known = image_row(series) | {"channel": planes[0]["channel"]}
    return known | {
        "index": {k: n for k, n in planes[0]["index"].items() if k != axis},
        "axis": axis,
        "assumed": axis in series.unnamed_axes,
        "planes": len(planes),
        "place": fit.place,
        "focus_plane": focus,
        "focus_offset_um": step_um and focus and round(focus * step_um, 6),
        "z_rises": rises,
        "likely": [one and round(one, 2) for one in (fit.low, fit.high)],
        "explained": round(fit.explained, 3),
        "why": fit.why,
    }


def plane_row(
    images: ImageSet,
    number: int,
    index: dict[str, int],
    result: FrameResult,
    *,
    with_tiles: bool,
) -> dict[str, Any]:
    """Return what was found in a plane as plain values; unknown is None."""
    series, estimate = images.series[number], result.estimate
    keys = ("level", "defocus_um", "signed", "confidence")
    names, step = series.channel_names, series.z_step_um
    of_stack = None if step is None else round(index["z"] * step, 9)
    return {
        **image_row(series),
        "channel": names[index["c"]] if names else None,
        "index": index,
        # Where the stage was, files tell of their first stack alone.
        "z_um": None if index["t"] or index["c"] else series.slices_um[index["z"]],
        "z_offset_um": of_stack if index["z"] else 0.0,
        "shape": list(series.shape),
        "estimate": estimate and {name: getattr(estimate, name) for name in keys},
        "from_focus_planes": None,
        "from_focus_um": None,
        "from_focus_z_um": None,
        "foreground": estimate and estimate.foreground,
        **_shares(result.defocus),
        "classifier": result.engines.get("classifier"),
        **({"tiles": tile_rows(result)} if with_tiles else {}),
        "optics": images.optics(number, index["c"]).describe(),
    }


def image_row(series: ImageSeries) -> dict[str, str | int | None]:
    """Return which image it is as plain values; unknown is None."""
    plate = well = field = None
    if (place := series.place) is not None:
        plate, field = place.plate, place.field
        well = place.rows[place.row] + place.columns[place.column]
    return {
        "path": str(series.path),
        "name": series.name,
        "plate": plate,
        "well": well,
        "field": field,
        "position": series.position,
    }


def _shares(defocus: DefocusMap | None) -> dict[str, float | None]:
    """Return the share of tiles with specimen out of focus, and how far off they are.

    The deviation is the median of what the tiles state.
    """
    shares: dict[str, float | None] = {"out_of_focus": None, "uncertainty_um": None}
    if defocus is not None and (there := defocus.level != BACKGROUND).any():
        shares["out_of_focus"] = float(np.mean(defocus.level[there] != 0))
        if defocus.stated_um is not None:
            shares["uncertainty_um"] = float(np.median(defocus.stated_um[there]))
    return shares


def texts_of(json_file: Path | None, table: Path | None) -> list[tuple[Path, TextKind]]:
    """Return the files that are asked of ``classify``, with their kinds."""
    texts: list[tuple[Path, TextKind]] = []
    if json_file is not None:
        texts.append((json_file, "json"))
    return texts if table is None else [*texts, (table, "csv")]


def tile_rows(result: FrameResult) -> list[dict[str, float | int | str | None]]:
    """List the tiles of a result as plain values, row by row.

    ``y`` and ``x`` are the upper left corner of the tile in frame pixels, cut at
    the frame's edge; ``level`` and ``defocus_um`` are None for background.
    """
    return [] if result.defocus is None else list(_tile_rows(result.defocus))


def _tile_rows(defocus: DefocusMap) -> Iterator[dict[str, float | int | str | None]]:
    grid = defocus.grid
    first = grid.origin_px - (grid.tile_px - 1) / 2
    for row, column in np.ndindex(defocus.level.shape):
        level = int(defocus.level[row, column])
        empty = level == BACKGROUND
        yield {
            "y": max(0, round(first + row * grid.stride_px)),
            "x": max(0, round(first + column * grid.stride_px)),
            "level": None if empty else level,
            "label": "bg" if empty else str(level),
            "probability": float(defocus.confidence[row, column]),
            "defocus_um": None if empty else float(defocus.defocus_um[row, column]),
            "uncertainty_um": None
            if empty or defocus.stated_um is None
            else float(defocus.stated_um[row, column]),
        }


class StatedErrors(msgspec.Struct):
    """The error expected to be left in the planes of an image, a number per tile."""

    grid: TileGrid | None = None
    planes: list[bytes] = []
    """Each float32, little-endian."""

    def note(self, result: FrameResult) -> None:
        """Take in the next plane; NaN: nothing is stated of it."""
        if result.defocus is not None:
            self.grid, error = result.defocus.grid, result.expected_error
            if error is None:
                error = np.full((self.grid.rows, self.grid.columns), np.nan, np.float32)
            self.planes.append(error.astype("<f4").tobytes())

    def is_of(self, image: ImageSeries) -> bool:
        """Whether there are findings of all planes of an image."""
        return len(self.planes) == len(image)
