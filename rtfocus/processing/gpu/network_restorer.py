"""Network restorer: all tiles of a frame, or the pass that found the defocus.

As `rtfocus.processing.cpu.network_restorer.TileNetworkRestorer`, but for every tile,
whatever its label: its batches are recorded once, for the whole frame.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from rtfocus.processing.classify import invertible_normalisation
from rtfocus.processing.engines.card import EngineCard, input_of
from rtfocus.processing.gpu.classifier import FrameClassifier, InFlight, Part
from rtfocus.processing.gpu.depth_variant import Blending
from rtfocus.processing.gpu.engine import GpuContext, GpuEngine, Shape
from rtfocus.processing.gpu.preparation import Percentiles
from rtfocus.processing.gpu.tiles import TileConditions, windowed_tiles
from rtfocus.processing.gpu.work import DeviceArray, DeviceMemory, FrameShape, Work
from rtfocus.processing.tiles.windows import FrameTiles


class JointRestorer:
    """The restored frame of the joint engine that found the defocus.

    Parameters
    ----------
    classifier
        The joint engine.
    blending
        Montage weights of its tiles.
    frame
        Shape of the signal.
    output
        Tensor that holds the restored frame.
    """

    def __init__(
        self,
        classifier: FrameClassifier,
        blending: Blending,
        frame: FrameShape,
        output: str,
    ) -> None:
        self._classifier = classifier
        self._blending = blending
        self._frame = frame
        self._output = output

    def why_not_capturable(self, work: Work) -> str | None:
        """Return None: kernels may be recorded."""
        del work
        return None

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return the one part there is: every tile in one go, whatever its label."""
        del labels
        return [()]

    def recurs(self, part: Part) -> bool:
        """Return True: it is the same for every frame."""
        del part
        return True

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue the blending of what the network restored."""
        del part
        restored = frame.seen.network.buffers[self._output]
        self._classifier.tile.join(work, restored, frame.seen.ranges, frame.out)
        self._blending.enqueue_share(
            work,
            frame=self._frame,
            signal=frame.signal,
            restored=frame.out,
            levels=frame.maps["level"],
            out=frame.out,
        )

    def close(self) -> None:
        """Nothing is its own."""


class TileNetworkRestorer:
    """A restorer engine; implements `FrameRestorer`.

    Buffers and context are shared by all frames in flight: their restoration is on
    one stream.

    Parameters
    ----------
    memory
        Where the tiles lie.
    engine
        Opened for batches of tiles; closed by `close`.
    card
        Of the engine.
    batch
        Tiles per inference.
    tiles
        Where they lie in a frame.
    frame
        Shape of the signal.
    blending
        Montage weights of the labels.
    conditions
        What the engine is told; None: nothing.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        engine: GpuEngine,
        card: EngineCard,
        *,
        batch: int,
        tiles: FrameTiles,
        frame: FrameShape,
        blending: Blending,
        conditions: TileConditions | None,
    ) -> None:
        self._engine = engine
        self._card = card
        self._input = input_of(card)
        self._frame = frame
        self._blending = blending
        self._conditions = conditions
        self._batch = batch
        planes = self._input.channels
        self._tiles = windowed_tiles(memory, frame, planes, tiles.windows)
        rule = invertible_normalisation(card)
        self._percentiles = Percentiles(memory, rule, frame, planes)
        self._ranges = memory.allocate((planes, 2), np.float32, "ranges")
        self._batches = ceil(self._tiles.count / batch)
        self._shapes: dict[str, Shape] = {
            self._input.name: (batch, planes, *(2 * (self._input.tile_px,)))
        }
        if card.condition is not None:
            self._shapes[card.condition.name] = (batch, len(card.condition.entries))
        every = {**self._shapes, **engine.output_shapes(self._shapes)}
        # All batches behind each other; the last one may be longer than the frame.
        self._buffers: dict[str, DeviceArray] = {
            name: memory.upload(
                np.zeros(
                    (self._batches * batch, *shape[1:]), engine.tensors[name].dtype
                ),
                f"tensor '{name}' of {engine.name}",
            )
            for name, shape in every.items()
        }
        self._context: GpuContext = engine.open_context()

    def parts(self, labels: NDArray[np.int16] | None) -> list[Part]:
        """Return the one part there is: every tile in one go, whatever its label."""
        del labels
        return [()]

    def recurs(self, part: Part) -> bool:
        """Return True: it is the same for every frame."""
        del part
        return True

    def enqueue(self, work: Work, frame: InFlight, part: Part) -> None:
        """Enqueue the restoration of a frame."""
        del part
        tiles = self._buffers[self._input.name]
        self._percentiles.enqueue(work, frame.signal, self._ranges)
        self._tiles.cut(
            work, frame.signal, self._ranges, tiles, first=0, count=self._tiles.count
        )
        if self._conditions is not None and self._card.condition is not None:
            condition = self._buffers[self._card.condition.name]
            self._conditions.enqueue(work, frame.maps, condition)
        for number in range(self._batches):
            self._context.bind(self._addresses(number), self._shapes)
            self._context.enqueue(work.handle)
        restored = self._buffers[self._card.output.name if self._card.output else ""]
        self._tiles.join(work, restored, self._ranges, frame.out)
        self._blending.enqueue_share(
            work,
            frame=self._frame,
            signal=frame.signal,
            restored=frame.out,
            levels=frame.maps["level"],
            out=frame.out,
        )

    def why_not_capturable(self, work: Work) -> str | None:
        """Return why it may not be recorded in a CUDA graph; None: it may."""
        return self._context.why_not_capturable(work.handle)

    def close(self) -> None:
        """Free the context and the engine."""
        self._context.close()
        self._engine.close()

    def _addresses(self, number: int) -> dict[str, int]:
        """Return where the tensors of a batch lie."""
        return {
            name: buffer.from_element(number * buffer.count // self._batches).address
            for name, buffer in self._buffers.items()
        }
