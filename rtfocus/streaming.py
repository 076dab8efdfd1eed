"""Streaming: into a processor from your own script, and what comes out of one."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import useq
from numpy.typing import NDArray
from psygnal import EmitLoopError, Signal, SignalInstance
from pymmcore_plus import CMMCorePlus

from rtfocus.autofocus.actions import FocusActions
from rtfocus.autofocus.devices import checked_core, end_abandoned
from rtfocus.autofocus.plans import focus_plans
from rtfocus.config import Config, load_config
from rtfocus.errors import (
    ConfigError,
    IncompleteError,
    MicroscopeError,
    RtfocusError,
    WriterError,
    one_line,
)
from rtfocus.files import path_given
from rtfocus.focusing import Focusing
from rtfocus.frame import Act, Estimate
from rtfocus.holding import StreamEngine, holding_engine
from rtfocus.launch import SideProcess, on_free_ports, paired
from rtfocus.microscope.delivery import AcquisitionReport
from rtfocus.microscope.mda import FollowedAcquisition
from rtfocus.runs import Run, open_run
from rtfocus.transport.preview import open_preview
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.viewer import PreviewViewer
from rtfocus.workers import Newest, Wait, acting_when

_LOOK_S = 0.1
"""How often a waiting call looks whether it should stop."""

logger = logging.getLogger(__name__)


def estimates(
    endpoint: str = "tcp://127.0.0.1:5573",
    *,
    timeout_s: float | None = None,
    stop: threading.Event | None = None,
    curve_keys: Path | str | None = None,
) -> Iterator[Estimate]:
    """Yield focus estimates of a running processor, newest wins.

    They come from its preview socket, at most one per ``transport.preview.interval_s``,
    and never slow the recording. An estimate that is not taken in time is lost.

    Parameters
    ----------
    endpoint
        ``transport.preview.endpoint`` of the processor.
    timeout_s
        End after this time without a new estimate; None: wait for ever.
    stop
        Set it from another thread to end the iteration.
    curve_keys
        Folder of keys, if the processor uses keys.

    Raises
    ------
    ConfigError
        If the endpoint, the keys or the timeout cannot be used.
    ProtocolError
        If another version of rtfocus, or something else, publishes there.

    Examples
    --------
    ::

        for estimate in rtfocus.estimates(timeout_s=60):
            print(estimate.sequence, estimate.defocus_um, estimate.confidence)
    """
    keys = None if curve_keys is None else path_given(curve_keys, "curve_keys")
    given: object = timeout_s
    if given is not None and not (isinstance(given, Real) and float(given) >= 0):
        msg = f"timeout_s is {timeout_s!r}; give seconds from 0, or None to wait on"
        raise ConfigError(msg)
    with PreviewViewer(endpoint, keys) as viewer:
        wait = Wait()
        last: Estimate | None = None
        while stop is None or not stop.is_set():
            preview = viewer.newest(_LOOK_S)
            estimate = None if preview is None else preview.header.estimate
            # The estimate of a frame comes alone, and again with its picture.
            if estimate is not None and estimate != last:
                yield estimate
                last = estimate
                wait.restart()
            elif timeout_s is not None and wait.look() > timeout_s:
                return


def stream(
    core: CMMCorePlus,
    config: Config | Path | str,
    *,
    processor: Literal["here", "configured"] = "here",
) -> "LiveStream":
    """Send what your own script acquires to a processor, beside whatever else it does.

    Every plan that runs on `core` within the block becomes a series: estimated,
    restored and recorded like one of ``rtfocus acquire``. ``core.mda.run`` returns
    when its frames are durable. Your engine, your handlers and your own files stay
    as they are. If the processor is too slow a frame waits for it, as
    ``transport.on_stall`` says. Instead of pymmcore-plus' stock engine, one of
    rtfocus runs the plans while the block lasts: it carries out an autofocus_plan of
    device ``rtfocus`` and holds focus with ``autofocus.mode: hold``.

    Parameters
    ----------
    core
        A core with its devices loaded.
    config
        Run, channels, camera, processing, store and transport are used; microscope
        and acquisition are not.
    processor
        ``here``: start one as a separate process on this machine, on free ports, and
        end it with the block. ``configured``: use one that runs already, here or
        elsewhere (``rtfocus process``), at the endpoints of `config`.

    Returns
    -------
    LiveStream
        A context manager; ``estimateReady``, ``reports`` and ``runs`` are yours.

    Raises
    ------
    ConfigError
        If `config`, `core` or `processor` cannot be used.
    IncompleteError
        At the end of the block, if a plan broke off or a camera lost images; what
        was acquired is recorded. Not for a plan that was canceled.

    Examples
    --------
    ::

        with rtfocus.stream(core, "my.yaml") as live:
            live.estimateReady.connect(print)
            core.mda.run(sequence)
        print(live.runs[0].outcome)
    """
    checked_core(core)
    if processor not in ("here", "configured"):
        msg = f"processor {processor!r} is none; choose 'here' or 'configured'"
        raise ConfigError(msg)
    settings = config if isinstance(config, Config) else load_config(config)
    if processor == "here":
        settings = _with_free_preview(on_free_ports(settings))
    else:
        settings = paired(settings)
    return LiveStream(core, settings, starts_processor=processor == "here")


class LiveStream:
    """A script's own acquisitions on their way into a processor; see `stream`.

    May stand among the outputs of ``core.mda.run(sequence, output=[live, "x.zarr"])``,
    which changes nothing: within the block it has the frames already, in the thread
    that acquires. Outside it has none, and says so.
    """

    estimateReady = Signal(Estimate)  # noqa: N815 (named as pymmcore-plus' signals)
    """Emitted with each focus estimate, newest wins, from a thread of its own."""

    def __init__(
        self, core: CMMCorePlus, config: Config, *, starts_processor: bool
    ) -> None:
        self._core = core
        self._config = config
        self._starts_processor = starts_processor
        self._following: FollowedAcquisition | None = None
        self._thread: threading.Thread | None = None
        """Runs the plan under way."""
        self._idle = threading.Event()
        self._idle.set()
        self._failure: Exception | None = None
        self._child: SideProcess | None = None
        self._opened = ExitStack()
        self._is_open = False
        self.reports: list[AcquisitionReport] = []
        """How each plan went, in order."""

    @property
    def runs(self) -> list[Run]:
        """The run folders of the plans so far, where they lie on this machine."""
        uids = [report.series_uid for report in self.reports]
        by_uid = {run.series.series_uid: run for run in self._run_folders()}
        return [by_uid[uid] for uid in uids if uid in by_uid]

    def sequenceStarted(self, *_: object) -> None:  # noqa: N802 (pymmcore-plus' name)
        """Cancel a plan whose frames would be lost: outside of the stream's block."""
        if self._is_open:
            return
        logger.error(
            "the plan is canceled: rtfocus.stream is an output of it and records "
            "nothing outside of its block; write `with rtfocus.stream(...) as live:` "
            "and run the plan within"
        )
        self._core.mda.cancel()

    def frameReady(self, *_: object) -> None:  # noqa: N802 (pymmcore-plus' name)
        """Do nothing: the frame was taken in the thread that acquires."""

    def sequenceFinished(self, *_: object) -> None:  # noqa: N802 (pymmcore-plus' name)
        """Do nothing: the stream is connected to the core already."""

    def __enter__(self) -> Self:
        self._refuse_in_use()
        self._failure = None
        with ExitStack() as opened:
            opened.callback(setattr, self, "_is_open", False)
            focusing = Focusing(self._config, logger.info)
            self._publisher = self._open_publisher(opened, focusing)
            engine = StreamEngine(self._core, focusing, self._followed)
            opened.enter_context(holding_engine(engine))
            if self._starts_processor:
                self._child = opened.enter_context(SideProcess(self._config, "process"))
                # A processor that has ended with an error is not waited for.
                opened.enter_context(
                    acting_when(self._child.failed, self._publisher.stop)
                )
            self._follow_plans(opened)
            self._is_open = True
            self._opened = opened.pop_all()
        return self

    def _open_publisher(self, opened: ExitStack, focusing: Focusing) -> FramePublisher:
        """Open what sends frames, and hands estimates to listeners and autofocus."""
        emit = opened.enter_context(_telling(self.estimateReady.emit))

        def take_estimate(estimate: Estimate) -> None:
            if not estimate.is_early:
                emit(estimate)
            following = self._following
            # Late ones of the plan before answer for no image of this one.
            if following and estimate.series_uid == following.series_uid:
                focusing.inbox.take(estimate)

        publisher = FramePublisher(
            self._config.transport,
            on_estimate=take_estimate,
            on_ask=lambda act: self._do_request(focusing, act),
            # A processor of its own is followed by no other.
            waits_for_another=not self._starts_processor,
        )
        return opened.enter_context(publisher)

    def _follow_plans(self, opened: ExitStack) -> None:
        """Listen to the plans that the core runs, until the stream is closed."""
        events = self._core.mda.events
        for signal, slot in (
            (events.sequenceStarted, self._begin),
            (events.frameReady, self._take),
            (events.sequenceFinished, self._finish),
        ):
            # Before handlers of the script: one that fails keeps those after it
            # from being called, and a plan's end would be waited for for ever.
            first = {"priority": 1} if isinstance(signal, SignalInstance) else {}
            signal.connect(slot, **first)
            opened.callback(signal.disconnect, slot)

    def _refuse_in_use(self) -> None:
        if self._is_open:
            msg = "this stream is in use; end its block before another, or make another"
            raise ConfigError(msg)
        if self._core.mda.is_running():
            msg = "a plan runs on this core already; begin the stream before it"
            raise MicroscopeError(msg)

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        with self._opened:
            if error is not None:
                self._publisher.stop()
                self._core.mda.cancel()
            if self._thread is threading.current_thread():
                # Ctrl-C has left the plan's run, which signals its end no more.
                end_abandoned(self._core.mda)
            while (plan := _begun_plan(self._core)) is not None:
                if error is not None:
                    # Before its first signal a cancellation is lost.
                    self._core.mda.cancel()
                plan.join(_LOOK_S)
            while not self._idle.wait(_LOOK_S):
                continue
        if self._child is not None and not self._child.failed():
            for line in self._child.said.splitlines():
                logger.warning("processor side: %s", line)
        if error is None and self._failure is not None:
            raise self._failure

    def _followed(self) -> FollowedAcquisition:
        assert self._following is not None, "plans run between their start and end"
        return self._following

    def _do_request(self, focusing: Focusing, act: Act) -> None:
        """Do what somebody asks for who looks at the run; any thread."""
        engine = self._core.mda.engine
        if act == "stop" or isinstance(engine, StreamEngine):
            focusing.asked(act, self._core.mda.cancel)
        else:
            name = type(engine).__name__
            logger.warning("'%s' was asked for; this core's %s does none", act, name)

    def _begin(self, sequence: useq.MDASequence, summary: Mapping[str, Any]) -> None:
        self._idle.clear()
        self._thread = threading.current_thread()
        self._following = FollowedAcquisition(
            self._config, self._core, sequence, self._publisher
        )
        engine = self._core.mda.engine
        if isinstance(engine, FocusActions):
            self._following.focus_notes = engine.focus_notes
        elif focus_plans(sequence):
            msg = (
                "the plan asks 'rtfocus' for focus, which the engine of this core "
                f"({type(engine).__name__}) does not answer; set pymmcore-plus' "
                "MDAEngine before rtfocus.stream, or leave autofocus_plan out"
            )
            self._following.give_up(ConfigError(msg))
            return
        self._following.begin(summary)

    def _take(
        self, pixels: NDArray[Any], event: useq.MDAEvent, meta: Mapping[str, Any]
    ) -> None:
        if self._following is not None:
            self._following.take(pixels, event, meta)

    def _finish(self, _sequence: useq.MDASequence) -> None:
        following, self._following, self._thread = self._following, None, None
        try:
            if following is not None:
                self.reports.append(following.finish())
                outcome = self.reports[-1].outcome
                if not (outcome.is_complete or outcome.was_stopped):
                    raise IncompleteError(str(outcome))
        except Exception as error:  # raised at the end of the block
            # A processor that ended says best why nobody takes the frames.
            of_child = self._child and self._child.failure()
            logger.error("the stream failed: %s", of_child or error)
            self._failure = self._failure or of_child or _as_rtfocus_error(error)
        finally:
            self._idle.set()

    def _run_folders(self) -> Iterator[Run]:
        for folder in sorted(self._config.run.folder.glob("*.rtfocus")):
            try:
                yield open_run(folder)
            except WriterError:
                continue


def _begun_plan(core: CMMCorePlus) -> threading.Thread | None:
    """Return the thread of a plan that ``core.run_mda`` has begun; None: there is none.

    It opens the plan's files before it says that the plan starts. Until then nothing
    but its target tells that there will be frames.
    """
    # No public name tells what a thread runs.
    here, run = threading.current_thread(), core.mda.run
    threads = (thread for thread in threading.enumerate() if thread is not here)
    return next((one for one in threads if getattr(one, "_target", None) == run), None)


def _as_rtfocus_error(error: Exception) -> Exception:
    """Return what a plan ended with as an error of rtfocus; its cause is kept."""
    if isinstance(error, RtfocusError):
        return error
    failure = MicroscopeError(f"the plan failed: {one_line(error)}")
    failure.__cause__ = error
    return failure


def _with_free_preview(config: Config) -> Config:
    """Return `config` with its preview at another port if its own is in use."""
    with open_preview(config.transport, any_port=True) as preview:
        return config.with_preview(endpoint=preview.endpoint, control=preview.control)


@contextmanager
def _telling(emit: Callable[[Estimate], None]) -> Iterator[Callable[[Estimate], None]]:
    """Yield what takes estimates; the newest is emitted from a thread of its own.

    A listener may take its time. What is left at the end is still emitted.
    """
    newest: Newest[Estimate] = Newest()

    def tell() -> None:
        while (estimate := newest.wait()) is not None:
            try:
                emit(estimate)
            except EmitLoopError:
                logger.exception("a listener of estimateReady failed")

    thread = threading.Thread(target=tell, name="estimates")
    thread.start()
    try:
        yield newest.put
    finally:
        newest.close()
        thread.join()
