"""Restorers: from a name in the config to what restores the frames of a channel."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.config.model import Config
from rtfocus.config.processor import RestorationConfig
from rtfocus.errors import EngineError
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.classifier import FrameClassifier, fit_frame
from rtfocus.processing.conditions import Conditions, is_mirrored
from rtfocus.processing.engines.card import EngineCard, identity
from rtfocus.processing.engines.fit import check_fit, parts, step_um
from rtfocus.processing.engines.opening import input_of, runs_on
from rtfocus.processing.engines.registry import FoundEngine, find_engine
from rtfocus.processing.frame_network import open_frame_network
from rtfocus.processing.learned_wiener import LearnedWienerRestorer, Level
from rtfocus.processing.methods import (
    METHODS,
    ByLevel,
    FrameRestorer,
    make_restorer,
)
from rtfocus.processing.network_restorer import JointRestorer, TileNetworkRestorer
from rtfocus.processing.preparation import invertible_normalisation
from rtfocus.processing.tile_network import TileNetwork, open_tile_network
from rtfocus.processing.tiling import Montage

Image = NDArray[np.float32]

LEARNED_WIENER = "builtin:learned_wiener"


@dataclass(frozen=True, slots=True)
class ChannelView:
    """What a restorer has to know of a channel and its frames."""

    config: Config
    restoration: RestorationConfig
    optics: OpticalSystem
    shape: tuple[int, ...]
    """Of the frames, (y, x) or (y, x, 3)."""
    quantum: float
    """Step between the camera's values; 0 for float frames."""
    blind: bool
    """The aberrations are not told to engines."""
    threads: int
    """Of a network."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.shape[0], self.shape[1]


@dataclass(frozen=True, slots=True)
class OpenRestorer:
    """A restorer with what the report says of it."""

    restorer: FrameRestorer
    identity: str
    """``name@hash``."""
    runs_on: str | None = None
    """Runtime and precision; None: no network of its own."""

    @property
    def name(self) -> str:
        """Of the engine or method."""
        return self.identity.partition("@")[0]


def find_joint(view: ChannelView) -> FoundEngine | None:
    """Return the joint engine that the restoration names; None: it is another kind."""
    name = view.restoration.method
    if name in METHODS or name == "none":
        return None
    found = find_engine(name, view.config.processing.engine_folders)
    return found if found.kind == "joint" else None


def open_restorer(
    view: ChannelView, classifier: FrameClassifier, *, one_pass: bool
) -> OpenRestorer:
    """Open the restoration of a channel by its name.

    Parameters
    ----------
    view
        Channel and frames.
    classifier
        Whose labels say what is restored.
    one_pass
        The classifier is the joint engine that restores too.

    Raises
    ------
    EngineError
        If the engine is missing, damaged, unfit for the optics or no restorer.
    """
    montage = Montage(classifier.grid, view.size, view.restoration.window)
    name = view.restoration.method
    if name in METHODS:
        return _classical(view, classifier, montage, name)
    found = find_engine(name, view.config.processing.engine_folders)
    card = found.card
    if card.implementation.removeprefix("builtin:") in METHODS:
        method = card.implementation.removeprefix("builtin:")
        return _classical(view, classifier, montage, method)
    if one_pass:
        return OpenRestorer(JointRestorer(montage, None), identity(card))
    check_fit(card, view.optics, ignore=view.config.processing.ignore_optics)
    if card.kind == "joint":
        return _joint(view, found, montage)
    if card.kind != "restorer" or card.implementation not in ("onnx", LEARNED_WIENER):
        msg = (
            f"restoration '{name}' is a {card.kind} with implementation "
            f"'{card.implementation}', which does not restore; choose a restorer or "
            f"joint engine; built in are {', '.join(METHODS)} and none"
        )
        raise EngineError(msg)
    if card.implementation == LEARNED_WIENER:
        return _learned_wiener(view, found, classifier, montage)
    network = _open_tiles(view, found)
    conditions = Conditions(
        card, view.optics, blind=view.blind, signed=classifier.grid.signed
    )
    restorer = TileNetworkRestorer(card, network, conditions, montage)
    return _with_network(view, card, restorer, network)


def open_classifier(
    view: ChannelView, found: FoundEngine, *, restores: bool
) -> FrameClassifier:
    """Open a classifier or joint engine on whole frames.

    Parameters
    ----------
    view
        Channel and frames.
    found
        Engine with its card.
    restores
        Whether the restored frame of a joint engine is wanted.
    """
    card = found.card
    if card.kind == "restorer":
        msg = (
            f"engine '{card.name}' is a restorer; processing.classifier needs a "
            "classifier or joint engine"
        )
        raise EngineError(msg)
    tiles = input_of(card)
    fit = fit_frame(tiles, view.size)
    # The grey frame, and the colours if they are restored one by one.
    colours = restores and len(view.shape) == 3 and tiles.channels == 1
    network = open_frame_network(
        found,
        view.config.processing,
        fit.padded,
        images=1 + view.shape[2] if colours else 1,
        restored=restores,
        threads=view.threads,
    )
    return FrameClassifier(
        card,
        network,
        fit,
        step_um=step_um(card, view.optics),
        quantum=view.quantum,
        conditions=Conditions(card, view.optics, blind=view.blind, signed=False),
        mirrored=is_mirrored(view.optics),
    )


def level_psfs(
    card: EngineCard, optics: OpticalSystem, *, size_px: int | None = None
) -> dict[int, Image]:
    """Compute the PSF of every level but 0, in the configured optics.

    Parameters
    ----------
    card
        Of the classifier; levels with a sign have a PSF on either side.
    optics
        Of the channel.
    size_px
        Side; None: what 99 % of the light need.
    """
    levels, _ = parts(card)
    step = step_um(card, optics)
    distances = range(1, levels.count)
    wanted = [*(-level for level in distances), *distances]
    return {
        level: compute_psf(optics, level * step, size_px=size_px)
        for level in wanted
        if levels.signed or level > 0
    }


def _classical(
    view: ChannelView, classifier: FrameClassifier, montage: Montage, method: str
) -> OpenRestorer:
    restorer = make_restorer(
        method,
        view.restoration,
        montage,
        level_psfs(classifier.card, view.optics),
        view.config.camera.gain_e_per_count,
    )
    return OpenRestorer(ByLevel(restorer), f"{view.restoration.method}@builtin")


def _joint(view: ChannelView, found: FoundEngine, montage: Montage) -> OpenRestorer:
    """Open a joint engine beside another classifier, for a pass of its own."""
    own_pass = open_classifier(view, found, restores=True)
    restorer = JointRestorer(montage, own_pass)
    return OpenRestorer(
        restorer, identity(found.card), own_pass.runs_on(view.config.processing)
    )


def _learned_wiener(
    view: ChannelView,
    found: FoundEngine,
    classifier: FrameClassifier,
    montage: Montage,
) -> OpenRestorer:
    card = found.card
    tiles = input_of(card)
    network = _open_tiles(view, found)
    output = "" if card.output is None else card.output.name
    conditions = Conditions(
        card, view.optics, blind=view.blind, signed=classifier.grid.signed
    )
    psfs = level_psfs(classifier.card, view.optics, size_px=2 * tiles.halo_px + 1)
    defocus_um = np.array([level * classifier.step_um for level in psfs], np.float32)
    told = conditions.rows(defocus_um)
    levels = {
        level: Level(psf, () if told is None else tuple(told[index]))
        for index, (level, psf) in enumerate(psfs.items())
    }

    def predict(batch: Image, condition: Image) -> Image:
        return network.run(batch, None if told is None else condition)[output]

    restorer = LearnedWienerRestorer(
        montage,
        levels,
        predict,
        tile_px=tiles.tile_px,
        halo_px=tiles.halo_px,
        normalisation=invertible_normalisation(card),
    )
    return _with_network(view, card, ByLevel(restorer, network), network)


def _open_tiles(view: ChannelView, found: FoundEngine) -> TileNetwork:
    output = found.card.output
    return open_tile_network(
        found,
        view.config.processing,
        outputs=() if output is None else (output.name,),
        threads=view.threads,
    )


def _with_network(
    view: ChannelView, card: EngineCard, restorer: FrameRestorer, network: TileNetwork
) -> OpenRestorer:
    precision = view.config.processing.precision
    return OpenRestorer(
        restorer, identity(card), runs_on(card, network.engine, precision)
    )
