"""TensorRT log: its messages go to `logging`, its errors into ours.

TensorRT's calls fail by returning None or False; the reason is only in the log.
The first logger of a process stays its logger for good, so there is one per
library and it lives as long as the process.
"""

import logging
from collections import deque
from typing import Any

# What TensorRT says when it looks for a GPU to clean up on where there is none;
# it follows every error on such a machine and explains nothing.
_ECHO = "catchCudaError"


def make_logger(api: Any, name: str) -> Any:
    """Return a logger of a library whose ``errors`` holds what went wrong last.

    Parameters
    ----------
    api
        Module ``tensorrt`` or ``tensorrt_rtx``.
    name
        Of the library, for `logging`.
    """
    logger = logging.getLogger(f"rtfocus.{name}")
    severity = api.ILogger.Severity
    # An error of TensorRT reaches the user as our error, with a remedy: it is not
    # told twice.
    levels = {
        severity.INTERNAL_ERROR: logging.INFO,
        severity.ERROR: logging.INFO,
        severity.WARNING: logging.INFO,
    }
    serious = (severity.INTERNAL_ERROR, severity.ERROR)

    class TensorRtLogger(api.ILogger):  # type: ignore[misc]
        """Receives messages from every thread of TensorRT."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=50)

        def log(self, severity: Any, message: str) -> None:
            logger.log(levels.get(severity, logging.DEBUG), "%s", message)
            if severity in serious and _ECHO not in message:
                self.errors.append(message)

    return TensorRtLogger()
