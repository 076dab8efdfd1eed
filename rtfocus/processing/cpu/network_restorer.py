"""Network restorer: tile by tile, or in the pass that finds the defocus.

Both end alike: ``out = signal + share * (restored - signal)``, with the share of
the montage. Where only tiles in focus and background reach it is 0, and pixels
come back as they went in. A network that knows no focus restores all of a frame.
"""

import threading
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import EngineCard, input_of, output_of
from rtfocus.engines.fitted import Evidence
from rtfocus.engines.registry import FoundEngine
from rtfocus.engines.spec_steps import Values
from rtfocus.errors import EngineError
from rtfocus.optics.normalisation import normalised
from rtfocus.processing.classify import Conditions, invertible_normalisation
from rtfocus.processing.cpu.classifier import FrameClassifier, Prediction
from rtfocus.processing.montage import FrameTiles, Montage, from_planes, to_planes
from rtfocus.runtimes.cpu_backends import open_engine, runs_on

Image = NDArray[np.float32]

# Pixels that keep a core busy at once; more only takes memory.
_BATCH_PX = 256 * 256


class TileNetwork:
    """A restorer's network, opened for batches of its tiles.

    Any number of tiles goes through. Safe to use from several threads, which take
    turns.

    Parameters
    ----------
    output
        Tensor that is wanted; None: the card's first.

    Raises
    ------
    EngineError
        If it is no network or cannot be loaded.
    """

    def __init__(
        self,
        found: FoundEngine,
        settings: ProcessingConfig,
        *,
        output: str | None = None,
        threads: int = 1,
    ) -> None:
        tiles = input_of(found.card)
        self._output = output_of(found.card).name if output is None else output
        # Networks of other people may be made for one image at a time.
        alone = found.card.sees_image_alone
        self.batch = 1 if alone else max(1, _BATCH_PX // tiles.tile_px**2)
        """Tiles per inference."""
        self._engine = open_engine(
            found,
            settings,
            shape=(self.batch, tiles.channels, tiles.tile_px, tiles.tile_px),
            outputs=(self._output,),
            threads=threads,
        )
        self.runs_on = runs_on(self._engine)
        """Runtime and precision, e.g. ``openvino bf16``."""
        self._turn = threading.Lock()

    def run(self, tiles: Image, condition: Image | None) -> Image:
        """Return the output for tiles (N, C, y, x) with conditions (N, entries)."""
        found = []
        for first in range(0, len(tiles), self.batch):
            span = slice(first, first + self.batch)
            number = len(tiles[span])
            # What is fixed is faster than what may vary: a shorter last batch is
            # filled up, and the rest is thrown away.
            full, told = (
                None if part is None else _filled(part[span], self.batch)
                for part in (tiles, condition)
            )
            assert full is not None
            with self._turn:
                outputs = self._engine.infer(full, told)
            found.append(outputs[self._output][:number])
        return np.concatenate(found)

    def restored(self, tiles: Image, condition: Image | None) -> Image:
        """Return the restored tiles; EngineError if they have another shape."""
        restored = np.asarray(self.run(tiles, condition), np.float32)
        if restored.shape != tiles.shape:
            msg = (
                f"engine '{self._engine.name}': its output '{self._output}' is "
                f"{restored.shape} for tiles of {tiles.shape}; a restorer returns "
                "tiles of the size it is given"
            )
            raise EngineError(msg)
        return restored

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def _filled(part: Image, batch: int) -> Image:
    """Repeat the last of a batch until it is full."""
    missing = batch - len(part)
    if not missing:
        return part
    return np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])


class FrameRestorer(ABC):
    """Restores the frames of one channel.

    Safe to use from several threads, each with its own `out`.

    Parameters
    ----------
    network
        Of its own, closed by `close`; None: it has none.
    """

    def __init__(self, network: TileNetwork | FrameClassifier | None = None) -> None:
        self.runs_on = None if network is None else network.runs_on
        """Runtime and precision of its own network; None: it has none."""
        self._owned = network

    @abstractmethod
    def restore_frame(
        self, signal: Image, seen: Prediction | None, out: Image
    ) -> Image | None:
        """Restore a frame; return `FrameResult.expected_error`.

        Parameters
        ----------
        signal
            Axes (y, x) or (y, x, colour); camera offset removed, no NaN.
        seen
            What the classifier saw in it; None: there is none, and the restorer does
            without.
        out
            Result, shape of `signal`, float32; in focus and background exactly as
            in `signal`, except of a restorer that knows no focus.
        """

    def close(self) -> None:
        """Free the network; called twice does nothing."""
        if self._owned is not None:
            self._owned.close()


class TileNetworkRestorer(FrameRestorer):
    """A restorer engine, told `conditions`, on the tiles of a frame that need it."""

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

    def restore_frame(self, signal: Image, seen: Prediction | None, out: Image) -> None:
        """Restore a frame, see `FrameRestorer`."""
        assert seen is not None
        np.copyto(out, signal)
        share = self._montage.restored_share(seen.defocus.level)
        places = self._tiles.needed(share)
        if not places:
            return
        condition = self._conditions.rows(self._tiles.defocus_um(seen.defocus, places))
        images = to_planes(signal, self._input.channels)
        restored = np.empty(images.shape, np.float32)
        for image, into in zip(images, restored, strict=True):
            ranges = [self._normalisation.fit(plane) for plane in image]
            into[...] = np.stack(
                [normalised(p, *line) for p, line in zip(image, ranges, strict=True)]
            )
            found = self._network.restored(self._tiles.cut(into, places), condition)
            into[...] = self._tiles.join(found, places)
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

    def restore_frame(self, signal: Image, seen: Prediction | None, out: Image) -> None:
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
            found = self._network.restored(tiles, None)
            into[...] = self._steps.give(self._tiles.join(found, places), shown, image)
        # No light is negative; what is on a scale of its own is no light.
        least = -np.inf if self._steps.values is Values.own else 0
        np.maximum(from_planes(restored, signal.shape), least, out=out)


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
        self, signal: Image, seen: Prediction | None, out: Image
    ) -> Image | None:
        """Restore a frame, see `FrameRestorer`."""
        assert seen is not None
        np.copyto(out, signal)
        share = self._montage.restored_share(seen.defocus.level)
        if share.any():
            if self._own_pass is not None:
                prepared = self._own_pass.prepare(signal)
                with self._turn:
                    seen = self._own_pass.see(prepared)
            assert seen.restored is not None
            blend(signal, seen.restored, share, out)
        evidence = self._evidence
        return None if evidence is None else evidence.weigh(signal, seen.defocus, out)


def blend(signal: Image, restored: Image, share: Image, out: Image) -> None:
    """Move `out`, a copy of `signal`, towards the restored frame by a share.

    Parameters
    ----------
    signal, restored
        Axes (y, x) or (y, x, colour); negative light becomes 0, infinite NaN.
    share
        0 to 1, axes (y, x).
    out
        Shape of `signal`.
    """
    # Of minus infinity 0 would hide that the network is damaged; 0 times it is NaN.
    change = np.maximum(restored, 0 * restored)
    change -= signal
    change *= share if signal.ndim == 2 else share[..., None]
    out += change
