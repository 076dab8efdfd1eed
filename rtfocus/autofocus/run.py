"""Run: one search carried out on a stage, from its first image to its verdict."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

from rtfocus.autofocus.policy import Decision, GiveUp, Move, Probe, Stay
from rtfocus.autofocus.search import FocusSearch, path_of
from rtfocus.frame import FocusReading


class FocusStage(Protocol):
    """The z-stage, as autofocus needs it; positions in um."""

    def position_um(self) -> float:
        """Return where the stage says it is."""
        ...

    def go_to(self, z_um: float) -> None:
        """Go there and wait for the end of the move."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One image of a search and what was decided on it; a line of the journal."""

    z_um: float
    reading: FocusReading
    decision: Decision
    belief_um: float | None
    """Where focus was believed to be."""
    belief_sd_um: float | None
    seconds: float
    """Since the search began."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a search ended."""

    focused: bool
    reason: str
    start_um: float
    end_um: float
    """Where the stage was sent last; where it stands unless it lied."""
    images: int
    moves: int
    seconds: float
    notes: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

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
    search: FocusSearch,
    stage: FocusStage,
    look: Callable[[float], FocusReading],
    *,
    timeout_s: float = 60.0,
    on_step: Callable[[Step], None] = lambda _: None,
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
        Told of every image as soon as it is decided on.

    Raises
    ------
    RtfocusError
        What `look` or `stage` raise; the stage stays where it is.
    """
    began = progress = clock()
    start = here = stage.position_um()
    moves, steps, nearest = 0, list[Step](), float("inf")
    while True:
        search.observe(here, look(here))
        decision = search.decide()
        best = None if search.belief.is_empty else search.belief.best
        if best is not None and abs(best.mean_um - here) < nearest:
            nearest, progress = abs(best.mean_um - here), clock()
        late = clock() - progress > timeout_s
        if late and isinstance(decision, Move | Probe):
            decision = search.give_up(f"no progress for {timeout_s:g} s")
        step = Step(
            z_um=here,
            reading=search.looks[-1].reading,
            decision=decision,
            belief_um=None if best is None else best.mean_um,
            belief_sd_um=None if best is None else best.sd_um,
            seconds=clock() - began,
        )
        steps.append(step)
        on_step(step)
        path = path_of(decision, here, search.moves)
        for place in path:
            stage.go_to(place)
        moves += bool(path)
        if isinstance(decision, Stay | GiveUp):
            end = path[-1] if path else here
            return Verdict(
                focused=isinstance(decision, Stay),
                reason=decision.reason,
                start_um=start if isfinite(start) else end,
                end_um=end,
                images=len(steps),
                moves=moves,
                seconds=clock() - began,
                notes=tuple(search.notes),
                steps=tuple(steps),
            )
        here = stage.position_um()
