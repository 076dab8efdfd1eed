"""GPU restorer: depth-variant deconvolution of whole frames on the device.

As `rtfocus.processing.restoration` with the whole frame as every level's region:
all levels are restored, whichever the tiles have, because which those are is known
to the device only; waiting for it would stop the stream.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.optics.psf import psf_radius_px
from rtfocus.processing.fourier import padded_shape
from rtfocus.processing.gpu.blending import GpuBlending
from rtfocus.processing.gpu.cells import FrameShape
from rtfocus.processing.gpu.surround import GpuSurround
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, Work
from rtfocus.processing.tiling import Montage

Image = NDArray[np.float32]


class GpuDeconvolution(Protocol):
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


class GpuDepthVariantRestorer:
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
        deconvolution: GpuDeconvolution,
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
        self._blending = GpuBlending(memory, montage)
        self._surround = GpuSurround(memory, frame, shape, halo_px)
        self._padded = memory.allocate(shape, np.float32, "the padded frame")
        self._restored = memory.allocate(shape, np.float32, "the padded frame")

    def enqueue(
        self, work: Work, signal: DeviceArray, levels: DeviceArray, out: DeviceArray
    ) -> None:
        """Enqueue signal -> out, both float32 (y, x, channel).

        Parameters
        ----------
        work
            Stream.
        signal
            Camera offset removed, no NaN.
        levels
            Level per tile, int16.
        out
            Result; background and level 0 come back unchanged.
        """
        work.copy(out, signal)
        for channel in range(self._frame.channels):
            self._surround.enqueue(
                work,
                signal,
                channel,
                self._padded,
                positive=self._deconvolution.positive,
            )
            self._deconvolution.begin(work, self._padded)
            for level in self._levels:
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
