"""Network restorers: what a network restores of a frame, in one pass or tile by tile.

`TileRestorer` goes tile by tile too, without a network: LB-DVD as published (He 2020),
slower than `rtfocus.processing.cpu.depth_variant` and kept to measure that against.

In the learned Wiener filter a network tells the signal-to-noise ratio of a tile per
band; the filter is ``conj(H) / (|H|^2 + 1 / SNR)`` with H that of the tile's level
(Pronina et al. 2020 for the idea). Tiles overlap by half and are blended linearly.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.engines.card import EngineCard, input_of
from rtfocus.engines.fitted import Evidence
from rtfocus.engines.spec_steps import Values
from rtfocus.optics.normalisation import PercentileRange, normalised
from rtfocus.processing.classify import Conditions, invertible_normalisation
from rtfocus.processing.cpu.classifier import FrameClassifier, Prediction, TileNetwork
from rtfocus.processing.cpu.depth_variant import (
    DepthVariantRestorer,
    FrameRestorer,
    LevelRestorer,
    Planes,
    blend,
)
from rtfocus.processing.montage import (
    FrameTiles,
    Montage,
    Region,
    axis_weights,
    defocused,
    from_planes,
    pad,
    to_planes,
)
from rtfocus.processing.restore import (
    PATCH_BY_PATCH,
    Spectrum,
    iterations_of,
    patch_halo_px,
    richardson_lucy,
    transfer_function,
)

Image = NDArray[np.float32]

# Of the learned Wiener filter; more only takes memory.
_BATCH_TILES = 8


class JointRestorer(FrameRestorer):
    """The restored frame of a joint engine, from whichever pass made it.

    Parameters
    ----------
    montage
        Blending weights of the tiles whose labels decide what is restored.
    own_pass
        The engine for a pass of its own; None: the pass that found the defocus has
        restored the frame too.
    evidence
        Weighs what the engine corrected; None: all of it is taken.
    """

    def __init__(
        self,
        montage: Montage,
        own_pass: FrameClassifier | None,
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__(own_pass)
        self._montage = montage
        self._own_pass = own_pass
        self._evidence = evidence
        self._turn = threading.Lock()

    def restore_frame(
        self, signal: Image, prediction: Prediction | None, out: Image
    ) -> Image | None:
        """Restore a frame, see `FrameRestorer`."""
        assert prediction is not None
        np.copyto(out, signal)
        share = self._montage.restored_share(prediction.defocus.level)
        if share.any():
            if self._own_pass is not None:
                prepared = self._own_pass.prepare(signal)
                with self._turn:
                    prediction = self._own_pass.see(prepared)
            assert prediction.restored is not None
            blend(signal, prediction.restored, share, out)
        if self._evidence is None:
            return None
        return self._evidence.weigh(signal, prediction.defocus, out)


class TileNetworkRestorer(FrameRestorer):
    """A restorer engine with `conditions`, on the tiles of a frame that need it."""

    def __init__(
        self,
        card: EngineCard,
        network: TileNetwork,
        conditions: Conditions,
        montage: Montage,
    ) -> None:
        super().__init__(network)
        self._network = network
        self._conditions = conditions
        self._montage = montage
        self._input = input_of(card)
        self._normalisation = invertible_normalisation(card)
        self._tiles = FrameTiles(self._input, montage.shape)

    def restore_frame(
        self, signal: Image, prediction: Prediction | None, out: Image
    ) -> None:
        """Restore a frame, see `FrameRestorer`."""
        assert prediction is not None
        np.copyto(out, signal)
        share = self._montage.restored_share(prediction.defocus.level)
        places = self._tiles.needed(share)
        if not places:
            return
        defocus_um = self._tiles.defocus_um(prediction.defocus, places)
        condition = self._conditions.rows(defocus_um)
        images = to_planes(signal, self._input.channels)
        restored = np.empty(images.shape, np.float32)
        for image, into in zip(images, restored, strict=True):
            ranges = [self._normalisation.fit(plane) for plane in image]
            for number, (offset, scale) in enumerate(ranges):
                into[number] = normalised(image[number], offset, scale)
            tiles = self._network.restored(self._tiles.cut(into, places), condition)
            into[...] = self._tiles.join(tiles, places)
            for plane, (offset, scale) in zip(into, ranges, strict=True):
                plane *= np.float32(scale)
                plane += np.float32(offset)
        blend(signal, from_planes(restored, signal.shape), share, out)


class WholeImageRestorer(FrameRestorer):
    """A restorer that knows no focus, on all tiles of a frame of a shape (y, x).

    What its card's steps measure is measured on the whole frame, not tile by tile.
    """

    def __init__(
        self, card: EngineCard, network: TileNetwork, shape: tuple[int, int]
    ) -> None:
        super().__init__(network)
        assert card.steps is not None
        self._network = network
        self._steps = card.steps
        self._channels = input_of(card).channels
        self._tiles = FrameTiles(input_of(card), shape)

    def restore_frame(
        self, signal: Image, prediction: Prediction | None, out: Image
    ) -> None:
        """Restore a frame, see `FrameRestorer`.

        Raises
        ------
        EngineError
            If what the network gives is no image of its tiles' size, or no numbers.
        """
        images = to_planes(signal, self._channels)
        restored = np.empty(images.shape, np.float32)
        places = self._tiles.places
        for image, into in zip(images, restored, strict=True):
            shown = self._steps.show(image)
            tiles = self._tiles.cut(shown.image, places)
            joined = self._tiles.join(self._network.restored(tiles, None), places)
            into[...] = self._steps.give(joined, shown, image)
        # No light is negative; what is on a scale of its own is no light.
        least = -np.inf if self._steps.values is Values.own else 0
        np.maximum(from_planes(restored, signal.shape), least, out=out)


class TileRestorer(LevelRestorer):
    """Richardson-Lucy on each tile alone, blended by the montage weights.

    Parameters
    ----------
    montage
        Blending weights of the frame's tiles; a tile is what its weight covers.
    psfs
        PSF per level, for every level but 0.
    settings
        Iterations, and context per side: neighbouring pixels, 0 beyond the frame.
    """

    def __init__(
        self, montage: Montage, psfs: Mapping[int, Image], settings: RestorationConfig
    ) -> None:
        super().__init__()
        self._montage = montage
        self._psfs = dict(psfs)
        self._iterations = iterations_of(settings)
        self._halo_px = patch_halo_px(settings)

    def _restore_planes(self, pairs: Planes, labels: NDArray[np.int16]) -> None:
        halo = self._halo_px
        for plane, into in pairs:
            padded = np.pad(np.maximum(plane, 0), halo)
            for (level, shape), tiles in self._batches(labels).items():
                regions = [self._montage.tile_region(*tile) for tile in tiles]
                patches = np.stack([_with_halo(padded, r, halo) for r in regions])
                restored = richardson_lucy(patches, self._psfs[level], self._iterations)
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


def make_restorer(
    montage: Montage,
    psfs: Mapping[int, Image],
    settings: RestorationConfig,
    quantum: float,
    gain_e_per_count: float | None = None,
) -> LevelRestorer:
    """Make one of `METHODS` with the parameters of the config."""
    if settings.method == PATCH_BY_PATCH:
        return TileRestorer(montage, psfs, settings)
    return DepthVariantRestorer(
        montage, psfs, settings, quantum=quantum, gain_e_per_count=gain_e_per_count
    )


Predict = Callable[[Image, Image | None], Image]
"""From tiles (N, 1, y, x) and conditions (N, entries) to log SNR (N, band)."""


class LearnedWienerRestorer(LevelRestorer):
    """Restores frames of one channel, tile by tile; thread-safe if `predict` is.

    Parameters
    ----------
    psfs
        PSF per level that is restored.
    conditions
        What the network gets beside tiles of each, axes (level, entry); None: nothing.
    tile_px
        Side of the tiles that the network sees, halo included.
    halo_px
        Pixels per side that a tile reads beyond what it keeps.
    normalisation
        What the network expects of a frame's values.
    network
        What `predict` runs, closed by `close`; None: the caller closes it.
    """

    def __init__(
        self,
        montage: Montage,
        psfs: Mapping[int, Image],
        conditions: Image | None,
        predict: Predict,
        *,
        tile_px: int,
        halo_px: int,
        normalisation: PercentileRange,
        network: TileNetwork | None = None,
    ) -> None:
        super().__init__(network)
        self._montage = montage
        self._told = (
            {} if conditions is None else dict(zip(psfs, conditions, strict=True))
        )
        self._predict = predict
        self._tile_px = tile_px
        self._halo_px = halo_px
        self._normalisation = normalisation
        self._transfers = {
            level: transfer_function(psf, (tile_px, tile_px))
            for level, psf in psfs.items()
        }

    def _restore_planes(self, pairs: Planes, labels: NDArray[np.int16]) -> None:
        for plane, into in pairs:
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
        for first in range(0, len(grid), _BATCH_TILES):
            batch = grid[first : first + _BATCH_TILES]
            restored = self._restore_tiles(padded, region, batch, number)
            for (row, column), image in zip(batch, restored, strict=True):
                top, left = row * own // 2, column * own // 2
                into = result[top : top + own, left : left + own]
                cut = image[: into.shape[0], : into.shape[1]]
                down = rows[row, top : top + own]
                across = columns[column, left : left + own]
                into += down[:, None] * across * cut
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
        condition = None
        if self._told:
            condition = np.repeat(self._told[number][None], len(batch), axis=0)
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
        as in `rtfocus.optics.formation`.

    Returns
    -------
    Image
        Shape of `tiles`; brightness kept. The outer `TAPER_PX` and what the PSF
        carries in from there are of no use.
    """
    # Here, because SciPy takes long to load, and few channels need it.
    from scipy import fft

    from rtfocus.optics.formation import TAPER_PX, band_weights, edge_taper

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
