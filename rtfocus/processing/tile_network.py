"""Tile network: an engine that sees batches of tiles, shared between threads."""

import threading

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.processor import ProcessingConfig
from rtfocus.errors import EngineError
from rtfocus.processing.engines.opening import input_of, open_engine
from rtfocus.processing.engines.registry import FoundEngine
from rtfocus.processing.engines.seam import Engine, Outputs

Image = NDArray[np.float32]

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
    batch = max(1, _BATCH_PX // tiles.tile_px**2)
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
