"""Learned Wiener: the filter whose noise-to-signal ratio a network predicts.

The network looks at a tile and says, per radial frequency band, how much signal
there is for one part of noise; the filter is ``conj(H) / (|H|^2 + 1 / SNR)`` with
H that of the tile's level (Pronina et al. 2020 for the idea). Neighbouring tiles
overlap by half of what they keep and are blended linearly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from rtfocus.optics.bands import band_weights, edge_taper
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.restore.fourier import Spectrum, transfer_function
from rtfocus.processing.tiles.frame_fit import paired_planes
from rtfocus.processing.tiles.margins import pad
from rtfocus.processing.tiles.montage import Montage, Region, axis_weights

Image = NDArray[np.float32]
Predict = Callable[[Image, Image], Image]
"""From tiles (N, 1, y, x) and conditions (N, entries) to log SNR (N, band)."""

TAPER_PX = 16
"""Outer pixels of a tile that fade to its mean before the transform."""

_BATCH = 8


@dataclass(frozen=True, slots=True)
class Level:
    """What the filter of a level needs."""

    psf: Image
    """Axes (y, x), odd sides."""
    condition: tuple[float, ...]
    """What the network is told of tiles of this level."""


class LearnedWienerRestorer:
    """Restores frames of one channel, tile by tile; thread-safe if `predict` is.

    Parameters
    ----------
    montage
        Blending weights of the classifier's tiles.
    levels
        Per level that is restored.
    predict
        The network.
    tile_px
        Side of the tiles that the network sees, halo included.
    halo_px
        Pixels per side that a tile reads beyond what it keeps.
    normalisation
        What the network expects of a frame's values.
    """

    method = "learned_wiener"

    def __init__(
        self,
        montage: Montage,
        levels: Mapping[int, Level],
        predict: Predict,
        *,
        tile_px: int,
        halo_px: int,
        normalisation: PercentileRange,
    ) -> None:
        self._montage = montage
        self._levels = dict(levels)
        self._predict = predict
        self._tile_px = tile_px
        self._halo_px = halo_px
        self._normalisation = normalisation
        self._transfers = {
            number: transfer_function(level.psf, (tile_px, tile_px))
            for number, level in self._levels.items()
        }

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
        offset, scale = (np.float32(v) for v in self._normalisation.fit(plane))
        # Room for the halo and for a last tile that begins at the frame's edge.
        height, width = (side + 2 * self._tile_px for side in plane.shape)
        normalised = (plane - offset) / scale
        padded = pad(normalised, (height, width), self._halo_px, "symmetric")
        for number in self._montage.present(labels):
            region = self._montage.region(labels, number)
            weights = self._montage.weights(labels, number, region)
            restored = self._restore_region(padded, region, number)
            restored = np.maximum(restored * scale + offset, 0)
            place = region.rows, region.columns
            into[place] += weights * (restored - plane[place])

    def _restore_region(self, padded: Image, region: Region, number: int) -> Image:
        """Filter a rectangle with the PSF of one level; `padded` is the frame."""
        own = self._tile_px - 2 * self._halo_px
        rows, columns = (_tile_weights(side, own) for side in region.shape)
        grid = list(np.ndindex(len(rows), len(columns)))
        result = np.zeros(region.shape, np.float32)
        for first in range(0, len(grid), _BATCH):
            batch = grid[first : first + _BATCH]
            restored = self._restore_tiles(padded, region, batch, number)
            for (row, column), image in zip(batch, restored, strict=True):
                top, left = row * own // 2, column * own // 2
                into = result[top : top + own, left : left + own]
                kept = image[: into.shape[0], : into.shape[1]]
                down = rows[row, top : top + own]
                across = columns[column, left : left + own]
                into += down[:, None] * across * kept
        return result

    def _restore_tiles(
        self, padded: Image, region: Region, batch: list[Any], number: int
    ) -> Image:
        """Restore some tiles of a region; returns them without halo."""
        side, halo = self._tile_px, self._halo_px
        stride = (side - 2 * halo) // 2
        tiles = []
        for row, column in batch:
            top = region.rows.start + row * stride
            left = region.columns.start + column * stride
            tiles.append(padded[top : top + side, left : left + side])
        stack = np.stack(tiles)
        condition = np.array([self._levels[number].condition] * len(batch), np.float32)
        log_snr = self._predict(stack[:, None], condition)
        restored = filter_tiles(stack, self._transfers[number], log_snr)
        return restored[:, halo : side - halo, halo : side - halo]


def filter_tiles(tiles: Image, transfer: Spectrum, log_snr: Image) -> Image:
    """Apply the Wiener filter of one OTF, each tile with its own SNR.

    Parameters
    ----------
    tiles
        Axes (tile, y, x).
    transfer
        OTF over the half spectrum of a tile, real or complex.
    log_snr
        Natural logarithm of signal power over noise power, axes (tile, band), bands
        as in `rtfocus.optics.bands`.

    Returns
    -------
    Image
        Shape of `tiles`; brightness kept. The outer `TAPER_PX` and what the PSF
        carries in from there are of no use.
    """
    shape = tiles.shape[1], tiles.shape[2]
    bands = band_weights(shape, log_snr.shape[1])
    noise = np.exp(np.tensordot(-log_snr, bands, axes=1))
    gain = np.conj(transfer) / (np.abs(transfer) ** 2 + noise)
    gain[:, 0, 0] = 1
    mean = tiles.mean(axis=(1, 2), keepdims=True)
    spectrum = fft.rfft2((tiles - mean) * edge_taper(shape, TAPER_PX))
    restored = fft.irfft2(spectrum * gain, s=shape) + mean
    return np.asarray(restored, dtype=np.float32)


def _tile_weights(length: int, own_px: int) -> Image:
    """Blending weights along one axis; axes (tile, pixel), a tile every half own."""
    stride = own_px // 2
    count = max(1, -(-length // stride) - 1)
    centres = (own_px - 1) / 2 + stride * np.arange(count, dtype=np.float64)
    return axis_weights(length, centres)
