"""Channel plan: everything decided once about the frames of one channel.

It knows neither CPU nor GPU: what is corrected, which engine looks and what it is
told, what restores and with which PSFs. A device opens the engines and does it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.model import Config
from rtfocus.config.sections import ProcessingConfig, RestorationConfig
from rtfocus.engines.card import EngineCard, identity, input_of, restored_levels
from rtfocus.engines.fitted import Evidence
from rtfocus.engines.registry import (
    FoundEngine,
    FrameFit,
    check_fit,
    find_engine,
    fit_frame,
    list_engines,
    parts,
    step_um,
    why_too_small,
)
from rtfocus.engines.spec_steps import Values
from rtfocus.errors import ConfigError, EngineError
from rtfocus.frame import SeriesStart, TileGrid
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.camera import CameraCorrection
from rtfocus.processing.classify import (
    Conditions,
    invertible_normalisation,
    is_mirrored,
)
from rtfocus.processing.montage import Montage, Window
from rtfocus.processing.restore import BLIND, LEARNED_WIENER, METHODS, PATCH_BY_PATCH

logger = logging.getLogger(__name__)

Image = NDArray[np.float32]
Way = Literal[
    "by_level",
    "by_patch",
    "blind",
    "by_tile",
    "same_pass",
    "own_pass",
    "learned_wiener",
    "whole_image",
]
"""How a frame is restored: deconvolved as a whole, level by level; patch by patch;
as a whole with kernels found on the way; tile by tile with a network; by the joint
engine in the pass that finds the defocus, or in a pass of its own; with the learned
Wiener filter; or tile by tile, all of it, with a network that knows no defocus."""

# A pixel size that differs more than this from the optics' is not rounding.
_PIXEL_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class ClassifierPlan:
    """A classifier or joint engine for whole frames of one channel."""

    found: FoundEngine
    fit: FrameFit
    step_um: float
    """Defocus between two levels in the optics of the frames."""
    quantum: float
    """Step between the camera's values; 0 for float frames."""
    conditions: Conditions | None = None
    """What the engine gets beside the pixels; None: nothing."""
    mirrored: bool = False
    """The engine sees the sign of the defocus turned."""
    images: int = 1
    """Of one frame that go through the network at once: the grey one, and its
    colours where they are restored one by one."""
    restores: bool = False
    """Whether the restored frame of a joint engine is wanted."""
    looks_twice: bool = False
    """Whether it is restored in a second pass that knows what the first found."""

    @property
    def card(self) -> EngineCard:
        """Of the engine."""
        return self.found.card


@dataclass(frozen=True)
class RestorationPlan:
    """What restores the frames of one channel."""

    way: Way
    identity: str
    """``name@hash``."""
    settings: RestorationConfig
    """Its method is one of `METHODS`, or an engine's."""
    found: FoundEngine | None = None
    """Engine; None: built in."""
    conditions: Conditions | None = None
    """What the engine gets beside its tiles."""
    own_pass: ClassifierPlan | None = None
    """Of a joint engine that is not the classifier."""

    @property
    def name(self) -> str:
        """Of the engine or method."""
        return self.identity.partition("@")[0]

    @cached_property
    def gives_counts(self) -> bool:
        """Whether its values are those of the camera, not on a scale of their own."""
        steps = None if self.found is None else self.found.card.steps
        return steps is None or steps.values is not Values.own

    @property
    def engine(self) -> FoundEngine:
        """The engine; only for ways that have one."""
        assert self.found is not None
        return self.found


@dataclass(frozen=True)
class ChannelPlan:
    """What happens to the frames of one channel."""

    name: str
    shape: tuple[int, ...]
    """Of the frames, (y, x) or (y, x, 3)."""
    camera: CameraCorrection
    processing: ProcessingConfig
    gain_e_per_count: float | None = None
    """Photo-electrons per count; None: not known."""
    optics: OpticalSystem | None = None
    classifier: ClassifierPlan | None = None
    """None: no defocus is estimated."""
    restoration: RestorationPlan | None = None
    """None: not restored, for the reason in `skipped`."""
    skipped: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.shape[0], self.shape[1]

    @cached_property
    def engines(self) -> Mapping[str, str]:
        """Kind of engine to ``name@hash``, as in `FrameResult.engines`."""
        names = {}
        if self.classifier is not None:
            names["classifier"] = identity(self.classifier.card)
        if self.restoration is not None:
            names["restorer"] = self.restoration.identity
        return names

    @cached_property
    def evidence(self) -> Evidence | None:
        """What weighs the corrections, see `rtfocus.engines.fitted`.

        None: the optics are known, or nothing restores that can be weighed.
        """
        restoration = self.restoration
        if restoration is None or not self.processing.blind:
            return None
        passes = {"same_pass": self.classifier, "own_pass": restoration.own_pass}
        network = passes.get(restoration.way)
        if network is None or (card := network.card.evidence) is None:
            return None
        rule = invertible_normalisation(network.card)
        # Of a frame in focus a pass of its own would tell nothing.
        error = network.card.expected_error if restoration.way == "same_pass" else None
        return Evidence(card, rule, network.step_um, error)

    @property
    def expects_error(self) -> bool:
        """Whether the error left in restored frames is stated."""
        return self.evidence is not None and self.evidence.error_card is not None

    def montage(self, grid: TileGrid) -> Montage:
        """Return the blending weights of the classifier's tiles."""
        window: Window = "triangular"
        if self.restoration is not None:
            window = self.restoration.settings.window
        return Montage(grid, self.size, window)

    @cached_property
    def psfs(self) -> Mapping[int, Image]:
        """PSF of every level but 0, with 99 % of the light."""
        return self.psfs_of_size(None)

    def band_levels(self) -> tuple[dict[int, Image], Image | None]:
        """Return what the learned Wiener filter needs of every level.

        PSF per level, as wide as the halo of the engine's tiles allows; and what the
        engine is told of tiles of each, axes (level, entry); None: nothing.
        """
        restoration, classifier = self.restoration, self.classifier
        assert restoration is not None
        assert restoration.conditions is not None
        assert classifier is not None
        halo_px = input_of(restoration.engine.card).halo_px
        psfs = self.psfs_of_size(2 * halo_px + 1)
        defocus_um = np.array([n * classifier.step_um for n in psfs], np.float32)
        return psfs, restoration.conditions.rows(defocus_um)

    def psfs_of_size(self, size_px: int | None) -> dict[int, Image]:
        """Compute the PSF of every level but 0, on both sides if levels have a sign.

        `size_px` is their side; None: what 99 % of the light need.
        """
        classifier, optics = self.classifier, self.optics
        assert classifier is not None
        assert optics is not None
        levels, _ = parts(classifier.card)
        lowest = 1 - levels.count if levels.signed else 1
        return {
            level: compute_psf(optics, level * classifier.step_um, size_px=size_px)
            for level in range(lowest, levels.count)
            if level
        }


def plan_channel(
    config: Config, series: SeriesStart, channel: Channel, *, any_size: bool = False
) -> ChannelPlan:
    """Decide what happens to the frames of a channel.

    `any_size`: of images; restore even what is too small to tell its defocus.

    Raises
    ------
    EngineError
        If an engine is missing, does not fit the optics or is of the wrong kind.
    ConfigError
        If flat field or orientations do not fit, or frames are too small for a defocus.
    """
    settings = config.channel(channel.name)
    optics = settings.optics or channel.optics
    camera = CameraCorrection(
        config.camera, series.shape, np.dtype(series.dtype), series.bit_depth
    )
    shape = tuple(series.shape)
    name, method = config.engines_of(channel.name)
    if not any_size and method.orientations > 1:
        msg = "restoration.orientations is for images from files; leave it out of a run"
        raise ConfigError(msg)
    as_it_is = restored_as_it_is(method, config.processing)
    if as_it_is is not None:
        _refuse_cut_values(as_it_is, config, series)
    plan = ChannelPlan(
        channel.name, shape, camera, config.processing, restoration=as_it_is
    )
    if optics is None or name is None:
        reason = "no classifier is configured"
        if optics is None:
            reason = f"channel '{channel.name}' has no optics in the config"
        return replace(plan, skipped=reason if as_it_is is None else None)
    if not any_size and (why := why_too_small(shape)):
        msg = (
            f"a frame {why}: enlarge the camera's region of interest, or set "
            "processing.classifier: null to record without"
        )
        raise ConfigError(msg)
    compare_pixel_size(channel.name, optics, series.pixel_size_um)
    engine = find_classifier(name, config.processing.engine_folders)
    check_fit(
        engine.card,
        optics,
        ignore=config.processing.ignore_optics,
        blind=config.processing.blind,
    )
    planner = _Planner(config.processing, optics, shape, camera.quantum)
    restoration = as_it_is or planner.restoration(method, engine)
    one_pass = restoration is not None and restoration.way == "same_pass"
    return replace(
        plan,
        gain_e_per_count=config.camera.gain_e_per_count,
        optics=optics,
        classifier=planner.classifier(engine, restores=one_pass),
        restoration=restoration,
        skipped="restoration.method is none" if restoration is None else None,
    )


def find_classifier(name: str, folders: Sequence[Path] = ()) -> FoundEngine:
    """Return the engine of a name that finds the defocus.

    Raises
    ------
    EngineError
        If there is none of that name, or it restores only; names those that find it.
    """
    engine = None if name in METHODS else find_engine(name, folders)
    if engine is not None and engine.card.kind != "restorer":
        return engine
    able = [e.name for e in list_engines(folders) if e.card.kind != "restorer"]
    msg = (
        f"'{name}' restores and finds no defocus; processing.classifier and classify "
        f"--engine take a classifier or joint engine: {', '.join(able) or 'none'}"
    )
    raise EngineError(msg)


def restored_dtype(config: Config, series: SeriesStart) -> np.dtype[Any]:
    """Return the type of restored frames: the camera's, or float32 by the config."""
    as_float = config.store.restored_dtype == "float32"
    return np.dtype(np.float32 if as_float else series.dtype)


def restored_as_it_is(
    settings: RestorationConfig, processing: ProcessingConfig
) -> RestorationPlan | None:
    """Plan a restoration that needs neither levels nor optics; None: it needs them."""
    if settings.method in (*METHODS, "none"):
        return None
    engine = find_engine(settings.method, processing.engine_folders, METHODS)
    if not engine.card.sees_image_alone:
        return None
    return RestorationPlan("whole_image", identity(engine.card), settings, engine)


def _refuse_cut_values(
    restoration: RestorationPlan, config: Config, series: SeriesStart
) -> None:
    """Refuse to store values as counts that are none: they would be rounded away."""
    dtype = restored_dtype(config, series)
    if not restoration.gives_counts and np.issubdtype(dtype, np.integer):
        msg = (
            f"engine '{restoration.name}' gives values on a scale of its own, which "
            f"{dtype.name} would round away; set store.restored_dtype: float32"
        )
        raise EngineError(msg)


@dataclass(frozen=True, slots=True)
class _Planner:
    """Plans what the engines of a channel do, by what is known of its frames."""

    processing: ProcessingConfig
    optics: OpticalSystem
    shape: tuple[int, ...]
    quantum: float

    def classifier(self, engine: FoundEngine, *, restores: bool) -> ClassifierPlan:
        """Plan a classifier or joint engine on whole frames."""
        card = engine.card
        tiles = input_of(card)
        colours = restores and len(self.shape) == 3 and tiles.channels == 1
        return ClassifierPlan(
            found=engine,
            fit=fit_frame(tiles, (self.shape[0], self.shape[1])),
            step_um=step_um(card, self.optics, blind=self.processing.blind),
            quantum=self.quantum,
            conditions=self._conditions(card, signed=False),
            mirrored=is_mirrored(self.optics) and parts(card)[0].signed,
            images=1 + self.shape[2] if colours else 1,
            restores=restores,
            looks_twice=restores and card.second_look and self.processing.blind,
        )

    def restoration(
        self, settings: RestorationConfig, classifier: FoundEngine
    ) -> RestorationPlan | None:
        """Plan the restoration that the config names; None: there is none."""
        name, given = settings.method, self.processing
        if name == "none":
            return None
        signed = restored_levels(classifier.card).signed
        if name in METHODS:
            return _classical(name, settings)
        engine = find_engine(name, given.engine_folders, METHODS)
        card = engine.card
        if card.implementation.removeprefix("builtin:") in METHODS:
            return _classical(card.implementation.removeprefix("builtin:"), settings)
        same = card.kind == "joint" and engine.folder == classifier.folder
        if not same:
            check_fit(card, self.optics, ignore=given.ignore_optics, blind=given.blind)
        own_pass, conditions = None, None
        way = _way_of(card, same=same)
        if way == "own_pass":
            own_pass = self.classifier(engine, restores=True)
        elif way != "same_pass":
            conditions = self._conditions(card, signed=signed)
        return RestorationPlan(
            way, identity(card), settings, engine, conditions, own_pass
        )

    def _conditions(self, card: EngineCard, *, signed: bool) -> Conditions:
        return Conditions(card, self.optics, blind=self.processing.blind, signed=signed)


def _classical(method: str, settings: RestorationConfig) -> RestorationPlan:
    ways: dict[str, Way] = {PATCH_BY_PATCH: "by_patch", BLIND: "blind"}
    own = settings.model_copy(update={"method": method})
    way = ways.get(method, "by_level")
    return RestorationPlan(way, f"{settings.method}@builtin", own)


def _way_of(card: EngineCard, *, same: bool) -> Way:
    """Return how an engine restores; EngineError for one that does not."""
    if card.kind == "joint":
        return "same_pass" if same else "own_pass"
    if card.kind == "restorer" and card.implementation == "onnx":
        return "by_tile"
    if card.kind == "restorer" and card.implementation == LEARNED_WIENER:
        return "learned_wiener"
    msg = (
        f"restoration '{card.name}' is a {card.kind} with implementation "
        f"'{card.implementation}', which does not restore; choose a restorer or "
        f"joint engine; built in are {', '.join(METHODS)} and none"
    )
    raise EngineError(msg)


def compare_pixel_size(
    channel: str, optics: OpticalSystem, pixel_size_um: float
) -> None:
    """Warn when the microscope reports another pixel size than the optics."""
    if abs(pixel_size_um / optics.pixel_size_um - 1.0) > _PIXEL_TOLERANCE:
        logger.warning(
            "channel '%s': the microscope reports %g um per pixel, the optics say "
            "%g um; PSFs follow the optics",
            channel,
            pixel_size_um,
            optics.pixel_size_um,
        )
