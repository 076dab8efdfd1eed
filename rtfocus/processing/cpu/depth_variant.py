"""Depth variant: a whole frame, each pixel by the PSFs of the tiles around it.

``out = signal + sum over levels of w_level * (R_level(signal) - signal)``: one
deconvolution per level that is present, over the smallest rectangle its tiles
touch, blended with the montage weights. Background and level 0 have no term, so
their pixels come back exactly as they went in.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.optics.psf import psf_radius_px
from rtfocus.processing.cpu.richardson_lucy import RichardsonLucyDeconvolution
from rtfocus.processing.cpu.wiener import WienerDeconvolution
from rtfocus.processing.restore import WHOLE_FRAME
from rtfocus.processing.restore.fourier import padded_shape
from rtfocus.processing.restore.richardson_lucy import (
    ACCELERATED_ITERATIONS,
    DEFAULT_ITERATIONS,
)
from rtfocus.processing.tiles.frame_fit import paired_planes
from rtfocus.processing.tiles.margins import crop, read_region
from rtfocus.processing.tiles.montage import Montage, Region

Image = NDArray[np.float32]

# Filters kept, in elements of their half spectra: 200 MB for Wiener. Regions of
# changing size share good transform sizes; one per level always fits.
_CACHED_ELEMENTS = 1 << 24


class Deconvolution(Protocol):
    """One PSF and one transform size, ready to restore images of that size."""

    def restore(self, padded: Image, quantum: float, workers: int) -> Image:
        """Restore an image padded by mirroring; a new array of the same shape."""
        ...


class DepthVariantRestorer:
    """Restores frames of one channel; filters are computed once and kept.

    Safe to use from several threads, each with its own `out`.

    Parameters
    ----------
    montage
        Blending weights of the frame's tiles.
    psfs
        PSF per level, for every level but 0; negative levels where they are signed.
    method
        One of `WHOLE_FRAME`.
    iterations
        Of Richardson-Lucy; None: 15, accelerated 4.
    noise_to_signal
        Of Wiener; None: estimated per frame and level.
    gain_e_per_count
        Of the camera, for that estimate; None: from the frame alone.
    halo_px
        Context around a region; None: half the side of the PSF, which holds 99 %
        of its energy.
    workers
        Threads of the Fourier transforms.
    """

    def __init__(
        self,
        montage: Montage,
        psfs: Mapping[int, Image],
        *,
        method: str = "wiener",
        iterations: int | None = None,
        noise_to_signal: float | None = None,
        gain_e_per_count: float | None = None,
        halo_px: int | None = None,
        workers: int = 1,
    ) -> None:
        if method not in WHOLE_FRAME:
            msg = f"method '{method}' is not one of {', '.join(WHOLE_FRAME)}"
            raise ValueError(msg)
        self.method = method
        self._montage = montage
        self._psfs = dict(psfs)
        self._iterations = iterations
        self._noise_to_signal = noise_to_signal
        self._gain = gain_e_per_count
        self._halos = {
            level: psf_radius_px(psf, 1.0) if halo_px is None else halo_px
            for level, psf in self._psfs.items()
        }
        self._workers = workers
        self._lock = threading.Lock()
        self._filters: OrderedDict[Any, Deconvolution] = OrderedDict()

    def restore(
        self,
        signal: Image,
        labels: NDArray[np.int16],
        out: Image,
        *,
        quantum: float = 0.0,
    ) -> Image:
        """Restore a frame.

        Parameters
        ----------
        signal
            Axes (y, x) or (y, x, colour); camera offset removed, no NaN.
        labels
            Level per tile, axes (tile_y, tile_x), as `DefocusMap.level`.
        out
            Result, shape of `signal`, float32; non-negative where restored.
        quantum
            Step between the camera's values; 0 for float frames.

        Returns
        -------
        Image
            `out`.
        """
        np.copyto(out, signal)
        for level in self._montage.present(labels):
            region = self._montage.region(labels, level)
            weights = self._montage.weights(labels, level, region)
            for plane, into in paired_planes(signal, out):
                restored = self._restore_region(plane, level, region, quantum)
                np.maximum(restored, 0, out=restored)
                restored -= plane[region.rows, region.columns]
                restored *= weights
                into[region.rows, region.columns] += restored
        return out

    def _restore_region(
        self, plane: Image, level: int, region: Region, quantum: float
    ) -> Image:
        """Deconvolve one rectangle with true neighbours around it."""
        halo_px = self._halos[level]
        shape = padded_shape(region.shape, halo_px)
        padded = read_region(plane, region, shape, halo_px)
        deconvolution = self._filter(level, shape)
        restored = deconvolution.restore(padded, quantum, self._workers)
        return np.asarray(crop(restored, region.shape, halo_px))

    def _filter(self, level: int, shape: tuple[int, int]) -> Deconvolution:
        """Build a filter or take it from the cache, oldest out first."""
        key = (level, shape)
        with self._lock:
            if key in self._filters:
                self._filters.move_to_end(key)
            else:
                self._filters[key] = self._build(self._psfs[level], shape)
                self._forget_oldest()
            return self._filters[key]

    def _forget_oldest(self) -> None:
        """Drop filters beyond the bound, but never those of one whole frame."""
        sizes = [shape[0] * (shape[1] // 2 + 1) for _, shape in self._filters]
        bound = max(_CACHED_ELEMENTS, len(self._psfs) * max(sizes))
        while sum(sizes) > bound:
            self._filters.popitem(last=False)
            sizes.pop(0)

    def _build(self, psf: Image, shape: tuple[int, int]) -> Deconvolution:
        if self.method == "wiener":
            return WienerDeconvolution(
                psf,
                shape,
                noise_to_signal=self._noise_to_signal,
                gain_e_per_count=self._gain,
            )
        accelerated = self.method == "richardson_lucy_accelerated"
        usual = ACCELERATED_ITERATIONS if accelerated else DEFAULT_ITERATIONS
        return RichardsonLucyDeconvolution(
            psf, shape, self._iterations or usual, accelerated=accelerated
        )
