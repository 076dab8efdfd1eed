"""Tally: rejected messages, each counted and logged with its reason."""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Tally:
    """Counts by reason; logs the 1st, 10th, 100th ... of each.

    Parameters
    ----------
    source
        Appears in the log, e.g. ``frames``.
    on_count
        Called with the reason of every rejected message.
    """

    def __init__(
        self, source: str, on_count: Callable[[str], None] = lambda _: None
    ) -> None:
        self._source = source
        self._on_count = on_count
        self.counts: dict[str, int] = {}
        self.last: str | None = None
        """What was wrong with the newest."""

    def reject(self, reason: str, detail: str) -> None:
        """Count one message that cannot be used."""
        number = self.counts.get(reason, 0) + 1
        self.counts[reason] = number
        self._on_count(reason)
        self.last = detail
        # A flood of bad messages must not become a flood of log lines.
        if str(number).strip("0") == "1":
            logger.warning(
                "%s: rejected message, %s (number %d of these): %s",
                *(self._source, reason, number, detail),
            )
