"""Looks: the images of one search, and what they say of the stage that took them.

Images that do not change tell of a stage that stands still; images of one place that
differ, or that fit other places better than those it was sent to, of one that arrives
after its image was taken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product, takewhile

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.appearance import change, sharpness
from rtfocus.autofocus.planes import REVERSED_PRICE, PlaneComparison, Scores, Tried
from rtfocus.autofocus.policy import MoveRule
from rtfocus.frame import FocusReading

Floats = NDArray[np.float64]

SAME = 0.1
"""Relative change of images below which nothing has changed."""
APART, CLOSE_BY = 0.9, 0.5
"""In depths of field: images so far apart differ, elsewhere than about focus; so close
they do not much."""
TOO_LATE = (
    "the stage arrives after its image, and so few images do not find focus: give it a "
    "delay in Micro-Manager's hardware wizard"
)
_SUSPECTED = (
    "the images fit other places better than those the stage was sent to: does it "
    "arrive late (Micro-Manager's hardware wizard gives it a delay), does the specimen "
    "drift, are the channel's optics right?"
)
_SAME_PLACE = 0.05
# Of the least so far, what counts as progress.
_NEARER = 0.8
# Rings that stand out of the noise, or nothing shows.
_FEWEST_RINGS = 6
# Of the way that is left when an image is taken, and how unlikely it is beforehand, as
# a logarithm: optics that are a little off look like a stage that hardly lags.
_LEFT = ((1.0, 2.0), (0.6, 3.0), (0.35, 3.0))
# Probability of a late stage that forbids an end, of an early image that asks for more.
_SUSPECT = 0.3
# Images after a move that come too early, at most.
_MOST_LAG = 2
# Depths of field from where a stage came at least, or its lag does not show.
_MOVED = 0.9
# How far from the images focus is looked for then, in depths of field.
_REACH = 4.0
_LEAST_PLACES = 3


@dataclass(frozen=True, slots=True)
class Look:
    """One image of a search."""

    z_um: float
    """Where it was exposed, as the stage says."""
    reading: FocusReading
    sharpness: float
    """Root of the gradient energy above the noise, per light."""
    early_um: tuple[float, ...]
    """Where else the stage may have stood, had it not arrived: at its last stop on the
    way, or where the image before was taken."""

    @classmethod
    def of(
        cls, z_um: float, reading: FocusReading, early_um: tuple[float, ...] = ()
    ) -> "Look":
        """Make one of a reading; `early_um` empty: the stage was there already."""
        spectrum = np.asarray(reading.spectrum, dtype=np.float64)
        sharp = sharpness(spectrum, reading.noise)
        return cls(z_um, reading, sharp, early_um or (z_um, z_um))

    @property
    def shows_detail(self) -> bool:
        """Something stands out of the noise, whatever the engine says of it."""
        spectrum = np.asarray(self.reading.spectrum)
        return int((spectrum > self.reading.noise).sum()) >= _FEWEST_RINGS

    @property
    def is_bare(self) -> bool:
        """The engine finds no specimen, or hardly one."""
        return self.reading.refusal in ("blank", "few_tiles")

    @property
    def is_far(self) -> bool:
        """The engine finds nothing, or the end of its range: it is from far away."""
        return self.reading.refusal in ("edge", "blank")

    def reads_focus(self, unit_um: float) -> bool:
        """Tell whether the engine puts it within half a depth of field of focus."""
        away_um = self.reading.defocus_um
        return away_um is not None and abs(away_um) < 0.5 * unit_um

    def shows_lag(self, unit_um: float) -> bool:
        """Tell whether an image of a stage that arrives late would be another one."""
        is_moved = abs(self.early_um[0] - self.z_um) > _MOVED * unit_um
        return is_moved and not self.is_far

    def change_from(self, other: "Look") -> float:
        """Return by how much the two differ, relatively."""
        first, second = (np.asarray(look.reading.spectrum) for look in (self, other))
        return change(first, second, max(self.reading.noise, other.reading.noise))


def early_um(
    moves: MoveRule, before: Look | None, z_um: float, unit_um: float
) -> tuple[float, ...]:
    """Return where a stage may stand that has not arrived, as `Look.early_um`.

    Parameters
    ----------
    moves
        Tells the stops on the way.
    before
        The image before; None: this is the first.
    z_um
        Where the stage was sent.
    unit_um
        Depth of field.
    """
    if before is None:
        return (*moves.settling(z_um), z_um)[0], z_um
    if abs(before.z_um - z_um) < _SAME_PLACE * unit_um:
        # It may be later still.
        return before.early_um
    return (before.z_um, *moves.path(before.z_um, z_um))[-2], before.z_um


def spectra_of(looks: Sequence[Look]) -> tuple[Floats, Floats, Floats]:
    """Return z in um, spectra and noise, axes (plane,), (plane, ring), (plane,)."""
    columns = ((look.z_um, look.reading.spectrum, look.reading.noise) for look in looks)
    z_um, spectra, noise = map(np.array, zip(*columns, strict=True))
    return z_um, spectra, noise


def places_of(z_um: Iterable[float], unit_um: float) -> int:
    """Return how many of the places are well apart."""
    return len({round(place / (0.3 * unit_um)) for place in z_um})


def newest_alike(looks: Sequence[Look]) -> list[Look]:
    """Return the images that look like the newest, back to one that does not."""
    now = looks[-1]
    return [*takewhile(lambda look: look.change_from(now) < SAME, looks[::-1])]


def alike_um(
    looks: Sequence[Look], unit_um: float, apart_units: float = APART
) -> list[float]:
    """Return the places of the newest images, if they look alike and are far apart.

    An older one that looks so too tells nothing of the stage when it has left in
    between: in and about focus images of many z look alike. Alike on either side of
    a place that was not, the stage does move: empty.

    Parameters
    ----------
    looks
        In their order.
    unit_um
        Depth of field.
    apart_units
        Depths of field that are far.
    """
    apart_um, close_um = apart_units * unit_um, CLOSE_BY * unit_um
    places = [look.z_um for look in newest_alike(looks)]
    if not places or np.ptp(places) < apart_um:
        return []
    for other in looks[: -len(places)]:
        below = [z for z in places if z < other.z_um - close_um]
        above = [z for z in places if z > other.z_um + close_um]
        is_around = bool(below and above) and len(below + above) == len(places)
        if is_around and max(np.ptp(below), np.ptp(above)) < apart_um:
            return []
    return places


def stuck_um(
    looks: Sequence[Look], unit_um: float, apart_units: float, *, at_stops: bool
) -> list[float]:
    """Return where the stage may have stuck, as far as the newest images tell.

    Where the oldest of those that look alike is from, if they are far apart, and
    `at_stops` on the way there. Other arguments as of `alike_um`.
    """
    newest = newest_alike(looks)
    stop_um, before_um = newest[-1].early_um
    is_at_stop = at_stops and len(newest) > 1 and stop_um != before_um
    places = alike_um(looks, unit_um, apart_units)[-1:]
    return [*places, stop_um] if is_at_stop else places


@dataclass
class Headway:
    """How long a search got neither surer of focus nor closer to it; `see` all."""

    idle: int = 0
    """Images since it did."""
    _least_sd_um: float = float("inf")
    _least_way_um: float = float("inf")

    def see(self, sd_um: float, way_um: float) -> None:
        """Take in what is believed after an image: deviation, and way to focus."""
        is_surer = sd_um < _NEARER * self._least_sd_um
        is_closer = way_um < _NEARER * self._least_way_um
        self._least_sd_um = min(self._least_sd_um, sd_um)
        self._least_way_um = min(self._least_way_um, way_um)
        self.idle = 0 if is_surer or is_closer else self.idle + 1


@dataclass
class Arrival:
    """Whether the stage has arrived when an image is taken; `see` every one."""

    lag: int = 0
    """Images after a move that come too early; 0: the stage was not seen to be late."""
    doubt: float = 0.0
    """How likely it arrives late, by how well the images fit other places."""
    was_tried: bool = False
    """An image was taken again where one that came too early would differ."""
    _early: float = 0.0
    """How likely the newest image came too early, by the same."""
    _again: int = 0
    """Images that were taken here before the newest."""

    @property
    def is_late(self) -> bool:
        """The stage was seen to arrive after its image."""
        return self.lag > 0

    @property
    def why_lost(self) -> str | None:
        """Why a search does not find focus, if the stage's arrival is the reason."""
        if self.is_late:
            return TOO_LATE
        return _SUSPECTED if self.is_suspect else None

    @property
    def is_early(self) -> bool:
        """The newest image comes too early to count, or seems to."""
        return self._again < self.lag or self._early > _SUSPECT

    @property
    def is_taken_again(self) -> bool:
        """The newest image is not the first here."""
        return self._again > 0

    @property
    def is_seen_at_rest(self) -> bool:
        """Two images that count were taken here, or the stage is not late."""
        return self._again > self.lag or not self.is_late

    @property
    def is_suspect(self) -> bool:
        """Images leave open whether the stage arrives late."""
        return self.doubt > _SUSPECT

    def forgets_early(self, looks: list[Look]) -> bool:
        """Forget the newest image if it came too early; tell whether it did."""
        is_forgotten = self.is_early and len(looks) > 1
        if is_forgotten:
            self._again, self._early = self.lag, 0.0
            del looks[-1]
        return is_forgotten

    def see(
        self,
        looks: list[Look],
        comparison: PlaneComparison,
        *,
        calibrated: bool,
        is_clear: bool,
    ) -> None:
        """Take the newest image in and forget those that came too early.

        Parameters
        ----------
        looks
            In their order.
        comparison
            Of the channel's optics.
        calibrated
            The optics are known so well that other places need no confirmation.
        is_clear
            Images changed by more than noise.
        """
        self.doubt = self._early = 0.0
        unit_um = comparison.unit_um
        way_um = looks[-1].z_um - looks[-2].z_um if len(looks) > 1 else float("inf")
        self._again = self._again + 1 if abs(way_um) < _SAME_PLACE * unit_um else 0
        self.was_tried |= self._again > 0 and looks[-1].shows_lag(unit_um)
        if self._again and self._again <= self.lag:
            del looks[-2]
        elif self._again and _show_late_stage(looks[-2], looks[-1]):
            self.lag = self._again
            # None of the older was taken where the stage was sent, or all is noise.
            del looks[0 if is_clear else -2 : -1]
        elif self._again and (self.is_late or not calibrated):
            del looks[-2]
        elif calibrated and is_clear and not (self.is_late or looks[-1].is_far):
            self.doubt, self._early = _lag_probabilities(looks, comparison)


def _show_late_stage(one: Look, two: Look) -> bool:
    """Tell whether two images of one place show a stage that arrived in between."""
    # Far away noise makes images differ.
    return not (one.is_far and two.is_far) and one.change_from(two) > SAME


def _lag_probabilities(
    looks: Sequence[Look], comparison: PlaneComparison
) -> tuple[float, float]:
    """Return how likely the stage arrives late, and the newest image came too early."""
    looks = [look for look in looks if look.reading.spectrum]
    if places_of((look.z_um for look in looks), comparison.unit_um) < _LEAST_PLACES:
        return 0.0, 0.0
    told_um, spectra, noise = spectra_of(looks)
    ways_um = np.array([look.early_um for look in looks]).T - told_um
    again = _again(told_um, comparison.unit_um)
    lags = range(1, min(int(again.max()) + 1, _MOST_LAG) + 1)
    tried = Tried(Scores(spectra, noise), allows_sharper=False)
    focus_um = comparison.candidates(told_um, None, _REACH * comparison.unit_um)
    # What optics a little off explain is no stage's doing, nor does one come late that
    # runs the other way.
    turns, few = comparison.turns, comparison.few_models
    against = tuple({1, -1}.difference(turns))
    accounts = [
        (0, told_um, 0.0, comparison.models, turns),
        (0, told_um, REVERSED_PRICE, few, against),
    ]
    for lag, way_um, (left, price) in product(lags, ways_um, _LEFT):
        seen_um = told_um + left * np.where(again < lag, way_um, 0.0)
        accounts.append((lag, seen_um, price, few, turns))
    for lag, seen_um, price, models, by_turn in accounts:
        away = (focus_um[:, None] - seen_um) / comparison.unit_um
        for turn in by_turn:
            tried.add(str(lag), turn, turn * away, models, price)
    answers = tried.fit(focus_um).answers
    early = sum(answers[str(lag)] for lag in lags if lag > again[-1])
    return 1.0 - answers["0"], early


def newest_of_each(looks: Sequence[Look], unit_um: float) -> list[Look]:
    """Return images without those that were taken again: the newest is at rest."""
    newest = [
        look
        for look, after in pairwise(looks)
        if abs(after.z_um - look.z_um) >= _SAME_PLACE * unit_um
    ]
    return [*newest, *looks[-1:]]


def _again(z_um: Floats, unit_um: float) -> NDArray[np.intp]:
    """Return how many images were taken before each since its place was reached."""
    again = np.zeros(len(z_um), dtype=np.intp)
    for number in np.flatnonzero(abs(np.diff(z_um)) < _SAME_PLACE * unit_um) + 1:
        again[number] = again[number - 1] + 1
    return again
