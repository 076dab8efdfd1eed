"""Stall: what the publisher does when the recorder does not keep up."""

from typing import Literal

from rtfocus.errors import TransportError


class Stall:
    """Judges waits; pure, the time comes in as a parameter.

    Parameters
    ----------
    policy
        ``wait``, ``raw_only`` (wait, but ask a living recorder to skip
        restoration) or ``abort``.
    timeout_s
        A wait longer than this is a stall.
    """

    def __init__(
        self, policy: Literal["wait", "raw_only", "abort"], timeout_s: float
    ) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        self._last_wait_s = 0.0
        self.count = 0
        """Stalls so far."""

    def watch(
        self,
        waiting_for: str,
        waited_s: float,
        *,
        alive: bool,
        stopped: bool,
        left: str | None = None,
    ) -> str | None:
        """Judge a wait that has lasted `waited_s`; return a reason for raw only.

        Raises
        ------
        TransportError
            If the wait must end.
        """
        stalled = waited_s > self._timeout_s
        # Counted once per wait, however often it is looked at.
        if stalled and not self._timeout_s < self._last_wait_s <= waited_s:
            self.count += 1
        self._last_wait_s = waited_s
        state = "is alive but too slow" if alive else "is lost"
        if left is not None and not alive:
            state = f"left ({left})"
        if stopped and (stalled or not alive):
            msg = f"stopped: {waiting_for}, the recorder {state}"
            raise TransportError(msg)
        if not stalled:
            return None
        if self._policy == "abort":
            msg = (
                f"{waiting_for} for {self._timeout_s:g} s, the recorder {state}; "
                "transport.on_stall is abort (wait or raw_only would go on)"
            )
            raise TransportError(msg)
        if self._policy == "raw_only" and alive:
            return f"{waiting_for} for {self._timeout_s:g} s"
        return None
