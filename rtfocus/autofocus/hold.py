"""Hold: keeps every position in focus while a plan runs, by its own images.

All positions share one drift, whose speed is learnt; each has a surface height of
its own. A new image is compared with images of the same position whose defocus is
known by now: what the specimen looks like cancels. Between visits the drift is
predicted, so a position is corrected before its image shows that it must be.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.belief import Mode, modes_of_weights
from rtfocus.autofocus.planes import PlaneComparison
from rtfocus.autofocus.policy import MoveRule
from rtfocus.frame import Estimate, FocusReading

Floats = NDArray[np.float64]
Key = tuple[int | None, int | None]

_MOST_KEPT = 5
# Depths of field per square root of a second and of its cube: a drift that wanders.
_WANDER = 0.02
_RATE_WANDER = 0.0003
_FIRST_RATE = 0.1
# Depths of field.
_ALIKE, _START_SD, _LEAST_SD, _REACH = 0.25, 0.1, 0.12, 3.0
_OUTLIER, _OWN, _OWN_REACH = 0.05, 0.1, 1.0
_MOST_GUESSES, _SAME_COURSE = 6, 0.1
_MOST_UNEXPLAINED = 0.2


@dataclass(frozen=True, slots=True)
class _Guess:
    """One course the drift may have taken: a Kalman filter of drift and speed."""

    weight: float
    state: Floats
    covariance: Floats

    def ahead(self, step_s: float) -> "_Guess":
        """Return the guess some seconds later."""
        move = np.array([[1.0, step_s], [0.0, 1.0]])
        across = _RATE_WANDER**2 * step_s**2 / 2
        noise = np.array(
            [
                [_WANDER**2 * step_s + _RATE_WANDER**2 * step_s**3 / 3, across],
                [across, _RATE_WANDER**2 * step_s],
            ]
        )
        covariance = move @ self.covariance @ move.T + noise
        return _Guess(self.weight, move @ self.state, covariance)

    def seen(self, mode: Mode) -> "_Guess":
        """Return the guess after one reading of the drift."""
        variance = self.covariance[0, 0] + mode.sd_um**2
        away = mode.mean_um - self.state[0]
        likely = float(
            np.exp(-0.5 * away**2 / variance) / np.sqrt(2 * np.pi * variance)
        )
        gain = self.covariance[:, 0] / variance
        return _Guess(
            self.weight * mode.weight * likely,
            self.state + gain * away,
            self.covariance - np.outer(gain, self.covariance[0]),
        )


class Drift:
    """One drift of all positions and its speed, in depths of field.

    An even PSF does not tell up from down, so several courses are followed at once;
    the stage goes with the likeliest, and the next image shows whether it was right.

    Examples
    --------
    >>> drift = Drift(0.0)
    >>> for second in range(1, 60):
    ...     drift.see(float(second), [Mode(1.0, 0.1 * second, 0.05)])
    >>> round(drift.at(70.0), 1)
    7.0
    """

    def __init__(self, time_s: float) -> None:
        self._time_s = time_s
        still = np.diag([0.0, _FIRST_RATE**2])
        self._guesses = [_Guess(1.0, np.zeros(2), still)]

    def at(self, time_s: float) -> float:
        """Return the likeliest drift at a time."""
        return float(self._best.ahead(time_s - self._time_s).state[0])

    def sd_at(self, time_s: float) -> float:
        """Return its standard deviation."""
        step_s = max(time_s - self._time_s, 0.0)
        return sqrt(max(float(self._best.ahead(step_s).covariance[0, 0]), 0.0))

    def see(self, time_s: float, modes: Sequence[Mode]) -> None:
        """Take in what one position says of the drift, as modes."""
        # An image that comes late is taken as if it were of now.
        step_s = max(time_s - self._time_s, 0.0)
        self._time_s += step_s
        before = [guess.ahead(step_s) for guess in self._guesses]
        after = [
            replace(guess, weight=guess.weight * _OUTLIER / (2 * _REACH))
            for guess in before
        ]
        after += [guess.seen(mode) for guess in before for mode in modes]
        self._guesses = _likeliest(after)

    @property
    def _best(self) -> _Guess:
        return self._guesses[0]


def _likeliest(guesses: list[_Guess]) -> list[_Guess]:
    """Join guesses that are alike and keep the likeliest; weights sum to 1."""
    kept: list[_Guess] = []
    for guess in sorted(guesses, key=lambda one: -one.weight):
        for number, other in enumerate(kept):
            if abs(guess.state[0] - other.state[0]) < _SAME_COURSE:
                kept[number] = replace(other, weight=other.weight + guess.weight)
                break
        else:
            kept.append(guess)
    kept = sorted(kept, key=lambda one: -one.weight)[:_MOST_GUESSES]
    total = sum(guess.weight for guess in kept)
    return [replace(guess, weight=guess.weight / total) for guess in kept]


@dataclass(frozen=True, slots=True)
class Seen:
    """One image of a position, in a frame of reference that drifts along."""

    z_um: float
    """Of its stack's reference plane's stage z, drift and slice included."""
    spectrum: Floats
    noise: float


@dataclass
class Place:
    """One position: its surface height and images whose defocus is known."""

    height_um: float
    """Focus in the drifting frame of reference."""
    sd: float
    """Of the height, in depths of field."""
    reference_um: float
    """Where the stage stands for the reference plane, corrections included."""
    kept: list[Seen] = field(default_factory=list)
    misses: int = 0
    """Images in a row that could not be explained."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What was decided at the beginning of a stack; a line of the journal."""

    key: Key
    time_s: float
    step_um: float
    error_um: float
    """Predicted focus minus where the stage would stand."""
    drift_um: float
    reason: str


class Holder:
    """Takes estimates from any thread and gives corrections to the acquisition's.

    Parameters
    ----------
    comparison
        Of the focus channel's optics.
    moves
        Limits, deadband and longest step.
    channel
        Index c of the focus channel.
    """

    def __init__(
        self,
        comparison: PlaneComparison,
        moves: MoveRule,
        *,
        channel: int = 0,
        on_correction: Callable[[Correction], None] = lambda _: None,
    ) -> None:
        self._comparison, self._moves = comparison, moves
        self._channel = channel
        self._on_correction = on_correction
        self._arrived: deque[Estimate] = deque(maxlen=4096)
        self._lock = threading.Lock()
        self._places: dict[Key, Place] = {}
        self._drift: Drift | None = None
        self._moved_ns: dict[Key, int] = {}
        self._stack: dict[Key, tuple[int, list[Estimate]]] = {}

    def take(self, estimate: Estimate) -> None:
        """Keep an estimate for the next correction; returns at once."""
        if estimate.index.get("c", 0) == self._channel and estimate.focus is not None:
            self._arrived.append(estimate)

    def knows(self, key: Key) -> bool:
        """Tell whether a position has been focused."""
        return key in self._places

    def lost(self, key: Key) -> bool:
        """Tell whether a position must be searched anew."""
        place = self._places.get(key)
        return place is not None and place.misses >= 3

    def begin(
        self, key: Key, time_s: float, focus_um: float, looks: list[Seen]
    ) -> None:
        """Start holding a position that was focused by a search.

        Parameters
        ----------
        key
            Of the position.
        time_s
            Of the search.
        focus_um
            Stage z of focus, where the stage stands now.
        looks
            The images of the search.
        """
        if self._drift is None:
            self._drift = Drift(time_s)
        shift = self._drift.at(time_s) * self._comparison.unit_um
        kept = [Seen(s.z_um - shift, s.spectrum, s.noise) for s in looks]
        self._places[key] = Place(
            focus_um - shift, _START_SD, focus_um, kept[-_MOST_KEPT:]
        )
        self._moved_ns[key] = 0

    def correction_um(self, key: Key, time_s: float, now_ns: int) -> float:
        """Return by how much to move a position's stack; 0: not.

        Parameters
        ----------
        key
            Of the position that is about to be acquired.
        time_s
            Now, on the clock of `captured_ns`.
        now_ns
            Frames of this position exposed before are ignored from now on if the
            stage moves.
        """
        self._work_off()
        place = self._places.get(key)
        if place is None or self._drift is None:
            return 0.0
        unit = self._comparison.unit_um
        drift_um = self._drift.at(time_s) * unit
        wanted = place.height_um + drift_um
        error = wanted - place.reference_um
        target = self._moves.target(place.reference_um, wanted)
        step = 0.0 if target is None else target - place.reference_um
        reason = "within the deadband"
        if target is not None:
            place.reference_um = target
            self._moved_ns[key] = now_ns
            reason = "drift"
            if abs(target - wanted) > self._moves.deadband_um:
                reason = "drift, cut by the limits"
        self._on_correction(Correction(key, time_s, step, error, drift_um, reason))
        return step

    def _work_off(self) -> None:
        """Learn from what has arrived, one stack of one position at a time."""
        stacks: dict[tuple[Key, int | None], list[Estimate]] = {}
        while self._arrived:
            estimate = self._arrived.popleft()
            key = key_of_index(estimate.index)
            # Exposed before the last move ended: it tells of a place that is left.
            begun_ns = estimate.captured_ns
            if begun_ns >= self._moved_ns.get(key, 0):
                stacks.setdefault((key, estimate.index.get("t")), []).append(estimate)
        for (key, _), estimates in stacks.items():
            if key in self._places:
                self._learn(self._places[key], estimates)

    def _learn(self, place: Place, estimates: list[Estimate]) -> None:
        good = [e for e in estimates if _is_good(e.focus) and e.z_um is not None]
        if not good or self._drift is None:
            place.misses += bool(estimates)
            return
        unit = self._comparison.unit_um
        time_s = max(e.captured_ns for e in good) / 1e9
        drift_um = self._drift.at(time_s) * unit
        new = [_seen(e, drift_um) for e in good]
        planes = [*place.kept, *new]
        known = np.array([place.height_um] * len(place.kept) + [np.nan] * len(new))
        fit = self._comparison.fit(
            np.array([plane.z_um for plane in planes]),
            np.array([plane.spectrum for plane in planes]),
            np.array([plane.noise for plane in planes]),
            known if place.kept else None,
            reach_um=_REACH * unit,
        )
        if fit.unexplained > _MOST_UNEXPLAINED:
            place.misses += 1
            return
        place.misses = 0
        modes = [
            Mode(
                mode.weight,
                (mode.mean_um - place.height_um + drift_um) / unit,
                max(np.hypot(mode.sd_um / unit, place.sd), _LEAST_SD),
            )
            for mode in modes_of_weights(fit.candidates_um, fit.weights)
        ]
        self._drift.see(time_s, modes)
        # What the shared drift leaves is this position's own; slowly, for one image
        # may be wrong.
        now = self._drift.at(time_s)
        nearest = min(modes, key=lambda mode: abs(mode.mean_um - now))
        own = nearest.mean_um - now
        if abs(own) < _OWN_REACH:
            place.height_um += _OWN * own * unit
        self._keep(place, [_seen(e, self._drift.at(time_s) * unit) for e in good])

    def _keep(self, place: Place, new: list[Seen]) -> None:
        """Keep images that differ in their defocus; of two alike the older.

        Were the newer kept, a drift too slow to show from one visit to the next would
        never show: each image would be compared with one that had drifted as far.
        """
        unit = self._comparison.unit_um
        for seen in new:
            near = _ALIKE * unit
            if not any(abs(kept.z_um - seen.z_um) < near for kept in place.kept):
                place.kept.append(seen)
        # Those nearest to focus know its height best.
        place.kept.sort(key=lambda k: abs(k.z_um - place.height_um))
        del place.kept[_MOST_KEPT:]


def key_of_index(index: dict[str, int]) -> Key:
    """Return the place of an image by its index."""
    return index.get("p"), index.get("g")


def _is_good(reading: FocusReading | None) -> bool:
    if reading is None or reading.refusal in ("blank", "saturated"):
        return False
    return any(reading.spectrum)


def _seen(estimate: Estimate, drift_um: float) -> Seen:
    assert estimate.focus is not None
    assert estimate.z_um is not None
    z_um = estimate.z_um - drift_um
    return Seen(z_um, np.asarray(estimate.focus.spectrum), estimate.focus.noise)
