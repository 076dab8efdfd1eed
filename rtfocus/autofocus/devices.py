"""Devices: what of a core a search uses: stage or offset, light, live mode, runner."""

import math
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import useq
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus, DeviceType
from pymmcore_plus.mda import FinishReason, MDAEngine, MDARunner, PMDAEngine

from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.workers import Wait

_LOCK_S = 10.0
"""Longest wait for a hardware focus device to hold focus again."""
_POLL_S = 0.02
_CHOICES = (
    "use_hardware_sequencing",
    "force_set_xy_position",
    "restore_initial_state",
    "timeout_base",
    "timeout_multiplier",
    "timeout_first_frame",
    "timeout_action",
)
"""What the stock engine lets a script choose."""


def checked_core(core: object) -> None:
    """Refuse with a ConfigError what is not a core."""
    if not isinstance(core, CMMCorePlus):
        kind = type(core).__name__
        msg = f"core is of type {kind}; give a pymmcore_plus.CMMCorePlus"
        raise ConfigError(msg)


def focus_stage(core: CMMCorePlus) -> str:
    """Return the label of the stage that autofocus moves; one there must be."""
    label = core.getFocusDevice()
    if not label:
        msg = (
            "the configuration has no focus stage; choose one in Micro-Manager's "
            "hardware wizard (core property 'Focus')"
        )
        raise MicroscopeError(msg)
    return str(label)


def expose(core: CMMCorePlus) -> NDArray[np.generic]:
    """Take an image that tells focus.

    Raises
    ------
    MicroscopeError
        If the camera gives none, or one of floats, which the core calls counts.
    """
    camera = core.getCameraDevice()
    try:
        core.snapImage()
        pixels = np.asarray(core.getImage())
    except RuntimeError as error:
        msg = f"camera '{camera}' gives no image for autofocus: {error}"
        raise MicroscopeError(msg) from error
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize > 2:  # the bits of floats
        msg = (
            f"camera '{camera}' delivers pixels of {pixels.dtype.itemsize} bytes; set "
            "its pixel type to 8 or 16 bit grey, or RGB"
        )
        raise MicroscopeError(msg)
    return pixels


class CoreStage:
    """The focus stage of a core; see `rtfocus.autofocus.execution.FocusStage`."""

    def __init__(self, core: CMMCorePlus) -> None:
        self._core = core
        focus_stage(core)

    def position_um(self) -> float:
        """Return where the stage says it is."""
        stage = self._core.getFocusDevice()
        try:
            z_um = float(self._core.getZPosition())
        except RuntimeError as error:
            msg = f"z-stage '{stage}' does not answer: {error}"
            raise MicroscopeError(msg) from error
        if not math.isfinite(z_um):
            msg = f"z-stage '{stage}' says that it stands at {z_um} um; check it"
            raise MicroscopeError(msg)
        return z_um

    def go_to(self, z_um: float) -> None:
        """Go there and wait for the end of the move."""
        stage = self._core.getFocusDevice()
        try:
            self._core.setZPosition(z_um)
            self._core.waitForDevice(stage)
        except RuntimeError as error:
            msg = f"z-stage '{stage}' does not go to {z_um:g} um: {error}"
            raise MicroscopeError(msg) from error


class OffsetStage:
    """The offset of a hardware focus device, moved in place of the z-stage.

    Parameters
    ----------
    core
        With its devices loaded; the autofocus device holds focus.
    device
        Stage device that is the offset; None: the autofocus device's own.
    um_per_unit
        What one unit of the offset moves the plane of focus by.
    """

    def __init__(
        self, core: CMMCorePlus, device: str | None, um_per_unit: float
    ) -> None:
        self._core, self._device, self._um_per_unit = core, device, um_per_unit
        holder = core.getAutoFocusDevice()
        if not holder:
            msg = (
                "autofocus.actuator 'offset' needs a hardware focus device, and there "
                "is none (core property 'AutoFocus'); set actuator: stage"
            )
            raise MicroscopeError(msg)
        self._holder = holder
        if device is not None and device not in core.getLoadedDevices():
            loaded = ", ".join(core.getLoadedDevicesOfType(DeviceType.Stage))
            msg = (
                f"autofocus.offset_device '{device}' is not loaded; stage devices: "
                f"{loaded}"
            )
            raise ConfigError(msg)

    def position_um(self) -> float:
        """Return the offset in um of the plane of focus."""
        try:
            units = (
                self._core.getAutoFocusOffset()
                if self._device is None
                else self._core.getPosition(self._device)
            )
        except RuntimeError as error:
            msg = f"the offset of '{self._holder}' cannot be read: {error}"
            raise MicroscopeError(msg) from error
        return float(units) * self._um_per_unit

    def go_to(self, z_um: float) -> None:
        """Set the offset, and wait until focus is held there."""
        units = z_um / self._um_per_unit
        try:
            if self._device is None:
                self._core.setAutoFocusOffset(units)
                self._core.waitForDevice(self._holder)
            else:
                self._core.setPosition(self._device, units)
                self._core.waitForDevice(self._device)
            wait = Wait()
            while not self._core.isContinuousFocusLocked():
                if wait.look() > _LOCK_S:
                    msg = (
                        f"'{self._holder}' does not hold focus {_LOCK_S:g} s after its "
                        f"offset was set to {units:g}; bring it into range again"
                    )
                    raise MicroscopeError(msg)
                time.sleep(_POLL_S)
        except RuntimeError as error:
            msg = f"the offset of '{self._holder}' cannot be set to {units:g}: {error}"
            raise MicroscopeError(msg) from error


class FocusLight:
    """The focus channel while a search lasts; afterwards what was set before.

    Parameters
    ----------
    core
        With its devices loaded.
    wanted
        Preset of the channel group; None: the present one.
    """

    def __init__(self, core: CMMCorePlus, channel: str | None) -> None:
        self._core, self._group = core, core.getChannelGroup()
        self._before = core.getCurrentConfig(self._group) if self._group else ""
        self._wanted = channel or self._before or "default"
        self._properties: list[tuple[str, str, str]] = []

    def __enter__(self) -> str:
        """Set the channel up and return its name."""
        if self._wanted != self._before and self._group:
            presets = self._core.getAvailableConfigs(self._group)
            if self._wanted not in presets:
                msg = (
                    f"autofocus.focus_channel '{self._wanted}' is no preset of group "
                    f"'{self._group}'; presets: {', '.join(presets)}"
                )
                raise ConfigError(msg)
            # What stood before may be no preset, or more than one says.
            self._properties = [
                (device, name, self._core.getProperty(device, name))
                for device, name, _ in self._core.getConfigData(
                    self._group, self._wanted
                )
            ]
            self._core.setConfig(self._group, self._wanted)
            self._core.waitForSystem()
        return self._wanted

    def __exit__(self, *_: object) -> None:
        """Set everything back that the channel has set."""
        if not self._properties:
            return
        if self._before:
            self._core.setConfig(self._group, self._before)
        for device, name, value in self._properties:
            if self._core.getProperty(device, name) != value:
                self._core.setProperty(device, name, value)
        self._core.waitForSystem()


class stopped_live:  # noqa: N801 reads as a statement
    """Live mode stopped while a search takes single images, then started again.

    Parameters
    ----------
    core
        With its devices loaded.
    """

    def __init__(self, core: CMMCorePlus) -> None:
        self._core = core

    def __enter__(self) -> None:
        """Stop what runs."""
        self._was_live = self._core.isSequenceRunning()
        if self._was_live:
            self._core.stopSequenceAcquisition()

    def __exit__(self, *_: object) -> None:
        """Go on as before."""
        if self._was_live:
            self._core.startContinuousSequenceAcquisition()


def interrupt_at_end(runner: MDARunner) -> None:
    """Let a plan end in order, everything set back, before Ctrl-C is heard.

    Left at once, pymmcore-plus' runner would be as if the plan ran on.
    """

    def interrupt(*_: object) -> None:
        runner.events.sequenceFinished.disconnect(interrupt)
        raise KeyboardInterrupt

    runner.events.sequenceFinished.connect(interrupt)
    runner.cancel()


def end_abandoned(runner: MDARunner) -> None:
    """End a plan whose run Ctrl-C has left: set everything back and say so."""
    # pymmcore-plus does this after every exception but this one, and would call
    # the plan running for ever.
    runner._finish_reason = FinishReason.CANCELED  # noqa: SLF001
    runner._finish_run(runner._sequence or useq.MDASequence())  # noqa: SLF001


def set_back_light(core: CMMCorePlus, settings: Mapping[str, Any]) -> None:
    """Set back what a plan has changed of light and camera, and no stage.

    Parameters
    ----------
    core
        With its devices loaded.
    settings
        What the stock engine noted before the plan; empty: it was not to.
    """
    for group, preset in settings.get("config_groups", {}).items():
        core.setConfig(group, preset)
    if settings:
        core.setExposure(settings["exposure"])
        core.setAutoShutter(settings["autoshutter"])
        core.clearROI()
        core.setROI(*settings["roi"])


def choices_of(engine: object) -> dict[str, Any]:
    """Return how a script wants the stock engine to work; of another one nothing."""
    if type(engine) is not MDAEngine:
        return {}
    return {name: getattr(engine, name) for name in _CHOICES}


_former: WeakKeyDictionary[MDAEngine, PMDAEngine | None] = WeakKeyDictionary()
"""What an engine that runs the plans of its core for a while is to give back."""


def take_over(engine: MDAEngine) -> None:
    """Let an engine run the plans of its core until `hand_back`."""
    _former[engine] = engine.mmcore.mda.set_engine(engine)


def hand_back(engine: MDAEngine) -> None:
    """End what `take_over` began: its core runs plans again by what ran them before.

    Engines may end in any order: one that came later and is open still goes on, and
    does not bring this one back when it ends.
    """
    former, runner = _former.pop(engine, None), engine.mmcore.mda
    later = [one for one, before in _former.items() if before is engine]
    _former.update(dict.fromkeys(later, former))
    if former is not None and runner.engine is engine and not runner.is_running():
        runner.set_engine(former)
