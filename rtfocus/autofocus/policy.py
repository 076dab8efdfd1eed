"""Policy: what a search may decide, and where the stage may be sent.

Pure. Whatever the images seem to say, a z for the stage comes only from here. Every
target is an absolute position inside the limits, and so is every stop on the way there:
between two positions inside an interval a stage passes only positions inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite


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

        The step is clipped, then the place; a wish within the deadband is none.
        """
        if not (self.limits.holds(z_um) and isfinite(wanted_um)):
            return None
        step = min(max(wanted_um - z_um, -self.most_um), self.most_um)
        target = self.limits.clip(z_um + step)
        return None if abs(target - z_um) < self.deadband_um else target

    def settling(self, z_um: float) -> tuple[float, ...]:
        """Return the stops that arrive here anew from the chosen side; empty: none.

        Nobody knows from which side a stage came to where a search begins. From twice
        as far as later, so that one that arrives late is not off alike everywhere.
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
