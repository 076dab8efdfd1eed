"""Acquisition: one series from a configured source or a free camera into a sink."""

import math
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pymmcore_plus.experimental.unicore import UniMMCore
from useq import MDASequence, Position

from rtfocus.config import Config
from rtfocus.config.sections import LiveConfig, ReplayConfig
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.frame import FrameHeader, Role, SeriesStart
from rtfocus.machine import RUN_CLOCK
from rtfocus.metrics import CANCELED, COMPLETED
from rtfocus.microscope.core import open_core
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
    number_on,
    overflow_error,
    pixel_size_change,
    untold,
)
from rtfocus.microscope.engine import RecordingEngine, SetUps
from rtfocus.microscope.mda import PlannedAcquisition
from rtfocus.microscope.plan import lay_out
from rtfocus.microscope.replay import Replay
from rtfocus.microscope.sequence import read_sequence
from rtfocus.microscope.series import (
    Complaints,
    camera_geometry,
    describe_series,
    warn_of_silent_stage,
    with_field_of_view,
)

# Micro-Manager's own word for "without end".
_ENDLESS = 2**31 - 1
_POLL_S = 0.001
# Asking a real z-stage takes milliseconds: not at every frame.
_Z_INTERVAL_S = 0.1


class FocusHold(Protocol):
    """What holds focus while a camera runs freely."""

    def start(self, send: Callable[[NDArray[np.generic], str, float], int]) -> None:
        """Find focus before the camera starts; `send` delivers a focus image."""
        ...

    def z_um(self, captured_ns: int, exposure_ms: float) -> float | None:
        """Return where the stage stood during an exposure; None: it moved."""
        ...

    def notes(self) -> list[dict[str, Any]]:
        """Return what was decided since the frame before; raises what went wrong."""
        ...

    def stop(self) -> None:
        """Send the stage nowhere any more."""
        ...


class LiveAcquisition:
    """One live run from the start of the camera to its report.

    A sequence that stops on overflow, not Micro-Manager's "continuous" one, which
    overwrites its buffer in silence.
    """

    def __init__(
        self,
        config: Config,
        live: LiveConfig,
        core: UniMMCore,
        sink: FrameSink,
        on_frame: Callable[[FrameHeader], None],
        hold: FocusHold | None,
    ) -> None:
        self._live = live
        self._hold = hold
        self._core = core
        self._observations = Observations()
        self._complaints = Complaints()
        if live.exposure_ms is not None:
            core.setExposure(live.exposure_ms)
        self._exposure_ms = core.getExposure()
        self._geometry = camera_geometry(core)
        series = describe_series(
            config,
            core,
            self._geometry,
            plan=None,
            frames=live.frames,
            summary=core.state(),
        )
        self._expected = 0
        """Number of the image that should come next."""
        self._before = 0
        """Images before the camera began to count anew."""
        self._z_um: float | None = None
        self._z_read_s = -_Z_INTERVAL_S
        self._delivery = Delivery(series, sink, on_frame)

    def run(self, stop: threading.Event) -> AcquisitionReport:
        """Run until `stop`, the wanted number of frames, or a failure.

        Raises
        ------
        RtfocusError
            What went wrong, after the sink has the end.
        """
        self._started = time.perf_counter()
        failure: Exception | None = None
        with self._complaints.heard():
            try:
                if self._hold is not None:
                    self._hold.start(self._send_focus_image)
                reason = self._record(stop)
            except SeriesChangedError as change:
                reason = str(change)
            except Exception as error:  # raised below, once the camera rests
                failure, reason = error, str(error)
            finally:
                self._core.stopSequenceAcquisition()
                if self._hold is not None:
                    self._hold.stop()
        seconds = time.perf_counter() - self._started
        observations, planned = self._observations, self._live.frames
        remaining = 0 if planned is None else planned - self._delivery.recorded
        return self._delivery.end(
            observations,
            planned=planned,
            not_acquired=max(remaining - observations.camera_lost, 0),
            reason=reason,
            seconds=seconds,
            failure=failure,
            warnings=self._complaints.texts,
        )

    def _record(self, stop: threading.Event) -> str:
        core = self._core
        frames = self._live.frames or _ENDLESS
        try:
            core.startSequenceAcquisition(frames, 0.0, True)
        except RuntimeError as error:
            msg = f"camera '{core.getCameraDevice()}' does not start: {error}"
            raise MicroscopeError(msg) from error
        while not stop.is_set():
            if core.getRemainingImageCount() > 0:
                self._take()
            elif core.isSequenceRunning():
                time.sleep(_POLL_S)
            elif core.getRemainingImageCount() == 0:
                return self._ended(frames)
        return CANCELED

    def _ended(self, frames: int) -> str:
        """Tell why the camera stopped unasked."""
        if self._core.isBufferOverflowed():
            raise overflow_error(self._core)
        if self._expected < frames and self._live.frames is None:
            msg = (
                f"camera '{self._core.getCameraDevice()}' stopped by itself after "
                f"{self._expected} images; check its trigger mode and connection"
            )
            raise MicroscopeError(msg)
        lost = self._observations.camera_lost + max(frames - self._expected, 0)
        self._observations.camera_lost = lost
        if lost:
            return camera_lost_images(self._core, self._complaints.fault)
        return COMPLETED

    def _take(self) -> None:
        core = self._core
        waiting = core.getRemainingImageCount() - 1
        pixels, tags = core.popNextImageAndMD()
        camera = dict(tags)
        self._observations.note_buffer(waiting, core.getBufferFreeCapacity())
        now_um = float(core.getPixelSizeUm(True))
        change = pixel_size_change(self._geometry.pixel_size_um, now_um)
        if change is not None:
            raise SeriesChangedError(change)
        number = self._number(camera)
        self._observations.camera_lost += max(0, number - self._expected)
        self._expected = number + 1
        age = age_ns(camera, RUN_CLOCK.told_ns()) or 0
        captured_ns = RUN_CLOCK.now_ns() - age
        end_s = time.perf_counter() - self._started - age / 1e9
        exposure = Exposure(
            index={"t": number, "p": 0, "c": 0, "z": 0},
            captured_ns=captured_ns,
            exposure_ms=self._exposure_ms,
            z_um=self._z_um_at(captured_ns),
            camera_image_number=number,
            actual_s=end_s - self._exposure_ms / 1e3,
            frame_meta=frame_json(
                {
                    "format": "frame-dict",
                    "version": "1.0",
                    "camera_device": core.getCameraDevice(),
                    "exposure_ms": self._exposure_ms,
                    "pixel_size_um": self._delivery.series.pixel_size_um,
                    "runner_time_ms": end_s * 1e3,
                    "images_remaining_in_buffer": waiting,
                    "camera_metadata": camera,
                    **self._focus_notes(),
                }
            ),
        )
        self._delivery.deliver(pixels, exposure)

    def _number(self, camera: dict[str, Any]) -> int:
        """Return which image of the run came; no number is given twice."""
        following = self._expected - self._before
        number = number_on(self._core, camera, following, _ENDLESS)
        if number is None:
            # Time goes on; who began to count anew goes on from here.
            self._before += following - (image_number(camera) or 0)
            return self._expected
        return number + self._before

    def _focus_notes(self) -> dict[str, Any]:
        notes = [] if self._hold is None else self._hold.notes()
        return {"extra": {"rtfocus": {"focus_log": notes}}} if notes else {}

    def _send_focus_image(
        self, pixels: NDArray[np.generic], channel: str, z_um: float
    ) -> int:
        """Deliver an image that autofocus took before the camera runs."""
        del channel  # a live run has one
        sequence = self._delivery.sent
        exposure = Exposure(
            index={"t": 0, "p": 0, "c": 0, "z": 0},
            captured_ns=RUN_CLOCK.now_ns(),
            exposure_ms=self._exposure_ms,
            z_um=z_um,
            role=Role.FOCUS,
        )
        self._delivery.deliver(pixels, exposure)
        return sequence

    def _z_um_at(self, captured_ns: int) -> float | None:
        if self._hold is not None:
            return self._hold.z_um(captured_ns, self._exposure_ms)
        if not self._core.getFocusDevice():
            return None
        now_s = time.perf_counter()
        if now_s - self._z_read_s >= _Z_INTERVAL_S:
            self._z_read_s = now_s
            self._z_um = None
            with suppress(RuntimeError):
                z_um = self._core.getPosition()
                self._z_um = z_um if math.isfinite(z_um) else None
            if self._z_um is None:
                warn_of_silent_stage(self._core)
        return self._z_um


def acquire(
    config: Config,
    sink: FrameSink,
    *,
    stop: threading.Event,
    core: UniMMCore | None = None,
    on_frame: Callable[[FrameHeader], None] = untold,
    make_engine: Callable[..., RecordingEngine] = RecordingEngine,
    make_hold: Callable[[UniMMCore], FocusHold | None] = lambda _: None,
) -> AcquisitionReport:
    """Acquire one series from the configured source.

    Parameters
    ----------
    config
        Its `microscope`, `acquisition` and `channels` sections are read.
    sink
        Takes the frames; it hears of the end in every case once it was started.
    stop
        Ends the series when set, also from another thread.
    core
        With its devices loaded; None: those of the config are.
    on_frame
        Called with each frame's header after it was handed over.
    make_engine
        Makes the engine that runs a plan, with the arguments of `RecordingEngine`.
    make_hold
        Makes what holds focus while a camera runs without a plan.

    Raises
    ------
    ConfigError, MicroscopeError, InputError
        If the source cannot be opened or fails.
    TransportError
        And whatever else the sink raises; the run is cancelled first.
    """
    if isinstance(config.microscope, ReplayConfig):
        if config.autofocus.mode == "hold":
            msg = "recorded images cannot be held in focus; set autofocus.mode: off"
            raise ConfigError(msg)
        return Replay(config, config.microscope).run(sink, stop, on_frame)
    with open_core(config) if core is None else nullcontext(core) as loaded:
        live = config.acquisition.live
        if live is not None:
            hold = make_hold(loaded)
            return LiveAcquisition(config, live, loaded, sink, on_frame, hold).run(stop)
        planned = _planned(loaded, config)
        return PlannedAcquisition(
            config, loaded, planned, sink, on_frame, make_engine
        ).run(stop)


def foresee(config: Config) -> SeriesStart:
    """Return the series that `acquire` would announce; nothing is exposed or moved.

    The devices are loaded as for a run, and what the camera will give is found by its
    own settings.

    Raises
    ------
    ConfigError, MicroscopeError, InputError
        As `acquire`, before its first exposure.
    """
    if isinstance(config.microscope, ReplayConfig):
        return Replay(config, config.microscope).series
    with open_core(config) as core:
        live = config.acquisition.live
        if live is not None:
            geometry = camera_geometry(core)
            return describe_series(
                config, core, geometry, plan=None, frames=live.frames
            )
        planned = _planned(core, config)
        common = SetUps(core).require_one_geometry(planned)
        geometry = camera_geometry(core) if common is None else common
        height, width = geometry.shape[:2]
        planned = with_field_of_view(planned, width, height, core.getPixelSizeUm())
        return describe_series(config, core, geometry, plan=lay_out(planned))


def _planned(core: UniMMCore, config: Config) -> MDASequence:
    """Return the configured plan as this microscope is asked to run it."""
    acquisition = config.acquisition
    if acquisition.mda is None:
        msg = (
            "acquisition has neither 'mda' (a useq plan) nor 'live'; give one of them, "
            "e.g. acquisition: {live: {frames: 100}}"
        )
        raise ConfigError(msg)
    sequence = read_sequence(acquisition.mda)
    _check_presets(core, sequence)
    _check_autofocus(core, sequence)
    return anchored(sequence, _standing_z_um(core))


def _standing_z_um(core: UniMMCore) -> float | None:
    """Return where the z-stage stands; None: there is none; raises MicroscopeError."""
    if not (stage := core.getFocusDevice()):
        return None
    try:
        z_um = float(core.getPosition())
    except RuntimeError as error:
        msg = f"z-stage '{stage}' does not answer: {error}"
        raise MicroscopeError(msg) from error
    if not math.isfinite(z_um):
        msg = f"z-stage '{stage}' says that it stands at {z_um} um; check it"
        raise MicroscopeError(msg)
    return z_um


def anchored(sequence: MDASequence, z_um: float | None) -> MDASequence:
    """Give relative z-stacks a reference: where the z-stage is when the plan begins.

    That is where it is now, or where the plan's own set-up sends it. useq and
    pymmcore-plus take 0 where a position has no z, which would drive the objective to
    the stage's origin.
    """
    plan = sequence.z_plan
    if sequence.setup is not None and sequence.setup.z_pos is not None:
        z_um = sequence.setup.z_pos
    if plan is None or not plan.is_relative or z_um is None:
        return sequence
    positions = list(sequence.stage_positions)
    if not positions:
        return sequence.replace(stage_positions=[Position(z=z_um)])
    if all(position.z is not None for position in positions):
        return sequence
    return sequence.replace(
        stage_positions=[
            p if p.z is not None else p.model_copy(update={"z": z_um})
            for p in positions
        ]
    )


def _check_autofocus(core: UniMMCore, sequence: MDASequence) -> None:
    """Refuse a plan that asks for focus where nothing answers.

    Plans of pymmcore-widgets name no device, which means the core's.
    """
    below = [one.sequence for one in sequence.stage_positions if one.sequence]
    plans = [level.autofocus_plan for level in (sequence, *below)]
    devices = {plan.autofocus_device_name for plan in plans if plan is not None}
    if devices <= {"rtfocus"} or core.getAutoFocusDevice():
        return
    msg = (
        "acquisition.mda: its autofocus_plan does not name 'rtfocus', and "
        "Micro-Manager has no autofocus device: nobody would focus; give it "
        "autofocus_device_name: rtfocus, or leave it out"
    )
    raise ConfigError(msg)


def _check_presets(core: UniMMCore, sequence: MDASequence) -> None:
    """Refuse a plan with unknown channels before the series begins."""
    for channel in sequence.channels:
        groups = core.getAvailableConfigGroups()
        if channel.group not in groups:
            msg = (
                f"acquisition.mda: there is no channel group '{channel.group}'; groups "
                f"of this configuration: {', '.join(groups) or 'none'}"
            )
            raise ConfigError(msg)
        presets = core.getAvailableConfigs(channel.group)
        if channel.config not in presets:
            msg = (
                f"acquisition.mda: there is no channel '{channel.config}'; presets of "
                f"group '{channel.group}': {', '.join(presets) or 'none'}"
            )
            raise ConfigError(msg)
    for position in sequence.stage_positions:
        if position.sequence is not None:
            _check_presets(core, position.sequence)
