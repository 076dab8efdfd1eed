"""Sink: where the microscope side puts its frames."""

from typing import Protocol

from rtfocus.frame import SeriesStart
from rtfocus.slots import Slot


class FrameSink(Protocol):
    """Takes one series: `start`, then `acquire` and `publish` per frame, then `end`.

    All calls come from the acquisition's thread. The transport's publisher has
    this form; the two packages meet only in `rtfocus.app`.
    """

    def start(self, series: SeriesStart) -> None:
        """Begin a series; may wait for whoever records it."""
        ...

    def acquire(self) -> Slot:
        """Return a free slot, waiting for one; raises when the wait is given up."""
        ...

    def publish(self, slot: Slot) -> None:
        """Hand over a filled slot; it is not the caller's any more."""
        ...

    def end(
        self,
        reason: str,
        *,
        camera_lost: int = 0,
        not_acquired: int = 0,
        warnings: tuple[str, ...] = (),
    ) -> None:
        """End the series, once everything published is safe; see `SeriesEnd`."""
        ...
