"""Hold: keeps every position in focus while a plan runs, by its own images.

All positions share one drift, whose speed is learnt; each has a surface height of
its own. A new image is compared with those of the search that found focus there, see
`rtfocus.autofocus.appearance`. Between visits the drift is predicted, so a position is
corrected before its image shows that it must be.
"""

from collections import deque
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np

from rtfocus.autofocus.appearance import Appearance, DefocusModels, Floats, Spectrum
from rtfocus.autofocus.belief import Drift, modes_of_weights
from rtfocus.autofocus.execution import Verdict
from rtfocus.autofocus.policy import Limits, MoveRule
from rtfocus.errors import ConfigError
from rtfocus.frame import Estimate, FocusReading

Key = tuple[int | None, int | None]
"""Index of the position and of the grid tile."""

# Depths of field.
_REACH, _STEP = 3.0, 0.1
_CANDIDATES = np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
_VALLEY = 0.8
"""Of two peaks of one image, for them to be two."""
_UNSURE = 0.3
"""Depths of field that are borne rather than moving to what may be the wrong side."""
_ALIKE = 0.2
"""Depths of field between the images of a search that are kept."""
_MOST_MISFIT, _MOST_MISSES = 5.5, 3
_MOST_TURNS = 1
_MOST_LATE, _LATE_S = 5, 2.0
"""Corrections of a position since its newest image was exposed, and seconds, beyond
which it is read late; the first frames of a plan may come in a burst."""
_MOST_ARRIVED = 512
"""Images that wait for the next correction: more than most stacks have."""
_MOST_SILENT = 3
"""Corrections of a position by prediction alone."""


@dataclass(frozen=True, slots=True)
class SpectrumAtZ:
    """One image of a position, and the stage z it was exposed at."""

    z_um: float
    spectrum: Floats
    noise: float


@dataclass
class FollowedPlace:
    """One position, and what it looks like out of focus."""

    number: int
    """Of the place in the drift."""
    reference_um: float
    """Where the stage stands for the reference plane, corrections included."""
    appearance: Appearance
    moves: MoveRule
    misses: int = 0
    """Images in a row that could not be explained."""
    silent: int = 0
    """Corrections in a row without an image in between."""
    moved_ns: int = 0
    """Images exposed before tell of a place that is left."""
    last_step_um: float = 0.0
    """The newest correction that moved the stage."""
    turns: int = 0
    """Corrections in a row that wanted to take the newest one back."""
    asked_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """When the newest corrections were asked for."""
    read_s: float = inf
    """When the newest image that was read was exposed."""

    @property
    def is_lost(self) -> bool:
        """Tell whether its images have not been explained for a while."""
        return self.misses >= _MOST_MISSES

    def is_late(self, time_s: float) -> bool:
        """Tell whether images are read, but too long after they were exposed."""
        if time_s - self.read_s < _LATE_S or self.silent >= _MOST_SILENT:
            return False
        if self.misses:  # they are read, but show nothing
            return False
        return sum(asked_s > self.read_s for asked_s in self.asked_s) > _MOST_LATE


@dataclass(frozen=True, slots=True)
class Correction:
    """What was decided at the beginning of a stack; a line of the journal."""

    key: Key
    time_s: float
    step_um: float
    error_um: float
    """Predicted focus minus where the stage would stand."""
    z_um: float
    """Where the stage is sent for the reference plane."""
    drift_um: float
    reason: str
    captured_ns: int
    """End of the newest exposure that was taken into account; 0: none."""
    is_late: bool = False
    """The stage stays, and goes by images that are read late."""


class Holder:
    """Takes estimates from any thread and gives corrections to the acquisition's.

    Parameters
    ----------
    models
        Of the focus channel's optics.
    moves
        Limits, deadband and longest step.
    channel
        Index c of the focus channel.
    on_correction
        Told of every decision.
    searched
        Sequences of images of searches: they are of no planned place.
    """

    def __init__(
        self,
        models: DefocusModels,
        moves: MoveRule,
        *,
        channel: int = 0,
        on_correction: Callable[[Correction], None] = lambda _: None,
        searched: Container[int] = (),
    ) -> None:
        self._models, self._moves = models, moves
        self._searched = searched
        self._channel = channel
        self._on_correction = on_correction
        self._arrived: deque[Estimate] = deque(maxlen=_MOST_ARRIVED)
        self._places: dict[Key, FollowedPlace] = {}
        self._numbers: dict[Key, int] = {}
        """In the drift, of every position that was ever held."""
        self._given: set[Key] = set()
        """Positions that a focus device holds."""
        self._drift: Drift | None = None
        self._newest_ns = 0
        self.unread: int | None = None
        """Sequence of a focus channel's frame whose estimate says nothing of focus:
        the processor was not asked to hold, or cannot."""

    def take(self, estimate: Estimate) -> None:
        """Keep an estimate for the next correction; returns at once."""
        if estimate.index.get("c", 0) != self._channel:
            return
        if estimate.focus is None:
            self.unread = estimate.sequence
        elif self.knows(key_of_index(estimate.index)):
            self._arrived.append(estimate)

    def knows(self, key: Key) -> bool:
        """Tell whether a position has been focused."""
        return key in self._places

    def lost(self, key: Key) -> bool:
        """Tell whether a position must be searched anew."""
        place = self._places.get(key)
        return place is not None and place.is_lost

    def forget(self, key: Key) -> None:
        """Hold a position no more, until it is searched anew."""
        self._places.pop(key, None)

    def gives_way(self, key: Key) -> bool:
        """Leave a position to a device that holds it now; False: it never was held.

        Afterwards it is searched anew: the device leaves the stage anywhere.
        """
        if key in self._places:
            self._given.add(key)
            self.forget(key)
        return key in self._given

    def explains(self, key: Key) -> bool:
        """Tell whether the newest image of a position shows what its search saw."""
        place = self._places.get(key)
        return place is not None and place.read_s < inf and not place.misses

    def focus_um(self, key: Key, time_s: float) -> float:
        """Return where the focus of a known position is believed to be at a time."""
        assert self._drift is not None
        number = self._places[key].number
        return self._drift.focus(number, time_s) * self._models.unit_um

    def begin(
        self,
        key: Key,
        time_s: float,
        focus_um: float,
        looks: list[SpectrumAtZ],
        limits: Limits | None = None,
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
            The images of the search, one or more.
        limits
            Of this position; None: those of all.
        """
        if self._drift is None:
            self._drift = Drift(time_s)
        unit = self._models.unit_um
        known = [
            ((focus_um - look.z_um) / unit, Spectrum(look.spectrum, look.noise))
            for look in _differing_in_z(looks, _ALIKE * unit)
        ]
        number = self._numbers.setdefault(key, len(self._numbers))
        self._given.discard(key)
        self._drift.begin(number, time_s, focus_um / unit)
        self._places[key] = FollowedPlace(
            number=number,
            reference_um=focus_um,
            appearance=Appearance(self._models, known),
            moves=self._moves
            if limits is None
            else replace(self._moves, limits=limits),
            # What was exposed while the place was lost says nothing of it any more.
            moved_ns=round(time_s * 1e9),
        )

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
        drift_um = self._drift.at(time_s) * self._models.unit_um
        focus_um = self.focus_um(key, time_s)
        error = focus_um - place.reference_um
        target, reason = self._target(place, focus_um, sure=self._drift.is_sure())
        step = target - place.reference_um
        is_late = not step and place.is_late(time_s)
        if step:
            place.last_step_um = step
            place.reference_um = target
            place.moved_ns = now_ns
        elif is_late:
            reason = (
                f"its images are read {time_s - place.read_s:.0f} s late: the "
                "processor does not keep up"
            )
        place.silent += 1
        place.asked_s.append(time_s)
        self._on_correction(
            Correction(
                *(key, time_s, step, error, target, drift_um, reason),
                captured_ns=self._newest_ns,
                is_late=is_late,
            )
        )
        return step

    def _target(
        self, place: FollowedPlace, wanted_um: float, *, sure: bool
    ) -> tuple[float, str]:
        """Return where a position's stack goes, and why."""
        stays = place.reference_um
        if place.silent >= _MOST_SILENT:
            return stays, "no image of this position was read since"
        if place.is_lost:
            return stays, "its newest images cannot be explained"
        borne_um = _UNSURE * self._models.unit_um
        if not sure and abs(wanted_um - stays) < borne_um:
            return stays, "it is not sure yet which way"
        target = place.moves.target(stays, wanted_um)
        if target is None:
            inside = abs(wanted_um - stays) < place.moves.deadband_um
            return stays, "within the deadband" if inside else "at the limits"
        if (target - stays) * place.last_step_um < 0:
            # A drift seldom turns; what seems to is more often the wrong side.
            place.turns += 1
            if place.turns <= _MOST_TURNS:
                return stays, "back again only if the next image says so too"
        place.turns = 0
        is_cut = abs(target - wanted_um) > place.moves.deadband_um
        return target, "drift, cut by the limits" if is_cut else "drift"

    def _work_off(self) -> None:
        """Learn from what has arrived, one stack of one position at a time."""
        stacks: dict[tuple[Key, int | None], list[Estimate]] = {}
        while self._arrived:
            estimate = self._arrived.popleft()
            if estimate.sequence in self._searched:
                continue
            key = key_of_index(estimate.index)
            place = self._places.get(key)
            # Exposed before the last move ended, or while the stage was under way.
            if place is None or estimate.captured_ns < place.moved_ns:
                continue
            if estimate.z_um is not None:
                stacks.setdefault((key, estimate.index.get("t")), []).append(estimate)
        for (key, _), estimates in stacks.items():
            self._learn(self._places[key], estimates)

    def _learn(self, place: FollowedPlace, estimates: list[Estimate]) -> None:
        assert self._drift is not None
        place.silent = 0
        good = [e for e in estimates if _is_good(e.focus)]
        if not good:
            place.misses += 1
            return
        unit = self._models.unit_um
        newest_ns = max(e.captured_ns for e in good)
        self._newest_ns = max(newest_ns, self._newest_ns)
        time_s = place.read_s = newest_ns / 1e9
        expected = self._drift.focus(place.number, time_s)
        looks = [_image_of(e, expected * unit, unit) for e in good]
        weights, misfit = place.appearance.weights(looks, _CANDIDATES)
        if misfit > _MOST_MISFIT:
            place.misses += 1
            return
        place.misses = 0
        modes = modes_of_weights(expected + _CANDIDATES, weights, valley=_VALLEY)
        self._drift.see(place.number, time_s, modes)


def _differing_in_z(looks: list[SpectrumAtZ], least_um: float) -> list[SpectrumAtZ]:
    """Return images that differ in z, of those alike the newest."""
    apart: list[SpectrumAtZ] = []
    for look in reversed(looks):
        if all(abs(look.z_um - other.z_um) >= least_um for other in apart):
            apart.append(look)
    return apart


def seen_by(verdict: Verdict) -> list[SpectrumAtZ]:
    """Return the images of a search that show what a place looks like."""
    return [
        SpectrumAtZ(step.z_um, np.asarray(step.reading.spectrum), step.reading.noise)
        for step in verdict.steps
        if _is_good(step.reading)
    ]


def key_of_index(index: Mapping[str, int]) -> Key:
    """Return the place of an image by its index."""
    return index.get("p"), index.get("g")


def _is_good(reading: FocusReading | None) -> bool:
    if reading is None or reading.refusal in ("blank", "saturated"):
        return False
    return any(reading.spectrum)


def _image_of(
    estimate: Estimate, focus_um: float, unit_um: float
) -> tuple[float, Spectrum]:
    """Return an image and its distance from where focus is expected."""
    assert estimate.focus is not None
    assert estimate.z_um is not None
    image = Spectrum(np.asarray(estimate.focus.spectrum), estimate.focus.noise)
    return (estimate.z_um - focus_um) / unit_um, image


def unread(sequence: int) -> ConfigError:
    """Say that a processor was not asked for what hold needs."""
    msg = (
        f"the processor's estimate of frame {sequence} says nothing of focus, so it "
        "cannot be held; give the processor the same config: autofocus.mode hold, and "
        "optics and classifier of the focus channel"
    )
    return ConfigError(msg)
