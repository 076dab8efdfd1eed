"""Survey: what the images of one search say together of focus and of the stage.

Three cues are weighed. The network's distance of the first image starts the belief;
the optics (`rtfocus.autofocus.planes`) settle side and place, best from images on both
sides of focus; sharpness checks them. Images that do not change, or not as the stage's
moves say, tell of the stage instead.
"""

from dataclasses import dataclass, field
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.belief import Belief, modes_of_reading, modes_of_weights
from rtfocus.autofocus.looks import (
    CLOSE_BY,
    SAME,
    Arrival,
    Look,
    alike_um,
    newest_of_each,
    places_of,
    spectra_of,
)
from rtfocus.autofocus.planes import AS_TOLD, Course, PlaneComparison, PlaneFit
from rtfocus.autofocus.policy import Limits
from rtfocus.frame import FocusReading

Floats = NDArray[np.float64]

# In depths of field.
_NEAR = 3.5  # from the sharpest image: those that are compared
_BESIDE = 0.7  # from focus: images that are on one side of it
_TOP = 0.8  # from the sharpest image: where a parabola holds
_BRACKET = 0.5  # from the sharpest image: where both sides are looked at
_FLAT_TOP = 1.5  # over which images about focus look alike
_MARGIN = 0.3  # within which focus is known then
_BEYOND_TOP = 2.0  # from focus: where images must differ
_CLOSE = 2.0  # to the sharpest image: those that optics must explain,
_CLOSE_PLACES = 4  # from so many places
_STILL_PLACES = 3  # with images alike: the stage stands still
_ALIEN = 0.06  # unexplained share of energy of images that the optics do not form
_ROUGHLY_SURE = 0.7  # of focus within a depth of field: enough after a failed search
_CHANGE = 1.08  # of sharpness, at least, from focus to a depth of field beside it
# Rings that are averaged to tell a change from noise, and how often its variance a
# change must have: noise alone has 5 at most, the faintest cell that landed 24.
_BAND, _CLEAR_CHANGE = 6, 10.0
SHARPER = 1.10
"""An image is sharper than another by noise, below this ratio."""
# With prices as logarithms, beside those of `planes`.
_COURSES = (Course("half", 0.5, 7.0), Course("double", 2.0, 7.0))
_FAULTS = {
    "reversed": "the stage moves against what the core says",
    "half": "the stage goes about half as far as it is told",
    "double": "the stage goes about twice as far as it is told",
}


@dataclass
class Survey:
    """The images of one search; `add` every one, then ask.

    Parameters
    ----------
    comparison
        Of the channel's optics.
    direction
        +1: larger z brings the plane of focus towards the specimen; -1; 0: unknown.
    trust_sign
        The optics are calibrated: signed estimates are believed.
    prior
        What is known of this place before.
    calibrated
        The optics are known well enough that what they leave open is the stage's
        doing: a wrong aperture looks like a stage that goes too far.
    """

    comparison: PlaneComparison
    direction: int = 1
    trust_sign: bool = False
    prior: Belief = field(default_factory=lambda: Belief(()))
    calibrated: bool = True
    looks: list[Look] = field(default_factory=list)
    belief: Belief = field(default_factory=lambda: Belief(()))
    fit: PlaneFit | None = None
    arrival: Arrival = field(default_factory=Arrival)
    begun_um: float | None = None
    """Where the first image was taken, kept or not."""

    @property
    def unit_um(self) -> float:
        """Depth of field."""
        return self.comparison.unit_um

    def add(
        self, z_um: float, reading: FocusReading, early_um: tuple[float, ...] = ()
    ) -> None:
        """Take in one image; `early_um` as of a `Look`."""
        self.looks.append(Look.of(z_um, reading, early_um))
        self.begun_um = z_um if self.begun_um is None else self.begun_um
        if isfinite(z_um):
            self.arrival.see(
                self.looks,
                self.comparison,
                calibrated=self.calibrated,
                is_clear=self.is_change_clear(),
            )
            self.belief = self._posterior()

    def forget_older(self) -> None:
        """Let only the newest image count, of what may have moved since the others."""
        del self.looks[:-1]

    def forget_early(self) -> None:
        """Let the newest image not count, if it came too early."""
        if self.arrival.forgets_early(self.looks):
            self.belief = self._posterior()

    def faults(self) -> list[str]:
        """Return what the stage seems to do wrong, in words."""
        faults = ["the stage arrives late"] if self.arrival.is_late else []
        if self.fit is not None and self.fit.course != AS_TOLD:
            faults.append(_FAULTS[self.fit.course])
        return faults

    @property
    def best_seen(self) -> Look:
        """The sharpest image so far."""
        usable = [look for look in self.looks if isfinite(look.z_um)]
        return max(usable or self.looks, key=lambda look: look.sharpness)

    def best_known_um(self, most_unexplained: float) -> float:
        """Return where to end when focus was not found.

        Where the optics put it, among the places seen, if they explain the images so
        well; else where the image was sharpest; where the search began, if nothing
        was clearly sharper, or if the engine reads focus there, or the sharpest shows
        it no specimen, in images that change unlike any optics: in bright field an
        image in focus has the least contrast.
        """
        best, first, begun_um = self.best_seen, self.looks[0], self.begun_um
        if begun_um is None or not isfinite(begun_um):
            return best.z_um
        if len(self.with_detail()) > 1 and not self.is_change_clear():
            # The sharpest of images that differ by noise alone is so by chance.
            return begun_um
        if self.fit is not None and self.fit.unexplained <= most_unexplained:
            place = 0.0 if self.belief.is_empty else self.belief.best.mean_um
            is_rough = self.fit.probability(place, self.unit_um) > _ROUGHLY_SURE
            if is_rough and self.covers(place):
                return place
        is_alien = self.fit is not None and self.fit.unexplained > _ALIEN
        if is_alien and (best.is_bare or first.reads_focus(self.unit_um)):
            return begun_um
        if first.z_um == begun_um or self.belief.is_empty:
            is_better = best.sharpness > SHARPER * first.sharpness
        else:
            # How sharp it was there a late stage has not shown.
            ways_um = [abs(z - self.belief.best.mean_um) for z in (best.z_um, begun_um)]
            is_better = ways_um[0] < ways_um[1]
        return best.z_um if is_better else begun_um

    def certainty(self, z_um: float) -> float:
        """Return how likely focus is within half a depth of field of a place."""
        fit = self.fit
        return 0.0 if fit is None else fit.probability(z_um, 0.5 * self.unit_um)

    def with_detail(self) -> list[Look]:
        """Return the images that show anything."""
        return [
            look
            for look in self.looks
            if isfinite(look.z_um)
            and any(look.reading.spectrum)
            and (look.reading.refusal != "blank" or look.shows_detail)
        ]

    def places(self) -> int:
        """Return the number of places, well apart, that were seen."""
        return places_of([look.z_um for look in self.with_detail()], self.unit_um)

    def does_peak_agree(self, most_unexplained: float, beside: float) -> bool:
        """Tell whether images are sharpest where focus is believed to be.

        Parameters
        ----------
        most_unexplained
            Share of their energy that the optics may leave unexplained.
        beside
            Depths of field between the two places.
        """
        if self.fit is None or self.belief.is_empty:
            return False
        way_um = abs(self.best_seen.z_um - self.belief.best.mean_um)
        is_clear = self.saw_change() and self.is_change_clear()
        is_explained = self.fit.unexplained <= most_unexplained
        return is_clear and is_explained and way_um < beside * self.unit_um

    def unexplained_close(self) -> float:
        """Return what the optics leave unexplained of images close to the sharpest.

        Of all, where these are too few. The thickness of a specimen, which the model
        lacks, shows less there than in all images.
        """
        top = self.best_seen.z_um
        reach = _CLOSE * self.unit_um
        close = [look for look in self.with_detail() if abs(look.z_um - top) < reach]
        if places_of([look.z_um for look in close], self.unit_um) < _CLOSE_PLACES:
            return 0.0 if self.fit is None else self.fit.unexplained
        return self._compared(close).unexplained

    def _compared(
        self, looks: list[Look], courses: tuple[Course, ...] = ()
    ) -> PlaneFit:
        return self.comparison.fit(*spectra_of(looks), courses=courses)

    def has_seen(self, z_um: float, within_um: float) -> bool:
        """Tell whether there is an image from near a place."""
        return any(abs(look.z_um - z_um) <= within_um for look in self.looks)

    def covers(self, z_um: float) -> bool:
        """Tell whether a place lies between those seen."""
        places = [look.z_um for look in self.with_detail()]
        return bool(places) and min(places) <= z_um <= max(places)

    def saw_change(self) -> bool:
        """Tell whether images changed with z by more than noise does."""
        looks = self.with_detail()
        values = [look.sharpness for look in looks]
        if not values:
            return False
        if max(values) > _CHANGE * min(values):
            return True
        return any(look.change_from(looks[0]) > SAME for look in looks[1:])

    def is_change_clear(self) -> bool:
        """Tell whether what changed with z is of the optics' kind, and not noise.

        A nearly empty field, a speck on the chip or shading give numbers too, and the
        optics explain any three of them at some z.
        """
        looks = self.with_detail()
        if len(looks) < 2:
            return False
        _, spectra, noise = spectra_of(looks)
        return _change_over_noise(spectra, noise) > _CLEAR_CHANGE

    def unmoved_um(self) -> list[float]:
        """Return places whose images look alike although they are apart.

        Empty: there are none, or they lie about focus, where images look alike. For
        that another image must have differed.
        """
        places = alike_um(self.looks, self.unit_um)
        if not places or self.belief.is_empty or len(places) == len(self.looks):
            return places
        low, high, focus = min(places), max(places), self.belief.best.mean_um
        margin = _MARGIN * self.unit_um
        is_narrow = high - low <= _FLAT_TOP * self.unit_um
        return [] if is_narrow and low - margin < focus < high + margin else places

    def does_stand_still(self, unmoved_um: list[float]) -> bool:
        """Tell whether images that look alike show that the stage stands still.

        Three places do, or one that has shown another image before.
        """
        is_wide = places_of(unmoved_um, self.unit_um) >= _STILL_PLACES
        return is_wide or self.showed_another(unmoved_um)

    def showed_another(self, unmoved_um: list[float]) -> bool:
        """Tell whether this place has shown another image before those alike."""
        now, near_um = self.looks[-1], CLOSE_BY * self.unit_um
        return bool(unmoved_um) and any(
            abs(look.z_um - now.z_um) < near_um and look.change_from(now) > SAME
            for look in self.looks[: -len(unmoved_um)]
        )

    def other_um(self) -> float | None:
        """Return the nearest place whose image differs from the newest, if any."""
        now = self.looks[-1]
        others = [o.z_um for o in self.looks if o.change_from(now) > SAME]
        return min(others, key=lambda z_um: abs(z_um - now.z_um), default=None)

    def beyond_top_um(self, sides: tuple[int, int]) -> list[float]:
        """Return where images must differ from those about focus; empty: it was seen.

        About focus they hardly change with z, though the stage does move.
        """
        focus = self.belief.best.mean_um
        if any(self.seen_beside(focus, s, 0.8 * _BEYOND_TOP, 4.0) for s in sides):
            return []
        return [focus + side * _BEYOND_TOP * self.unit_um for side in sides]

    def gap_beside(self, z_um: float, low_um: float, high_um: float) -> float | None:
        """Return the middle of the wider gap between images beside a place, if any."""
        places = [look.z_um for look in self.looks]
        low = max((z for z in places if z < z_um), default=low_um)
        high = min((z for z in places if z > z_um), default=high_um)
        end = low if z_um - low > high - z_um else high
        return (z_um + end) / 2 if abs(end - z_um) > 2 * self.unit_um else None

    def seen_beside(self, z_um: float, side: int, near: float, far: float) -> bool:
        """Tell whether a side of a place was seen, between two distances in units."""
        ways = [(look.z_um - z_um) * side / self.unit_um for look in self.with_detail()]
        return any(near < way < far for way in ways)

    def saw_both_sides(self) -> bool:
        """Tell whether there are images from both sides of where focus may be."""
        if self.belief.is_empty:
            return False
        place = self.belief.best.mean_um
        return all(self.seen_beside(place, side, _BESIDE, 4.0) for side in (-1, 1))

    def climbed_um(self) -> float | None:
        """Return the last step, if all is far from focus and it made it sharper.

        The optics' account of images from so far away is no better than a guess.
        """
        looks = self.looks
        if len(looks) < 3 or not all(look.is_far for look in looks):
            return None
        if looks[-1] is not self.best_seen:
            return None
        return looks[-1].z_um - looks[-2].z_um

    def unbracketed_um(self, sides: tuple[int, int], limits: Limits) -> float | None:
        """Return where to look beyond the sharpest image; None: both sides are known.

        A side that the limits cut off counts as known.
        """
        top, step = self.best_seen.z_um, _BRACKET * self.unit_um
        for side in sides:
            beyond = limits.clip(top + side * step)
            is_seen = self.seen_beside(top, side, 0.5 * _BRACKET, 1.5)
            if not is_seen and abs(beyond - top) > 0.5 * step:
                return beyond
        return None

    def peak_um(self) -> float:
        """Return the top of the parabola through the images about the sharpest.

        Through all of them: about focus sharpness differs less than by noise, so the
        sharpest of several is so by chance.
        """
        best = self.best_seen
        ways = np.array([look.z_um - best.z_um for look in self.with_detail()])
        values = np.array([look.sharpness for look in self.with_detail()])
        below, above = ways[ways < -1e-6], ways[ways > 1e-6]
        if not (below.size and above.size):
            return best.z_um
        left, right = float(below.max()), float(above.min())
        # A parabola holds near the top alone.
        reach = _TOP * self.unit_um
        if max(-left, right) > reach:
            return self._focus_between(best, left, right)
        near = np.abs(ways) <= reach
        curve = np.polyfit(ways[near], values[near] / best.sharpness, 2)
        if curve[0] >= 0:
            return best.z_um
        top = -curve[1] / (2 * curve[0])
        lowest, highest = ways[near].min(), ways[near].max()
        return best.z_um + float(min(max(top, lowest), highest))

    def _focus_between(self, best: Look, left_um: float, right_um: float) -> float:
        """Return where the optics put focus between the sharpest and one nearly so."""
        way_um = 0.0 if self.fit is None else self.belief.best.mean_um - best.z_um
        beside_um = best.z_um + (left_um if way_um < 0 else right_um)
        is_nearly = any(
            abs(look.z_um - beside_um) < 1e-6
            and best.sharpness < SHARPER * look.sharpness
            for look in self.with_detail()
        )
        return best.z_um + is_nearly * min(max(way_um, left_um), right_um)

    def _posterior(self) -> Belief:
        """Weigh everything that was seen anew."""
        belief = self.prior
        # Networks err alike on images of one field, so only the first counts.
        estimated = [look for look in self.looks if look.reading.defocus_um is not None]
        for look in estimated[:1]:
            modes = modes_of_reading(
                look.reading,
                look.z_um,
                direction=self.direction,
                trust_sign=self.trust_sign,
            )
            belief = belief.seen(modes, outlier=0.1)
        planes = self._planes()
        self.fit = None
        if len(planes) < 2:
            return belief
        courses = _COURSES if self.calibrated and self.places() > 2 else ()
        self.fit = self._compared(planes, courses)
        modes = modes_of_weights(self.fit.candidates_um, self.fit.weights)
        # The optics know better than the network, which is in the prior already.
        return Belief.of(modes).seen(belief.modes, outlier=0.3)

    def _planes(self) -> list[Look]:
        """Return the images to compare: those near enough to tell.

        Far from focus the thickness of a specimen shows, which the model lacks.
        """
        planes = newest_of_each(self.with_detail(), self.unit_um)
        if len(planes) < 3:
            return planes
        top = max(planes, key=lambda look: look.sharpness).z_um
        if self.calibrated and not self.belief.is_empty and self.is_change_clear():
            # Aberrations make images sharpest beside focus, which such optics know.
            top = self.belief.best.mean_um
        near = [look for look in planes if abs(look.z_um - top) < _NEAR * self.unit_um]
        if self.calibrated and not _are_around(top, near, _BESIDE * self.unit_um):
            # From one side alone they leave more open than with those from afar.
            return planes
        return near if len(near) > 2 else planes


def _are_around(place_um: float, looks: list[Look], away_um: float) -> bool:
    """Tell whether there are images from both sides of a place, so far from it."""
    ways = [look.z_um - place_um for look in looks]
    return bool(ways) and min(ways) < -away_um and max(ways) > away_um


def _change_over_noise(spectra: Floats, noise: Floats) -> float:
    """Return the variance of relative changes between images in units of noise's.

    Defocus changes neighbouring rings alike, noise does not: bands of rings hold the
    change, second differences of neighbours the noise. About 1 where nothing changes.

    Parameters
    ----------
    spectra, noise
        Of several images, axes (image, ring), and noise of shape (image,).
    """
    typical = spectra.mean(axis=0)
    floor = float((noise**2).mean())
    # The lowest rings are left over: they have the fewest amplitudes.
    above_noise = np.flatnonzero(typical**2 > floor)[::-1]
    above_noise = above_noise[: len(above_noise) // _BAND * _BAND]
    if above_noise.size == 0:
        return 0.0
    mean = typical[above_noise]
    weight = (mean**2 / (mean**2 + floor)).reshape(-1, _BAND)
    away = (spectra[:, above_noise] / mean - 1.0).reshape(len(spectra), -1, _BAND)
    bands = (away * weight).sum(axis=2) / weight.sum(axis=1)
    jumps = np.diff(away, n=2, axis=2)
    # A second difference has six times the variance of a ring.
    of_ring = float((jumps**2).mean()) / 6.0
    return _BAND * float((bands**2).mean()) / max(of_ring, 1e-12)
