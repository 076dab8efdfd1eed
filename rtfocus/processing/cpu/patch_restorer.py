"""Patch restorer: LB-DVD as published, patch by patch in batches.

Slower than `rtfocus.processing.cpu.depth_variant`, which gives the same away from the
borders of patches; kept as the reproduction of He 2020 that the other is
measured against.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.cpu.richardson_lucy import richardson_lucy
from rtfocus.processing.restore import PATCH_BY_PATCH
from rtfocus.processing.restore.richardson_lucy import DEFAULT_ITERATIONS
from rtfocus.processing.tiles.frame_fit import paired_planes
from rtfocus.processing.tiles.montage import Montage, Region, defocused

Image = NDArray[np.float32]

PAPER_HALO_PX = 13
"""Patches of 84 px are padded to 110 (He 2020, section 2.3)."""


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
