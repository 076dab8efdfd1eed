"""Findings: what a part found out about this machine, for ``rtfocus doctor``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis."""

    topic: str
    """What was looked at, e.g. ``device adapters``."""
    found: str
    """What is there, with version and place."""
    remedy: str | None = None
    """How to get what is missing; None: nothing is."""
    needed: bool = True
    """False: rtfocus runs without it."""
