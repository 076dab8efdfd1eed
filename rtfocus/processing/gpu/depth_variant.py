"""Depth variant: a whole frame, each pixel by the PSFs of the tiles around it.

As `rtfocus.processing.cpu.depth_variant` with the whole frame as every level's region.
Along an axis a pixel lies between two tiles, so three numbers tell its weights.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND
from rtfocus.optics.psf import psf_radius_px
from rtfocus.processing.gpu.classifier import Part
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, FrameShape, Work
from rtfocus.processing.restore import padded_shape
from rtfocus.processing.tiles.montage import Montage, axis_mix

Image = NDArray[np.float32]


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
        self._tables = [
            memory.upload(table, "blending weights")
            for weights in montage.axes
            for table in neighbours(weights, montage.step)
        ]

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
            *self._tables,
            out,
        )

    def enqueue(
        self,
        work: Work,
        *,
        frame: FrameShape,
        channel: int,
        signal: DeviceArray,
        restored: DeviceArray,
        halo_px: int,
        levels: DeviceArray,
        level: int,
        out: DeviceArray,
    ) -> None:
        """Enqueue ``out += weight * (restored - signal)``, negative values as 0.

        Parameters
        ----------
        work
            Stream.
        frame, channel
            Shape of `signal` and `out`, and the plane that is meant.
        signal, out
            Frames (y, x, channel).
        restored
            Plane with a margin of `halo_px` before it, any margin behind.
        halo_px
            Of `restored`.
        levels
            Level per tile, int16.
        level
            That was restored.
        """
        work.launch(
            "blend_level",
            frame.height * frame.width,
            signal,
            *frame.sides,
            channel,
            restored,
            halo_px,
            restored.shape[1],
            levels,
            self._tile_columns,
            level,
            *self._tables,
            out,
        )


def neighbours(
    weights: NDArray[np.float32], step: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Return the two tiles of every pixel and the share of the second.

    Parameters
    ----------
    weights
        Axes (tile that takes part, pixel); at most two neighbours per pixel.
    step
        Every how many tiles of the grid take part.
    """
    first = weights.astype(bool).argmax(axis=0)
    second = np.minimum(first + 1, len(weights) - 1)
    share = 1 - np.take_along_axis(weights, first[None], axis=0)[0]
    return (
        (first * step).astype(np.int32),
        (second * step).astype(np.int32),
        np.asarray(share, np.float32),
    )


class Surround:
    """Tables of `rtfocus.processing.tiles.montage.axis_mix` for both axes.

    Parameters
    ----------
    memory
        Where the tables lie.
    frame
        Shape of the signal.
    shape
        Height and width of the transforms.
    halo_px
        Margin before the frame.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        frame: FrameShape,
        shape: tuple[int, int],
        halo_px: int,
    ) -> None:
        self._frame = frame
        self._shape = shape
        self._tables = []
        for count, length in zip((frame.height, frame.width), shape, strict=True):
            first, second, share = axis_mix(count, length, halo_px)
            for table in (first.astype(np.int32), second.astype(np.int32), share):
                self._tables.append(memory.upload(table, "margins"))

    def enqueue(
        self,
        work: Work,
        signal: DeviceArray,
        channel: int,
        padded: DeviceArray,
        *,
        positive: bool,
    ) -> None:
        """Enqueue signal -> padded plane; `positive`: negative values become 0."""
        work.launch(
            "surround",
            padded.count,
            signal,
            self._frame.width,
            self._frame.channels,
            channel,
            *self._shape,
            *self._tables,
            int(positive),
            padded,
        )


class Deconvolution(Protocol):
    """Restores padded planes of one size, level by level."""

    positive: bool
    """Whether it is handed the signal without negative values."""

    def begin(self, work: Work, padded: DeviceArray) -> None:
        """Enqueue what all levels of a plane share."""
        ...

    def restore(
        self, work: Work, level: int, padded: DeviceArray, out: DeviceArray
    ) -> None:
        """Enqueue the restoration of the plane with the PSF of one level."""
        ...


def transform_shape(
    psfs: Mapping[int, Image], shape: tuple[int, int], halo_px: int | None
) -> tuple[tuple[int, int], int]:
    """Return the size of the transforms of a frame and its halo.

    Parameters
    ----------
    psfs
        PSF per level.
    shape
        Height and width of the frame.
    halo_px
        Context per side; None: half the side of the largest PSF.
    """
    if halo_px is None:
        halo_px = max(psf_radius_px(psf, 1.0) for psf in psfs.values())
    return padded_shape(shape, halo_px), halo_px


class DepthVariantRestorer:
    """Restores frames of one channel.

    Parameters
    ----------
    memory
        Where the work space lies.
    deconvolution
        Of the padded frame.
    montage
        Blending weights of the frame's tiles.
    frame
        Shape of the signal.
    shape
        Height and width of the transforms.
    halo_px
        Margin before the frame.
    levels
        That are restored.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        deconvolution: Deconvolution,
        montage: Montage,
        *,
        frame: FrameShape,
        shape: tuple[int, int],
        halo_px: int,
        levels: Sequence[int],
    ) -> None:
        self._deconvolution = deconvolution
        self._frame = frame
        self._halo_px = halo_px
        self._levels = tuple(levels)
        self._blending = Blending(memory, montage)
        self._surround = Surround(memory, frame, shape, halo_px)
        self._padded = memory.allocate(shape, np.float32, "the padded frame")
        self._restored = memory.allocate(shape, np.float32, "the padded frame")

    def parts(self, present: Sequence[int] | None = None) -> list[Part]:
        """Return (plane,) and every (plane, level) for the levels that are present.

        As on the CPU, a level that no tile has is not restored; None: all are.
        """
        levels = [n for n in self._levels if present is None or n in present]
        return [
            part
            for channel in range(self._frame.channels)
            for part in ((channel,), *((channel, level) for level in levels))
        ]

    def enqueue(
        self,
        work: Work,
        part: Part,
        signal: DeviceArray,
        levels: DeviceArray,
        out: DeviceArray,
    ) -> None:
        """Enqueue a part of signal -> out, both float32 (y, x, channel).

        Parameters
        ----------
        work
            Stream.
        part
            Of `parts`; those of a frame come in that order.
        signal
            Camera offset removed, no NaN.
        levels
            Level per tile, int16.
        out
            Result; background and level 0 come back unchanged.
        """
        channel = part[0]
        if len(part) == 1:
            if channel == 0:
                work.copy(out, signal)
            self._surround.enqueue(
                work,
                signal,
                channel,
                self._padded,
                positive=self._deconvolution.positive,
            )
            self._deconvolution.begin(work, self._padded)
            return
        level = part[1]
        self._deconvolution.restore(work, level, self._padded, self._restored)
        self._blending.enqueue(
            work,
            frame=self._frame,
            channel=channel,
            signal=signal,
            restored=self._restored,
            halo_px=self._halo_px,
            levels=levels,
            level=level,
            out=out,
        )
