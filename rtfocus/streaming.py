"""Streaming: what comes out of a running processor."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rtfocus.frame import Estimate
from rtfocus.transport.preview import PreviewViewer

_LOOK_S = 0.1
"""How often a waiting iterator looks whether it should stop."""


def estimates(
    endpoint: str = "tcp://127.0.0.1:5573",
    *,
    timeout_s: float | None = None,
    stop: threading.Event | None = None,
    curve_keys: Path | None = None,
) -> Iterator[Estimate]:
    """Yield focus estimates of a running processor, newest wins.

    They come from its preview socket, at most one per ``transport.preview.interval_s``,
    and never slow the recording. An estimate that nobody took in time is gone.

    Parameters
    ----------
    endpoint
        ``transport.preview.endpoint`` of the processor.
    timeout_s
        End after so long without a new estimate; None: wait for ever.
    stop
        Ends the iteration when set, from another thread.
    curve_keys
        Folder of keys, where the processor has them.

    Raises
    ------
    TransportError
        If the endpoint is none.
    ProtocolError
        If what comes there is not of this version of rtfocus.

    Examples
    --------
    ::

        for estimate in rtfocus.estimates(timeout_s=60):
            print(estimate.sequence, estimate.defocus_um, estimate.confidence)
    """
    with PreviewViewer(endpoint, curve_keys) as viewer:
        since_s = time.monotonic()
        while stop is None or not stop.is_set():
            preview = viewer.newest(_LOOK_S)
            if preview is not None and preview.header.estimate is not None:
                yield preview.header.estimate
                since_s = time.monotonic()
            elif timeout_s is not None and time.monotonic() - since_s > timeout_s:
                return
