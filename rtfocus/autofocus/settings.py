"""Settings: the config and the stage as it stands, turned into rules of movement."""

from rtfocus.autofocus.calibration import load_calibration
from rtfocus.autofocus.policy import Limits, MoveRule
from rtfocus.autofocus.search import SearchRule
from rtfocus.config.model import AutofocusConfig
from rtfocus.errors import ConfigError

_SIDES = {"down": -1, "up": 1}
# Of a measured backlash, to be past it for certain; and the least that is believed, in
# depths of field.
_PAST_BACKLASH, _LEAST_BACKLASH = 1.5, 0.2
_DIRECTIONS = {"toward": 1, "away": -1, "unknown": 0}


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
    """Return how the stage may be moved; `unit_um` is the depth of field."""
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
        `core.getFocusDirection`: 0 where nobody has said.
    """
    return _DIRECTIONS.get(config.direction, of_core)
