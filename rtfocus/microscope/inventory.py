"""Inventory: what a Micro-Manager configuration has, for a first config of rtfocus."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pymmcore_plus import DeviceType
from pymmcore_plus.experimental.unicore import UniMMCore

from rtfocus.config import Config
from rtfocus.config.microscope import DemoCameraConfig, MicroManagerConfig
from rtfocus.microscope.core import open_core
from rtfocus.microscope.series import current_channel


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the core says of itself; nothing was moved or exposed."""

    cameras: tuple[str, ...]
    camera: str
    """The one in use."""
    shape: tuple[int, int]
    """Rows and columns of its images as it is set."""
    bit_depth: int
    exposure_ms: float
    focus_stage: str
    """Empty: there is none."""
    xy_stage: str
    channel_group: str
    presets: tuple[str, ...]
    """Of the channel group."""
    preset: str
    """The one it stands at, or the first."""
    pixel_size_um: float
    """Binning included; 0: not calibrated."""
    calibrations: tuple[tuple[str, float], ...]
    """Every pixel size that the configuration knows, by its name."""
    objective: str
    """What a turret of objectives says it stands at; empty: nothing does."""


def take_inventory(
    config_file: Path | None, adapter_paths: Sequence[Path] = ()
) -> Inventory:
    """Load a Micro-Manager configuration and ask its core what is there.

    Parameters
    ----------
    config_file
        The ``.cfg``; None: the demo's, with Micro-Manager's DemoCamera.
    adapter_paths
        Folders of the device adapters; none: what this machine has.

    Raises
    ------
    MicroscopeError
        If it cannot be loaded, or has no camera.
    """
    source = (
        DemoCameraConfig()
        if config_file is None
        else MicroManagerConfig(
            source="micromanager",
            config_file=config_file,
            adapter_paths=list(adapter_paths),
        )
    )
    with open_core(Config(microscope=source)) as core:
        return _ask(core)


def _ask(core: UniMMCore) -> Inventory:
    group = core.getChannelGroup()
    presets = tuple(map(str, core.getAvailableConfigs(group))) if group else ()
    now = current_channel(core)
    calibrations = tuple(
        (str(name), float(core.getPixelSizeUmByID(name)))
        for name in core.getAvailablePixelSizeConfigs()
    )
    return Inventory(
        cameras=tuple(map(str, core.getLoadedDevicesOfType(DeviceType.Camera))),
        camera=core.getCameraDevice(),
        shape=(core.getImageHeight(), core.getImageWidth()),
        bit_depth=core.getImageBitDepth(),
        exposure_ms=float(core.getExposure()),
        focus_stage=core.getFocusDevice(),
        xy_stage=core.getXYStageDevice(),
        channel_group=group,
        presets=presets,
        preset=now if now in presets else next(iter(presets), ""),
        pixel_size_um=float(core.getPixelSizeUm()),
        calibrations=calibrations,
        objective=_objective(core),
    )


def _objective(core: UniMMCore) -> str:
    """Return the label of the turret that is called an objective, if there is one."""
    for device in core.getLoadedDevicesOfType(DeviceType.State):
        said = f"{device} {core.getDeviceDescription(device)}".lower()
        if "objective" in said or "nosepiece" in said:
            return str(core.getStateLabel(device))
    return ""
