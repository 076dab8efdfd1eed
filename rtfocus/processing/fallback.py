"""Fallback: a faster processor where it can run a series, a sure one where not."""

import logging

from rtfocus.errors import EngineError
from rtfocus.frame import DefocusMap, Estimate, FrameResult, SeriesStart, TileGrid
from rtfocus.processing.seam import FrameProcessor
from rtfocus.slots import Slot

logger = logging.getLogger(__name__)


class FallbackProcessor:
    """`FrameProcessor` that chooses between two at the start of every series.

    A failure during a series is not answered by the other: its results would
    differ within one run.

    Parameters
    ----------
    preferred
        Tried first.
    sure
        Runs what the first refuses.
    """

    def __init__(self, preferred: FrameProcessor, sure: FrameProcessor) -> None:
        self._preferred = preferred
        self._sure = sure
        self._chosen = preferred

    def start(self, series: SeriesStart, slots: int) -> TileGrid | None:
        """Prepare the preferred processor, or the sure one with the reason told."""
        self.close()
        try:
            self._chosen = self._preferred
            return self._preferred.start(series, slots)
        except EngineError as error:
            logger.warning("this series is processed on the CPU: %s", error)
        self._chosen = self._sure
        return self._sure.start(series, slots)

    def submit(self, slot: Slot, *, unrestored: str | None = None) -> None:
        """Begin work on a frame; waits while the processor is full."""
        self._chosen.submit(slot, unrestored=unrestored)

    def wait_estimate(self, slot: Slot) -> tuple[Estimate, DefocusMap] | None:
        """Wait for the defocus of a frame; None: this channel has no classifier."""
        return self._chosen.wait_estimate(slot)

    def wait_result(self, slot: Slot) -> FrameResult:
        """Wait for everything about a frame; raises what went wrong with it."""
        return self._chosen.wait_result(slot)

    def backends(self) -> dict[str, str]:
        """Tell what each engine of the series runs on."""
        return self._chosen.backends()

    def close(self) -> None:
        """Close both; called twice does nothing."""
        self._preferred.close()
        self._sure.close()
