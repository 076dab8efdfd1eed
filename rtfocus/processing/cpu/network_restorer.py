"""Network restorer: tile by tile, or in the pass that finds the defocus.

Both end alike: ``out = signal + share * (restored - signal)``, with the share of
the montage. Where only tiles in focus and background reach it is 0, and pixels
come back as they went in. A network that knows no focus restores all of a frame.

In the learned Wiener filter the network says of a tile, per radial frequency band, how
much signal there is for one part of noise; the filter is ``conj(H) / (|H|^2 + 1 /
SNR)`` with H that of the tile's level (Pronina et al. 2020 for the idea). Neighbouring
tiles overlap by half of what they keep and are blended linearly.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from rtfocus.engines.card import EngineCard, input_of
from rtfocus.engines.spec_steps import Values
from rtfocus.optics.formation import band_weights, edge_taper
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.classify import Conditions, invertible_normalisation
from rtfocus.processing.cpu.classifier import FrameClassifier, Seen, known
from rtfocus.processing.cpu.networks import TileNetwork, restored_tiles
from rtfocus.processing.cpu.preparation import normalised
from rtfocus.processing.evidence import Evidence
from rtfocus.processing.montage import Montage, Region, axis_weights, pad
from rtfocus.processing.restore import TAPER_PX, Spectrum, transfer_function
from rtfocus.processing.windows import (
    FrameTiles,
    from_planes,
    paired_planes,
    restored_share,
    to_planes,
)

Image = NDArray[np.float32]


class TileNetworkRestorer:
    """A restorer engine on the tiles of a frame that need it.

    Safe to use from several threads, each with its own `out`.

    Parameters
    ----------
    card
        Of the engine.
    network
        Opened for its tiles; closed by `close`.
    conditions
        What it is told.
    montage
        Blending weights of the classifier's tiles.
    """

    def __init__(
        self,
        card: EngineCard,
        network: TileNetwork,
        conditions: Conditions,
        montage: Montage,
    ) -> None:
        self.card = card
        self._network = network
        self._conditions = conditions
        self._montage = montage
        self._input = input_of(card)
        self._output = "" if card.output is None else card.output.name
        self._normalisation = invertible_normalisation(card)
        self._tiles = FrameTiles(self._input, montage.shape)

    def restore(
        self, signal: Image, seen: Seen | None, out: Image, *, quantum: float
    ) -> None:
        """Restore a frame, see `rtfocus.processing.cpu.channel.FrameRestorer`."""
        del quantum
        seen = known(seen)
        np.copyto(out, signal)
        share = restored_share(self._montage, seen.defocus.level)
        places = self._tiles.needed(share)
        if not places:
            return
        condition = self._conditions.rows(self._tiles.defocus_um(seen.defocus, places))
        images = to_planes(signal, self._input.channels)
        restored = np.empty(images.shape, np.float32)
        for image, into in zip(images, restored, strict=True):
            ranges = [self._normalisation.fit(plane) for plane in image]
            into[...] = np.stack(
                [normalised(p, *found) for p, found in zip(image, ranges, strict=True)]
            )
            tiles = self._tiles.cut(into, places)
            outputs = self._network.run(tiles, condition)
            found = restored_tiles(self.card.name, outputs, self._output, tiles)
            into[...] = self._tiles.join(found, places)
            for plane, (offset, scale) in zip(into, ranges, strict=True):
                plane *= np.float32(scale)
                plane += np.float32(offset)
        blend(signal, from_planes(restored, signal.shape), share, out)

    def close(self) -> None:
        """Free the network."""
        self._network.close()


class WholeImageRestorer:
    """A restorer that knows no focus, on all tiles of a frame.

    What its card's steps measure is measured on the whole frame, not tile by tile.
    Safe to use from several threads, each with its own `out`.

    Parameters
    ----------
    card
        Of the engine; with steps.
    network
        Opened for its tiles; closed by `close`.
    shape
        Height and width of the frames.
    """

    def __init__(
        self, card: EngineCard, network: TileNetwork, shape: tuple[int, int]
    ) -> None:
        if card.steps is None or card.output is None:
            msg = f"engine '{card.name}' has no steps"
            raise ValueError(msg)
        self.card = card
        self._network = network
        self._steps = card.steps
        self._output = card.output.name
        self._channels = input_of(card).channels
        self._tiles = FrameTiles(input_of(card), shape)

    def restore(
        self, signal: Image, seen: Seen | None, out: Image, *, quantum: float
    ) -> None:
        """Restore a frame, see `rtfocus.processing.cpu.channel.FrameRestorer`.

        Raises
        ------
        EngineError
            If what the network gives is no image of its tiles' size, or no numbers.
        """
        del seen, quantum
        images = to_planes(signal, self._channels)
        restored = np.empty(images.shape, np.float32)
        places = self._tiles.places
        for image, into in zip(images, restored, strict=True):
            shown = self._steps.show(image)
            tiles = self._tiles.cut(shown.image, places)
            outputs = self._network.run(tiles, None)
            found = restored_tiles(self.card.name, outputs, self._output, tiles)
            into[...] = self._steps.give(self._tiles.join(found, places), shown, image)
        # No light is negative; what is on a scale of its own is no light.
        least = -np.inf if self._steps.values is Values.own else 0
        np.maximum(from_planes(restored, signal.shape), least, out=out)

    def close(self) -> None:
        """Free the network."""
        self._network.close()


class JointRestorer:
    """The restored frame of a joint engine, from whichever pass made it.

    Safe to use from several threads, each with its own `out`.

    Parameters
    ----------
    montage
        Blending weights of the tiles whose labels decide what is restored.
    own_pass
        The engine for a pass of its own, closed by `close`; None: the pass that
        found the defocus has restored the frame too.
    evidence
        Weighs what the engine corrected; None: all of it is taken.
    """

    def __init__(
        self,
        montage: Montage,
        own_pass: FrameClassifier | None,
        evidence: Evidence | None = None,
    ) -> None:
        self._montage = montage
        self._own_pass = own_pass
        self._evidence = evidence
        self._turn = threading.Lock()

    def restore(
        self, signal: Image, seen: Seen | None, out: Image, *, quantum: float
    ) -> None:
        """Restore a frame, see `rtfocus.processing.cpu.channel.FrameRestorer`."""
        del quantum
        seen = known(seen)
        np.copyto(out, signal)
        share = restored_share(self._montage, seen.defocus.level)
        if not share.any():
            return
        if self._own_pass is not None:
            prepared = self._own_pass.prepare(signal)
            with self._turn:
                seen = self._own_pass.see(prepared)
        if seen.restored is None:
            msg = "a joint engine was opened without its restored frame"
            raise ValueError(msg)
        blend(signal, seen.restored, share, out)
        if self._evidence is not None:
            self._evidence.weigh(signal, seen.defocus, out)

    def close(self) -> None:
        """Free the engine of the own pass."""
        if self._own_pass is not None:
            self._own_pass.close()


def blend(signal: Image, restored: Image, share: Image, out: Image) -> None:
    """Move `out`, a copy of `signal`, towards the restored frame by a share.

    Parameters
    ----------
    signal, restored
        Axes (y, x) or (y, x, colour); negative light becomes 0.
    share
        0 to 1, axes (y, x).
    out
        Shape of `signal`.
    """
    change = np.maximum(restored, 0)
    change -= signal
    change *= share if signal.ndim == 2 else share[..., None]
    out += change


Predict = Callable[[Image, Image], Image]
"""From tiles (N, 1, y, x) and conditions (N, entries) to log SNR (N, band)."""

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
        as in `rtfocus.optics.formation`.

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
