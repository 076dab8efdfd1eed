"""Outcome: whether a series has all that was planned, in words and as an exit code.

``run``, ``acquire``, ``process`` and ``check`` judge with it, so that none of them
calls a series complete that another does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rtfocus.errors import ExitCode

COMPLETED = "completed"
CANCELED = "canceled"
"""The microscope side was asked to end."""
STOPPED_HERE = "stopped"
"""The processor side was asked to end."""
BY_THE_USER = (CANCELED, STOPPED_HERE)
"""Reasons of an end that somebody asked for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How much of a series there is; ``str()`` is for people."""

    planned: int | None
    """Images planned; None: no plan, or one without an end."""
    present: int
    """Frames that are where they belong: sent, or written, depending on who asks."""
    reason: str
    """``completed``, ``canceled``, ``stopped``, or why the series broke off."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Frames exposed and not kept, by what became of them."""
    not_acquired: int = 0
    """Planned images that were never exposed, because of `reason`."""

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> "Outcome":
        """Judge a ``report.json``; reports of older versions name no plan."""
        terms = report["accounting"]
        lost = {"lost by the camera": terms.get("camera_lost", 0)}
        for name, label in (("dropped", "dropped"), ("in_error", "in error")):
            lost |= {f"{label} ({place})": n for place, n in terms[name].items()}
        return cls(
            planned=terms.get("planned"),
            present=terms["written"],
            reason=report.get("reason", COMPLETED),
            lost={what: number for what, number in lost.items() if number},
            not_acquired=terms.get("not_acquired", 0),
        )

    @property
    def was_stopped(self) -> bool:
        """Tell whether somebody asked for the end."""
        return self.reason in BY_THE_USER

    @property
    def is_complete(self) -> bool:
        """Tell whether nothing is missing; a series without an end may be stopped."""
        if self.lost or self.not_acquired:
            return False
        if self.planned is None:
            return self.was_stopped or self.reason == COMPLETED
        return True

    @property
    def is_plain(self) -> bool:
        """Tell whether there is nothing to say but that the series is completed."""
        return self.is_complete and self.reason == COMPLETED

    @property
    def exit_code(self) -> ExitCode:
        """Return what a command that recorded this series ends with."""
        return ExitCode.DONE if self.is_complete else ExitCode.INCOMPLETE

    def __str__(self) -> str:
        number = f"{self.present} frames"
        if self.planned is not None:
            number = f"{self.present} of {self.planned} planned frames"
        why = "" if self.reason == COMPLETED else f": {self.reason}"
        if self.is_complete:
            return (
                f"stopped by the user: {number}" if self.was_stopped else number + why
            )
        missing = [f"{n} {what}" for what, n in self.lost.items()]
        if self.not_acquired:
            missing.append(f"{self.not_acquired} not acquired")
        said = "; ".join([number, *([", ".join(missing)] if missing else [])])
        if self.was_stopped:
            return f"stopped by the user: {said}"
        return f"incomplete: {said}{why}"
