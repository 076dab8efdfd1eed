"""Dialogue: one recorder's talk with the publisher, from hello to the end.

Holds no socket: gets messages and the time, says what is to be sent. The series that
a publisher announces is checked here.
"""

import getpass
import logging
import math
import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
from pydantic import TypeAdapter, ValidationError

from rtfocus.channel import Channel
from rtfocus.config.sections import TransportConfig
from rtfocus.errors import PeerGoneError, PeerLostError, TransportError
from rtfocus.frame import MOST_PLACES, PROTOCOL_VERSION, SeriesStart
from rtfocus.transport import messages as m
from rtfocus.transport.inflow import Inflow
from rtfocus.transport.messages import DTYPES, MOST_COUNT, not_finite
from rtfocus.transport.registrar import LOST_HEARTBEATS
from rtfocus.transport.sockets import max_frame_bytes

_DELAY_S = 0.005
"""How long news of less than a batch of frames may wait for more."""

logger = logging.getLogger(__name__)


class Dialogue:
    """What the processor knows about one series and its publisher.

    Parameters
    ----------
    config
        Its times, and the pairing to name.
    now_s
        ``time.monotonic``.
    patient
        Wait for ever: for a publisher that wants us, and for one that went silent,
        as long as it may come back.
    is_gone
        Tells whether a silent publisher is gone for good.
    unwanted
        Series not to record, by uid, with the reason; those that cannot be received
        are added, and another is waited for. None: such a series is an error.
    """

    def __init__(
        self,
        config: TransportConfig,
        now_s: float,
        *,
        patient: bool = False,
        is_gone: Callable[[], bool] = lambda: False,
        unwanted: dict[str, str] | None = None,
    ) -> None:
        self.uid = uuid.uuid4().hex
        self._hello = introduce(self.uid, config.pairing)
        self._patient = patient
        self._is_gone = is_gone
        self._unwanted = unwanted
        self._declined: m.Leave | None = None
        self._folder = ""
        self._max_frame_bytes = max_frame_bytes(config)
        self.welcome: m.Welcome | None = None
        self.inflow: Inflow | None = None
        """Set when frames are wanted."""
        self.refused: str | None = None
        """Newest answer of a publisher that does not want us."""
        self.broken: TransportError | None = None
        """Why no series can come of this."""
        self.heard_s: float | None = None
        """Time of the publisher's last message; None: never heard."""
        self.raw_only: str | None = None
        self.durable_upto = 0
        self.stop_wanted = False
        """Frames are not wanted any more."""
        self._heartbeat_s = config.heartbeat_s
        self._lost_s = LOST_HEARTBEATS * config.heartbeat_s
        self._patience_s = max(config.stall_timeout_s, self._lost_s)
        self._over: str | None = None
        self._taken_over: str | None = None
        self._complaint = ""
        self._said: m.Progress | None = None
        self._said_s = 0.0
        self._news = 0
        self._is_armed = False
        self._attempt = 0
        self._asked_s = now_s
        self._flowing_s = now_s
        self._watched_s = now_s
        self._looked_s = 0.0
        self._next_beat_s = now_s
        self.next_turn_s = now_s
        """When there will be something to say even if nothing happens."""

    def begin(
        self, inflow: Inflow, next_sequence: int, now_s: float, folder: str = ""
    ) -> None:
        """Ask for frames; `inflow` takes them, `folder` is where they will lie."""
        self._folder = folder
        self.durable_upto = next_sequence
        self._flowing_s = now_s
        self.inflow = inflow
        if self._taken_over is not None:
            inflow.yield_to_another(self._taken_over)
        elif self._over is not None:
            inflow.abandon(self._over)

    def handle(self, message: m.FromPublisher, now_s: float) -> None:
        """Take note of a control message."""
        self.heard_s = now_s
        match message:
            case m.Welcome() if message.uid == self.uid and self.series is None:
                self._note_welcome(message)
            case m.Refused() if message.uid == self.uid:
                self._note_refusal(message)
            case m.RawOnly() if self._is_ours(message.series_uid):
                self.raw_only = m.printable(message.reason)
            case m.Abandon() if self._is_ours(message.series_uid):
                self._end(m.printable(message.reason), message.frames_sent)
            case m.Complaint():
                reason = m.printable(message.reason)
                if reason not in self._complaint:
                    logger.warning("the publisher complains: %s", reason)
                self._complaint = f"; it says: {reason}"
            case _:
                # Waiting and Ping say only that the publisher lives.
                return

    def say(self, now_s: float) -> Iterator[m.FromRecorder]:
        """Yield what is to be sent now."""
        is_beat = now_s >= self._next_beat_s
        if is_beat:
            self._next_beat_s = now_s + self._heartbeat_s
        self.next_turn_s = self._next_beat_s
        if self.series is None:
            if self._declined is not None:
                yield self._declined
                self._declined = None
            elif is_beat and self.broken is None:
                yield self._hello
            return
        # Before the numbers are read: what changes from here on wakes the loop.
        self._is_armed, self._news = False, 0
        progress = self._progress(self.series.series_uid)
        if self._is_worth_saying(progress, now_s, is_beat=is_beat):
            self._said, self._said_s = progress, now_s
            yield progress
        if self.inflow is not None:
            yield from self._ask(self.inflow, now_s)

    def is_wake_due(self) -> bool:
        """Tell whether a change by another thread must wake the loop; any thread.

        The first one does, to arm the delay after which all are told; then only a
        batch of them.
        """
        # Two threads may count as one here: that costs a delay, never a wake-up.
        news = self._news + 1
        self._news = news
        batch = self.inflow.batch if self.inflow is not None else 1
        return news % batch == 0 or (news == 1 and not self._is_armed)

    def last_words(self, reason: str) -> Iterator[m.FromRecorder]:
        """Yield what is to be sent before going away."""
        # A welcome may be on its way to one who has only said hello.
        series_uid = self.series.series_uid if self.series is not None else ""
        if self.series is not None:
            yield self._progress(series_uid)
        if self.broken is not None:
            reason = str(self.broken)
        if not self.is_complete:
            yield m.Leave(uid=self.uid, series_uid=series_uid, reason=reason)

    def watch(self, now_s: float) -> None:
        """End the series on request, or if its publisher is lost for too long."""
        if self.inflow is None or self.inflow.arrivals.is_over:
            return
        if now_s - self._watched_s > self._lost_s and self.heard_s is not None:
            # It was this process that slept; the publisher's silence begins now.
            self.heard_s = self._flowing_s = now_s
        self._watched_s = now_s
        if self.stop_wanted:
            self.inflow.stop()
            return
        if not self.inflow.sequencer.waiting:
            self._flowing_s = now_s
        heard_s = self.heard_s if self.heard_s is not None else now_s
        if now_s - heard_s > self._lost_s:
            # What it does not say it cannot send.
            self._flowing_s = now_s
        if now_s - max(heard_s, self._looked_s) > self._patience_s:
            self._lose_publisher(self.inflow, now_s)
        elif now_s - self._flowing_s > self._patience_s:
            self.inflow.lose(
                f"the publisher does not send frame {self.inflow.sequencer.expected} "
                f"within {self._patience_s:g} s{self._complaint}"
            )

    def _lose_publisher(self, inflow: Inflow, now_s: float) -> None:
        """Give a silent publisher up, unless it may come back and we may wait."""
        silence = f"the publisher is lost: nothing heard for {self._patience_s:g} s"
        if self._is_gone():
            inflow.lose(f"{silence}, and its port is closed", PeerGoneError)
        elif not self._patient:
            inflow.lose(silence, PeerLostError)
        elif self._looked_s == 0:
            logger.warning("%s; waiting for it, Ctrl-C ends the run", silence)
        self._looked_s = now_s

    @property
    def series(self) -> SeriesStart | None:
        """What the publisher welcomed us to; None: not welcome yet."""
        return None if self.welcome is None else self.welcome.start

    @property
    def is_running(self) -> bool:
        """Tell whether frames are wanted and have not ended."""
        return self.inflow is not None and not self.inflow.arrivals.is_over

    @property
    def is_complete(self) -> bool:
        """Tell whether the publisher has ended the series and all of it is durable."""
        if self.inflow is None or not self.inflow.has_all:
            return False
        return self.durable_upto >= self.inflow.sequencer.expected

    def _is_ours(self, series_uid: str) -> bool:
        return self.series is not None and self.series.series_uid == series_uid

    def _note_welcome(self, welcome: m.Welcome) -> None:
        uid, unwanted = welcome.start.series_uid, self._unwanted
        try:
            check_welcome(welcome.topic, welcome.start, self._max_frame_bytes)
        except TransportError as error:
            if unwanted is None:
                self.broken = error
                return
            if uid not in unwanted:
                logger.error("%s; waiting for another", error)
                unwanted[uid] = str(error)
        if unwanted is not None and uid in unwanted:
            self._declined = m.Leave(uid=self.uid, series_uid=uid, reason=unwanted[uid])
            return
        self.welcome = welcome

    def _note_refusal(self, refused: m.Refused) -> None:
        reason = m.printable(refused.reason, 1000)
        if self.series is None:
            if self.refused is None and self._patient:
                logger.warning("refused: %s; asking again", reason)
            if refused.code != "occupied" and not self._patient:
                self.broken = TransportError(f"refused: {reason}")
            self.refused = reason
        elif refused.code == "occupied":
            self._taken_over = (
                "another recorder has taken over the series; this one leaves its run "
                "folder as it is"
            )
            if self.inflow is not None:
                self.inflow.yield_to_another(self._taken_over)
        else:
            self._end("the publisher restarted")

    def _end(self, reason: str, frames_sent: int | None = None) -> None:
        self._over = reason
        if self.inflow is not None:
            self.inflow.abandon(reason, frames_sent)

    def _is_worth_saying(
        self, progress: m.Progress, now_s: float, *, is_beat: bool
    ) -> bool:
        """Tell whether to send it now; sets the next turn if it can wait.

        At hundreds of frames per second one message per frame and change would
        cost both sides more than the rest of the protocol.
        """
        said = self._said
        if said is None or (is_beat and not self.is_complete):
            return True
        credit = progress.credit_upto - said.credit_upto
        durable = progress.durable_upto - said.durable_upto
        if credit == durable == 0:
            return False
        batch = self.inflow.batch if self.inflow is not None else 1
        due_s = self._said_s + _DELAY_S
        if max(credit, durable) >= batch or now_s >= due_s:
            return True
        self.next_turn_s = min(self.next_turn_s, due_s)
        self._is_armed = True
        return False

    def _progress(self, series_uid: str) -> m.Progress:
        inflow = self.inflow
        return m.Progress(
            uid=self.uid,
            series_uid=series_uid,
            credit_upto=inflow.credit_upto if inflow else 0,
            received_upto=inflow.sequencer.expected if inflow else 0,
            durable_upto=self.durable_upto,
        )

    def _ask(self, inflow: Inflow, now_s: float) -> Iterator[m.FromRecorder]:
        """Yield the request to resend, and the receipt of the end."""
        if inflow.end_to_confirm:
            inflow.end_to_confirm = False
            yield m.Ended(uid=self.uid, series_uid=inflow.series.series_uid)
        sequencer = inflow.sequencer
        if inflow.arrivals.is_over or not sequencer.waiting:
            return
        is_lost = now_s - self._asked_s > self._lost_s
        if sequencer.attempt > self._attempt or is_lost:
            self._attempt, self._asked_s = sequencer.attempt, now_s
            yield m.Resend(
                uid=self.uid,
                series_uid=inflow.series.series_uid,
                sequence=sequencer.expected,
                attempt=sequencer.attempt,
                folder=self._folder,
                shared=inflow.is_shared,
            )


def user_name() -> str:
    """Return whose process this is; a container's user may have no name."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return ""


def introduce(uid: str, pairing: str | None) -> m.Hello:
    """Return the hello that says who asks to record."""
    return m.Hello(
        version=PROTOCOL_VERSION,
        role="recorder",
        uid=uid,
        pairing=pairing or "",
        host=socket.gethostname(),
        pid=os.getpid(),
        user=user_name(),
    )


_channel = TypeAdapter(Channel)
MOST_CHANNELS = 256
MOST_POSITIONS = 100_000


def check_welcome(topic: str, start: SeriesStart, max_frame_bytes: int) -> None:
    """Check what a publisher welcomes a recorder with.

    Raises
    ------
    TransportError
        If frames like this cannot be received; names the value and the rule.
    """
    fault = _form_fault(start, max_frame_bytes) or _sizes_fault(start)
    fault = fault or _numbers_fault(start) or _channels_fault(start)
    fault = fault if topic else "its topic is empty"
    if fault is not None:
        raise m.unreceivable(fault)


def _form_fault(start: SeriesStart, max_frame_bytes: int) -> str | None:
    grey, rgb = len(start.shape) == 2, len(start.shape) == 3 and start.shape[2] == 3
    if not start.series_uid:
        return "series_uid is empty"
    if not (grey or rgb) or min(start.shape) < 1:
        return f"shape={start.shape} is not (y, x) or (y, x, 3)"
    if start.dtype not in DTYPES:
        return f"dtype={start.dtype!r} is none of {', '.join(DTYPES)}"
    if not m.is_json([start.mda_sequence, start.summary]):
        return "mda_sequence or summary holds what JSON cannot"
    frame_bytes = math.prod(start.shape) * np.dtype(start.dtype).itemsize
    if frame_bytes > max_frame_bytes:
        return (
            f"shape={start.shape} {start.dtype} is {frame_bytes / 1e6:.0f} MB a frame, "
            f"more than transport.max_frame_mb={max_frame_bytes / 1e6:g}"
        )
    return None


def _sizes_fault(start: SeriesStart) -> str | None:
    sizes = start.sizes
    if not set(sizes) <= set("tpcz"):
        return f"sizes={sizes} has an axis that is not t, p, c or z"
    endless = [axis for axis, size in sizes.items() if size is None and axis != "t"]
    if endless:
        return f"sizes={sizes}: only t may be without an end, not {endless[0]}"
    if any(size is not None and size < 1 for size in sizes.values()):
        return f"sizes={sizes}: every length must be >= 1"
    if math.prod(size or 1 for size in sizes.values()) > MOST_PLACES:
        return f"sizes={sizes} are more than {MOST_PLACES} places"
    for axis, name, number, most in (
        ("c", "channels", len(start.channels), MOST_CHANNELS),
        ("p", "positions", len(start.positions), MOST_POSITIONS),
    ):
        if not 1 <= number <= most:
            return f"{name} has {number} entries, must have 1 to {most}"
        if sizes.get(axis, 1) != number:
            return f"sizes={sizes}, but {name} has {number} entries"
    return None


def _numbers_fault(start: SeriesStart) -> str | None:
    if not 1e-3 <= start.pixel_size_um <= 1e3:
        return f"pixel_size_um={start.pixel_size_um} is not from 0.001 to 1000"
    if start.z_step_um is not None and not 0 < start.z_step_um < math.inf:
        return f"z_step_um={start.z_step_um} is not > 0"
    if start.interval_s is not None and not 0 <= start.interval_s < math.inf:
        return f"interval_s={start.interval_s} is not >= 0"
    bits = 8 * np.dtype(start.dtype).itemsize
    if start.bit_depth is not None and not 1 <= start.bit_depth <= bits:
        return f"bit_depth={start.bit_depth} is not from 1 to {bits}, as {start.dtype}"
    if start.planned is not None and not 0 <= start.planned <= MOST_PLACES:
        return f"planned={start.planned} is not from 0 to {MOST_PLACES}"
    if not 0 <= start.started_ns < MOST_COUNT:
        return f"started_ns={start.started_ns} is not from 0 to 2^63 - 1"
    for number, position in enumerate(start.positions):
        place = {"x_um": position.x_um, "y_um": position.y_um}
        if (fault := not_finite(place)) is not None:
            return f"positions[{number}].{fault}"
        if not 0 <= position.field < MOST_COUNT:
            return f"positions[{number}].field={position.field} is not >= 0"
    return None


def _channels_fault(start: SeriesStart) -> str | None:
    """Hold the channels to the rules of the config."""
    names = Counter(channel.name for channel in start.channels)
    if (doubled := names.most_common(1)[0])[1] > 1:
        return f"channels: '{doubled[0]}' is there twice; names must be unique"
    for number, channel in enumerate(start.channels):
        try:
            _channel.validate_python(msgspec.to_builtins(channel))
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(str(part) for part in detail["loc"])
            rule = f"{detail['msg']} (got {detail['input']!r})"
            return f"channels[{number}].{key}: {rule}"
    return None
