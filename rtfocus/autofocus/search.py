"""Search: autofocus on demand, image by image, as a pure state machine.

The first image tells the distance by the network, roughly. A step to the safe side
and a second image tell side and distance by the optics; where they do not tell
closely, an image from beyond focus does. The image at focus confirms it. Whatever
comes otherwise ends at the best z that is known, with the reason.
"""

from dataclasses import dataclass, field
from itertools import product
from math import isfinite

from rtfocus.autofocus.belief import Belief
from rtfocus.autofocus.looks import TOO_LATE, Headway, Look, early_um, stuck_um
from rtfocus.autofocus.planes import PlaneComparison
from rtfocus.autofocus.policy import (
    Decision,
    GiveUp,
    Move,
    MoveRule,
    Probe,
    SearchRule,
    Stay,
)
from rtfocus.autofocus.survey import SHARPER, Survey
from rtfocus.frame import FocusReading

# In depths of field.
_ARRIVED = 0.3  # from where focus should be
_ROUGH = 1.5  # deviation of a belief; beyond it the next view is focus itself
_LEAST_STEP = 1.2  # that shows a change
_MOST_STEP = 5.0  # of the first step
_FAR_STEP = 2.5  # where nothing but blur is seen
_BEYOND = 2.0  # how far beyond focus a view tells most
_BESIDE = 0.7  # that sharpness may peak from focus
_MOST_BESIDE = 4.0  # the same where calibrated optics explain the images well
_STUCK = 2.0  # over which images of a stage that moves must differ
_ALIKE = 0.9  # over which images that look alike are doubted at the end
_ALIKE_AT_END = 0.5  # the same for calibrated optics
_SURE = 0.85  # of focus within half a depth of field: enough to end there
_WORTH_A_MOVE = 0.7  # the same: enough to go there
# Unexplained share of the spectra's energy.
_MOST_UNEXPLAINED = 0.06  # beyond it the optics do not explain the images
_MOST_CALIBRATED = 0.02  # the same of calibrated optics
_WELL_EXPLAINED = 0.01  # below it they may contradict sharpness
_GROWTH = 1.6  # of steps while images from far away get sharper
# Numbers of images.
_LEAST_PLACES = 3  # that differ, before calibrated optics end
_ENOUGH = 5  # before it ends unsure, having seen both sides
_MOST_RETURNS = 1  # to the sharpest place
_IN_NOISE = (
    "the images change with z no more than by noise: there is too little to see here; "
    "a longer exposure or another region tells more"
)
# Share of saturated pixels that is worth a word.
_SATURATED = 1e-3


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
    rule: SearchRule = field(default_factory=SearchRule)
    direction: int = 1
    prior: Belief = field(default_factory=lambda: Belief(()))
    _sides: tuple[int, int] = field(init=False)
    _images: int = 0
    _headway: Headway = field(default_factory=Headway)
    _returns: int = 0
    _back_at: float | None = None
    """The sharpest place, when the search has decided to end there."""
    _follows: bool = False
    """What was sharp there no longer is: only images from then on count."""

    def __post_init__(self) -> None:
        """Begin with nothing seen."""
        self._sides = self.rule.safe_side, -self.rule.safe_side
        known = self.comparison, self.direction, self.rule.trust_sign, self.prior
        self.survey = Survey(*known, calibrated=not self.rule.verify)

    def observe(self, z_um: float, reading: FocusReading) -> None:
        """Take in one image."""
        self._images += 1
        before = self.looks[-1] if self.looks else None
        unit_um = self.survey.unit_um
        self.survey.add(z_um, reading, early_um(self.moves, before, z_um, unit_um))

    @property
    def looks(self) -> list[Look]:
        """The images that count."""
        return self.survey.looks

    @property
    def belief(self) -> Belief:
        """Where focus may be by all that was seen."""
        return self.survey.belief

    @property
    def notes(self) -> list[str]:
        """What was noticed on the way, e.g. a stage that runs the other way."""
        share = max(look.reading.saturated for look in self.looks)
        is_told = self.looks[-1].reading.refusal == "saturated" or share <= _SATURATED
        words = f"{100 * share:.1f} % of the pixels are saturated: focus may lie beside"
        return self.survey.faults() + ([] if is_told else [words])

    def decide(self) -> Decision:
        """Say what to do after the newest image."""
        decision = self._next_decision()
        if isinstance(decision, Stay):
            decision = self._verified(decision)
        wants_more = isinstance(decision, Move | Probe)
        if wants_more and self._images >= self.rule.most_images:
            return self._give_up_unsure(f"not found in {self._images} images")
        return decision

    def give_up(self, reason: str) -> GiveUp:
        """End at the best z that is known."""
        now = self.looks[-1].z_um
        self.survey.forget_early()
        # Optics that are not calibrated are no better guide than sharpness.
        trusted = 0.0 if self.rule.verify else _WELL_EXPLAINED
        best = self.survey.best_known_um(trusted)
        back = self.moves.limits.clip(best) if isfinite(best) else now
        return GiveUp(reason, back - now)

    def _next_decision(self) -> Decision:
        if (end := self._end_of_sight()) is not None:
            return end
        if (doubt := self._doubt_the_stage()) is not None:
            return doubt
        if self._back_at is not None:
            return self._check_end()
        if self._follows:
            return self._top_of_now()
        is_there = not self.belief.is_empty and self._way_um() <= self._near_um()
        if is_there and self._is_sure_of(self.looks[-1].z_um):
            return self._end_on_arrival()
        if self._is_worth_a_move():
            return self._approach()
        saw_enough = is_there and self.survey.saw_both_sides()
        saw_enough &= not self.survey.arrival.is_suspect
        if not self._makes_progress() or (saw_enough and self._images >= _ENOUGH):
            return self._end_unsure()
        return self._next_view()

    def _approach(self) -> Decision:
        """Go to focus, or, having been there, first to the side still unseen."""
        if self._has_been_there() and (view := self._missing_view()) is not None:
            return view
        return self._move()

    def _missing_view(self) -> Decision | None:
        """Return the view that an end lacks: two places agree with too much."""
        if self.rule.verify:
            beyond = self._unbracketed()
            return None if beyond is None else self._view(beyond)
        return self._next_view() if self.survey.places() < _LEAST_PLACES else None

    def _way_um(self) -> float:
        return abs(self.belief.best.mean_um - self.looks[-1].z_um)

    def _is_worth_a_move(self) -> bool:
        if self.belief.is_empty or self._way_um() <= self.moves.deadband_um:
            return False
        focus_um, way_um = self.belief.best.mean_um, self._way_um()
        is_close = way_um < self.survey.unit_um and not self._is_sure_of(focus_um)
        is_beside = is_close or way_um <= self._near_um()
        if not self.rule.verify and is_beside and not self.survey.saw_both_sides():
            # One more image beside focus tells less than one from a side still unseen.
            return False
        if self.rule.verify or self._has_been_there():
            return self._is_sure_of(focus_um)
        # The image there makes it surer.
        return self.survey.certainty(focus_um) >= _WORTH_A_MOVE

    def _is_sure_of(self, z_um: float) -> bool:
        is_suspect = self.survey.arrival.is_suspect
        return self.survey.certainty(z_um) >= _SURE and not is_suspect

    def _has_been_there(self) -> bool:
        return self.survey.has_seen(self.belief.best.mean_um, self._near_um())

    def _near_um(self) -> float:
        return max(_ARRIVED * self.survey.unit_um, self.moves.deadband_um)

    def _end_of_sight(self) -> Decision | None:
        """Say what to do about an image that tells nothing; None: it tells."""
        now = self.looks[-1]
        if not self.moves.limits.holds(now.z_um):
            # No way is known from there that stays inside.
            return GiveUp(f"the stage says {now.z_um:g} um, outside its limits")
        refusal = f"{now.reading.refusal}: {now.reading.detail}"
        if now.reading.refusal == "saturated":
            return self.give_up(refusal)
        unseen = now.is_bare and not now.shows_detail
        if unseen and len(self.looks) == 2:
            # So far out that nothing shows: the other side, then.
            other = self.moves.limits.clip(2 * self.looks[0].z_um - now.z_um)
            return Probe(other - now.z_um)
        if unseen or (self.belief.is_empty and not any(now.reading.spectrum)):
            return self.give_up(refusal)
        return None

    def _next_view(self) -> Decision:
        """Go where an image tells most."""
        now, unit = self.looks[-1].z_um, self.survey.unit_um
        if len(self.looks) == 1:
            return self._probe(self._first_step_um())
        if self.belief.is_empty:
            return self._probe(_BEYOND * unit)
        if (beyond := self._limit_in_the_way()) is not None:
            return beyond
        best = self.belief.best
        if best.sd_um > _ROUGH * unit and abs(best.mean_um - now) > unit:
            return self._move()
        # Images from both sides of focus leave least open.
        sides = (1, -1) if now < best.mean_um else (-1, 1)
        for length, within in ((_BEYOND, 1.0), (0.0, 0.3), (1.0, 0.3)):
            for side in sides:
                view_um = self.moves.limits.clip(best.mean_um + side * length * unit)
                if length and self.survey.seen_beside(
                    best.mean_um, side, length - within, length + 1.5
                ):
                    continue
                if not self.survey.has_seen(view_um, 0.3 * unit):
                    return self._view(view_um)
        if not self.rule.verify and abs(best.mean_um - now) > _FAR_STEP * unit:
            return self._end_unsure()
        return self._probe(_LEAST_STEP * unit)

    def _view(self, wanted_um: float) -> Decision:
        now, most = self.looks[-1].z_um, self.moves.most_um
        way = wanted_um - now
        if (before := self.survey.climbed_um()) is not None and before * way > 0:
            way = max(way, _GROWTH * before) if way > 0 else min(way, _GROWTH * before)
        target = self.moves.limits.clip(now + min(max(way, -most), most))
        return Probe(target - now)

    def _move(self) -> Decision:
        """Go to where focus is believed to be."""
        if (beyond := self._limit_in_the_way()) is not None:
            return beyond
        now, focus_um = self.looks[-1].z_um, self.belief.best.mean_um
        target = self.moves.target(now, focus_um)
        if target is None:
            return self._probe(_LEAST_STEP * self.survey.unit_um)
        return Move(target - now)

    def _limit_in_the_way(self) -> Decision | None:
        now, focus_um = self.looks[-1].z_um, self.belief.best.mean_um
        limits, unit = self.moves.limits, self.survey.unit_um
        at_limit = min(now - limits.low_um, limits.high_um - now) < 0.1 * unit
        if not (abs(limits.clip(focus_um) - focus_um) > unit and at_limit):
            return None
        best = self.survey.best_seen
        gap = self.survey.gap_beside(best.z_um, limits.low_um, limits.high_um)
        if self.looks[-1].sharpness * SHARPER < best.sharpness and gap is not None:
            # It was sharper elsewhere, so the optics are wrong about these images.
            return self._view(gap)
        at = f"{focus_um:.1f} um"
        return self._give_up_seeing(f"focus seems to lie beyond the limits, at {at}")

    def _first_step_um(self) -> float:
        """Return a step that crosses focus, if it is on that side."""
        unit, first = self.survey.unit_um, self.looks[0].reading
        if self.looks[0].is_far:
            return _FAR_STEP * unit
        beyond = _LEAST_STEP if self.rule.verify else _BEYOND
        return min(abs(first.defocus_um or 0.0) + beyond * unit, _MOST_STEP * unit)

    def _probe(self, length_um: float) -> Decision:
        """Step to the safe side; where that was seen to the other, or twice as far."""
        now, most = self.looks[-1].z_um, self.moves.most_um
        for length, side in product((length_um, 2 * length_um), self._sides):
            target = self.moves.limits.clip(now + side * min(length, most))
            if not self.survey.has_seen(target, 0.3 * self.survey.unit_um):
                return Probe(target - now)
        return self._give_up_seeing("there is no room to probe within the limits")

    def _end_on_arrival(self) -> Decision:
        now, best, fit = self.looks[-1], self.survey.best_seen, self.survey.fit
        unit, sure = self.survey.unit_um, self.belief.best.mean_um
        unexplained = 0.0 if fit is None else fit.unexplained
        is_sharper = best.sharpness > SHARPER * now.sharpness
        beside = abs(best.z_um - sure)
        is_well = not self.rule.verify and unexplained <= _WELL_EXPLAINED
        trusted = is_well and beside < _MOST_BESIDE * unit
        if is_sharper and beside > _BESIDE * unit and not trusted:
            return self.give_up(
                f"sharpness peaks {beside:.1f} um from where focus should be"
            )
        changed = self.survey.saw_change()
        if not (changed and self.survey.is_change_clear()):
            for place in self.survey.beyond_top_um(self._sides):
                inside = self.moves.limits.clip(place)
                if not self.survey.has_seen(inside, 0.3 * unit):
                    return self._view(inside)
            alike = "the images hardly change with z; does the stage move?"
            return self.give_up(_IN_NOISE if changed else alike)
        if (view := self._missing_view()) is not None:
            return view
        if self.survey.arrival.is_late and not (is_well or self.rule.verify):
            return self.give_up(TOO_LATE)
        most = _MOST_UNEXPLAINED if self.rule.verify else _MOST_CALIBRATED
        if unexplained > most and self.rule.verify:
            unexplained = self.survey.unexplained_close()
        if unexplained > most:
            return self.give_up(
                "the images do not change with z as the optics say "
                f"({100 * unexplained:.0f} % unexplained); check the channel's optics, "
                "or rtfocus calibrate"
            )
        # Aberrations move the sharpest plane away from where the optics put focus.
        return self._end_at(self.survey.peak_um()) if self.rule.verify else Stay()

    def _check_end(self) -> Decision:
        """Check the image at the place where the search wants to end."""
        now, best = self.looks[-1], self.survey.best_seen
        # To end blurrier than what was seen would be a mistake. The sharpest of several
        # images is so by chance in part: at its very place as much again is noise.
        at_best = abs(now.z_um - best.z_um) <= self.moves.deadband_um
        noise = SHARPER**2 if at_best else SHARPER
        if now.sharpness * noise >= best.sharpness:
            return Stay()
        if not at_best:
            self._returns += 1
            if self._returns <= _MOST_RETURNS:
                return Move(best.z_um - now.z_um)
        if self._follows:
            return self.give_up(
                "the image did not get as sharp as it was; does the specimen drift?"
            )
        # A specimen that drifts has left where it was sharp, the further the longer an
        # image takes: sharpness is compared among images from now on.
        self._follows, self._back_at = True, None
        self.survey.forget_older()
        return self._top_of_now()

    def _top_of_now(self) -> Decision:
        """Look at both sides of the sharpest image since the older were forgotten."""
        if (beyond := self._unbracketed()) is not None:
            return self._view(beyond)
        return self._end_at(self.survey.peak_um())

    def _end_at(self, top_um: float) -> Decision:
        """Go to a place to end there, if the image is as sharp as was seen."""
        self._back_at, way = top_um, top_um - self.looks[-1].z_um
        return Move(way) if abs(way) > self.moves.deadband_um else self._check_end()

    def _unbracketed(self) -> float | None:
        return self.survey.unbracketed_um(self._sides, self.moves.limits)

    def _end_unsure(self) -> Decision:
        """End where nothing that was seen makes it surer."""
        survey, beyond = self.survey, self._unbracketed()
        if self.rule.verify and beyond is not None and survey.saw_change():
            # Images from afar on both sides tell little: those beside the sharpest do.
            return self._view(beyond)
        place = self.belief.best.mean_um
        is_likely = self.rule.verify or survey.certainty(place) >= _WORTH_A_MOVE
        agrees = survey.does_peak_agree(_MOST_UNEXPLAINED, _BESIDE)
        if beyond is None and is_likely and agrees and not survey.arrival.is_suspect:
            # A peak of sharpness where focus is believed to be, seen from both sides.
            return self._end_at(survey.best_seen.z_um if self.rule.verify else place)
        return self._give_up_unsure("no progress")

    def _give_up_unsure(self, reason: str) -> GiveUp:
        if not self.rule.verify and self.survey.saw_both_sides():
            sd_um = self.belief.best.sd_um
            reason = (
                f"focus cannot be told more closely than by {sd_um:.1f} um: is the "
                "aberration as the channel's optics say? rtfocus psf fit finds it"
            )
        reason = self.survey.arrival.why_lost or reason
        far = [look.reading for look in self.looks if look.is_far]
        if self.survey.best_seen.is_far and len(far) > len(self.looks) / 2:
            reason = f"focus is farther away than can be seen ({far[-1].detail})"
        return self._give_up_seeing(reason)

    def _give_up_seeing(self, reason: str) -> GiveUp:
        """Give up for a reason that holds if there is anything to see."""
        sees = len(self.looks) < 2 or self.survey.is_change_clear()
        return self.give_up(reason if sees else _IN_NOISE)

    def _doubt_the_stage(self) -> Decision | None:
        """Say what to do where images do not follow the stage; None: they do."""
        now, unit = self.looks[-1], self.survey.unit_um
        arrival, places = self.survey.arrival, self.survey.unmoved_um()
        # Optics that are not calibrated do not tell late images from others: one taken
        # again does.
        is_untried = self.rule.verify and not arrival.was_tried and now.shows_lag(unit)
        if arrival.is_early or is_untried:
            return Probe(0.0)
        if arrival.is_late or not places:
            return None
        may_move = not self.rule.verify and self.survey.is_change_clear()
        may_move &= not self.survey.showed_another(places)
        if not (arrival.is_taken_again or may_move):
            return Probe(0.0)
        if not self.survey.does_stand_still(places):
            return None
        if may_move:
            # Far about an aberrated focus images look alike; one that differed shows.
            other_um = self.survey.other_um()
            return None if other_um is None else self._view(other_um)
        if max(places) - min(places) > _STUCK * unit:
            why = "the stage does not answer: images stay the same, or show only dirt"
            is_doubtful = len(places) < len(self.looks) or self.looks[-1].is_bare
            return (self._give_up_seeing if is_doubtful else self.give_up)(why)
        return self._probe(_STUCK * unit)

    def _verified(self, end: Stay) -> Decision:
        """Before the end look where images must differ, if the newest look alike."""
        if not self.survey.arrival.is_seen_at_rest:
            return Probe(0.0)
        # Where no image from both sides is asked for, the last move must show, unless
        # focus is also where the stage may have stuck.
        now, unit = self.looks[-1].z_um, self.survey.unit_um
        apart = _ALIKE if self.rule.verify else _ALIKE_AT_END
        stuck = stuck_um(self.looks, unit, apart, at_stops=not self.rule.verify)
        if not stuck or (not self.rule.verify and all(map(self._is_sure_of, stuck))):
            return end
        self._returns = 0
        beyond = [now + side * _BEYOND * unit for side in self._sides]
        places = [z for z in beyond if not self.survey.has_seen(z, 0.3 * unit)]
        if (other_um := self.survey.other_um()) is not None:
            places.append(other_um)
        return next(map(self._view, filter(self.moves.limits.holds, places)), end)

    def _makes_progress(self) -> bool:
        if self.belief.is_empty:
            return len(self.looks) <= self.rule.patience
        self._headway.see(self.belief.best.sd_um, self._way_um())
        return self._headway.idle < self.rule.patience
