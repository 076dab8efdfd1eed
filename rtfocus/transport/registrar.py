"""Registrar: who records the series, what it has said, and what is owed to it.

Pure: gets messages and the time, returns replies. One recorder per series; it
is lost after `LOST_HEARTBEATS` of silence, and back as soon as it speaks again,
unless another one took its place meanwhile.
"""

import hmac
import math
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rtfocus.errors import ProtocolError, TransportError
from rtfocus.frame import PROTOCOL_VERSION, Act, Estimate, SeriesEnd, SeriesStart, Slot
from rtfocus.transport import messages as m
from rtfocus.transport.memory import Segment
from rtfocus.transport.messages import check_estimate
from rtfocus.workers import Newest


class Outbox:
    """The frames of one series that the publisher holds until they are durable.

    In the order of their sequence. Safe to use from any thread: the acquisition
    appends, the I/O thread sends and settles, waiters are notified.
    """

    def __init__(self, series: SeriesStart) -> None:
        self.series = series
        self.changed = threading.Condition()
        """Notified whenever something below changes."""
        self.ending: str | None = None
        """Reason of the end, once the acquisition has said that no frame follows."""
        self.end: SeriesEnd | None = None
        """The message that says so."""
        self.end_received = False
        """The recorder has confirmed the end."""
        self._held: deque[Slot] = deque()
        self._first = 0
        self._next = 0
        self.most_sent = 0
        """Frames sent at least once."""

    @property
    def published(self) -> int:
        """Frames handed over so far."""
        with self.changed:
            return self._first + len(self._held)

    @property
    def durable_upto(self) -> int:
        """All frames with a smaller sequence are durable and gone from here."""
        return self._first

    @property
    def sent_upto(self) -> int:
        """All frames with a smaller sequence were sent since the last rewind."""
        return self._next

    @property
    def is_sent(self) -> bool:
        """Tell whether every frame of the ended series was sent."""
        with self.changed:
            return self.ending is not None and self._next == self.published

    @property
    def is_complete(self) -> bool:
        """Tell whether the recorder has everything, for good, and knows the end."""
        with self.changed:
            return self.end_received and self._first == self.published

    def append(self, slot: Slot) -> None:
        """Hand over a filled slot.

        Raises
        ------
        TransportError
            If its sequence is not the next one or the series has ended.
        """
        sequence = slot.frame().sequence
        with self.changed:
            if self.ending is not None:
                msg = f"frame {sequence} published after the end of the series"
                raise TransportError(msg)
            if sequence != self.published:
                msg = (
                    f"frame {sequence} published where {self.published} was next; "
                    "sequence counts frames without holes"
                )
                raise TransportError(msg)
            self._held.append(slot)

    def take(self, credit_upto: int) -> Slot | None:
        """Return the next frame to send; None without credit or frame."""
        with self.changed:
            if self._next >= min(credit_upto, self.published):
                return None
            slot = self._held[self._next - self._first]
            self._next += 1
            self.most_sent = max(self.most_sent, self._next)
            return slot

    def untake(self) -> None:
        """Take back the last `take`: the frame could not be sent now."""
        with self.changed:
            self._next -= 1

    def rewind(self, sequence: int) -> int:
        """Send again from `sequence`, or from the first frame held; return which.

        Raises
        ------
        TransportError
            If `sequence` was never published.
        """
        with self.changed:
            if sequence > self.published:
                msg = (
                    f"the recorder asks for frame {sequence}, only {self.published} "
                    "exist; its run folder belongs to another series"
                )
                raise TransportError(msg)
            self._next = max(sequence, self._first)
            return self._next

    def settle(self, durable_upto: int) -> list[Slot]:
        """Let go of the frames before `durable_upto`; return their slots."""
        with self.changed:
            count = min(durable_upto, self.published) - self._first
            if count <= 0:
                return []
            settled = [self._held.popleft() for _ in range(count)]
            self._first += count
            self._next = max(self._next, self._first)
            self.changed.notify_all()
            return settled

    def finish(
        self,
        reason: str,
        *,
        camera_lost: int = 0,
        not_acquired: int = 0,
        warnings: tuple[str, ...] = (),
        focus_log: tuple[dict[str, Any], ...] = (),
    ) -> None:
        """Say that no frame follows; see `SeriesEnd`."""
        with self.changed:
            self.end = SeriesEnd(
                version=PROTOCOL_VERSION,
                series_uid=self.series.series_uid,
                frames_sent=self.published,
                reason=reason,
                camera_lost=camera_lost,
                not_acquired=not_acquired,
                warnings=warnings,
                focus_log=focus_log,
            )
            self.ending = reason

    def confirm_end(self) -> None:
        """Note that the recorder knows the end."""
        with self.changed:
            self.end_received = True
            self.changed.notify_all()


LOST_HEARTBEATS = 6
"""A peer silent for this many heartbeats is lost."""

Reply = m.FromPublisher

DERIVED = ("config ", "run ")
"""How pairings begin that say where they come from; any other is not shown."""


@dataclass
class Recorder:
    """The one processor that records the series."""

    identity: bytes
    """Address on the control socket."""
    uid: str
    topic: str
    heard_s: float
    """``time.monotonic`` of its last message."""
    who: str
    """Its process, user and host, as it says."""
    folder: str = ""
    """Where it puts the series, once it has said so."""
    subscriptions: int = 0
    """Connections through which `topic` reaches it; two for a moment when it
    reconnects before its old connection is known to be dead."""
    attempt: int = 0
    """Its newest request to resend; 0: it has not begun."""
    shared: bool = False
    """It reads frames where they lie."""
    rewind_due: bool = False
    """That request is not answered yet."""
    credit_upto: int = 0
    received_upto: int = 0
    end_sent: bool = False
    raw_only_sent: bool = False

    @property
    def takes_frames(self) -> bool:
        """Tell whether frames sent now would reach it."""
        return self.subscriptions > 0 and self.attempt > 0

    def __str__(self) -> str:
        """Say who records, and where."""
        return f"{self.who} in '{self.folder}'" if self.folder else self.who


@dataclass
class Registrar:
    """Keeps the recorder of `outbox`; used by the I/O thread alone."""

    heartbeat_s: float
    pairing: str | None = None
    """What a recorder must say to be welcomed; None: any is."""
    outbox: Outbox | None = None
    """The series to record; None before the first."""
    segment: Segment | None = None
    """Where its frames lie, for a recorder on this machine."""
    recorder: Recorder | None = None
    estimates: Newest[Estimate] = field(
        default_factory=lambda: Newest(lambda estimate: estimate.sequence)
    )
    """The newest one, until it is taken."""
    asked: list[Act] = field(default_factory=list)
    """What the recorder asked for, until it is taken."""
    resent: int = 0
    """Frames sent more than once."""
    left: str | None = None
    """Why the last recorder went away, if it said so."""
    recorded_by: str | None = None
    """The recorder of the series, or the last one it had."""
    stranger: str | None = None
    """Who was refused last for another pairing."""
    settled: list[Slot] = field(default_factory=list)
    """Slots of durable frames, until they are taken."""
    _watched_s: float = math.inf
    """When the I/O thread had its last turn; infinite before the first."""

    def open(self, outbox: Outbox, segment: Segment | None = None) -> None:
        """Start a series without a recorder."""
        self.outbox, self.segment = outbox, segment
        self.recorder = None
        self.left = self.stranger = self.recorded_by = None

    def is_alive(self, now_s: float) -> bool:
        """Tell whether the recorder was heard of lately."""
        if self.recorder is None:
            return False
        slept = now_s - self._watched_s > self._lost_s
        return slept or now_s - self.recorder.heard_s < self._lost_s

    def watch(self, now_s: float) -> None:
        """Note a turn, before what came is read: a sleeper hears nobody.

        What the recorder said while this process was frozen, or its machine slept,
        is not read yet; its silence begins now.
        """
        if now_s - self._watched_s > self._lost_s and self.recorder is not None:
            self.recorder.heard_s = now_s
        self._watched_s = now_s

    @property
    def _lost_s(self) -> float:
        return LOST_HEARTBEATS * self.heartbeat_s

    def handle(
        self, identity: bytes, message: m.FromRecorder, now_s: float
    ) -> list[Reply]:
        """Take note of a message; return the replies to its sender.

        Raises
        ------
        ProtocolError
            If it contradicts what the publisher knows.
        """
        if isinstance(message, m.Hello):
            return [self._greet(identity, message, now_s)]
        if isinstance(message, Estimate):
            self._note_estimate(identity, message)
            return []
        if isinstance(message, m.Leave):
            if self.recorder is not None and self.recorder.uid == message.uid:
                self.recorder, self.left = None, m.printable(message.reason)
            return []
        refusal = self._refuse(message)
        if refusal is not None:
            return [refusal]
        if isinstance(message, m.Ask):
            self.asked.append(message.what)
            return []
        self._note(identity, message, now_s)
        return []

    def _greet(self, identity: bytes, hello: m.Hello, now_s: float) -> Reply:
        """Answer a processor that asks to record."""
        if hello.role != "recorder":
            reason = f"role '{hello.role}' does not exist; use 'recorder'"
            return m.Refused(uid=hello.uid, code="role", reason=reason)
        if (mismatch := self._mismatch(hello)) is not None:
            return m.Refused(uid=hello.uid, code="pairing", reason=mismatch)
        if self.outbox is None or self.outbox.is_complete:
            return m.Waiting(version=PROTOCOL_VERSION)
        series = self.outbox.series
        known = self.recorder
        if known is None or known.uid != hello.uid:
            if known is not None and self.is_alive(now_s):
                reason = (
                    f"series '{series.name}' already has a recorder, {known}; there "
                    "is one per series, viewers use the preview socket"
                )
                return m.Refused(uid=hello.uid, code="occupied", reason=reason)
            topic = f"{series.series_uid}/{hello.uid}/"
            known = Recorder(identity, hello.uid, topic, now_s, hello.who)
            self.recorder = known
        known.identity, known.heard_s = identity, now_s
        return m.Welcome(
            version=PROTOCOL_VERSION,
            uid=hello.uid,
            topic=known.topic,
            start=series,
            shared=self.segment,
        )

    def _mismatch(self, hello: m.Hello) -> str | None:
        """Return why this recorder is not meant; None: it is."""
        ours, theirs = self.pairing, hello.pairing
        if ours is None or hmac.compare_digest(ours.encode(), theirs.encode()):
            return None
        self.stranger = f"{hello.who}, {_pairing_text(theirs)}"
        return (
            f"this microscope side is paired by {_pairing_text(ours)}, not by "
            f"{_pairing_text(theirs)}; start `rtfocus process` with the config of "
            "`rtfocus acquire`, or set transport.pairing to one word on both sides"
        )

    def _refuse(
        self, message: m.Progress | m.Resend | m.Ended | m.Ask
    ) -> m.Refused | None:
        """Return the answer to one who is not the recorder of this series."""
        series_uid = self.outbox.series.series_uid if self.outbox else None
        if message.series_uid != series_uid:
            reason = f"series '{message.series_uid}' is not published here (any more)"
            return m.Refused(uid=message.uid, code="unknown", reason=reason)
        if self.recorder is None or self.recorder.uid != message.uid:
            # One that has left since took its place: only a restart knows nobody.
            is_replaced = self.recorder is not None or self.left is not None
            code = "occupied" if is_replaced else "unknown"
            reason = "not the recorder of this series (any more); say hello again"
            return m.Refused(uid=message.uid, code=code, reason=reason)
        return None

    def _note(
        self,
        identity: bytes,
        message: m.Progress | m.Resend | m.Ended,
        now_s: float,
    ) -> None:
        """Take note of what the recorder said."""
        outbox, recorder = self.outbox, self.recorder
        # _refuse has seen both.
        assert outbox is not None
        assert recorder is not None
        recorder.identity, recorder.heard_s = identity, now_s
        match message:
            case m.Progress():
                self._note_progress(outbox, recorder, message)
            case m.Resend():
                if message.sequence < 0 or not 0 < message.attempt < 2**63:
                    msg = f"resend from {message.sequence}, attempt {message.attempt}"
                    raise ProtocolError(msg, "range")
                before = outbox.sent_upto
                self.resent += max(before - outbox.rewind(message.sequence), 0)
                recorder.attempt, recorder.rewind_due = message.attempt, True
                recorder.end_sent = False
                recorder.shared = message.shared and self.segment is not None
                recorder.folder = m.printable(message.folder)
                self.recorded_by = str(recorder)
            case m.Ended():
                outbox.confirm_end()

    def _note_progress(
        self, outbox: Outbox, recorder: Recorder, progress: m.Progress
    ) -> None:
        known = outbox.published
        if not 0 <= progress.durable_upto <= progress.received_upto <= known:
            msg = (
                f"progress with durable_upto={progress.durable_upto}, "
                f"received_upto={progress.received_upto} of {known} frames: must be "
                "in ascending order; the run folder belongs to another series?"
            )
            raise ProtocolError(msg, "progress")
        recorder.credit_upto = max(recorder.credit_upto, progress.credit_upto)
        recorder.received_upto = progress.received_upto
        self.settled += outbox.settle(progress.durable_upto)

    def _note_estimate(self, identity: bytes, estimate: Estimate) -> None:
        recorder, outbox = self.recorder, self.outbox
        if recorder is None or outbox is None or identity != recorder.identity:
            msg = "estimate from a peer that is not the recorder"
            raise ProtocolError(msg, "estimate")
        if estimate.series_uid != outbox.series.series_uid:
            msg = f"estimate of series '{estimate.series_uid}'"
            raise ProtocolError(msg, "estimate")
        check_estimate(estimate)
        self.estimates.put(estimate)


def _pairing_text(pairing: str) -> str:
    """Return a pairing for people; a word that a user chose is not shown."""
    if not pairing:
        return "nothing"
    derived = pairing.startswith(DERIVED)
    return m.printable(pairing) if derived else "a word of its own"
