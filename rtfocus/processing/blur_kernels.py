"""Blur kernels: the blur that a network with a kernel output saw in every tile."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.config.model import Config
from rtfocus.errors import EngineError
from rtfocus.processing.classify import Conditions, invertible_normalisation
from rtfocus.processing.cpu.networks import open_tile_network
from rtfocus.processing.cpu.preparation import normalised
from rtfocus.processing.engines.card import EngineCard, input_of
from rtfocus.processing.engines.registry import find_engine, list_engines, parts
from rtfocus.processing.offline import ImageProcessor
from rtfocus.processing.tiles.windows import FrameTiles, to_planes

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one image, tile by tile."""

    kernels: Image
    """Axes (row, column, y, x)."""
    own_px: int
    """Side of the part of the image that a kernel speaks for."""
    defocus_um: Image
    """What the classifier said of these tiles, axes (row, column); NaN: in focus or
    background."""


class KernelExtractor:
    """Extracts kernels with an engine that gives them; a context manager.

    Parameters
    ----------
    config
        Its classifier says which level the engine is told.
    engine
        Name or folder of an engine with a kernel output.

    Raises
    ------
    EngineError
        If the engine gives no kernels, or cannot be opened.
    """

    def __init__(self, config: Config, engine: str) -> None:
        folders = config.processing.engine_folders
        found = find_engine(engine, folders)
        card = found.card
        if card.kernel_output is None:
            able = [e.name for e in list_engines(folders) if e.card.kernel_output]
            msg = (
                f"engine '{card.name}' extracts no kernels; those that do: "
                f"{', '.join(able) or 'none'}"
            )
            raise EngineError(msg)
        self._card = card
        self._output = card.kernel_output
        self._normalisation = invertible_normalisation(card)
        self._config = config
        self._images = ImageProcessor(_only_classified(config))
        self._network = open_tile_network(
            found,
            config.processing,
            outputs=(card.kernel_output.name,),
            threads=config.processing.threads or 1,
        )

    def extract(
        self, image: NDArray[np.generic], *, channel: str = "default"
    ) -> Kernels:
        """Extract the kernel of every tile of an image (y, x) or (y, x, 3).

        Colours are extracted from their mean.
        """
        found = self._images.classify(image, channel=channel).defocus
        signal = np.asarray(image, np.float32)
        tiles_card = input_of(self._card)
        if signal.ndim == 3 and tiles_card.channels == 1:
            signal = signal.mean(axis=2)
        plane = to_planes(signal, tiles_card.channels)[0]
        scaled = [normalised(p, *self._normalisation.fit(p)) for p in plane]
        tiles = FrameTiles(tiles_card, (signal.shape[0], signal.shape[1]))
        places = tiles.places
        defocus_um = np.full(len(places), np.nan, np.float32)
        signed = False
        if found is not None:
            defocus_um = tiles.defocus_um(found, places)
            signed = found.grid.signed
        condition = self._conditions(channel, signed=signed).rows(defocus_um)
        cut = tiles.cut(np.stack(scaled), places)
        kernels = self._network.run(cut, condition)[self._output.name]
        side = self._output.size_px
        if kernels.shape[1:] != (side, side):
            msg = (
                f"engine '{self._card.name}': its output '{self._output.name}' is "
                f"{kernels.shape}, the card says (N, {side}, {side})"
            )
            raise EngineError(msg)
        grid = places[-1][0] + 1, places[-1][1] + 1
        return Kernels(
            kernels.reshape(*grid, side, side),
            tiles_card.tile_px - 2 * tiles_card.halo_px,
            defocus_um.reshape(grid),
        )

    def close(self) -> None:
        """Free both networks."""
        self._images.close()
        self._network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _conditions(self, channel: str, *, signed: bool) -> Conditions:
        given = self._config.channel(channel).optics
        optics = given or _reference(self._card)
        blind = given is None or self._config.processing.blind
        return Conditions(self._card, optics, blind=blind, signed=signed)


def draw_kernels(image: NDArray[np.generic], found: Kernels) -> NDArray[np.uint8]:
    """Draw every kernel, brightest point white, over the middle of its tile.

    Returns
    -------
    NDArray[np.uint8]
        Axes (y, x, colour): the image in grey at twice its size, kernels in green.
    """
    grey = np.asarray(image, np.float32)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    low, high = np.percentile(grey, (0.5, 99.8))
    shade = np.clip((grey - low) / max(high - low, 1e-9), 0, 1) * 160
    shade = np.kron(shade, np.ones((_ENLARGED, _ENLARGED)))
    picture = np.repeat(shade[..., None], 3, axis=2).astype(np.uint8)
    own = found.own_px * _ENLARGED
    side = found.kernels.shape[-1]
    factor = max(1, own * 2 // 3 // side)
    for row, column in np.ndindex(found.kernels.shape[:2]):
        kernel = found.kernels[row, column]
        drawn = np.kron(kernel / max(kernel.max(), 1e-9), np.ones((factor, factor)))
        top, left = (
            int((index + 0.5) * own - drawn.shape[0] / 2) for index in (row, column)
        )
        into = picture[max(top, 0) : top + len(drawn), max(left, 0) : left + len(drawn)]
        part = drawn[max(-top, 0) :, max(-left, 0) :][: into.shape[0], : into.shape[1]]
        into[...] = np.maximum(part, 0)[..., None] * (160, 255, 160)
    return picture


_ENLARGED = 2


def _reference(card: EngineCard) -> OpticalSystem:
    _, optics = parts(card)
    return optics.reference


def _only_classified(config: Config) -> Config:
    """Return the config without restoration, for all channels."""
    none = config.processing.restoration.model_copy(update={"method": "none"})
    processing = config.processing.model_copy(update={"restoration": none})
    channels = [
        channel.model_copy(update={"restoration": None}) for channel in config.channels
    ]
    return config.model_copy(update={"processing": processing, "channels": channels})
