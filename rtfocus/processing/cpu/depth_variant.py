"""Depth variant: a whole frame, each pixel by the PSFs of the tiles around it.

``out = signal + sum over levels of w_level * (R_level(signal) - signal)``: one
deconvolution per level that is present, over the smallest rectangle its tiles
touch, blended with the montage weights. Background and level 0 have no term, so
their pixels come back exactly as they went in.

`TileRestorer` is LB-DVD as published, patch by patch in batches: slower, the same away
from the borders of patches, and kept as the reproduction of He 2020 that the other is
measured against.
"""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.cpu.deconvolution import (
    BlindRichardsonLucyDeconvolution,
    RichardsonLucyDeconvolution,
    Surrounded,
    WienerDeconvolution,
    richardson_lucy,
)
from rtfocus.processing.montage import (
    Montage,
    Region,
    crop,
    defocused,
    read_region,
    together,
)
from rtfocus.processing.restore import (
    BLIND,
    BLIND_ITERATIONS,
    DEFAULT_ITERATIONS,
    PAPER_HALO_PX,
    PATCH_BY_PATCH,
    WHOLE_FRAME,
    iteration_steps,
    margin_px,
    padded_shape,
)
from rtfocus.processing.windows import paired_planes

Image = NDArray[np.float32]

# Filters kept, in elements of their half spectra: 200 MB for Wiener. Regions of
# changing size share good transform sizes; one per level always fits.
_CACHED_ELEMENTS = 1 << 24


class Deconvolution(Protocol):
    """One PSF and one transform size, ready to restore images of that size."""

    def restore(self, seen: Surrounded) -> Image:
        """Restore a plane in its margin; a new array of the same shape."""
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
        One of `WHOLE_FRAME`, or `BLIND`.
    iterations
        Of Richardson-Lucy; None: 15, accelerated 4, rounds of the blind one 8.
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
        if method not in (*WHOLE_FRAME, BLIND):
            msg = f"method '{method}' is not one of {', '.join((*WHOLE_FRAME, BLIND))}"
            raise ValueError(msg)
        self.method = method
        self._montage = montage
        self._psfs = dict(psfs)
        self._iterations = iterations
        self._noise_to_signal = noise_to_signal
        self._gain = gain_e_per_count
        self._halos = {
            level: margin_px(psf, halo_px) for level, psf in self._psfs.items()
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
        regions = self._montage.regions(labels)
        shapes = {
            level: padded_shape(region.shape, self._halos[level])
            for level, region in regions.items()
        }
        for region, shape, levels in together(regions, shapes):
            place = region.rows, region.columns
            weights = {
                level: self._montage.weights(labels, level, region) for level in levels
            }
            for plane, into in paired_planes(signal, out):
                padded = read_region(plane, region, shape)
                seen = Surrounded(padded, quantum, self._workers)
                for level in levels:
                    restored = self._filter(level, shape).restore(seen)
                    change = crop(restored, region.shape, 0)
                    np.maximum(change, 0, out=change)
                    change -= plane[place]
                    change *= weights[level]
                    into[place] += change
        return out

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
        if self.method == BLIND:
            rounds = self._iterations or BLIND_ITERATIONS
            return BlindRichardsonLucyDeconvolution(psf, shape, rounds)
        steps = iteration_steps(psf, self.method, self._iterations)
        return RichardsonLucyDeconvolution(psf, shape, steps)


class TileRestorer:
    """Richardson-Lucy on each tile by itself, blended by the montage weights.

    Parameters
    ----------
    montage
        Blending weights of the frame's tiles; a tile is what its weight covers.
    psfs
        PSF per level, for every level but 0.
    iterations
        Of Richardson-Lucy.
    halo_px
        Context per side: neighbouring pixels, 0 beyond the frame.
    workers
        Threads of the Fourier transforms.
    """

    method = PATCH_BY_PATCH

    def __init__(
        self,
        montage: Montage,
        psfs: Mapping[int, Image],
        *,
        iterations: int | None = None,
        halo_px: int | None = None,
        workers: int = 1,
    ) -> None:
        self._montage = montage
        self._psfs = dict(psfs)
        self._iterations = iterations or DEFAULT_ITERATIONS
        self._halo_px = PAPER_HALO_PX if halo_px is None else halo_px
        self._workers = workers

    def restore(
        self,
        signal: Image,
        labels: NDArray[np.int16],
        out: Image,
        *,
        quantum: float = 0.0,
    ) -> Image:
        """Restore a frame; see `DepthVariantRestorer.restore`."""
        del quantum
        np.copyto(out, signal)
        for plane, into in paired_planes(signal, out):
            self._restore_plane(plane, labels, into)
        return out

    def _restore_plane(
        self, plane: Image, labels: NDArray[np.int16], into: Image
    ) -> None:
        halo = self._halo_px
        padded = np.pad(np.maximum(plane, 0), halo)
        for (level, shape), tiles in self._batches(labels).items():
            regions = [self._montage.tile_region(*tile) for tile in tiles]
            patches = np.stack([_with_halo(padded, r, halo) for r in regions])
            restored = richardson_lucy(
                patches, self._psfs[level], self._iterations, workers=self._workers
            )
            inner = restored[:, halo : halo + shape[0], halo : halo + shape[1]]
            for tile, region, image in zip(tiles, regions, inner, strict=True):
                place = region.rows, region.columns
                weights = self._montage.tile_weights(*tile, region)
                into[place] += weights * (image - plane[place])

    def _batches(
        self, labels: NDArray[np.int16]
    ) -> dict[tuple[int, tuple[int, int]], list[tuple[int, int]]]:
        """Group the tiles to restore by level and size."""
        batches = defaultdict(list)
        present = self._montage.tiles(labels)
        for row, column in np.argwhere(defocused(present)):
            shape = self._montage.tile_region(row, column).shape
            batches[int(present[row, column]), shape].append((row, column))
        return batches


def _with_halo(padded: Image, region: Region, halo_px: int) -> Image:
    """Cut a region and its halo out of a frame that is padded by the halo."""
    rows = slice(region.rows.start, region.rows.stop + 2 * halo_px)
    columns = slice(region.columns.start, region.columns.stop + 2 * halo_px)
    return padded[rows, columns]
