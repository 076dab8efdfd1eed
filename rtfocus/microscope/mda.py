"""MDA: runs a useq plan on a core, or follows one that a user's script runs there."""

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import useq
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.experimental.unicore import UniMMCore
from pymmcore_plus.mda import MDARunner

from rtfocus.config import Config
from rtfocus.errors import ConfigError, MicroscopeError, RtfocusError
from rtfocus.frame import FrameHeader, Role
from rtfocus.machine import RUN_CLOCK
from rtfocus.metrics import CANCELED, COMPLETED
from rtfocus.microscope.delivery import (
    AcquisitionReport,
    Delivery,
    Exposure,
    FrameSink,
    Observations,
    SeriesChangedError,
    age_ns,
    camera_lost_images,
    frame_json,
    image_number,
    overflow_error,
    pixel_size_change,
    untold,
)
from rtfocus.microscope.engine import RecordingEngine, SequenceEngine, SetUps
from rtfocus.microscope.plan import EVENT_INDEX, lay_out, takes_image
from rtfocus.microscope.series import (
    Complaints,
    camera_geometry,
    describe_series,
    warn_of_silent_stage,
)
from rtfocus.workers import acting_when


class PlannedAcquisition:
    """One useq plan from its first event to its report.

    pymmcore-plus swallows what a frame handler raises and then reports success.
    So the handler never raises: the first failure is kept, the run cancelled, and
    the failure raised once the hardware has come to rest.
    """

    def __init__(
        self,
        config: Config,
        core: UniMMCore,
        sequence: useq.MDASequence,
        sink: FrameSink,
        on_frame: Callable[[FrameHeader], None],
        make_engine: Callable[..., RecordingEngine] = RecordingEngine,
    ) -> None:
        self._config = config
        self._core = core
        self._sequence = sequence
        self._sink = sink
        self._on_frame = on_frame
        self._observations = Observations()
        self._complaints = Complaints()
        self._stop = threading.Event()
        self._engine = make_engine(
            core,
            on_start=self._begin,
            on_lost=self.lose,
        )
        self._exposing: SequenceEngine = self._engine
        """Knows where the stage stands in a hardware sequence."""
        self._engine.send_focus_image = self.send_focus_image
        self._engine.place_of = self._place_of
        self._engine.failed_settings = lambda: self._complaints.failed_settings
        self.focus_notes: Callable[[], list[dict[str, Any]]] = self._engine.focus_notes
        """Returns what autofocus did since it was asked last."""
        self._last_planned_s: float | None = None
        self._clock_offset_s = 0.0
        self._delivery: Delivery | None = None
        self._failure: Exception | None = None
        self._broken_off: str | None = None

    def run(self, stop: threading.Event) -> AcquisitionReport:
        """Run the plan to its end, its cancellation or its failure.

        Raises
        ------
        RtfocusError
            What went wrong first, after the sink was told the end.
        """
        runner = self._core.mda
        self._stop = stop
        before = runner.set_engine(self._engine)
        runner.events.frameReady.connect(self._take)
        started = time.perf_counter()
        try:
            with (
                self._complaints.heard(),
                # Again and again: before the run begins, a cancellation is lost.
                acting_when(stop.is_set, runner.cancel, again=True),
            ):
                self._run_sequence(runner)
        finally:
            runner.events.frameReady.disconnect(self._take)
            if before is not None:
                runner.set_engine(before)
        reason = self._reason(runner)
        return self._finish(reason, time.perf_counter() - started)

    def _run_sequence(self, runner: MDARunner) -> None:
        try:
            runner.run(self._sequence)
        except RtfocusError as error:
            self._fail(error)
        except MemoryError as error:
            self._fail(overflow_error(self._core), cause=error)
        # Whatever a device raised, in Python or C++, ends the run in order.
        except Exception as error:
            msg = f"Micro-Manager failed during the acquisition: {error}"
            self._fail(MicroscopeError(msg), cause=error)

    def _begin(
        self, sequence: useq.MDASequence, summary: Mapping[str, Any] | None
    ) -> None:
        """Announce the series; the hardware is set up, the clock not started."""
        if (failed := self._complaints.first_failed) is not None:
            msg = f"the plan's setup cannot be made, nothing was exposed: {failed}"
            raise MicroscopeError(msg)
        self._plan = lay_out(sequence)
        self._geometry = camera_geometry(self._core)
        series = describe_series(
            self._config,
            self._core,
            self._geometry,
            plan=self._plan,
            summary=summary,
        )
        self._delivery = Delivery(series, self._sink, self._on_frame)

    def _take(
        self, pixels: NDArray[np.generic], event: useq.MDAEvent, meta: Mapping[str, Any]
    ) -> None:
        """Deliver one frame; the handler of pymmcore-plus, which never raises."""
        if self._failure is not None or self._broken_off is not None:
            return
        try:
            assert self._delivery is not None
            if meta.get("hardware_triggered", False):
                # Within a hardware sequence the camera itself cannot be changed. The
                # core knows its objective, of which nothing is asked.
                now_um = float(self._core.getPixelSizeUm(True))
                change = pixel_size_change(self._geometry.pixel_size_um, now_um)
            else:
                change = self._geometry.change(camera_geometry(self._core))
            if change is not None:
                raise SeriesChangedError(change)
            self._delivery.deliver(pixels, self._describe(event, meta))
        except SeriesChangedError as change:
            self._broken_off = str(change)
            self._core.mda.cancel()
        except Exception as error:  # raised by run()
            self._fail(error)
            self._core.mda.cancel()

    def _describe(self, event: useq.MDAEvent, meta: Mapping[str, Any]) -> Exposure:
        ordinal = int(event.metadata[EVENT_INDEX])
        camera = meta.get("camera_metadata", {})
        exposure_ms = float(meta["exposure_ms"])
        runner = self._core.mda
        end_s = float(meta["runner_time_ms"]) / 1e3
        start_s = end_s - exposure_ms / 1e3
        planned_s = event.min_start_time
        if planned_s is not None:
            if event.reset_event_timer:
                # The event restarted the plan's clock; here all times count from
                # the beginning of the series.
                elapsed_s = runner.seconds_elapsed()
                self._clock_offset_s = elapsed_s - runner.event_seconds_elapsed()
            planned_s += self._clock_offset_s
            # All images of one time point share its planned time; only the first
            # can be late.
            if self._plan.is_timed and event.min_start_time != self._last_planned_s:
                self._observations.note_start(planned_s, start_s)
            self._last_planned_s = event.min_start_time
        if meta.get("hardware_triggered", False):
            waiting = int(meta.get("images_remaining_in_buffer", 0))
            self._observations.note_buffer(waiting, self._core.getBufferFreeCapacity())
        now_ns, age = RUN_CLOCK.now_ns(), age_ns(camera, RUN_CLOCK.told_ns())
        if age is None:
            age = int(max(0.0, runner.seconds_elapsed() - end_s) * 1e9)
        index = self._plan.index(ordinal)
        return Exposure(
            index=index,
            captured_ns=now_ns - age,
            exposure_ms=exposure_ms,
            z_um=self._z_um(event, meta),
            z_offset_um=float(self._plan.z_offsets_um[ordinal]),
            event_index=ordinal,
            camera_image_number=image_number(camera),
            planned_s=planned_s,
            actual_s=start_s,
            frame_meta=frame_json(meta),
        )

    def _z_um(self, event: useq.MDAEvent, meta: Mapping[str, Any]) -> float | None:
        """Return where the z-stage stood: as read, else as planned.

        None where it was asked and did not answer, or no number: then it is not known.
        """
        z_um = self._read_z_um(event, meta)
        if z_um is None or math.isfinite(z_um):
            return z_um
        warn_of_silent_stage(self._core)
        return None

    def _read_z_um(self, event: useq.MDAEvent, meta: Mapping[str, Any]) -> float | None:
        if not meta.get("hardware_triggered", False):
            position = meta.get("position", {"z": event.z_pos})
            if "z" not in position and self._core.getFocusDevice():
                warn_of_silent_stage(self._core)
                return None
            z_um: float | None = position.get("z", event.z_pos)
            return z_um
        standing = self._exposing.standing_z_um
        if standing is not None or event.z_pos is None:
            return standing
        return self._exposing.z_um(event)

    def _place_of(self, event: useq.MDAEvent) -> tuple[int, float]:
        """Return the index p of a planned image and its distance from the reference."""
        ordinal = int(event.metadata[EVENT_INDEX])
        return self._plan.index(ordinal)["p"], float(self._plan.z_offsets_um[ordinal])

    def send_focus_image(
        self, pixels: NDArray[np.generic], channel: str, z_um: float
    ) -> int:
        """Deliver an image that autofocus took outside the plan; return its sequence.

        Raises
        ------
        ConfigError
            If the channel is not in the series.
        """
        assert self._delivery is not None
        names = [one.name for one in self._delivery.series.channels]
        if channel not in names:
            msg = (
                f"focus channel '{channel}' is none of the series' channels "
                f"({', '.join(names)}), so the processor has not prepared for it; add "
                "it to the plan, or choose another autofocus.focus_channel"
            )
            raise ConfigError(msg)
        exposure = Exposure(
            index={"t": 0, "p": 0, "c": names.index(channel), "z": 0},
            captured_ns=RUN_CLOCK.now_ns(),
            exposure_ms=self._core.getExposure(),
            z_um=z_um,
            role=Role.FOCUS,
            frame_meta=frame_json(
                {"extra": {"rtfocus": {"focus_log": self.focus_notes()}}}
            ),
        )
        sequence = self._delivery.sent
        self._delivery.deliver(pixels, exposure)
        return sequence

    def lose(self, number: int) -> None:
        """Count images that the camera never gave."""
        self._observations.camera_lost += number

    def _fail(self, error: Exception, cause: BaseException | None = None) -> None:
        if self._failure is None:
            if cause is not None:
                error.__cause__ = cause
            self._failure = error

    def _reason(self, runner: MDARunner) -> str:
        if self._failure is not None:
            return str(self._failure)
        if self._broken_off is not None:
            return self._broken_off
        finished = str(runner.status.finish_reason or COMPLETED)
        if self._not_acquired and self._stop.is_set():
            return CANCELED
        if finished == COMPLETED and self._observations.camera_lost:
            return camera_lost_images(self._core, self._complaints.fault)
        if finished == COMPLETED and self._not_acquired:
            return self._complaints.first_failed or COMPLETED
        return finished

    @property
    def _not_acquired(self) -> int:
        """Planned images that were neither delivered nor lost by the camera."""
        sent = 0 if self._delivery is None else self._delivery.recorded
        return max(len(self._plan) - sent - self._observations.camera_lost, 0)

    def _finish(self, reason: str, seconds: float) -> AcquisitionReport:
        delivery, failure = self._delivery, self._failure
        if delivery is None:
            assert failure is not None
            raise failure
        return delivery.end(
            self._observations,
            planned=len(self._plan),
            not_acquired=self._not_acquired,
            reason=reason,
            seconds=seconds,
            failure=failure,
            warnings=self._complaints.texts,
            focus_log=tuple(self.focus_notes()),
        )


Place = tuple[tuple[str, int], ...]


class FollowedAcquisition(PlannedAcquisition):
    """One plan on its way through an engine that is not ours.

    That engine says which frame belongs to which event; images that it never
    delivers are not acquired. Nothing here raises into it: the first failure is
    kept, cancels the plan and is raised by `finish`.

    Parameters
    ----------
    config
        As for `acquire`; its microscope and plan are not used.
    """

    def __init__(
        self,
        config: Config,
        core: CMMCorePlus,
        sequence: useq.MDASequence,
        sink: FrameSink,
    ) -> None:
        # Only methods of its base class are called.
        super().__init__(config, cast("UniMMCore", core), sequence, sink, untold)
        self._seconds = 0.0
        self._hearing = ExitStack()
        # Whose script it is sees the log as before.
        self._hearing.enter_context(self._complaints.heard(alone=False))
        self._ordinals: dict[Place, deque[int]] = defaultdict(deque)

    def begin(self, summary: Mapping[str, Any]) -> None:
        """Announce the series before the first event; waits for a recorder.

        Channel and camera of the first event are set up, as the engine does next:
        they decide what the frames are like.
        """
        try:
            if not isinstance(self._sequence, useq.MDASequence) or not any(
                takes_image(event) for event in self._sequence
            ):
                msg = (
                    "rtfocus can follow a plan that is known beforehand; give "
                    "core.mda.run a useq.MDASequence that takes images"
                )
                raise ConfigError(msg)
            images = filter(takes_image, self._sequence)
            for ordinal, event in enumerate(images):
                self._ordinals[_place(event)].append(ordinal)
            if isinstance(engine := self._core.mda.engine, SequenceEngine):
                self._exposing = engine
            set_ups = SetUps(self._core)
            set_ups.require_one_geometry(self._sequence)
            set_ups.begin(self._sequence)
            self._begin(self._sequence, summary)
        except Exception as error:  # raised by finish()
            self.give_up(error)

    @property
    def series_uid(self) -> str | None:
        """Of the series; None: it is not announced yet."""
        return None if self._delivery is None else self._delivery.series.series_uid

    def place_of(self, event: useq.MDAEvent) -> tuple[int, float]:
        """Return the index p of an event that comes, and its slice in um."""
        ordinal = self._ordinals[_place(event)][0]
        return self._plan.index(ordinal)["p"], float(self._plan.z_offsets_um[ordinal])

    def take(
        self, pixels: NDArray[Any], event: useq.MDAEvent, meta: Mapping[str, Any]
    ) -> None:
        """Deliver one frame; blocks while the processor has no room for it."""
        if self._failure is not None:
            self._core.mda.cancel()
            return
        waiting = self._ordinals.get(_place(event))
        if not waiting:
            msg = f"a frame came of an event that the plan does not have: {event.index}"
            self.give_up(MicroscopeError(msg))
            return
        numbered = {**event.metadata, EVENT_INDEX: waiting.popleft()}
        runner = self._core.mda
        known = {
            "exposure_ms": event.exposure or self._core.getExposure(),
            "runner_time_ms": runner.seconds_elapsed() * 1e3,
        }
        self._seconds = runner.seconds_elapsed()
        self._take(
            pixels, event.model_copy(update={"metadata": numbered}), known | dict(meta)
        )

    def finish(self) -> AcquisitionReport:
        """End the series; returns once everything that was sent is durable.

        Raises
        ------
        RtfocusError
            What went wrong first, after the sink was told the end.
        """
        self._hearing.close()
        return self._finish(self._reason(self._core.mda), self._seconds)

    def give_up(self, error: Exception) -> None:
        """Cancel the plan; `finish` raises what went wrong first."""
        self._fail(error)
        self._core.mda.cancel()


def _place(event: useq.MDAEvent) -> Place:
    return tuple(sorted(event.index.items()))
