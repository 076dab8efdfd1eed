"""Network restorer: tile by tile, or in the pass that finds the defocus.

Both end alike: ``out = signal + share * (restored - signal)``, with the share of
the montage. Where only tiles in focus and background reach it is 0, and pixels
come back as they went in.
"""

import threading

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.classify.conditions import Conditions
from rtfocus.processing.classify.rules import invertible_normalisation
from rtfocus.processing.cpu.classifier import FrameClassifier, Seen
from rtfocus.processing.cpu.networks import TileNetwork, restored_tiles
from rtfocus.processing.cpu.preparation import normalised
from rtfocus.processing.engines.card import EngineCard, input_of
from rtfocus.processing.tiles.frame_fit import from_planes, to_planes
from rtfocus.processing.tiles.montage import Montage
from rtfocus.processing.tiles.windows import FrameTiles, restored_share

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

    def restore(self, signal: Image, seen: Seen, out: Image, *, quantum: float) -> None:
        """Restore a frame, see `rtfocus.processing.cpu.channel.FrameRestorer`."""
        del quantum
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
    """

    def __init__(self, montage: Montage, own_pass: FrameClassifier | None) -> None:
        self._montage = montage
        self._own_pass = own_pass
        self._turn = threading.Lock()

    def restore(self, signal: Image, seen: Seen, out: Image, *, quantum: float) -> None:
        """Restore a frame, see `rtfocus.processing.cpu.channel.FrameRestorer`."""
        del quantum
        np.copyto(out, signal)
        share = restored_share(self._montage, seen.defocus.level)
        if not share.any():
            return
        restored = seen.restored
        if self._own_pass is not None:
            prepared = self._own_pass.prepare(signal)
            with self._turn:
                restored = self._own_pass.see(prepared).restored
        if restored is None:
            msg = "a joint engine was opened without its restored frame"
            raise ValueError(msg)
        blend(signal, restored, share, out)

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
