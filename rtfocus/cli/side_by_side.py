"""Side by side: the picture that ``restore`` and ``classify`` leave on request."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray

from rtfocus.errors import OutputError
from rtfocus.frame import DefocusMap, FrameResult, TileGrid
from rtfocus.images.outputs import OutputGuard
from rtfocus.processing.image_set import ImageSet
from rtfocus.report.facts import ShownFrame

_MOST_SHOWN = 4


class SideBySide:
    """The picture of ``--picture``: the first plane of the first images.

    Parameters
    ----------
    guard
        Refuses the file before the work; one that is there is never replaced.
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
        first = True
        for plane in planes:
            if first and self._wants_more:
                index = next(iter(images.series[number].indices()))
                self._keep(images, number, index, plane, None)
            first = False
            yield plane

    def classified(
        self,
        images: ImageSet,
        number: int,
        results: Iterator[tuple[dict[str, int], FrameResult]],
    ) -> Iterator[tuple[dict[str, int], FrameResult]]:
        """Pass the results of an image on, keeping what is shown."""
        first = True
        for index, result in results:
            if first and self._wants_more:
                self._keep(images, number, index, None, result.defocus)
            first = False
            yield index, result

    def save(self) -> None:
        """Write the picture, where it is wanted and there is something to show."""
        if self._path is None or not self._frames:
            return
        # Drawing takes long to import, and few want it.
        from rtfocus.drawing.figures import save_panels
        from rtfocus.report.pictures import farthest_um, frame_panels

        far_um = farthest_um([frame for frame, _, _ in self._frames])
        panels, columns = [], 0
        for frame, pixel_um, grid in self._frames:
            row = frame_panels(frame, pixel_um, grid, far_um)
            row[0] = replace(row[0], caption=f"{frame.title}: {row[0].caption}")
            panels += row
            columns = max(columns, len(row))
        with self._guard.whole(self._path) as part:
            save_panels(part, panels, columns=columns)
        typer.echo(f"picture: {self._path}", err=True)

    @property
    def _wants_more(self) -> bool:
        return self._path is not None and len(self._frames) < _MOST_SHOWN

    def _keep(
        self,
        images: ImageSet,
        number: int,
        index: dict[str, int],
        restored: NDArray[np.generic] | None,
        found: DefocusMap | None,
    ) -> None:
        series = images.series[number]
        known = images.optics(number, index.get("c", 0)).system
        pixel_um = series.pixel_size_um or (known.pixel_size_um if known else None)
        values = None if found is None else found.defocus_um
        raw = series.read(**index)
        frame = ShownFrame(series.name, index, None, raw, restored, values)
        grid = None if found is None else found.grid
        self._frames.append((frame, pixel_um, grid))
