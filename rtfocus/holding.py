"""Holding: focus held where rtfocus does not run the plan.

While a camera runs freely, without a plan; and in a plan that somebody's script runs.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import useq
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus
from pymmcore_plus._logger import logger as core_logger
from pymmcore_plus.mda import MDAEngine
from pymmcore_plus.metadata import SummaryMetaV1

from rtfocus.autofocus.actions import FocusActions, FocusEngine
from rtfocus.autofocus.devices import CoreStage, choices_of
from rtfocus.autofocus.hold import Holder, Key, seen_by
from rtfocus.autofocus.plans import unfocused
from rtfocus.errors import ConfigError, MicroscopeError, RtfocusError
from rtfocus.focusing import Focusing, unread
from rtfocus.frame import Estimate
from rtfocus.microscope.mda import FollowedAcquisition

_LIVE = (0, None)


class LiveHold:
    """Holds focus while a camera runs freely: in a thread of its own.

    Every estimate that comes is compared and answered at once, while frames go on
    coming; those exposed while the stage was under way have no z and are ignored.
    """

    def __init__(self, focusing: Focusing, core: CMMCorePlus) -> None:
        self._focusing = focusing
        self._core = core
        self._stage = CoreStage(core)
        self._send: Callable[[NDArray[np.generic], str, float], int]
        self._focuser = focusing.focuser(core, lambda *image: self._send(*image))
        self._news = threading.Condition()
        self._newest: Estimate | None = None
        self._is_over = False
        self._is_on = True
        self._moves: deque[tuple[int, int, float]] = deque(maxlen=64)
        """Begin and end of the newest moves, and where each led."""
        self._thread: threading.Thread | None = None
        self._failure: RtfocusError | None = None

    def start(self, send: Callable[[NDArray[np.generic], str, float], int]) -> None:
        """Find focus, then hold it from now on.

        Raises
        ------
        RtfocusError
            If the microscope or the processor fails, or no focus is found and
            ``autofocus.on_failure`` is ``skip``.
        """
        self._send = send
        verdict = self._focuser.focus(_LIVE)
        self._moves.append((0, time.time_ns(), self._stage.position_um()))
        channel = self._focuser.channel()
        holder = self._focusing.holder(self._focuser, [channel])
        assert holder is not None
        if not verdict.focused:
            if self._focuser.config.on_failure == "skip":
                msg = f"focus was not found: {verdict.reason} (autofocus.on_failure)"
                raise MicroscopeError(msg)
            said = unfocused((None, None), verdict.reason)
            core_logger.warning("%s; so it is not held", said)
            return
        limits = self._focuser.limits_around(None)
        holder.begin(_LIVE, time.time(), verdict.end_um, seen_by(verdict), limits)
        self._focusing.inbox.also = self._take
        self._thread = threading.Thread(target=self._run, args=(holder,), name="hold")
        self._thread.start()

    def z_um(self, captured_ns: int, exposure_ms: float) -> float | None:
        """Return where the stage stood during an exposure; None: it moved.

        A rolling shutter begins up to one more exposure time earlier.
        """
        begin_ns = captured_ns - int(2e6 * exposure_ms)
        stood: float | None = None
        for left_ns, arrived_ns, z_um in tuple(self._moves):
            if captured_ns < left_ns:
                break
            stood = z_um if begin_ns >= arrived_ns else None
        return stood

    def notes(self) -> list[dict[str, Any]]:
        """Return what was decided since the frame before; raises what went wrong."""
        if self._failure is not None:
            raise self._failure
        return self._focuser.journal.drain()

    def stop(self) -> None:
        """Send the stage nowhere any more."""
        with self._news:
            self._is_over = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join()

    def _take(self, estimate: Estimate) -> None:
        with self._news:
            self._newest = estimate
            self._news.notify()

    def _next(self) -> Estimate | None:
        """Wait for an estimate, newest wins; None: it is over."""
        with self._news:
            self._news.wait_for(lambda: self._newest is not None or self._is_over)
            newest, self._newest = self._newest, None
            return None if self._is_over else newest

    def _run(self, holder: Holder) -> None:
        try:
            while (estimate := self._next()) is not None:
                holder.take(estimate)
                if holder.unread is not None:
                    raise unread(holder.unread)
                self._hear()
                if self._is_on and not self._focuser.is_held_by_hardware():
                    self._correct(holder)
        except RtfocusError as error:  # raised by notes(), in the acquisition
            self._failure = error

    def _hear(self) -> None:
        """Do what somebody who looks at the run has asked for."""
        while self._focusing.requests:
            what = self._focusing.requests.popleft()
            self._focuser.journal.write("request", what=what)
            if what == "autofocus":
                self._focuser.tell("no search for focus while the camera runs freely")
            else:
                self._is_on = what == "hold_on"

    def _correct(self, holder: Holder) -> None:
        now_ns = time.time_ns()
        step_um = holder.correction_um(_LIVE, now_ns / 1e9, 0)
        if not step_um:
            return
        begin_ns = time.time_ns()
        for stop_um in self._focuser.way_to(self._stage.position_um() + step_um):
            self._stage.go_to(stop_um)
        self._moves.append((begin_ns, time.time_ns(), self._stage.position_um()))


class StreamEngine(FocusActions):
    """The stock engine of pymmcore-plus, holding focus in a plan of somebody's script.

    Parameters
    ----------
    core
        Runs the plan.
    focusing
        Of this stream.
    following
        Returns what delivers the frames of the plan under way.
    """

    def __init__(
        self,
        core: CMMCorePlus,
        focusing: Focusing,
        following: Callable[[], FollowedAcquisition],
    ) -> None:
        super().__init__(core, **choices_of(core.mda.engine))
        self._focusing = focusing
        self._following = following
        self.focuser = focusing.focuser(
            core, lambda *image: following().send_focus_image(*image)
        )

    @property
    def holds(self) -> bool:
        """Tell whether focus is to be held."""
        return self._focusing.holds

    def setup_sequence(self, sequence: useq.MDASequence) -> SummaryMetaV1 | None:
        """Set the plan up; the drift of a plan before is forgotten."""
        names = [channel.config for channel in sequence.channels]
        self.holder = self._focusing.holder(self.focuser, names)
        return super().setup_sequence(sequence)

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set an event up; what the processor cannot do is said before."""
        if self.holder is not None and self.holder.unread is not None:
            raise unread(self.holder.unread)
        super().setup_event(event)

    def place(self, event: useq.MDAEvent) -> tuple[Key, float]:
        """Return the place in the store, and the slice in um."""
        site, slice_um = self._following().place_of(event)
        return (site, None), slice_um

    def event_iterator(self, events: Iterable[useq.MDAEvent]) -> Iterator[Any]:
        """Combine events where possible, but none across a correction."""
        for stack in self.stacks(events):
            yield from super().event_iterator(stack)


@contextmanager
def holding_engine(engine: StreamEngine) -> Iterator[None]:
    """Let an engine run the plans of its core while the block lasts.

    Where nothing is to be held, an engine of somebody else stays: it knows why.

    Raises
    ------
    ConfigError
        If focus is to be held, and the core has an engine of its own kind, which would
        not run any more.
    """
    runner = engine.mmcore.mda
    before = runner.engine
    stock = (MDAEngine, FocusEngine) if engine.holds else (MDAEngine,)
    if before is not None and type(before) not in stock:
        if not engine.holds:
            yield
            return
        msg = (
            f"the core runs plans by an engine of its own ({type(before).__name__}), "
            "which cannot hold focus; set autofocus.mode: off, or set pymmcore-plus' "
            "MDAEngine before rtfocus.stream"
        )
        raise ConfigError(msg)
    runner.set_engine(engine)
    try:
        yield
    finally:
        if before is not None:
            runner.set_engine(before)
