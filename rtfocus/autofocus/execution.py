"""Execution: one search carried out on a stage, from its first image to its verdict.

The search is ours, or one that an installed package brings; both are sent only where
the limits allow.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from math import isfinite
from typing import Any, Protocol

import numpy as np

from rtfocus.autofocus.appearance import sharpness
from rtfocus.autofocus.belief import Belief, Mode
from rtfocus.autofocus.policy import (
    Decision,
    GiveUp,
    Limits,
    MoveRule,
    Stay,
    path_of,
    way_um,
)
from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.frame import FocusReading

ENTRY_POINTS = "rtfocus.autofocus"
"""Group of entry points by which other packages bring searches."""
OURS = "rtfocus"
"""Name of the search in `rtfocus.autofocus.search`."""


class Search(Protocol):
    """What decides, image by image, where the stage goes next.

    `run_search` calls `observe` and then `decide` after every image, in one thread.
    """

    moves: MoveRule
    """Limits and steps; every target of the stage is cut to them."""

    @property
    def notes(self) -> list[str]:
        """What was noticed on the way."""
        ...

    @property
    def belief(self) -> Belief:
        """Where focus may be; empty: nothing is known."""
        ...

    def observe(self, z_um: float, reading: FocusReading) -> None:
        """Take in one image, exposed where the stage says `z_um`."""
        ...

    def decide(self) -> Decision:
        """Say what to do after the newest image.

        Raises
        ------
        RtfocusError
            If it cannot decide; the stage then goes to the best z that was seen.
        """
        ...

    def give_up(self, reason: str) -> GiveUp:
        """Return the end of the search at the best z that was seen so far."""
        ...


@dataclass(frozen=True, slots=True)
class SearchTask:
    """What a search of another package is given before its first image."""

    optics: OpticalSystem
    """Of the channel that is imaged; ``optics.defocus_unit_um``: depth of field."""
    limits: Limits
    """Lowest and highest z in um; steps beyond are cut."""
    direction: int
    """+1: larger z brings the plane of focus towards the specimen; -1: smaller z does;
    0: unknown. A signed defocus is removed by a step of ``direction * defocus_um``."""
    safe_side: int
    """Sign of the z on whose side the objective cannot touch the specimen."""


Strategy = Callable[[float, FocusReading], Decision]
"""Gets the stage's z in um and the reading of the image there; returns what to do next.

Called after every image of one search, in one thread. An exception that it raises ends
the search as a `MicroscopeError` that names it.
"""


class BroughtSearch:
    """Lets a strategy of another package search, within our limits.

    Parameters
    ----------
    name
        Of its entry point, for messages.
    strategy
        Asked after every image.
    moves
        Limits and steps; a longer step is cut.
    unit_um
        Depth of field.
    most_images
        Images in all; then the search ends at the sharpest z that was seen.
    """

    def __init__(
        self,
        name: str,
        strategy: Strategy,
        moves: MoveRule,
        *,
        unit_um: float,
        most_images: int,
    ) -> None:
        self.moves = moves
        self.notes = [f"searched by '{name}'"]
        self.belief = Belief(())
        self._name = name
        self._strategy = strategy
        self._unit_um = unit_um
        self._most_images = most_images
        self._looks: list[tuple[float, FocusReading]] = []

    def observe(self, z_um: float, reading: FocusReading) -> None:
        """Take in one image."""
        self._looks.append((z_um, reading))

    def decide(self) -> Decision:
        """Ask the strategy.

        Raises
        ------
        MicroscopeError
            If it fails, or answers what is no decision.
        """
        z_um, reading = self._looks[-1]
        if not self.moves.limits.holds(z_um):
            return GiveUp(f"the stage says {z_um:g} um, outside its limits")
        try:
            decision = self._strategy(z_um, reading)
        except Exception as error:  # theirs: of any kind
            msg = f"autofocus.search '{self._name}' failed: {error!r}"
            raise MicroscopeError(msg) from error
        if isinstance(decision, Stay):
            self.belief = Belief.of([Mode(1.0, z_um, self._unit_um)])
            return decision
        way = way_um(decision) if isinstance(decision, Decision) else None
        if way is None or not isfinite(way):
            msg = (
                f"autofocus.search '{self._name}' answered {decision!r}; a decision "
                "is Stay, Move, Probe or GiveUp with a finite way in um"
            )
            raise MicroscopeError(msg)
        if isinstance(decision, GiveUp):
            return decision
        if len(self._looks) >= self._most_images:
            return self.give_up(f"not found in {self._most_images} images")
        longest = self.moves.most_um
        return replace(decision, dz_um=min(max(way, -longest), longest))

    def give_up(self, reason: str) -> GiveUp:
        """End at the sharpest z that was seen."""
        z_um, _ = self._looks[-1]
        best_um, _ = max(self._looks, key=lambda look: _sharpness(look[1]))
        return GiveUp(reason, best_um - z_um)


def _sharpness(reading: FocusReading) -> float:
    return sharpness(np.asarray(reading.spectrum, dtype=np.float64))


def brought_search(
    name: str, task: SearchTask, moves: MoveRule, *, most_images: int
) -> BroughtSearch:
    """Open the search that an installed package brings under a name.

    Its entry point, group ``rtfocus.autofocus``, is a function that is given a
    `SearchTask` and returns a `Strategy`, once for every search.

    Parameters
    ----------
    name
        Of the entry point.
    task
        Handed to the function.
    moves, most_images
        As for `BroughtSearch`.

    Raises
    ------
    ConfigError
        If no package brings one of this name, or it cannot be loaded.
    """
    entry = find_brought(name)
    try:
        strategy = entry.load()(task)
    except Exception as error:  # theirs: of any kind
        msg = f"autofocus.search '{name}' ({entry.value}) cannot begin: {error!r}"
        raise ConfigError(msg) from error
    unit_um = task.optics.defocus_unit_um
    return BroughtSearch(
        name, strategy, moves, unit_um=unit_um, most_images=most_images
    )


def find_brought(name: str) -> EntryPoint:
    """Return the entry point of a search that an installed package brings.

    Raises
    ------
    ConfigError
        If none brings one of this name.
    """
    there = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in there:
        known = ", ".join([OURS, *sorted(there)])
        msg = (
            f"autofocus.search '{name}' is brought by no installed package; there are "
            f"{known}"
        )
        raise ConfigError(msg)
    return there[name]


class FocusStage(Protocol):
    """The z-stage, as autofocus needs it; positions in um."""

    def position_um(self) -> float:
        """Return where the stage says it is.

        Raises
        ------
        MicroscopeError
            If it does not answer.
        """
        ...

    def go_to(self, z_um: float) -> None:
        """Go there and wait for the end of the move.

        Raises
        ------
        MicroscopeError
            If it does not get there.
        """
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One image of a search and what was decided on it; a line of the journal."""

    z_um: float
    """Where the stage said it was."""
    reading: FocusReading
    decision: Decision
    belief_um: float | None
    """z where focus was believed to be; None: nothing was known."""
    belief_sd_um: float | None
    """Its standard deviation; None: nothing was known."""
    seconds: float
    """Since the search began."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a search ended."""

    focused: bool
    reason: str
    """``in focus``, or why not."""
    start_um: float
    """Where the stage said it was at the start."""
    end_um: float
    """Where the stage was sent last; where it stands unless it lied."""
    images: int
    moves: int
    """Decisions that moved the stage."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What was noticed about stage and images."""
    steps: tuple[Step, ...] = field(default=(), repr=False)
    """Every image, in order."""

    @property
    def correction_um(self) -> float:
        """How far the stage was moved in all."""
        return self.end_um - self.start_um

    def summary(self) -> dict[str, Any]:
        """Return the verdict as JSON values, without its steps."""
        return {
            "focused": self.focused,
            "reason": self.reason,
            "start_um": self.start_um,
            "end_um": self.end_um,
            "images": self.images,
            "moves": self.moves,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }


def run_search(
    search: Search,
    stage: FocusStage,
    look: Callable[[float], FocusReading],
    *,
    timeout_s: float = 60.0,
    on_step: Callable[[Step], None] = lambda _: None,
    is_canceled: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Verdict:
    """Carry a search out.

    Parameters
    ----------
    search
        New, or with a prior.
    stage
        Sent only to positions that the search's limits allow.
    look
        Takes an image at the z it is given and reads it.
    timeout_s
        Since the last progress; then the search ends at the best z it has seen.
    on_step
        Called with every image as soon as it is decided on.
    is_canceled
        Asked after every image; then the search ends at the best z it has seen.
    clock
        Seconds that only increase.

    Returns
    -------
    Verdict
        Also where focus was not found: ``focused`` is False, ``reason`` says why.

    Raises
    ------
    RtfocusError
        What `search`, `look` or `stage` raise; the stage was sent to the best z that
        was seen.
    """
    watch = _Watch(timeout_s, is_canceled, clock)
    steps: list[Step] = []
    try:
        start_um = here_um = stage.position_um()
        moves = 0
        while True:
            reading = look(here_um)
            search.observe(here_um, reading)
            decision = search.decide()
            best = None if search.belief.is_empty else search.belief.best
            decision = watch.allowed(search, decision, best, here_um)
            step = Step(
                z_um=here_um,
                reading=reading,
                decision=decision,
                belief_um=None if best is None else best.mean_um,
                belief_sd_um=None if best is None else best.sd_um,
                seconds=watch.seconds(),
            )
            steps.append(step)
            on_step(step)
            path = path_of(decision, here_um, search.moves)
            for stop_um in path:
                stage.go_to(stop_um)
            moves += bool(path)
            if isinstance(decision, Stay | GiveUp):
                break
            here_um = stage.position_um()
    except BaseException:  # Ctrl-C too: a probe must not be where the stage stays
        if steps:
            with suppress(MicroscopeError):
                _go_to_best(search, stage, steps[-1].z_um)
        raise
    end_um = path[-1] if path else here_um
    return Verdict(
        focused=isinstance(decision, Stay),
        reason=decision.reason,
        start_um=start_um if isfinite(start_um) else end_um,
        end_um=end_um,
        images=len(steps),
        moves=moves,
        seconds=watch.seconds(),
        notes=tuple(search.notes),
        steps=tuple(steps),
    )


class _Watch:
    """Ends a search that makes no progress, or is canceled."""

    def __init__(
        self,
        timeout_s: float,
        is_canceled: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._timeout_s, self._is_canceled, self._clock = timeout_s, is_canceled, clock
        self._began_s = self._progress_s = clock()
        self._nearest_um = float("inf")

    def seconds(self) -> float:
        """Return how long the search has lasted."""
        return self._clock() - self._began_s

    def allowed(
        self, search: Search, decision: Decision, best: Mode | None, here_um: float
    ) -> Decision:
        """Return a decision, or the end of the search in its place.

        Coming nearer to where focus is believed to be, `best`, is progress.
        """
        if best is not None and abs(best.mean_um - here_um) < self._nearest_um:
            self._nearest_um = abs(best.mean_um - here_um)
            self._progress_s = self._clock()
        is_late = self._clock() - self._progress_s > self._timeout_s
        if isinstance(decision, Stay | GiveUp):
            return decision
        if is_late:
            return search.give_up(f"no progress for {self._timeout_s:g} s")
        return search.give_up("canceled") if self._is_canceled() else decision


def _go_to_best(search: Search, stage: FocusStage, looked_at_um: float) -> None:
    """Leave a search that broke off at the best z that was seen."""
    best_um = looked_at_um + search.give_up("broken off").back_um
    here_um = stage.position_um()
    if search.moves.limits.holds(here_um):
        for place in search.moves.path(here_um, best_um):
            stage.go_to(place)
