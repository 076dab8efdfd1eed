"""Search: autofocus on demand, image by image, as a pure state machine.

The first image tells the distance by the network, roughly. A step to the safe side
and a second image tell side and distance by the optics, closely; the third confirms
it. Whatever comes otherwise ends at the best z that was seen, with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.belief import (
    Belief,
    Mode,
    modes_of_reading,
    modes_of_weights,
)
from rtfocus.autofocus.planes import PlaneComparison, PlaneFit
from rtfocus.autofocus.policy import Decision, GiveUp, Move, MoveRule, Probe, Stay
from rtfocus.autofocus.spectrum import FREQUENCIES
from rtfocus.frame import FocusReading

Floats = NDArray[np.float64]

# In depths of field.
_ARRIVED, _SURE, _APART, _FIRST_STEP = 0.3, 0.35, 1.0, 1.0
_RIVAL = 0.25
_BESIDE, _STUCK, _NEAR, _BRACKET, _TOP = 0.7, 2.0, 3.0, 0.5, 0.8
# Of the spectra's energy, or the optics do not explain the images.
_MOST_UNEXPLAINED = 0.06
# Sharpness is gradient energy: its root goes with the blur.
_SHARPER, _SAME = 1.10, 0.02
# Other refusals leave the distance open: planes can still tell it.
_TERMINAL = ("blank", "saturated")
_FEWEST = 2
_LEAST_PLACES = 3
# Sharpness changes at least so much from focus to a depth of field beside it.
_CHANGE = 1.08


@dataclass(frozen=True, slots=True)
class Look:
    """One image of a search."""

    z_um: float
    """Where it was exposed, as the stage says."""
    reading: FocusReading
    sharpness: float
    """Root of the gradient energy above the noise, per light."""


@dataclass(frozen=True, slots=True)
class SearchRule:
    """What a search may do beside moving."""

    most_images: int = 10
    """Images in all, however well it goes."""
    patience: int = 4
    """Images without progress before it gives up."""
    safe_side: int = -1
    """Side on which the objective cannot touch the specimen: sign of the z."""
    trust_sign: bool = False
    """The optics are calibrated: signed estimates are believed."""
    verify: bool = True
    """End only with a blurrier image on both sides: for optics that are not
    calibrated; costs an image."""
    most_unexplained: float = _MOST_UNEXPLAINED


@dataclass
class FocusSearch:
    """One search for focus; `observe` every image, then ask `decide`.

    Parameters
    ----------
    comparison
        Of the channel's optics.
    moves
        Limits and steps.
    rule
        Patience and sides.
    direction
        +1: larger z brings the plane of focus towards the specimen; -1; 0: unknown.
    prior
        What is known of this place before.
    """

    comparison: PlaneComparison
    moves: MoveRule
    rule: SearchRule = SearchRule()
    direction: int = 1
    prior: Belief = field(default_factory=lambda: Belief(()))
    looks: list[Look] = field(default_factory=list)
    belief: Belief = field(default_factory=lambda: Belief(()))
    fit: PlaneFit | None = None
    notes: list[str] = field(default_factory=list)
    """What was noticed on the way, e.g. a stage that runs the other way."""
    _errors: list[float] = field(default_factory=list)
    _images: int = 0
    _idle: int = 0
    _returns: int = 0
    _looked_again: bool = False
    _is_late: bool = False
    _seen_again: bool = False
    """The newest image took the place of one at the same z."""
    _back_at: float | None = None
    """The sharpest place, when the search has decided to end there."""

    def observe(self, z_um: float, reading: FocusReading) -> None:
        """Take in one image."""
        self._images += 1
        self._seen_again = False
        spectrum = np.asarray(reading.spectrum, dtype=np.float64)
        self.looks.append(Look(z_um, reading, sharpness(spectrum)))
        if isfinite(z_um):
            self._drop_lagging()
            self.belief = self._posterior()

    @property
    def best_seen(self) -> Look:
        """The sharpest image so far."""
        usable = [look for look in self.looks if isfinite(look.z_um)]
        return max(usable or self.looks, key=lambda look: look.sharpness)

    def decide(self) -> Decision:
        """Say what to do after the newest image."""
        decision = self._wish()
        wants_more = isinstance(decision, Move | Probe)
        if wants_more and self._images >= self.rule.most_images:
            return self.give_up(f"not found in {self._images} images")
        return decision

    def _wish(self) -> Decision:
        if (end := self._end_of_sight()) is not None:
            return end
        now = self.looks[-1]
        if self._is_late and len(self.looks) > 1 and not self._is_again():
            return Probe(0.0)
        if self._back_at is not None:
            # To end blurrier than what was seen would be a mistake.
            best = self.best_seen
            if now.sharpness * _SHARPER < best.sharpness:
                self._returns += 1
                if self._returns > 1:
                    return self.give_up("the image did not get as sharp as it was")
                return Move(best.z_um - now.z_um)
            return Stay()
        if (doubt := self._doubt_the_stage()) is not None:
            return doubt
        if self._has_arrived():
            return self._arrived()
        decision: Decision = (
            self._step() if self._makes_progress() else self.give_up("no progress")
        )
        if isinstance(decision, GiveUp) and self._stands_out():
            # All that was seen agrees; only more images would not make it surer.
            self._back_at = self.best_seen.z_um
            way = self._back_at - now.z_um
            return Move(way) if way else Stay()
        return decision

    def _end_of_sight(self) -> Decision | None:
        """Say what to do about an image that tells nothing; None: it tells."""
        now = self.looks[-1]
        if not self.moves.limits.holds(now.z_um):
            # No way is known from there that stays inside.
            return GiveUp(f"the stage says {now.z_um:g} um, outside its limits")
        if now.reading.refusal == "blank" and len(self.looks) == 2:
            # So far out that nothing shows: the other side, then.
            other = self.moves.limits.clip(2 * self.looks[0].z_um - now.z_um)
            return Probe(other - now.z_um)
        alone = now.reading.refusal == "few_tiles" and now.reading.tiles < _FEWEST
        if now.reading.refusal in _TERMINAL or alone:
            return self.give_up(f"{now.reading.refusal}: {now.reading.detail}")
        if self.belief.is_empty and not any(now.reading.spectrum):
            return self.give_up(f"{now.reading.refusal}: {now.reading.detail}")
        return None

    def _distinct(self) -> int:
        """Return the number of places, well apart, that were seen."""
        step = 0.3 * self.comparison.unit_um
        return len({round(look.z_um / step) for look in self._with_spectrum()})

    def _saw_change(self) -> bool:
        """Tell whether sharpness changed with z by more than noise does."""
        values = [look.sharpness for look in self._with_spectrum()]
        return bool(values) and max(values) > _CHANGE * min(values)

    def _stands_out(self) -> bool:
        """Tell whether the sharpest image is a peak where focus is believed to be.

        Blurrier images lie on both sides of it, and the optics explain them.
        """
        if self.fit is None or self.belief.is_empty:
            return False
        best = self.best_seen
        beside = abs(best.z_um - self.belief.best.mean_um)
        return (
            self._saw_change()
            and beside < _BESIDE * self.comparison.unit_um
            and self._unbracketed(best) is None
            and self.fit.unexplained <= self.rule.most_unexplained
        )

    def _step(self) -> Decision:
        now, unit = self.looks[-1].z_um, self.comparison.unit_um
        if len(self.looks) == 1:
            known = not self.belief.is_empty and self.belief.best.sd_um < _SURE * unit
            if not (known and self.belief.rival(_APART * unit) is None):
                return self._probe(self._first_step_um())
        if self.belief.is_empty:
            return self._probe(2 * unit)
        wanted = self.belief.best.mean_um
        target = self.moves.target(now, wanted)
        if target is None:
            # In place by belief, yet not sure of it.
            beside = self._probe(_FIRST_STEP * unit)
            return beside
        if abs(target - wanted) > unit and target in (
            self.moves.limits.low_um,
            self.moves.limits.high_um,
        ):
            at = f"{wanted:.1f} um"
            return self.give_up(f"focus seems to lie beyond the limits, at {at}")
        return Move(target - now)

    def _first_step_um(self) -> float:
        unit, first = self.comparison.unit_um, self.looks[0].reading
        if first.refusal == "edge" or first.defocus_um is None:
            return 2.5 * unit
        return min(max(_FIRST_STEP * unit, 0.5 * abs(first.defocus_um)), 3 * unit)

    def _probe(self, length_um: float) -> Decision:
        """Step to the safe side, or where it ends to the other."""
        now = self.looks[-1].z_um
        length = min(length_um, self.moves.most_um)
        for side in (self.rule.safe_side, -self.rule.safe_side):
            target = self.moves.limits.clip(now + side * length)
            fresh = all(
                abs(target - look.z_um) > 0.3 * self.comparison.unit_um
                for look in self.looks
            )
            if fresh:
                return Probe(target - now)
        return self.give_up("there is no room to probe within the limits")

    def _posterior(self) -> Belief:
        """Weigh everything that was seen anew."""
        belief = self.prior
        for look in self.looks:
            if not isfinite(look.z_um):
                continue
            modes = modes_of_reading(
                look.reading,
                look.z_um,
                direction=self.direction,
                trust_sign=self.rule.trust_sign,
            )
            belief = belief.seen(modes, outlier=0.1)
        planes = self._planes()
        self.fit = None
        if len(planes) < 2:
            return belief
        self.fit = self.comparison.fit(
            np.array([look.z_um for look in planes]),
            np.array([look.reading.spectrum for look in planes]),
            np.array([look.reading.noise for look in planes]),
        )
        modes = modes_of_weights(self.fit.candidates_um, self.fit.weights)
        # The optics know better than the network, which had its say in the prior.
        return Belief.of(modes).seen(belief.modes, outlier=0.3)

    def _planes(self) -> list[Look]:
        """Return the images to compare: those near enough to tell.

        Far from focus the thickness of a specimen shows, which the model lacks.
        """
        planes = self._with_spectrum()
        if len(planes) < 3:
            return planes
        sharpest = max(planes, key=lambda look: look.sharpness).z_um
        reach = _NEAR * self.comparison.unit_um
        near = [look for look in planes if abs(look.z_um - sharpest) < reach]
        return near if len(near) > 1 else planes

    def _with_spectrum(self) -> list[Look]:
        return [
            look
            for look in self.looks
            if any(look.reading.spectrum)
            and isfinite(look.z_um)
            and look.reading.refusal != "blank"
        ]

    def _has_arrived(self) -> bool:
        unit = self.comparison.unit_um
        if len(self.looks) < 2 or self.belief.is_empty:
            return False
        best = self.belief.best
        near = max(_ARRIVED * unit, self.moves.deadband_um)
        sharpest = self.best_seen.z_um
        if min(abs(z - best.mean_um) for z in (self.looks[-1].z_um, sharpest)) > near:
            return False
        rival = self.belief.rival(_APART * unit)
        certain = best.sd_um < _SURE * unit
        return certain and (rival is None or rival.weight < _RIVAL)

    def _arrived(self) -> Decision:
        now, best = self.looks[-1], self.best_seen
        beside = abs(best.z_um - self.belief.best.mean_um)
        is_sharper = best.sharpness > _SHARPER * now.sharpness
        if is_sharper and beside > _BESIDE * self.comparison.unit_um:
            return self.give_up(
                f"sharpness peaks {beside:.1f} um from where focus should be"
            )
        if not self._saw_change():
            return self.give_up("the images hardly change with z; does the stage move?")
        # Two places agree with too much.
        check = self.rule.verify or self._distinct() < _LEAST_PLACES
        if check and (beyond := self._unbracketed(best)) is not None:
            return Probe(beyond - now.z_um)
        if self.fit is not None and self.fit.unexplained > self.rule.most_unexplained:
            share = 100 * self.fit.unexplained
            return self.give_up(
                f"the images do not change with z as the optics say ({share:.0f} % "
                "unexplained); check the channel's optics, or rtfocus calibrate"
            )
        top = self._peak_um(best) if self.rule.verify else best.z_um
        if is_sharper or (
            self.rule.verify and abs(top - now.z_um) > self.moves.deadband_um
        ):
            self._back_at = top
            return Move(top - now.z_um)
        if self.fit is not None and self.fit.is_reversed:
            self.notes.append("the stage moves against what the core says")
        return Stay()

    def _unbracketed(self, best: Look) -> float | None:
        """Return where to look beyond the sharpest image; None: both sides are known.

        A side that the limits cut off counts as known.
        """
        step = _BRACKET * self.comparison.unit_um
        for side in (self.rule.safe_side, -self.rule.safe_side):
            beyond = self.moves.limits.clip(best.z_um + side * step)
            seen = any(
                (look.z_um - best.z_um) * side > 0.5 * step
                and (look.z_um - best.z_um) * side < 4 * step
                for look in self._with_spectrum()
            )
            if not seen and abs(beyond - best.z_um) > 0.5 * step:
                return beyond
        return None

    def _peak_um(self, best: Look) -> float:
        """Return the top of the parabola through the sharpest image and its sides."""
        looks = self._with_spectrum()
        below = [look for look in looks if look.z_um < best.z_um - 1e-6]
        above = [look for look in looks if look.z_um > best.z_um + 1e-6]
        if not (below and above):
            return best.z_um
        left = max(below, key=lambda look: look.z_um)
        right = min(above, key=lambda look: look.z_um)
        # A parabola holds near the top alone.
        width = max(best.z_um - left.z_um, right.z_um - best.z_um)
        if width > _TOP * self.comparison.unit_um:
            return best.z_um
        three = (left, best, right)
        curve = np.polyfit(
            [look.z_um - best.z_um for look in three],
            [look.sharpness / best.sharpness for look in three],
            2,
        )
        if curve[0] >= 0:
            return best.z_um
        top = best.z_um - curve[1] / (2 * curve[0])
        return float(min(max(top, left.z_um), right.z_um))

    def _doubt_the_stage(self) -> Decision | None:
        """Say what to do where images do not change with the stage; None: they do.

        Two may look the same on both sides of focus, or the stage may be late: look
        again. Three at places far apart do not.
        """
        now, unit = self.looks[-1], self.comparison.unit_um
        same = [look for look in self.looks if _difference(look, now) < _SAME]
        if len(same) < 2:
            return None
        places = [look.z_um for look in same]
        spread = max(places) - min(places)
        if spread < _FIRST_STEP * 0.9 * unit:
            return None
        if not self._looked_again:
            self._looked_again = True
            return Probe(0.0)
        distinct = {round(place / (0.3 * unit)) for place in places}
        if len(distinct) < 3:
            return None
        if spread > _STUCK * unit:
            return self.give_up("the stage does not answer: images stay the same")
        return self._probe(_STUCK * unit)

    def _drop_lagging(self) -> None:
        """Forget an image that was taken before the stage had arrived.

        Two images at one z that differ: the first came too early.
        """
        if len(self.looks) < 2:
            return
        if not self._is_again():
            return
        before, now = self.looks[-2], self.looks[-1]
        if self._is_late or _difference(before, now) > 3 * _SAME:
            self.looks.pop(-2)
            if not self._is_late:
                self._is_late = True
                self.notes.append("the stage arrives late")
            self._seen_again = True

    def _is_again(self) -> bool:
        """Tell whether the newest image is the second one at its place."""
        if self._seen_again:
            return True
        if len(self.looks) < 2:
            return False
        way = self.looks[-1].z_um - self.looks[-2].z_um
        return abs(way) < 0.05 * self.comparison.unit_um

    def _makes_progress(self) -> bool:
        if self.belief.is_empty:
            return len(self.looks) <= self.rule.patience
        best = self.belief.best
        error = max(abs(self.looks[-1].z_um - best.mean_um), best.sd_um)
        if not self._errors or error < 0.8 * min(self._errors):
            self._idle = 0
        else:
            self._idle += 1
        self._errors.append(error)
        return self._idle < self.rule.patience

    def give_up(self, reason: str) -> GiveUp:
        """End at the sharpest z that was seen."""
        best, now = self.best_seen, self.looks[-1]
        back = self.moves.limits.clip(best.z_um) if isfinite(best.z_um) else now.z_um
        return GiveUp(reason, back - now.z_um)


def sharpness(spectrum: Floats) -> float:
    """Return the root of the gradient energy of a spectrum, per ring and light."""
    if spectrum.size == 0:
        return 0.0
    # Rings grow with the frequency: each counts with its area.
    return float(np.sqrt(np.sum((spectrum * FREQUENCIES**2) ** 2)))


def _difference(one: Look, two: Look) -> float:
    """Return the relative difference of two images' detail above their noise."""
    a, b = (np.asarray(look.reading.spectrum) for look in (one, two))
    if a.shape != b.shape or a.size == 0:
        return 1.0
    noise = max(one.reading.noise, two.reading.noise)
    seen = np.maximum(a, b) > noise
    if not seen.any():
        return 0.0
    # Weighted with the frequency: coarse structure hardly changes near focus.
    a, b = (a * FREQUENCIES)[seen], (b * FREQUENCIES)[seen]
    size = np.sqrt(np.mean(a**2) + np.mean(b**2))
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(size, 1e-12))


def path_of(decision: Decision, z_um: float, moves: MoveRule) -> Sequence[float]:
    """Return the positions to send the stage to for a decision; empty: none."""
    if isinstance(decision, Move | Probe):
        way = decision.dz_um
    elif isinstance(decision, GiveUp):
        way = decision.back_um
    else:
        way = 0.0
    if way == 0.0 or not moves.limits.holds(z_um):
        return ()
    return moves.path(z_um, z_um + way)


__all__ = ["FocusSearch", "Look", "Mode", "SearchRule", "path_of", "sharpness"]
