"""Policy: what a search may decide, and where the stage may be sent.

Whatever the images seem to say, a z for the stage comes only from here. Every target is
an absolute position inside the limits, and so is every stop on the way there: between
two positions inside an interval a stage passes only positions inside it.

The functions below the rules make them from a config and its calibration. All of this
is pure, except that calibrations are files.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path

import msgspec
import yaml

from rtfocus.autofocus.planes import FocusCalibration
from rtfocus.config.loading import read_yaml
from rtfocus.config.model import AutofocusConfig
from rtfocus.errors import ConfigError
from rtfocus.images.metadata import TEXT_MARK

_SIDES = {"down": -1, "up": 1}
# Of a measured backlash, to be past it for certain; and the least that is believed, in
# depths of field.
_PAST_BACKLASH, _LEAST_BACKLASH = 1.5, 0.2
_DIRECTIONS = {"toward": 1, "away": -1, "unknown": 0}


@dataclass(frozen=True, slots=True)
class Limits:
    """Lowest and highest z the stage may ever be sent to, in um.

    Raises
    ------
    ValueError
        If they are not finite or the wrong way round.
    """

    low_um: float
    high_um: float

    def __post_init__(self) -> None:
        """Refuse limits that allow nothing or anything."""
        if not (isfinite(self.low_um) and isfinite(self.high_um)):
            msg = f"limits {self.low_um} and {self.high_um} um must be finite"
            raise ValueError(msg)
        if self.low_um > self.high_um:
            msg = f"limits {self.low_um} to {self.high_um} um hold no position"
            raise ValueError(msg)

    def holds(self, z_um: float) -> bool:
        """Tell whether a position is allowed; NaN is not."""
        return self.low_um <= z_um <= self.high_um

    def clip(self, z_um: float) -> float:
        """Return the nearest allowed position."""
        return min(max(z_um, self.low_um), self.high_um)

    def within(self, z_um: float, reach_um: float) -> "Limits":
        """Return the part of the limits that lies within reach of an allowed z."""
        return Limits(
            max(self.low_um, z_um - reach_um), min(self.high_um, z_um + reach_um)
        )


@dataclass(frozen=True, slots=True)
class Stay:
    """End the search here, in focus."""

    reason: str = "in focus"
    """For the verdict and the journal."""


@dataclass(frozen=True, slots=True)
class Move:
    """Go to where focus is believed to be, then look again."""

    dz_um: float
    """Step from the current z, positive = larger z; finite."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Go a little to learn on which side focus is, or look again (0)."""

    dz_um: float
    """Step from the current z, positive = larger z; finite."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Go to the best known z and end, with the reason."""

    reason: str
    """Why focus was not found; for the verdict and the journal."""
    back_um: float = 0.0
    """Way from here to the best known z; 0: it is here, or nothing is known."""


Decision = Stay | Move | Probe | GiveUp


@dataclass(frozen=True, slots=True)
class MoveRule:
    """How the stage may be moved."""

    limits: Limits
    deadband_um: float
    """Corrections below it are not worth a move."""
    most_um: float
    """Longest single move."""
    approach: int = 0
    """+1: arrive from below always; -1: from above; 0: either."""
    overshoot_um: float = 0.0
    """How far to go beyond a target to arrive from the right side: the backlash."""

    def target(self, z_um: float, wanted_um: float) -> float | None:
        """Return where a wish may lead from an allowed position; None: nowhere.

        The step is clipped, then the place; a wish within the deadband does not count.
        """
        if not (self.limits.holds(z_um) and isfinite(wanted_um)):
            return None
        step = min(max(wanted_um - z_um, -self.most_um), self.most_um)
        target = self.limits.clip(z_um + step)
        return None if abs(target - z_um) < self.deadband_um else target

    def settling(self, z_um: float) -> tuple[float, ...]:
        """Return the stops that arrive here anew from the chosen side; empty: none.

        Where a search begins it is not known from which side the stage came. From
        twice as far as later, so that a late arrival is not off alike everywhere.
        """
        beyond = self.limits.clip(z_um - 2 * self.approach * self.overshoot_um)
        if beyond == z_um or not self.limits.holds(z_um):
            return ()
        return beyond, z_um

    def path(self, z_um: float, target_um: float) -> tuple[float, ...]:
        """Return the stops of a move; the last is the target, all are allowed.

        A target that would be reached from the wrong side is passed by the overshoot
        first, as far as the limits allow.
        """
        target = self.limits.clip(target_um)
        if (target - z_um) * self.approach >= 0:
            return (target,)
        beyond = self.limits.clip(target - self.approach * self.overshoot_um)
        return (target,) if beyond == target else (beyond, target)


@dataclass(frozen=True, slots=True)
class SearchRule:
    """What a search may do beside moving."""

    most_images: int = 12
    """Images in all, however well it goes."""
    patience: int = 4
    """Images without progress before it gives up."""
    safe_side: int = -1
    """Side on which the objective cannot touch the specimen: sign of the z."""
    trust_sign: bool = False
    """The optics are calibrated: signed estimates are believed."""
    verify: bool = True
    """End only with a blurrier image on both sides: for optics that are not
    calibrated; costs images."""


def way_um(decision: Decision) -> float:
    """Return how far a decision moves the stage, positive = larger z."""
    if isinstance(decision, Move | Probe):
        return decision.dz_um
    return decision.back_um if isinstance(decision, GiveUp) else 0.0


def path_of(decision: Decision, z_um: float, moves: MoveRule) -> Sequence[float]:
    """Return the positions to send the stage to for a decision; empty: none."""
    way = way_um(decision)
    if way == 0.0 or not moves.limits.holds(z_um):
        return ()
    return moves.path(z_um, z_um + way)


def limits_at(config: AutofocusConfig, start_um: float) -> Limits:
    """Return the limits of a run that begins at a stage z.

    Raises
    ------
    ConfigError
        If the stage stands outside of the configured limits.
    """
    low = start_um - config.reach_um if config.low_um is None else config.low_um
    high = start_um + config.reach_um if config.high_um is None else config.high_um
    if not low <= start_um <= high:
        msg = (
            f"the stage stands at {start_um:g} um, outside of autofocus.low_um "
            f"{low:g} to high_um {high:g}; move it or correct the limits"
        )
        raise ConfigError(msg)
    return Limits(low, high).within(start_um, config.reach_um)


def save_calibration(path: Path, calibration: FocusCalibration) -> None:
    """Write a calibration as YAML."""
    values = {
        key: round(value, 5) if isinstance(value, float) else value
        for key, value in asdict(calibration).items()
    }
    text = yaml.safe_dump(values, sort_keys=False)
    path.write_text(f"{TEXT_MARK}\n{text}", encoding="utf-8")


def load_calibration(path: Path) -> FocusCalibration:
    """Read a calibration.

    Raises
    ------
    ConfigError
        If the file cannot be read or is not a calibration.
    """
    remedy = "make it with: rtfocus calibrate CONFIG"
    values = read_yaml(path, "autofocus.calibration", remedy)
    try:
        loaded = msgspec.convert(asdict(FocusCalibration(**values)), FocusCalibration)
        if not (0 < loaded.unit_um < inf and isfinite(loaded.backlash_um)):
            msg = "unit_um must be a number above 0, backlash_um a number"
            raise ValueError(msg)
    except (TypeError, ValueError) as error:
        msg = f"autofocus.calibration '{path}' cannot be used: {error}; {remedy}"
        raise ConfigError(msg) from error
    return loaded


def with_measured_backlash(config: AutofocusConfig) -> AutofocusConfig:
    """Return the config with the backlash that its calibration measured.

    What the user says of `backlash_um` stands, and a calibration that cannot be trusted
    says nothing. Without an `approach` the stage then always arrives upwards, as on the
    calibration's first way.

    Raises
    ------
    ConfigError
        If the calibration cannot be read.
    """
    if config.calibration is None or config.backlash_um > 0:
        return config
    found = load_calibration(config.calibration)
    backlash_um = abs(found.backlash_um)
    if not found.trusted or backlash_um < _LEAST_BACKLASH * found.unit_um:
        return config
    approach = "up" if config.approach == "either" else config.approach
    overshoot_um = _PAST_BACKLASH * backlash_um
    return config.model_copy(update={"approach": approach, "backlash_um": overshoot_um})


def is_calibrated(config: AutofocusConfig) -> bool:
    """Tell whether a calibration says that the optics can be relied on.

    Raises
    ------
    ConfigError
        If the calibration cannot be read.
    """
    if config.calibration is None:
        return False
    return load_calibration(config.calibration).trusted


def against_unknown_backlash(
    config: AutofocusConfig, unit_um: float
) -> AutofocusConfig:
    """Return the config with places reached upwards, past a depth of field of play.

    What the user says of `approach` and `backlash_um` stands.
    """
    given = {
        "approach": "up" if config.approach == "either" else config.approach,
        "backlash_um": config.backlash_um or unit_um,
    }
    return config.model_copy(update=given)


def move_rule(config: AutofocusConfig, limits: Limits, unit_um: float) -> MoveRule:
    """Return how the stage may be moved; `unit_um` is the depth of field.

    Unless the user, or a calibration that measured some, tells of backlash there may
    be: screws wear, and images do not tell it from other optics where it is small.
    """
    if "backlash_um" not in config.model_fields_set:
        config = against_unknown_backlash(config, unit_um)
    return MoveRule(
        limits=limits,
        deadband_um=config.deadband * unit_um,
        most_um=config.most_um,
        approach=_SIDES.get(config.approach, 0),
        overshoot_um=config.backlash_um,
    )


def search_rule(
    config: AutofocusConfig, direction: int, *, trusted: bool
) -> SearchRule:
    """Return what a search may do.

    Parameters
    ----------
    config
        Of autofocus.
    direction
        As `direction_of` gives.
    trusted
        A calibration says that the optics hold.
    """
    away = -direction if direction else -1
    return SearchRule(
        most_images=config.most_images,
        safe_side=_SIDES.get(config.safe_side, away),
        trust_sign=trusted,
        verify=not trusted,
    )


def direction_of(config: AutofocusConfig, of_core: int) -> int:
    """Return +1 where larger z brings the plane of focus to the specimen, -1 or 0.

    Parameters
    ----------
    config
        Its `direction` wins over the core's.
    of_core
        `core.getFocusDirection`: 0 where it is not set.
    """
    return _DIRECTIONS.get(config.direction, of_core)
