"""Complaints: what pymmcore-plus only logs although a frame may be wrong.

A stage or channel that cannot be set is a log line there and the run goes on. The
lines are collected for the report, so that nobody has to read a log to learn it.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "pymmcore-plus"
_MOST_KINDS = 20
# Said at every cancellation, which the report states anyway.
_NO_COMPLAINT = "MDA Canceled"
# pymmcore-plus' thread that takes the images of a camera written in Python.
_CAMERA_THREAD = "AcquisitionThread"


class Complaints(logging.Handler):
    """Distinct warnings with their counts, at most `_MOST_KINDS` of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._counts: Counter[str] = Counter()
        self.fault: str | None = None
        """What a camera written in Python died of during a hardware sequence; its
        thread tells nobody else."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The warnings in the order of their first appearance."""
        return tuple(
            text if count == 1 else f"{text} ({count} times)"
            for text, count in self._counts.items()
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Note one warning."""
        text = " ".join(record.getMessage().split())
        if not text.startswith(_NO_COMPLAINT):
            self._note(text)

    def _note(self, text: str) -> None:
        if text in self._counts or len(self._counts) < _MOST_KINDS:
            self._counts[text] += 1
        else:
            self._counts["further warnings"] += 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen while the block runs, and keep the terminal free of log lines.

        The logger is also told to leave out its line per MDA event, which costs as
        much as the event itself.
        """
        logger = logging.getLogger(LOGGER)
        level = logger.level
        terminals = [
            (handler, handler.level)
            for handler in logger.handlers
            if type(handler) is logging.StreamHandler
        ]
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        for handler, _ in terminals:
            handler.setLevel(logging.CRITICAL)
        hook, threading.excepthook = threading.excepthook, self._note_thread
        self._next_hook = hook
        try:
            yield
        finally:
            threading.excepthook = hook
            logger.removeHandler(self)
            logger.setLevel(level)
            for handler, before in terminals:
                handler.setLevel(before)

    def _note_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Note what a sequence of images died of; pass on everything else."""
        if type(failed.thread).__name__ != _CAMERA_THREAD:
            self._next_hook(failed)
            return
        self.fault = " ".join(str(failed.exc_value).split())
        self._note(self.fault)
