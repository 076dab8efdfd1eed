"""Holding: focus held where rtfocus does not run the plan.

While a camera runs freely, without a plan; and in a plan that a user's script runs.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import useq
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus
from pymmcore_plus._logger import logger as core_logger
from pymmcore_plus.mda import MDAEngine

from rtfocus.autofocus.devices import CoreStage, hand_back, take_over
from rtfocus.autofocus.execution import FocusStage, Verdict
from rtfocus.autofocus.focuser import Focuser
from rtfocus.autofocus.hold import Holder, Key, seen_by, unread
from rtfocus.autofocus.plans import unfocused
from rtfocus.errors import ConfigError, MicroscopeError, RtfocusError, TransportError
from rtfocus.focusing import FocusEngine, Focusing, LoopActions
from rtfocus.frame import Estimate, FocusReading
from rtfocus.machine import RUN_CLOCK
from rtfocus.microscope.mda import FollowedAcquisition
from rtfocus.workers import Newest

_HERE = (0, None)
"""The one place that is held without a plan."""
_PAUSE_S = 30.0
"""After a search for lost focus; after the second in a row twice that, and so on."""
MOST_SEARCHES = 5
"""In a row, without an image in between that shows the place again."""


class HeldPlace:
    """The one place that is held without a plan: followed, and found again if lost.

    Where its images cannot be explained any more, focus is searched from where the
    stage stands, within the limits of the first search: at once, then after pauses,
    at last no more. From a search that finds none the stage comes back: what hides the
    specimen may go away. A processor that lags ends a search, a stage that fails all.
    While a focus device holds in hardware nothing is moved; afterwards focus is
    searched anew, as the device has left the stage anywhere.

    Parameters
    ----------
    focuser
        Knows limits and ways of the stage, and tells the user.
    holder
        Follows the place.
    stage
        Moved between images.
    search
        Finds focus.
    """

    def __init__(
        self,
        focuser: Focuser,
        holder: Holder,
        stage: FocusStage,
        search: Callable[[], Verdict],
    ) -> None:
        self.holder = holder
        self._focuser, self._stage, self._search = focuser, stage, search
        self._searches = 0
        """That did not lead to an image of the place so far."""
        self._not_before_s = 0.0
        self.is_paused = False
        """Whether a focus device holds the focus, as far as `follow` has seen."""

    def begin(self, verdict: Verdict | None, time_s: float) -> None:
        """Hold what a search found at a time; None: nothing, the next one waits."""
        if verdict is None:
            self._searches = max(self._searches, 1)
        if self._searches:
            self._not_before_s = time_s + _PAUSE_S * 2 ** (self._searches - 1)
        if verdict is not None:
            limits = self._focuser.limits_around(None)
            self.holder.begin(_HERE, time_s, verdict.end_um, seen_by(verdict), limits)

    def follow(self, time_s: float) -> float:
        """Correct the stage, or search, or pause; returns the correction in um.

        Parameters
        ----------
        time_s
            Now, on the clock of the images.

        Raises
        ------
        RtfocusError
            If the stage fails, or images cannot be taken or read.
        """
        if self._held_by_hardware():
            return 0.0
        holder = self.holder
        step_um = holder.correction_um(_HERE, time_s, int(time_s * 1e9))
        if holder.explains(_HERE):
            self._searches = 0
        if step_um:
            self._go_to(self._stage.position_um() + step_um)
        elif not holder.knows(_HERE) or holder.lost(_HERE):
            if self._searches < MOST_SEARCHES and time_s >= self._not_before_s:
                number = self._searches + 1
                self._find(
                    time_s, f"lost and searched again ({number} of {MOST_SEARCHES})"
                )
        return step_um

    def search(self, time_s: float, why: str) -> None:
        """Search now, however many there were, and tell `why`; raises as `follow`."""
        if self._held_by_hardware():
            self._focuser.tell(f"focus is not {why}: a focus device holds it")
            return
        self._searches = 0
        self._find(time_s, why)

    def _held_by_hardware(self) -> bool:
        """Tell whether a focus device holds the focus; then nothing here is known."""
        was_paused = self.is_paused
        self.is_paused = self._focuser.is_held_by_hardware()
        if self.is_paused and not was_paused:
            self.holder.forget(_HERE)
            self._searches, self._not_before_s = 0, 0.0
            device = self._focuser.core.getAutoFocusDevice()
            self._focuser.tell(
                f"'{device}' holds the focus in hardware: nothing is moved until its "
                "continuous focus is switched off, then focus is searched again"
            )
        return self.is_paused

    def _find(self, time_s: float, why: str) -> None:
        self._searches += 1
        self._focuser.tell(f"focus is {why}")
        stood_um = self._stage.position_um()
        begun_s = time.monotonic()
        verdict = self._focused_verdict()
        ended_s = time_s + time.monotonic() - begun_s
        self.begin(verdict, ended_s)
        if verdict is not None:
            return
        self._go_to(stood_um)
        if self.holder.knows(_HERE) and not self.holder.lost(_HERE):
            self._focuser.tell("focus is held on as before the search")
            return
        next_in = f"searched again in {self._not_before_s - ended_s:.0f} s"
        then = next_in if self._searches < MOST_SEARCHES else "not searched any more"
        self._focuser.tell(f"focus is not held until images show it; {then}")

    def _focused_verdict(self) -> Verdict | None:
        try:
            verdict = self._search()
        except TransportError as error:  # a processor that lags ends no run
            self._focuser.tell(f"autofocus failed: {error}")
            return None
        return verdict if verdict.focused else None

    def _go_to(self, z_um: float) -> None:
        for stop_um in self._focuser.way_to(z_um):
            self._stage.go_to(stop_um)


def estimate_of(reading: FocusReading, sequence: int, z_um: float) -> Estimate:
    """Return a reading of this process as an estimate, for a `Holder`."""
    return Estimate(
        series_uid="local",
        sequence=sequence,
        level=None,
        defocus_um=reading.defocus_um,
        signed=reading.signed,
        confidence=0.0,
        foreground=1.0,
        z_um=z_um,
        z_offset_um=0.0,
        index={"t": sequence, "p": 0, "c": 0, "z": 0},
        captured_ns=RUN_CLOCK.now_ns(),
        estimated_ns=RUN_CLOCK.now_ns(),
        focus=reading,
    )


class _WatchedStage(CoreStage):
    """The focus stage, and where it was when."""

    def __init__(self, core: CMMCorePlus) -> None:
        super().__init__(core)
        self._moves: deque[tuple[int, int, float]] = deque(maxlen=64)
        """Begin and end of the newest moves, and where each led."""

    @property
    def arrived_ns(self) -> int:
        """When the newest move ended."""
        return self._moves[-1][1]

    def note(self, left_ns: int) -> None:
        """Note that the stage has stood since now, and moved from a time until now."""
        self._moves.append((left_ns, RUN_CLOCK.now_ns(), self.position_um()))

    def go_to(self, z_um: float) -> None:
        """Go there and wait for the end of the move."""
        left_ns = RUN_CLOCK.now_ns()
        super().go_to(z_um)
        self.note(left_ns)

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


class LiveHold:
    """Holds focus while a camera runs freely: in a thread of its own.

    Every estimate that comes is compared and answered at once, while frames go on
    coming; those exposed while the stage was under way have no z and are ignored.
    Lost focus is searched in these frames too.
    """

    def __init__(self, focusing: Focusing, core: CMMCorePlus) -> None:
        self._focusing = focusing
        self._stage = _WatchedStage(core)
        self._send: Callable[[NDArray[np.generic], str, float], int]
        self._focuser = focusing.focuser(core, lambda *image: self._send(*image))
        self._news: Newest[Estimate] = Newest()
        self._is_over = False
        self._is_on = True
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
        verdict = self._focuser.focus(_HERE)
        self._stage.note(0)
        channel = self._focuser.channel()
        holder = self._focusing.holder(self._focuser, [channel])
        assert holder is not None
        if not verdict.focused:
            if self._focuser.config.on_failure == "skip":
                msg = f"focus was not found: {verdict.reason} (autofocus.on_failure)"
                raise MicroscopeError(msg)
            text = unfocused((None, None), verdict.reason)
            core_logger.warning("%s; so it is not held, and searched again later", text)
        search = partial(self._search, channel)
        place = HeldPlace(self._focuser, holder, self._stage, search)
        place.begin(verdict if verdict.focused else None, RUN_CLOCK.now_s())
        self._focusing.inbox.also = self._news.put
        self._thread = threading.Thread(target=self._run, args=(place,), name="hold")
        self._thread.start()

    def z_um(self, captured_ns: int, exposure_ms: float) -> float | None:
        """Return where the stage stood during an exposure; None: it moved."""
        return self._stage.z_um(captured_ns, exposure_ms)

    def notes(self) -> list[dict[str, Any]]:
        """Return what was decided since the frame before; raises what went wrong."""
        if self._failure is not None:
            raise self._failure
        return self._focuser.journal.drain()

    def stop(self) -> None:
        """Send the stage nowhere any more."""
        self._is_over = True
        self._news.close()
        self._focusing.inbox.wake()
        if self._thread is not None:
            self._thread.join()

    def _run(self, place: HeldPlace) -> None:
        try:
            while (estimate := self._news.wait()) is not None and not self._is_over:
                place.holder.take(estimate)
                if place.holder.unread is not None:
                    raise unread(place.holder.unread)
                self._hear(place)
                if self._is_on:
                    place.follow(RUN_CLOCK.now_s())
        except RtfocusError as error:  # raised by notes(), in the acquisition
            self._failure = error

    def _hear(self, place: HeldPlace) -> None:
        """Do what viewers of the run have asked for."""
        while self._focusing.requests:
            act = self._focusing.requests.popleft()
            self._focuser.journal.write("request", what=act)
            if act == "autofocus":
                place.search(RUN_CLOCK.now_s(), "searched as asked for")
            else:
                self._is_on = act == "hold_on"

    def _search(self, channel: str) -> Verdict:
        """Search in the frames of the running camera."""
        return self._focuser.focus(
            _HERE,
            channel=channel,
            stage=self._stage,
            look=self._look,
        )

    def _look(self, _z_um: float) -> FocusReading:
        """Return the reading of the first frame exposed where the stage stands."""

        def is_from_here(estimate: Estimate) -> bool:
            is_read = estimate.focus is None or estimate.focus.refusal != "left_out"
            stood = estimate.z_um is not None
            is_new = estimate.captured_ns >= self._stage.arrived_ns
            return self._is_over or (is_read and stood and is_new)

        timeout_s = self._focuser.config.request_timeout_s
        estimate = self._focusing.inbox.wait_for(is_from_here, timeout_s)
        if self._is_over:
            msg = "the camera stopped"
            raise TransportError(msg)
        if estimate is None:
            msg = (
                f"no frame of the camera was read within {timeout_s:g} s of a move; "
                "does the processor keep up? (autofocus.request_timeout_s)"
            )
            raise TransportError(msg)
        if estimate.focus is None:
            raise unread(estimate.sequence)
        return estimate.focus


class StreamEngine(LoopActions, FocusEngine):
    """The stock engine of pymmcore-plus, holding focus in a plan of a user's script.

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
        focuser = focusing.focuser(
            core, lambda *image: following().send_focus_image(*image)
        )
        super().__init__(core, focuser)
        self._focusing = focusing
        self._following = following

    @property
    def holds(self) -> bool:
        """Tell whether focus is to be held."""
        return self._focusing.holds

    def place(self, event: useq.MDAEvent) -> tuple[Key, float]:
        """Return the place in the store, and the slice in um."""
        site, slice_um = self._following().place_of(event)
        return (site, None), slice_um

    def lose(self, number: int) -> None:
        """Count images that never came."""
        self._following().lose(number)


@contextmanager
def holding_engine(engine: StreamEngine) -> Iterator[None]:
    """Let an engine run the plans of its core while the block lasts.

    Where nothing is to be held, an engine that is not ours stays.

    Raises
    ------
    ConfigError
        If focus is to be held, and the core has an engine of its own kind, which would
        not run any more.
    """
    before = engine.mmcore.mda.engine
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
    take_over(engine)
    try:
        yield
    finally:
        hand_back(engine)
