"""Load: puts the virtual microscope's devices into a Micro-Manager core."""

import time
import weakref
from collections.abc import Sequence
from math import ceil

from pymmcore_plus.experimental.unicore import UniMMCore

from rtfocus.channel import OpticalSystem
from rtfocus.config.microscope import VirtualMicroscopeConfig
from rtfocus.errors import ConfigError
from rtfocus.microscope.virtual.camera import CHANNEL, VirtualCamera
from rtfocus.microscope.virtual.specimen import VirtualSpecimen
from rtfocus.microscope.virtual.stages import VirtualXYStage, VirtualZStage

CAMERA, Z_STAGE, XY_STAGE = "Camera", "Z", "XY"
# Micro-Manager's buffer holds this many times the backlog, at least this much.
_BUFFER_BACKLOGS = 4
_LEAST_BUFFER_MB = 16
_POLL_S = 0.0005


def load_virtual_microscope(
    core: UniMMCore,
    config: VirtualMicroscopeConfig,
    channels: Sequence[tuple[str, OpticalSystem | None]],
    *,
    backlog_frames: int | None = None,
) -> dict[str, VirtualSpecimen]:
    """Load camera, z-stage and xy-stage and a preset per channel.

    Parameters
    ----------
    core
        A core without devices of these labels: ``Camera``, ``Z``, ``XY``.
    config
        The microscope; its `optics`, where given, hold for all channels.
    channels
        Preset names with the optics to image through.
    backlog_frames
        The camera waits while so many frames of a sequence have not been taken; the
        core's buffer is made just large enough. None: it does not wait, and the
        buffer overflows like any camera's.

    Returns
    -------
    dict[str, VirtualSpecimen]
        What each channel looks at, for whoever wants the truth.

    Raises
    ------
    ConfigError
        If a channel has no optics, or the channels' pixel sizes differ.
    """
    specimens: dict[str, VirtualSpecimen] = {}
    pixel_sizes_um: set[float] = set()
    for number, (name, known) in enumerate(channels):
        optics = config.optics or known
        if optics is None:
            msg = (
                f"the virtual microscope has no optics for channel '{name}'; give "
                "microscope.optics or the channel's optics"
            )
            raise ConfigError(msg)
        pixel_sizes_um.add(optics.pixel_size_um)
        specimens[name] = VirtualSpecimen(config, optics, channel=number)
    if len(pixel_sizes_um) > 1:
        msg = (
            f"channels have pixel sizes of {sorted(pixel_sizes_um)} um; one camera "
            "has one: give all channels' optics the same pixel_size_um"
        )
        raise ConfigError(msg)
    _load_devices(core, config, specimens, backlog_frames)
    _define_presets(core, list(specimens), pixel_sizes_um.pop())
    return specimens


def _load_devices(
    core: UniMMCore,
    config: VirtualMicroscopeConfig,
    specimens: dict[str, VirtualSpecimen],
    backlog_frames: int | None,
) -> None:
    z_stage, xy_stage = VirtualZStage(), VirtualXYStage()
    camera = VirtualCamera(config, specimens, z_stage, xy_stage)
    # Only this event tells that a sequence is to stop before it has: see `BufferRoom`.
    camera.stopping = core._stop_event  # noqa: SLF001
    if backlog_frames is not None:
        camera.wait_for_room = BufferRoom(core, backlog_frames).wait
    devices = {CAMERA: camera, Z_STAGE: z_stage, XY_STAGE: xy_stage}
    for label, device in devices.items():
        core.loadPyDevice(label, device)
        core.initializeDevice(label)
    core.setCameraDevice(CAMERA)
    core.setFocusDevice(Z_STAGE)
    core.setXYStageDevice(XY_STAGE)
    # Without a shutter, automatic shuttering costs time and does nothing.
    core.setAutoShutter(False)
    if backlog_frames is not None:
        wanted_mb = _BUFFER_BACKLOGS * backlog_frames * core.getImageBufferSize() / 1e6
        core.setCircularBufferMemoryFootprint(max(_LEAST_BUFFER_MB, ceil(wanted_mb)))


def _define_presets(core: UniMMCore, names: list[str], pixel_size_um: float) -> None:
    for name in names:
        core.defineConfig(CHANNEL, name, CAMERA, CHANNEL, name)
    core.setChannelGroup(CHANNEL)
    core.setConfig(CHANNEL, names[0])
    core.definePixelSizeConfig("virtual")
    core.setPixelSizeUm("virtual", pixel_size_um)


class BufferRoom:
    """Room for one more frame in the core's sequence buffer.

    The buffer of `UniMMCore` calls itself full when its end is reached while
    frames wait, although its beginning is free; so at its end one waits until it
    is empty.
    """

    def __init__(self, core: UniMMCore, backlog_frames: int) -> None:
        # The core owns the camera that owns this: a plain reference would keep
        # all three alive.
        self._core = weakref.ref(core)
        self._backlog_frames = backlog_frames
        self._since_empty = 0

    def wait(self) -> None:
        """Return when there is room, or the sequence was stopped."""
        while (core := self._core()) is not None:
            # The core joins the camera's thread before it says that the sequence
            # has stopped; only this event tells earlier.
            if core._stop_event.is_set():  # noqa: SLF001
                return
            if self._has_room(core):
                self._since_empty += 1
                return
            time.sleep(_POLL_S)

    def _has_room(self, core: UniMMCore) -> bool:
        capacity = core.getBufferTotalCapacity()
        if core.getBufferFreeCapacity() == capacity:
            self._since_empty = 0
            return True
        waiting = core.getRemainingImageCount()
        return waiting < self._backlog_frames and self._since_empty + 1 < capacity
