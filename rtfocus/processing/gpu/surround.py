"""Surround: a whole frame in a margin that joins its edges, for Fourier transforms."""

import numpy as np

from rtfocus.processing.context import axis_mix
from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work


class GpuSurround:
    """Tables of `rtfocus.processing.context.axis_mix` for both axes.

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
