"""Methods: the classical restorations a config can name, and the seam of all."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.processor import RestorationConfig
from rtfocus.processing.classifier import Seen
from rtfocus.processing.restoration import METHODS as WHOLE_FRAME
from rtfocus.processing.restoration import DepthVariantRestorer
from rtfocus.processing.tile_network import TileNetwork
from rtfocus.processing.tile_restoration import TileRestorer
from rtfocus.processing.tiling import Montage

Image = NDArray[np.float32]

METHODS = (*WHOLE_FRAME, TileRestorer.method)
"""Restorations built in; any other name but ``none`` is an engine's."""


class FrameRestorer(Protocol):
    """Restores the frames of one channel; safe to use from several threads."""

    def restore(self, signal: Image, seen: Seen, out: Image, *, quantum: float) -> None:
        """Restore a frame.

        Parameters
        ----------
        signal
            Axes (y, x) or (y, x, colour); camera offset removed, no NaN.
        seen
            What the classifier saw in it.
        out
            Result, shape of `signal`, float32; in focus and background exactly as
            in `signal`.
        quantum
            Step between the camera's values; 0 for float frames.
        """
        ...

    def close(self) -> None:
        """Free networks; called twice does nothing."""
        ...


class LevelRestorer(Protocol):
    """Restores by the level of every tile alone; safe to use from several threads."""

    def restore(
        self,
        signal: Image,
        labels: NDArray[np.int16],
        out: Image,
        *,
        quantum: float = 0.0,
    ) -> Image:
        """Write the restored `signal` to `out`; see `DepthVariantRestorer`."""
        ...


class ByLevel:
    """A `FrameRestorer` that needs nothing but levels.

    Parameters
    ----------
    restorer
        Does the work.
    network
        What it runs, to be closed with it; None: it needs none.
    """

    def __init__(
        self, restorer: LevelRestorer, network: TileNetwork | None = None
    ) -> None:
        self._restorer = restorer
        self._network = network

    def restore(self, signal: Image, seen: Seen, out: Image, *, quantum: float) -> None:
        """Restore a frame, see `FrameRestorer`."""
        self._restorer.restore(signal, seen.defocus.level, out, quantum=quantum)

    def close(self) -> None:
        """Free the network."""
        if self._network is not None:
            self._network.close()


def make_restorer(
    method: str,
    settings: RestorationConfig,
    montage: Montage,
    psfs: Mapping[int, Image],
    gain_e_per_count: float | None = None,
) -> LevelRestorer:
    """Make one of `METHODS` with the parameters of the config."""
    if method == TileRestorer.method:
        return TileRestorer(
            montage, psfs, iterations=settings.iterations, halo_px=settings.halo_px
        )
    return DepthVariantRestorer(
        montage,
        psfs,
        method=method,
        iterations=settings.iterations,
        noise_to_signal=settings.noise_to_signal,
        gain_e_per_count=gain_e_per_count,
        halo_px=settings.halo_px,
    )
