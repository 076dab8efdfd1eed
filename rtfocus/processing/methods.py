"""Methods: the restorations a config can name, and how each is made."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.processor import RestorationConfig
from rtfocus.processing.restoration import METHODS as WHOLE_FRAME
from rtfocus.processing.restoration import DepthVariantRestorer
from rtfocus.processing.tile_restoration import TileRestorer
from rtfocus.processing.tiling import Montage

Image = NDArray[np.float32]

METHODS = (*WHOLE_FRAME, TileRestorer.method)
"""Restorations built in; any other name but ``none`` is an engine's."""


class Restorer(Protocol):
    """Restores the frames of one channel; safe to use from several threads."""

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


def make_restorer(
    method: str,
    settings: RestorationConfig,
    montage: Montage,
    psfs: Mapping[int, Image],
    gain_e_per_count: float | None = None,
) -> Restorer:
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
