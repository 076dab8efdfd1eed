"""Depth variant: a whole frame, each pixel by the PSFs of the tiles around it.

As `rtfocus.processing.cpu.depth_variant`. Along an axis a pixel lies between two tiles,
so three numbers tell its weights.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND
from rtfocus.processing.gpu.classifier import InFlight, Part
from rtfocus.processing.gpu.deconvolution import Deconvolution
from rtfocus.processing.gpu.work import (
    BETWEEN,
    DeviceArray,
    DeviceMemory,
    FrameShape,
    Transforms,
    Work,
)
from rtfocus.processing.montage import Montage, Region, together
from rtfocus.processing.restore import padded_shape

_LOOK = len(("plane", "height", "width"))
_RECTANGLE = len(("top", "left", "rows", "columns"))


class Blending:
    """Adds what is restored at one level where the tiles have this level.

    Parameters
    ----------
    memory
        Where the tables lie.
    montage
        Weights of the frame's tiles.
    """

    def __init__(self, memory: DeviceMemory, montage: Montage) -> None:
        self._tile_columns = montage.grid.columns
        self.tables = [
            memory.upload(neighbours(weights, montage.step), "blending weights")
            for weights in montage.axes
        ]
        """`neighbours` of every row and of every column of pixels."""

    def enqueue_share(
        self,
        work: Work,
        *,
        frame: FrameShape,
        signal: DeviceArray,
        restored: DeviceArray,
        levels: DeviceArray,
        out: DeviceArray,
    ) -> None:
        """Enqueue ``out = signal + share * (restored - signal)``.

        The share is that of the tiles out of focus; arguments as of `enqueue`, but
        `restored` has the shape of `signal`.
        """
        work.launch(
            "blend_share",
            frame.height * frame.width,
            signal,
            *frame.sides,
            restored,
            levels,
            self._tile_columns,
            BACKGROUND,
            *self.tables,
            out,
        )

    def enqueue(
        self,
        work: Work,
        *,
        frame: FrameShape,
        plane: int,
        signal: DeviceArray,
        rectangle: tuple[int, int, int, int],
        restored: DeviceArray,
        levels: DeviceArray,
        level: int,
        out: DeviceArray,
    ) -> None:
        """Enqueue ``out += weight * (restored - signal)``, negative values as 0.

        Parameters
        ----------
        work
            Stream.
        frame, plane
            Shape of `signal` and `out`, and the colour that is meant.
        signal, out
            Frames (y, x, channel).
        rectangle
            Top, left, height and width of what was restored.
        restored
            It, with any margin behind.
        levels
            Level per tile, int16.
        level
            That was restored.
        """
        work.launch(
            "blend_level",
            rectangle[2] * rectangle[3],
            signal,
            frame.width,
            frame.channels,
            plane,
            *rectangle,
            restored,
            restored.shape[1],
            levels,
            self._tile_columns,
            level,
            *self.tables,
            out,
        )


def neighbours(weights: NDArray[np.float32], step: int) -> NDArray[np.void]:
    """Return the two tiles of every pixel and the share of the second, `BETWEEN`.

    Parameters
    ----------
    weights
        Axes (tile that takes part, pixel); at most two neighbours per pixel.
    step
        Every how many tiles of the grid take part.
    """
    first = weights.astype(bool).argmax(axis=0)
    found = np.empty(len(first), BETWEEN)
    found["first"] = first * step
    found["second"] = np.minimum(first + 1, len(weights) - 1) * step
    found["share"] = 1 - np.take_along_axis(weights, first[None], axis=0)[0]
    return found


class DepthVariantRestorer:
    """Restores frames of one channel; implements `FrameRestorer`.

    Parameters
    ----------
    memory
        Where the work space lies.
    deconvolution
        Of padded planes.
    transforms
        That it uses; closed by `close`.
    montage
        Blending weights of the frame's tiles.
    frame
        Shape of the signal.
    margins_px
        Context on every side, per level that is restored.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        deconvolution: Deconvolution,
        transforms: Transforms,
        montage: Montage,
        *,
        frame: FrameShape,
        margins_px: Mapping[int, int],
    ) -> None:
        self._deconvolution = deconvolution
        self._transforms = transforms
        self._montage = montage
        self._frame = frame
        self._margins = dict(margins_px)
        self._blending = Blending(memory, montage)
        shape = padded_shape((frame.height, frame.width), max(self._margins.values()))
        self._padded = memory.allocate(shape, np.float32, "the padded frame")
        self._restored = memory.allocate(shape, np.float32, "the padded frame")

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return (), the frame as it is, and two kinds of parts for the rest.

        (plane, height, width, *rectangle) surrounds a rectangle for a transform of that
        size; (plane, level, *rectangle) restores it then. As on the CPU a level is
        restored over the smallest rectangle that holds its tiles: (top, left, rows,
        columns), left out where it is the whole frame. None: every level over whole
        frames.
        """
        height, width = self._frame.height, self._frame.width
        if labels is None:
            whole = Region(slice(0, height), slice(0, width))
            regions = dict.fromkeys(self._margins, whole)
        else:
            regions = self._montage.regions(labels)
        shapes = {
            level: padded_shape(region.shape, self._margins[level])
            for level, region in regions.items()
        }
        found: list[Part] = [()]
        for plane in range(self._frame.channels):
            for region, shape, levels in together(regions, shapes):
                place = self._place(region)
                found.append((plane, *shape, *place))
                found += [(plane, level, *place) for level in levels]
        return found

    def recurs(self, part: Part) -> bool:
        """Return whether it is of a whole frame; other rectangles hardly come back."""
        return len(part) <= _LOOK

    def why_not_capturable(self, work: Work) -> str | None:
        """Return None: kernels and transforms may be recorded."""
        del work
        return None

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue a part of the restoration of a frame."""
        if not part:
            work.copy(frame.out, frame.signal)
            return
        if len(part) in (_LOOK, _LOOK + _RECTANGLE):
            self._look(work, frame, part)
            return
        plane, level, *place = part
        rectangle = self._rectangle(place)
        shape = padded_shape(rectangle[2:], self._margins[level])
        padded, restored = self._padded.shaped(shape), self._restored.shaped(shape)
        self._deconvolution.restore(work, level, padded, restored)
        self._blending.enqueue(
            work,
            frame=self._frame,
            plane=plane,
            signal=frame.signal,
            rectangle=rectangle,
            restored=restored,
            levels=frame.maps["level"],
            level=level,
            out=frame.out,
        )

    def _look(self, work: Work, frame: InFlight, part: Part) -> None:
        plane, *numbers = part
        padded = self._padded.shaped((numbers[0], numbers[1]))
        work.launch(
            "surround",
            padded.count,
            frame.signal,
            *self._frame.sides,
            plane,
            *self._rectangle(numbers[2:]),
            *padded.shape,
            int(self._deconvolution.positive),
            padded,
        )
        self._deconvolution.look(work, padded)

    def close(self) -> None:
        """Free the transforms."""
        self._transforms.close()

    def _place(self, region: Region) -> Part:
        if region.shape == (self._frame.height, self._frame.width):
            return ()
        return region.rows.start, region.columns.start, *region.shape

    def _rectangle(self, place: Sequence[int]) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a part's place."""
        if not place:
            return 0, 0, self._frame.height, self._frame.width
        top, left, height, width = place
        return top, left, height, width
