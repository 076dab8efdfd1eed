"""App: the main loop, wired on one screen.

The processor side, one thread per worker, queues bounded, nothing lost:

::

    microscope ══ frames ══▶ receive ─▶ submit ─▶ estimate ─▶ write ─▶ 3 OME-Zarrs
        ▲  ▲                  (BLOCK: credit)  │      │         │        + journal
        │  └── estimate (newest wins) ─────────┼──────┘         │
        └───── durable, credit ────────────────┼────────────────┘
                                               └─▶ preview (newest wins)

A frame lives in one slot from arrival until it is durable. Slots are the credit
the microscope side sends within, so a slow disk slows the camera's side, never
memory. Focus leaves at ``estimate`` and never waits for restoration or disk.
The loop is `SeriesLoop._run_workers`; its workers' steps are the methods below it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from msgspec.structs import replace

from rtfocus.alarms import Attendance
from rtfocus.autofocus.estimator import FocusReader
from rtfocus.config import Config
from rtfocus.errors import (
    EngineError,
    PeerGoneError,
    PeerLostError,
    RtfocusError,
    TakenOverError,
    TransportError,
    WorkerError,
    WriterError,
    beside,
    replacement,
)
from rtfocus.frame import Role, SeriesEnd, SeriesStart, Slot
from rtfocus.launch import SideProcess, on_free_ports, paired, takes_files
from rtfocus.metrics import STOPPED_HERE
from rtfocus.microscope.delivery import AcquisitionReport
from rtfocus.monitor import FocusLog, Monitor
from rtfocus.processing.device import Ticket
from rtfocus.processing.processor import FrameProcessor, open_processor
from rtfocus.transport.inflow import Gap
from rtfocus.transport.preview import PreviewPublisher, open_preview
from rtfocus.transport.publisher import FramePublisher
from rtfocus.transport.receiver import FrameReceiver
from rtfocus.workers import BoundedQueue, Pipeline, Worker, acting_when
from rtfocus.writers.folder import run_folder
from rtfocus.writers.run import RunWriter, open_writer

Arrival = Ticket | Gap


def acquire(
    config: Config,
    *,
    stop: threading.Event,
    on_publisher: Callable[[FramePublisher], None] = lambda _: None,
    on_focus: Callable[[str], None] = lambda _: None,
) -> AcquisitionReport:
    """Run the microscope side: acquire one series and send it until it is durable.

    `on_focus` gets one line for every move of the focus.
    """
    # A processor side starts without Micro-Manager, which takes long to import.
    from rtfocus.focusing import Focusing
    from rtfocus.holding import LiveHold
    from rtfocus.microscope.acquisition import acquire as acquire_frames

    focusing = Focusing(config, on_focus)
    with (
        FramePublisher(
            paired(config).transport,
            on_estimate=focusing.inbox.take,
            on_ask=lambda act: focusing.asked(act, stop.set),
        ) as publisher,
        acting_when(stop.is_set, publisher.stop),
    ):
        on_publisher(publisher)
        return acquire_frames(
            config,
            publisher,
            stop=stop,
            make_engine=focusing.make_engine,
            make_hold=(
                lambda core: LiveHold(focusing, core) if focusing.holds else None
            ),
        )


def run(
    config: Config,
    *,
    stop: threading.Event,
    abandon: threading.Event,
    on_monitor: Callable[[Monitor], None] = lambda _: None,
    on_preview: Callable[[PreviewPublisher], None] = lambda _: None,
) -> Path | None:
    """Run both sides on this machine, in two processes, for one series.

    Parameters
    ----------
    config
        Its endpoints are replaced by free ports of this machine; the preview's only
        where it is in use.
    stop
        Ends the acquisition; what was acquired is still processed and written.
    abandon
        Ends the processor too; the run folder is finished with what it has.
    on_monitor
        Receives the numbers of the series once, to read them while it runs.
    on_preview
        Receives what viewers connect to, once.
    """
    config = on_free_ports(config)
    monitor = Monitor()
    on_monitor(monitor)
    over = threading.Event()
    with (
        SideProcess(config, "acquire") as microscope,
        acting_when(stop.is_set, microscope.stop),
        acting_when(microscope.failed, abandon.set),
        # Patient: the child's end, not its silence, means that nothing comes.
        acting_when(
            lambda: abandon.is_set() or (microscope.ended() and monitor.series is None),
            over.set,
        ),
        open_preview(config.transport, any_port=True) as preview,
    ):
        on_preview(preview)
        monitor.broken_by = microscope.failure
        folder = _process(config, preview, monitor, stop=over, patient=True)
    if (failure := microscope.failure()) is not None:
        if folder is not None:
            terms = monitor.accounting
            planned = "" if terms.planned is None else f" of {terms.planned} planned"
            msg = f"{failure}; '{folder}' has {terms.written}{planned} frames"
            raise type(failure)(msg) from failure
        raise failure
    return folder


def process(
    config: Config,
    *,
    stop: threading.Event,
    on_monitor: Callable[[Monitor], None] = lambda _: None,
) -> Path | None:
    """Run the processor side for one series; return its run folder.

    Returns None when `stop` was set before a series came.

    Raises
    ------
    RtfocusError
        What went wrong first; the run folder is finished and reported before.
    """
    config = paired(config)
    with open_preview(config.transport) as preview:
        monitor = Monitor()
        on_monitor(monitor)
        return _process(config, preview, monitor, stop=stop)


def serve(
    config: Config,
    *,
    stop: threading.Event,
    on_monitor: Callable[[Monitor], None] = lambda _: None,
    on_finished: Callable[[Path], None] = lambda _: None,
    on_failure: Callable[[RtfocusError], None] = lambda _: None,
    any_port: bool = False,
) -> None:
    """Run the processor side for one series after the other, until `stop`.

    It waits for ever for the next series, and in a series for a microscope side
    that went silent and may come back. What goes wrong with a series ends that
    series alone; it is not recorded again.

    Parameters
    ----------
    config
        As for `process`.
    stop
        Ends the series under way, and the service.
    on_monitor
        Receives the numbers of each series once, before it comes.
    on_finished
        Receives the run folder of each series that went well.
    on_failure
        Receives what went wrong with any other.
    any_port
        Whether the preview may be elsewhere where its port is in use.
    """
    config = paired(config)
    unwanted: dict[str, str] = {}
    with open_preview(config.transport, any_port=any_port) as preview:
        while not stop.is_set():
            monitor = Monitor()
            on_monitor(monitor)
            begun: list[SeriesStart] = []
            try:
                folder = _process(
                    config,
                    preview,
                    monitor,
                    stop=stop,
                    patient=True,
                    unwanted=unwanted,
                    on_series=begun.append,
                )
            except RtfocusError as error:
                if not begun:
                    raise
                if not isinstance(error, PeerGoneError):
                    unwanted[begun[0].series_uid] = str(error)
                on_failure(error)
                continue
            if folder is not None:
                done = f"it is recorded in '{folder.resolve()}'; begin a new one"
                unwanted[begun[0].series_uid] = done
                on_finished(folder)


def _process(
    config: Config,
    preview: PreviewPublisher,
    monitor: Monitor,
    *,
    stop: threading.Event,
    patient: bool = False,
    unwanted: dict[str, str] | None = None,
    on_series: Callable[[SeriesStart], None] = lambda _: None,
) -> Path | None:
    """Process one series; `patient`, `unwanted`: see `FrameReceiver.wait_series`."""
    takes_files(config.run.folder)
    with (
        FrameReceiver(config.transport, monitor.accounting) as receiver,
        closing(open_processor(config)) as processor,
        acting_when(stop.is_set, receiver.stop),
    ):
        series = receiver.wait_series(patient=patient, unwanted=unwanted)
        if series is None:
            return None
        on_series(series)
        loop = SeriesLoop(config, series, receiver, processor, preview, monitor)
        try:
            return loop.run()
        finally:
            preview.end()


class SeriesLoop:
    """One series through the processor, from its start to its finished folder."""

    def __init__(
        self,
        config: Config,
        series: SeriesStart,
        receiver: FrameReceiver,
        processor: FrameProcessor,
        preview: PreviewPublisher,
        monitor: Monitor,
    ) -> None:
        self._config = config
        self._series = series
        self._receiver = receiver
        self._processor = processor
        self._preview = preview
        self._monitor = monitor
        self._focus = FocusReader(config, series, monitor.held)
        self._in_flight: dict[int, Slot] = {}
        """Frames that arrived and are not yet durable, by sequence."""
        self._lost: TransportError | None = None
        """Why the publisher sends no more, if it did not announce the end."""

    def run(self) -> Path:
        """Process the series; the folder is finished even when a worker fails."""
        with Attendance(self._config, self._monitor) as attendance:
            return self._record(attendance)

    def _record(self, attendance: Attendance) -> Path:
        grid = self._processor.start(self._series, self._config.transport.slots)
        folder = run_folder(self._config.run, self._config.store, self._series)
        self._focus_log = FocusLog(folder, self._preview.note_focus)
        with open_writer(
            folder,
            self._series,
            self._config.store,
            grid=grid,
            expects_error=self._processor.expects_error,
            accounting=self._monitor.accounting,
            on_durable=self._durable,
            on_free=self._free,
            provenance={"config": self._config.kept_with_data()},
        ) as writer:
            attendance.folder = folder
            self._receiver.begin(writer.next_sequence, str(folder.resolve()))
            self._monitor.begin(self._series, self._config.camera.offset_counts)
            self._monitor.backends = self._processor.backends()
            shown = self._monitor.shown(self._config, folder, self._receiver.ask)
            self._preview.begin(shown)
            failure = self._run_workers(writer)
            if (replaced := replacement(failure)) is not None:
                # The process that has the series now goes on with the folder.
                writer.abort()
                raise replaced
            if isinstance(failure, PeerLostError):
                msg = (
                    f"{failure}; what came is in '{folder}': to go on, start the same "
                    f"command again; or finish it: rtfocus check {folder} --repair"
                )
                raise PeerLostError(msg) from failure
            end = self._end(failure)
            self._focus_log.end(end)
            with beside(failure, "finishing the run folder"):
                folder = writer.close(end, self._monitor.report())
        if failure is not None:
            raise failure
        return folder

    def _run_workers(self, writer: RunWriter) -> RtfocusError | None:
        """Run the main loop: all workers, to the end of the series."""
        capacity = self._monitor.slots = self._receiver.slots.count
        to_estimate: BoundedQueue[Arrival] = BoundedQueue("estimate", capacity)
        to_write: BoundedQueue[Arrival] = BoundedQueue("write", capacity)
        self._monitor.queues = (to_estimate, to_write)
        self._writer = writer
        try:
            Pipeline(
                [
                    Worker("receive", self._arrivals(), self._submit, [to_estimate]),
                    Worker("estimate", to_estimate, self._publish, [to_write]),
                    Worker("write", to_write, self._write),
                ],
                on_abort=self._receiver.stop,
            ).run()
            writer.drain()
        except (WorkerError, WriterError) as error:
            # What the writer holds becomes durable or is counted by it. The rest
            # is counted here: it arrived and never came to the writer, or to anybody.
            writer.settle()
            with suppress(TransportError):
                for arrived in self._receiver.frames():
                    if isinstance(arrived, Slot):
                        self._in_flight[arrived.frame().sequence] = arrived
            if number := len(self._in_flight):
                self._monitor.accounting.count("in_error", "aborted", number)
            return error
        return self._lost

    def _arrivals(self) -> Iterator[Slot | Gap]:
        """Yield what arrives, to the last; a lost publisher fails no worker."""
        try:
            yield from self._receiver.frames()
        except TakenOverError:
            # The folder belongs to another process by now.
            raise
        except TransportError as error:
            self._lost = error

    def _submit(self, arrived: Slot | Gap) -> Arrival:
        """Hand a frame to the processor; returns at once while it has room."""
        if isinstance(arrived, Gap):
            return arrived
        frame, pixels = arrived.frame(), arrived.pixels
        self._in_flight[frame.sequence] = arrived
        self._monitor.arrived(arrived)
        reason = self._receiver.wants_raw_only()
        unrestored = None if reason is None else f"raw_only: {reason}"
        if frame.role is Role.FOCUS:
            unrestored = "focus image"
        ticket = self._processor.submit(arrived, unrestored=unrestored)
        if not ticket.result.done() and (look := self._focus.look(frame, pixels)):
            self._receiver.send_estimate(look)
        return ticket

    def _publish(self, arrived: Arrival) -> Arrival:
        """Send the focus estimate to the microscope side as soon as it is there."""
        if isinstance(arrived, Gap):
            return arrived
        try:
            estimated = arrived.estimate.result()
        except EngineError:
            # The frame's result fails too, and there the failure is recorded.
            return arrived
        slot, frame = arrived.slot, arrived.slot.frame()
        estimate = None
        if estimated is not None:
            estimate = self._focus.read(frame, slot.pixels, *estimated)
            self._receiver.send_estimate(estimate)
            self._monitor.estimated(slot, estimate)
            self._preview.offer(slot.pixels, estimate, self._monitor.snapshot())
        self._preview.note(frame, estimate)
        return arrived

    def _write(self, arrived: Arrival) -> None:
        """Store a frame, or the fact that it is missing, at its own index."""
        if isinstance(arrived, Gap):
            self._writer.mark_missing(arrived.first, arrived.count, arrived.reason)
            return
        slot = arrived.slot
        try:
            result = arrived.result.result()
        except EngineError as error:
            self._writer.record_error(slot, str(error))
            return
        self._monitor.finished(slot, result)
        self._preview.show(slot.frame(), slot.pixels, result)
        self._monitor.focus = self._focus_log.take(slot) or self._monitor.focus
        if slot.frame().role is Role.FOCUS:
            self._writer.record_focus(slot, result)
        else:
            self._writer.append(slot, result)
        status = self._writer.status()
        self._monitor.free_bytes = status.free_bytes
        self._monitor.time_to_full_s = status.time_to_full_s
        self._monitor.free_slots = self._receiver.slots.free

    def _durable(self, sequence: int) -> None:
        """Tell the microscope side that it may forget this frame."""
        slot = self._in_flight.pop(sequence, None)
        if slot is not None:
            self._monitor.committed(slot)
        self._monitor.durable_upto = sequence + 1
        self._receiver.report_durable(sequence)

    def _free(self, slot: Slot) -> None:
        """Take a slot back from the writer, which has accounted for its frame."""
        self._in_flight.pop(slot.frame().sequence, None)
        self._receiver.release(slot)

    def _end(self, failure: RtfocusError | None) -> SeriesEnd:
        end = self._receiver.end
        if end is not None and end.reason == STOPPED_HERE:
            # The end was not announced: perhaps the other side is gone.
            failure = failure or self._monitor.broken_by()
        if failure is None and end is not None:
            return replace(end, warnings=(*end.warnings, *self._processor.lost()))
        return SeriesEnd(
            version=self._series.version,
            series_uid=self._series.series_uid,
            frames_sent=self._monitor.accounting.acquired,
            reason=STOPPED_HERE if failure is None else str(failure),
        )
