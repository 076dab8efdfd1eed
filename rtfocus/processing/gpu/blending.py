"""Blending: the montage weights of a frame as tables on the device.

Along an axis a pixel lies between two tiles, so three numbers tell its weights.
"""

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND
from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work
from rtfocus.processing.tiling import Montage


class GpuBlending:
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
