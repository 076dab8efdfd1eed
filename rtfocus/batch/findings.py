"""Findings: what is told of images beside the images: tables, JSON, maps of errors.

A row per plane is what ``classify`` found, alone or by many processes.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import InputError
from rtfocus.frame import BACKGROUND, DefocusMap, FrameResult, TileGrid
from rtfocus.image_set import ImageSet
from rtfocus.images.metadata import OutputImage, table_text
from rtfocus.images.outputs import ImageOutput, OutputGuard, TextKind, json_text
from rtfocus.images.reading import BrokenImage
from rtfocus.images.series import (
    ContrastWindow,
    ImageSeries,
    StagePosition,
    writable_text,
)

COLUMNS = (
    *("image", "name", "plate", "well", "field", "position", "channel"),
    *("t", "c", "z", "z_um", "z_offset_um"),
    *("level", "defocus_um", "signed", "uncertainty_um", "confidence"),
    *("foreground", "out_of_focus", "classifier", "optics", "status", "why"),
)
"""Of the table that ``classify`` writes, called as in its JSON and in a run's table."""


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
    told = ("level", "defocus_um", "signed", "confidence")
    names, step = series.channel_names, series.z_step_um
    of_stack = None if step is None else round(index["z"] * step, 9)
    return {
        **image_row(series),
        "channel": names[index["c"]] if names else None,
        "index": index,
        # Files tell of the stage at the first plane alone.
        "z_um": series.stage and (None if any(index.values()) else series.stage.z_um),
        "z_offset_um": of_stack if index["z"] else 0.0,
        "shape": list(series.shape),
        "estimate": estimate and {name: getattr(estimate, name) for name in told},
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


def _shares(found: DefocusMap | None) -> dict[str, float | None]:
    """Return the share of tiles with specimen out of focus, and how far off they are.

    The deviation is the median of what the tiles state.
    """
    shares: dict[str, float | None] = {"out_of_focus": None, "uncertainty_um": None}
    if found is not None and (there := found.level != BACKGROUND).any():
        shares["out_of_focus"] = float(np.mean(found.level[there] != 0))
        if found.stated_um is not None:
            shares["uncertainty_um"] = float(np.median(found.stated_um[there]))
    return shares


def tile_rows(result: FrameResult) -> list[dict[str, float | int | str | None]]:
    """List the tiles of a result as plain values, row by row.

    ``y`` and ``x`` are the upper left corner of the tile in frame pixels, cut at
    the frame's edge; ``level`` and ``defocus_um`` are None for background.
    """
    return [] if result.defocus is None else list(_tile_rows(result.defocus))


def _tile_rows(found: DefocusMap) -> Iterator[dict[str, float | int | str | None]]:
    grid = found.grid
    first = grid.origin_px - (grid.tile_px - 1) / 2
    for row, column in np.ndindex(found.level.shape):
        level = int(found.level[row, column])
        empty = level == BACKGROUND
        yield {
            "y": max(0, round(first + row * grid.stride_px)),
            "x": max(0, round(first + column * grid.stride_px)),
            "level": None if empty else level,
            "label": "bg" if empty else str(level),
            "probability": float(found.confidence[row, column]),
            "defocus_um": None if empty else float(found.defocus_um[row, column]),
            "uncertainty_um": None
            if empty or found.stated_um is None
            else float(found.stated_um[row, column]),
        }


def texts_of(json_file: Path | None, table: Path | None) -> list[tuple[Path, TextKind]]:
    """Return the files that are asked of ``classify``, with their kinds."""
    texts: list[tuple[Path, TextKind]] = []
    if json_file is not None:
        texts.append((json_file, "json"))
    return texts if table is None else [*texts, (table, "csv")]


class Findings(NamedTuple):
    """What ``classify`` found in images."""

    engine: str | None
    rows: list[dict[str, Any]]
    """Of their planes, see `plane_row`."""
    broken: list[BrokenImage]
    root: Path
    """The input, as paths in `rows` and `broken` begin."""

    def text(self, kind: TextKind) -> str:
        """Return all of it as JSON, or as a table."""
        if kind == "csv":
            return self._table()
        content: dict[str, Any] = {"engine": self.engine, "images": self.rows}
        if self.broken:
            content["broken"] = [one.reason for one in self.broken]
        return json_text(content)

    def _table(self) -> str:
        """Return a row for every plane, and for every image that cannot be read."""
        file = io.StringIO()
        table = csv.DictWriter(
            file, COLUMNS, extrasaction="ignore", lineterminator="\n"
        )
        table.writeheader()
        for row in self.rows:
            known = {**row, **row["index"], **(row["estimate"] or {})}
            known["image"] = self._within(Path(row["path"]))
            table.writerow({**known, "status": "classified"})
        for one in self.broken:
            known = {} if one.image is None else image_row(one.image)
            known |= {"image": self._within(one.path), "why": one.reason}
            table.writerow({**known, "status": "broken"})
        return table_text(writable_text(file.getvalue()))

    def _within(self, path: Path) -> str:
        """Return where an image lies in the input, with the same slashes everywhere."""
        if path == self.root or not path.is_relative_to(self.root):
            return path.absolute().name
        return path.relative_to(self.root).as_posix()


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
        """Tell whether all planes of an image are told of."""
        return len(self.planes) == len(image)


class ErrorMaps:
    """The error expected to be left in restored images, a pixel per tile.

    Kept until all images are restored: a thousandth of their pixels. Arguments are as
    of `ImageOutput`; without an output nobody asked for it.
    """

    def __init__(
        self,
        output: Path | None,
        series: Sequence[ImageSeries],
        guard: OutputGuard,
        root: Path,
    ) -> None:
        self._place: ImageOutput | None = None
        if output is not None:
            self._place = ImageOutput(output, series, guard, root)
        self._found: dict[int, StatedErrors] = {}

    def note(self, number: int, result: FrameResult) -> None:
        """Take in the next plane of an image."""
        if self._place is not None:
            self._found.setdefault(number, StatedErrors()).note(result)

    def take(self, number: int, found: StatedErrors) -> None:
        """Take in all planes of an image."""
        self._found[number] = found

    def write(self, images: ImageSet) -> None:
        """Write those of images that were restored, once all are."""
        if (place := self._place) is None:
            return
        # In a folder every image has a target, which stays empty of a broken one.
        outputs = [
            error_map(found, image, images.made(number))
            for number, image in enumerate(images.series)
            if (found := self._found.get(number, StatedErrors())).is_of(image)
            or place.is_folder
        ]
        if outputs:
            place.write(outputs)


def error_map(
    stated: StatedErrors, image: ImageSeries, made: Mapping[str, str]
) -> OutputImage:
    """Return errors that are stated as an image, placed where the tiles lie."""
    grid = stated.grid
    if grid is None or not stated.is_of(image):
        return OutputImage(image, image.dtype, map(_not_restored, [image]))
    found = [
        np.frombuffer(plane, np.dtype("<f4")).reshape(grid.rows, grid.columns)
        for plane in stated.planes
    ]
    shown = ContrastWindow(0.0, float(np.nan_to_num(found).max()) or 1.0)
    size_y, size_x = image.pixel_size_y_um or 0.0, image.pixel_size_x_um or 0.0
    stage, origin = image.stage or StagePosition(), grid.origin_px
    like = replace(
        image,
        name=f"{image.name} expected error",
        shape=(grid.rows, grid.columns),
        pixel_size_y_um=round(grid.stride_px * size_y, 9) or None,
        pixel_size_x_um=round(grid.stride_px * size_x, 9) or None,
        stage=stage.moved(origin * size_y, origin * size_x),
        channels=tuple(replace(one, window=shown) for one in image.channels),
    )
    told = {
        "command": "restore --expected-error",
        "values": "root mean square over a tile, in counts",
        "tiles": f"of {grid.tile_px} px, every {grid.stride_px:g} px, the first "
        f"around {grid.origin_px:g} px from the middle of the first pixel",
        **made,
    }
    return OutputImage(like, np.dtype("<f4"), iter(found), told)


def _not_restored(image: ImageSeries) -> NDArray[np.float32]:
    msg = f"'{image.path}' was not restored"
    raise InputError(msg)
