"""Classifier: the defocus of every tile of a frame, in one pass of a network.

A joint engine gives the restored frame in the same pass. Frames too large for one are
seen through a few windows, put together as if there had been one.

The networks of restorers are opened here too: `TileNetwork`.
"""

import threading
from dataclasses import dataclass, replace
from math import ceil, lcm

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import input_of, output_of
from rtfocus.engines.registry import FoundEngine, parts
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND, DefocusMap
from rtfocus.optics.normalisation import CELL_PX, PercentileRange, luminance, normalised
from rtfocus.processing.channel_plan import ClassifierPlan
from rtfocus.processing.classify import (
    LabelDecoder,
    background_of,
    check_labels,
    normalisation_of,
    probabilities,
    tile_grid,
    tiles_in_cells,
    turned,
)
from rtfocus.processing.montage import (
    AxisWindows,
    fewest_windows,
    from_planes,
    pad,
    to_planes,
)
from rtfocus.runtimes.cpu_backends import open_engine, runs_on

Image = NDArray[np.float32]
Ranges = tuple[tuple[float, float], ...]
"""Offset and scale that normalised each plane; empty: there is no way back."""

LARGEST_PX = 2304
"""Longest side of one pass of a joint engine: memory for its features stays below
a gigabyte."""
HALO_PX = 144
"""Context of a window towards its neighbours."""

# Pixels that keep a core busy at once; more only takes memory.
_BATCH_PX = 256 * 256
# Share of a float frame's range that is taken for one step.
_INVISIBLE = 1e-4


@dataclass(frozen=True, slots=True)
class NetworkView:
    """What a network sees of a frame."""

    tiles: Image
    """Normalised, axes (image, channel, y, x)."""
    empty: NDArray[np.bool_]
    """Tiles without a specimen, axes (tile_y, tile_x)."""
    ranges: Ranges
    shape: tuple[int, ...]
    """Of the frame."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a network makes of a frame."""

    defocus: DefocusMap
    restored: Image | None
    """Shape and unit of the signal; None: the network does not restore."""


class FrameNetwork:
    """The network of a plan, opened for padded frames of one size."""

    def __init__(
        self, plan: ClassifierPlan, settings: ProcessingConfig, threads: int
    ) -> None:
        self._card = card = plan.card
        self._input, self._output = input_of(card), output_of(card)
        self._restored = card.restored.name if plan.restores and card.restored else None
        # A classifier's features are small, and its windows would meet in tiles.
        padded = plan.fit.padded
        largest = LARGEST_PX if card.kind == "joint" else max(padded)
        multiple = lcm(self._input.multiple_px, ceil(self._input.stride_px))
        self._down, self._across = (
            fewest_windows(side, largest, HALO_PX, multiple) for side in padded
        )
        self._weights = self._down.weights(), self._across.weights()
        self.shape = self._down.length_px, self._across.length_px
        """Height and width of the padded frames it takes."""
        images = plan.images, self._input.channels
        self.input_shape = (*images, *self.shape)
        """Images, channels, height and width of what it takes."""
        self.engine = open_engine(
            plan.found,
            settings,
            shape=(*images, self._down.size_px, self._across.size_px),
            outputs=tuple(filter(None, (self._output.name, self._restored))),
            threads=threads,
        )

    def run(self, planes: Image, condition: Image | None) -> tuple[Image, Image | None]:
        """Run the network on the planes of a frame.

        Parameters
        ----------
        planes
            Axes (image, channel, y, x), normalised, of `input_shape`.
        condition
            Axes (image, entry).

        Returns
        -------
        logits
            Axes (image, label, tile_y, tile_x).
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
        down, across = self._weights
        for row, column in np.ndindex(self._down.count, self._across.count):
            place = self._down.span(row), self._across.span(column)
            window, image = self._pass(planes[..., *place], condition)
            if logits is None:
                logits = self._empty_labels(window)
            self._keep_labels(logits, window, row, column)
            if image is not None and restored is not None:
                restored[..., *place] += down[row][:, None] * across[column] * image
        assert logits is not None
        return logits, restored

    def _pass(
        self, planes: Image, condition: Image | None
    ) -> tuple[Image, Image | None]:
        outputs = self.engine.infer(planes, condition)
        logits = np.asarray(outputs[self._output.name], np.float32)
        check_labels(self._card, logits.shape)
        if self._restored is None:
            return logits, None
        restored = np.asarray(outputs[self._restored], np.float32)
        if restored.shape != planes.shape:
            msg = (
                f"engine '{self.engine.name}': its output '{self._restored}' is "
                f"{restored.shape} for an input of {planes.shape}; they must be alike"
            )
            raise EngineError(msg)
        return logits, restored

    def _empty_labels(self, window: Image) -> Image:
        """Return room for the labels of all windows, of which one is given."""
        counts = [
            (axis.count - 1) * round(axis.own_px / self._input.stride_px) + tiles
            for axis, tiles in zip(
                (self._down, self._across), window.shape[2:], strict=True
            )
        ]
        return np.empty((*window.shape[:2], *counts), np.float32)

    def _keep_labels(self, logits: Image, window: Image, row: int, column: int) -> None:
        """Copy the tiles whose centre belongs to a window."""
        down, from_row = self._own_tiles(self._down, row, logits.shape[2])
        across, from_column = self._own_tiles(self._across, column, logits.shape[3])
        logits[..., down, across] = window[..., from_row, from_column]

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
        engine: FoundEngine,
        settings: ProcessingConfig,
        *,
        output: str | None = None,
        threads: int = 1,
    ) -> None:
        tiles = input_of(engine.card)
        self._output = output_of(engine.card).name if output is None else output
        # Networks of other people may be made for one image at a time.
        alone = engine.card.sees_image_alone
        self.batch = 1 if alone else max(1, _BATCH_PX // tiles.tile_px**2)
        """Tiles per inference."""
        self._engine = open_engine(
            engine,
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
        results, batch = [], self.batch
        for first in range(0, len(tiles), batch):
            span = slice(first, first + batch)
            # A fixed size is faster: a shorter last batch is filled up.
            full = _filled(tiles[span], batch)
            entries = None if condition is None else _filled(condition[span], batch)
            with self._turn:
                outputs = self._engine.infer(full, entries)
            results.append(outputs[self._output][: len(tiles[span])])
        return np.concatenate(results)

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


class FrameClassifier:
    """A classifier or joint engine applied to whole frames of one size.

    Raises
    ------
    EngineError
        If the engine cannot be opened, or its card names a rule that does not exist.
    """

    def __init__(
        self, plan: ClassifierPlan, settings: ProcessingConfig, threads: int = 1
    ) -> None:
        self.card = card = plan.card
        levels, _ = parts(card)
        self._network = FrameNetwork(plan, settings, threads)
        self._plan = plan
        self._channels = input_of(card).channels
        self._normalisation = normalisation_of(card)
        self._background = background_of(card)
        self._labels = LabelDecoder(output_of(card))
        self.precision = self._network.engine.precision
        """Numbers the network computes in: ``f32``, ``bf16`` ..."""
        self.runs_on = runs_on(self._network.engine)
        """Runtime and precision, e.g. ``openvino bf16``."""
        # The first inference compiles and shows how many tiles there are.
        logits, _ = self._run(np.zeros(self._network.input_shape, np.float32))
        rows, columns = logits.shape[-2:]
        self.grid = tile_grid(
            input_of(card), plan.fit, rows, columns, signed=levels.signed
        )

    def prepare(self, signal: Image) -> NetworkView:
        """Normalise a frame (y, x) or (y, x, 3) and find its empty tiles."""
        grey = luminance(signal)
        padded = self._pad(grey)
        empty = self._empty(padded)
        colours = self._plan.images > 1
        if self._channels == 1 and not colours:
            tiles, ranges = self._normalise(padded, grey)
            return NetworkView(tiles[None, None], empty, ranges, signal.shape)
        images = to_planes(signal if self._channels == 3 else grey, self._channels)
        if colours:
            # The grey frame first, for the labels.
            images = np.concatenate([images, to_planes(signal, 1)])
        tiles = np.empty((*images.shape[:2], *padded.shape), np.float32)
        ranges = ()
        for place in np.ndindex(images.shape[:2]):
            plane = images[place]
            tiles[place], plane_range = self._normalise(self._pad(plane), plane)
            ranges += plane_range
        return NetworkView(tiles, empty, ranges, signal.shape)

    def see(self, prepared: NetworkView) -> Prediction:
        """Run the network on a prepared frame for all that it tells of it."""
        logits, restored = self._run(prepared.tiles)
        defocus = self._map(logits[0], prepared.empty)
        if restored is None:
            return Prediction(defocus, None)
        conditions = self._plan.conditions
        if self._plan.looks_twice and conditions is not None:
            level = self._labels.level_of_frame(logits[0])
            condition = conditions.told(level, len(prepared.tiles))
            _, restored = self._network.run(prepared.tiles, condition)
            assert restored is not None
        return Prediction(defocus, self._to_signal(restored, prepared))

    def probabilities(self, prepared: NetworkView) -> Image:
        """Return how likely every label of the card is, in its order.

        For evaluations that look beyond the chosen label. Axes (label, tile_y,
        tile_x); labels as the engine sees them, mirrored where it is.
        """
        logits, _ = self._run(prepared.tiles)
        return probabilities(logits[0][:, : self.grid.rows, : self.grid.columns])

    def close(self) -> None:
        """Free the engine."""
        self._network.engine.close()

    def _run(self, tiles: Image) -> tuple[Image, Image | None]:
        conditions = self._plan.conditions
        condition = None if conditions is None else conditions.unknown(len(tiles))
        return self._network.run(tiles, condition)

    def _pad(self, plane: Image) -> Image:
        return pad(plane, self._network.shape, 0, "symmetric")

    def _normalise(self, padded: Image, plane: Image) -> tuple[Image, Ranges]:
        """Return the network's view of a padded plane, and the way back.

        A range is read from the `plane` alone, not from its mirror images.
        """
        rule = self._normalisation
        if not isinstance(rule, PercentileRange):
            return rule.apply(padded), ()
        offset, scale = rule.fit(plane)
        return normalised(padded, offset, scale), ((offset, scale),)

    def _empty(self, padded: Image) -> NDArray[np.bool_]:
        """Return True for tiles of a padded frame in which nothing stands out."""
        grid = self.grid
        empty = np.zeros((grid.rows, grid.columns), dtype=np.bool_)
        if self._background is None:
            return empty
        # Float frames have no smallest step: what cannot be seen counts as none.
        span = float(padded.max()) - float(padded.min())
        least = max(_INVISIBLE * span, float(np.finfo(np.float32).tiny))
        tile_px, stride_px, start_px = (CELL_PX * n for n in tiles_in_cells(grid))
        rule = replace(self._background, quantum=self._plan.quantum or least)
        is_empty = rule.tiles(
            padded, tile_px=tile_px, stride_px=stride_px, start_px=start_px
        )[: grid.rows, : grid.columns]
        empty[: is_empty.shape[0], : is_empty.shape[1]] = is_empty
        return empty

    def _map(self, logits: Image, empty: NDArray[np.bool_]) -> DefocusMap:
        decoded = self._labels.decode(logits[:, : self.grid.rows, : self.grid.columns])
        level, defocus = decoded.level, decoded.defocus
        if self._plan.mirrored:
            level, defocus = turned(level, defocus)
        level[empty] = BACKGROUND
        background = level == BACKGROUND
        defocus_um = defocus * np.float32(self._plan.step_um)
        uncertainty_um = decoded.uncertainty * np.float32(self._plan.step_um)
        defocus_um[background] = uncertainty_um[background] = np.nan
        return DefocusMap(
            self.grid, defocus_um, decoded.confidence, level, uncertainty_um
        )

    def _to_signal(self, restored: Image, prepared: NetworkView) -> Image:
        """Cut the network's image to the frame and bring it back to its unit."""
        height, width = self._plan.fit.shape
        ranges = prepared.ranges
        if self._plan.images > 1:
            # The first image was the grey one, for the labels.
            restored, ranges = restored[1:], ranges[1:]
        cut = restored[..., :height, :width]
        for place, (offset, scale) in zip(
            np.ndindex(cut.shape[:2]), ranges, strict=True
        ):
            cut[place] *= np.float32(scale)
            cut[place] += np.float32(offset)
        return from_planes(cut, prepared.shape)
