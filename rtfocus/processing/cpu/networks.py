"""Networks: engines that see whole frames in one pass, or batches of tiles.

Frames too large for one pass are seen through a few large windows, whose labels
and pixels are put together as if there had been one.
"""

import threading
from math import ceil, lcm

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import InputCard, OutputCard, input_of
from rtfocus.engines.registry import FoundEngine
from rtfocus.errors import EngineError
from rtfocus.processing.windows import AxisWindows, fewest_windows
from rtfocus.runtimes.cpu_backends import open_engine
from rtfocus.runtimes.cpu_engine import Engine, Outputs

Image = NDArray[np.float32]

LARGEST_PX = 2304
"""Longest side of one pass of a joint engine: memory for its features stays below
a gigabyte."""
HALO_PX = 144
"""Context of a window towards its neighbours."""


class FrameNetwork:
    """An engine opened for padded frames of one size.

    Parameters
    ----------
    engine
        Opened for ``(images, channels, *windows)``; closed by `close`.
    input_card, output_card
        Of its card; the output card that of the labels, None: they are not wanted.
    restored
        Output tensor of the restored frame; None: not wanted.
    windows
        Along y and x.
    images
        How many of one frame it takes at once.
    """

    def __init__(
        self,
        engine: Engine,
        input_card: InputCard,
        output_card: OutputCard | None,
        restored: str | None,
        windows: tuple[AxisWindows, AxisWindows],
        *,
        images: int = 1,
    ) -> None:
        self.engine = engine
        self._images = images
        self._input = input_card
        self._output = output_card
        self._restored = restored
        self._down, self._across = windows
        self._row_weights = self._down.weights()
        self._column_weights = self._across.weights()

    @property
    def restores(self) -> bool:
        """Whether it was opened for the restored frame."""
        return self._restored is not None

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Images, channels, height and width of what it takes."""
        return (self._images, self._input.channels, *self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the padded frames it takes."""
        return self._down.length_px, self._across.length_px

    def run(
        self, planes: Image, condition: Image | None
    ) -> tuple[Image | None, Image | None]:
        """Run the network on the planes of a frame.

        Parameters
        ----------
        planes
            Axes (image, channel, y, x), normalised, of `shape`.
        condition
            Axes (image, entry).

        Returns
        -------
        logits
            Axes (image, label, tile_y, tile_x); None: not wanted.
        restored
            Shape of `planes`; None: not wanted.

        Raises
        ------
        EngineError
            If the outputs are not what the card says.
        """
        if self._down.count == self._across.count == 1:
            return self._pass(planes, condition)
        logits: Image | None = None
        restored = None if self._restored is None else np.zeros_like(planes)
        for row, column in np.ndindex(self._down.count, self._across.count):
            place = self._down.span(row), self._across.span(column)
            found, image = self._pass(planes[..., *place], condition)
            if found is not None:
                logits = self._keep_labels(logits, found, row, column)
            if image is not None and restored is not None:
                weights = self._row_weights[row][:, None] * self._column_weights[column]
                restored[..., *place] += weights * image
        return logits, restored

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def _pass(
        self, planes: Image, condition: Image | None
    ) -> tuple[Image | None, Image | None]:
        outputs = self.engine.infer(planes, condition)
        logits = restored = None
        if self._output is not None:
            logits = np.asarray(outputs[self._output.name], np.float32)
            _check_logits(self.engine.name, logits, len(self._output.labels))
        if self._restored is not None:
            restored = np.asarray(outputs[self._restored], np.float32)
            if restored.shape != planes.shape:
                msg = (
                    f"engine '{self.engine.name}': its output '{self._restored}' is "
                    f"{restored.shape} for an input of {planes.shape}; they must be "
                    "alike"
                )
                raise EngineError(msg)
        return logits, restored

    def _keep_labels(
        self, logits: Image | None, found: Image, row: int, column: int
    ) -> Image:
        """Copy the tiles whose centre belongs to a window."""
        if logits is None:
            counts = [
                (axis.count - 1) * round(axis.own_px / self._input.stride_px) + tiles
                for axis, tiles in zip(
                    (self._down, self._across), found.shape[2:], strict=True
                )
            ]
            logits = np.empty((*found.shape[:2], *counts), np.float32)
        down, from_row = self._own_tiles(self._down, row, logits.shape[2])
        across, from_column = self._own_tiles(self._across, column, logits.shape[3])
        logits[..., down, across] = found[..., from_row, from_column]
        return logits

    def _own_tiles(
        self, axis: AxisWindows, index: int, count: int
    ) -> tuple[slice, slice]:
        """Return the tiles of a window, counted in the frame and in the window."""
        stride = self._input.stride_px
        centres = self._input.origin_px + stride * np.arange(count)
        owner = np.clip((centres - axis.halo_px) // axis.own_px, 0, axis.count - 1)
        own = np.flatnonzero(owner == index)
        first = round(index * axis.own_px / stride)
        start, stop = int(own[0]), int(own[-1]) + 1
        return slice(start, stop), slice(start - first, stop - first)


def open_frame_network(
    found: FoundEngine,
    settings: ProcessingConfig,
    padded: tuple[int, int],
    *,
    images: int = 1,
    labels: bool = True,
    restored: bool = False,
    threads: int = 1,
) -> FrameNetwork:
    """Open a classifier or a joint engine for frames of one padded size.

    Parameters
    ----------
    found
        Engine with its card.
    settings
        Backend and precision.
    padded
        Least height and width of what it is given, see `FrameNetwork.shape`.
    images
        Planes of a frame that go through it at once.
    labels, restored
        Which outputs are wanted.
    threads
        Of the network.
    """
    card = found.card
    tiles = input_of(card)
    # A classifier's features are small, and its windows would have to meet in tiles.
    largest = LARGEST_PX if card.kind == "joint" else max(padded)
    multiple = lcm(tiles.multiple_px, ceil(tiles.stride_px))
    down, across = (fewest_windows(side, largest, HALO_PX, multiple) for side in padded)
    output = card.output if labels else None
    image = card.restored.name if restored and card.restored is not None else None
    outputs = [output.name] if output is not None else []
    engine = open_engine(
        found,
        settings,
        shape=(images, tiles.channels, down.size_px, across.size_px),
        outputs=(*outputs, *([image] if image is not None else [])),
        threads=threads,
    )
    return FrameNetwork(engine, tiles, output, image, (down, across), images=images)


def labels_of(logits: Image | None) -> Image:
    """Return logits that are known to be there; ValueError where they are not."""
    if logits is None:
        msg = "the network was opened without its labels"
        raise ValueError(msg)
    return logits


def _check_logits(name: str, logits: Image, labels: int) -> None:
    if logits.ndim != 4 or logits.shape[1] != labels:
        msg = (
            f"engine '{name}': its output is {logits.shape}, but the card lists "
            f"{labels} labels; expected (N, {labels}, rows, columns)"
        )
        raise EngineError(msg)


# Pixels that keep a core busy at once; more only takes memory.
_BATCH_PX = 256 * 256


class TileNetwork:
    """An engine opened for batches of one size; any number of tiles goes through.

    Safe to use from several threads, which take turns.

    Parameters
    ----------
    engine
        Opened for `batch` tiles; closed by `close`.
    batch
        Tiles per inference; a shorter last batch is filled up.
    """

    def __init__(self, engine: Engine, batch: int) -> None:
        self.engine = engine
        self.batch = batch
        self._turn = threading.Lock()

    def run(self, tiles: Image, condition: Image | None) -> Outputs:
        """Run the network on tiles (N, C, y, x) with conditions (N, entries)."""
        parts = []
        for first in range(0, len(tiles), self.batch):
            span = slice(first, first + self.batch)
            part = None if condition is None else condition[span]
            parts.append(self._batch(tiles[span], part))
        return {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0]
        }

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def _batch(self, tiles: Image, condition: Image | None) -> Outputs:
        number = len(tiles)
        missing = self.batch - number
        if missing:
            # What is fixed is faster than what may vary, and the rest is thrown away.
            tiles = np.concatenate([tiles, np.repeat(tiles[-1:], missing, axis=0)])
            if condition is not None:
                last = np.repeat(condition[-1:], missing, axis=0)
                condition = np.concatenate([condition, last])
        with self._turn:
            outputs = self.engine.infer(tiles, condition)
        return {name: array[:number] for name, array in outputs.items()}


def open_tile_network(
    found: FoundEngine,
    settings: ProcessingConfig,
    *,
    outputs: tuple[str, ...],
    threads: int = 1,
) -> TileNetwork:
    """Open a restorer for tiles of its card's size.

    Parameters
    ----------
    found
        Engine with its card.
    settings
        Backend and precision.
    outputs
        Output tensors that are wanted.
    threads
        Of the network.

    Raises
    ------
    EngineError
        If it is no network or cannot be loaded.
    """
    tiles = input_of(found.card)
    # Networks of other people may be made for one image at a time.
    alone = found.card.sees_image_alone
    batch = 1 if alone else max(1, _BATCH_PX // tiles.tile_px**2)
    engine = open_engine(
        found,
        settings,
        shape=(batch, tiles.channels, tiles.tile_px, tiles.tile_px),
        outputs=outputs,
        threads=threads,
    )
    return TileNetwork(engine, batch)


def restored_tiles(engine: str, outputs: Outputs, name: str, tiles: Image) -> Image:
    """Return the restored tiles among the outputs.

    Raises
    ------
    EngineError
        If they are not of the shape of `tiles`.
    """
    restored = np.asarray(outputs[name], np.float32)
    if restored.shape != tiles.shape:
        msg = (
            f"engine '{engine}': its output '{name}' is {restored.shape} for tiles of "
            f"{tiles.shape}; a restorer returns tiles of the size it is given"
        )
        raise EngineError(msg)
    return restored
