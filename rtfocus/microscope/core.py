"""Core: a Micro-Manager core with the configured devices in it.

Also where device adapters and configurations are found, what a configuration has (for
a first config of rtfocus), and what this machine has for acquiring, for ``rtfocus
doctor``.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus, DeviceType, find_micromanager
from pymmcore_plus import _discovery as discovery
from pymmcore_plus.experimental.unicore import UniMMCore

from rtfocus.config import Config
from rtfocus.config.sections import (
    DemoCameraConfig,
    MicroManagerConfig,
    VirtualMicroscopeConfig,
)
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.machine import Finding
from rtfocus.microscope.series import current_channel
from rtfocus.microscope.virtual_devices import BufferRoom, load_virtual_microscope

DEMO_CONFIG = "MMConfig_demo.cfg"
TEST_ADAPTERS_REMEDY = "pip install mm-test-adapters"


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder with device adapters."""

    path: Path
    count: int
    """Number of adapter libraries in it."""
    interface_version: int | None
    """Device interface version of the first that tells; None: none does."""


def required_interface() -> int:
    """Return the device interface version that this core can load."""
    return int(discovery.PYMMCORE_DIV)


def look_into(folder: Path) -> AdapterFolder:
    """Count the adapters in a folder and ask one for its interface version."""
    paths = set(discovery._iter_device_paths(folder))  # noqa: SLF001
    interface = discovery.get_first_device_interface_version(folder)
    return AdapterFolder(folder, len(paths), interface)


def installed_folders() -> list[AdapterFolder]:
    """Return the folders that pymmcore-plus finds, first choice first."""
    return [look_into(Path(path)) for path in find_micromanager(return_first=False)]


def demo_folder(configured: Path | None) -> Path:
    """Return the folder with Micro-Manager's DemoCamera.

    Raises
    ------
    MicroscopeError
        If package mm-test-adapters is not installed and no folder is configured.
    """
    if configured is not None:
        return configured
    try:
        import mm_test_adapters
    except ImportError as error:
        msg = (
            "the DemoCamera needs package 'mm-test-adapters', which is not installed; "
            f"run: {TEST_ADAPTERS_REMEDY}, or set microscope.adapter_path to a "
            "Micro-Manager folder"
        )
        raise MicroscopeError(msg) from error
    return Path(mm_test_adapters.device_adapter_path())


def check_folders(folders: Sequence[Path], setting: str) -> None:
    """Refuse folders that cannot serve this core, before it tries.

    Raises
    ------
    MicroscopeError
        If a folder is missing, holds no adapter, or adapters of another device
        interface version; says which and how to get the right ones.
    """
    for folder in folders:
        if not folder.is_dir():
            msg = (
                f"{setting}: there is no folder '{folder}'; give the folder that "
                "holds the device adapters (mmgr_dal_*), usually Micro-Manager's own"
            )
            raise MicroscopeError(msg)
        adapters = look_into(folder)
        if adapters.count == 0:
            msg = (
                f"{setting}: '{folder}' holds no device adapter; looked for "
                "*mmgr_dal_* libraries. Give the Micro-Manager folder, or run: "
                "mmcore install"
            )
            raise MicroscopeError(msg)
        needed = required_interface()
        if adapters.interface_version not in (None, needed):
            msg = (
                f"adapters in '{folder}' have device interface version "
                f"{adapters.interface_version}, this core needs {needed}; get "
                "matching ones (mmcore install, or a Micro-Manager of the same date) "
                "or a pymmcore that fits them: its version has the interface as 4th "
                "number"
            )
            raise MicroscopeError(msg)


_ADAPTERS = "device adapters"


def describe() -> list[Finding]:
    """Look at core, adapters and test adapters; nothing is loaded or changed."""
    return [_core(), *_adapters(), _test_adapters()]


def _core() -> Finding:
    with bare_core() as core:
        release = core.getVersionInfo()
    detail = (
        f"{release}, pymmcore-plus {version('pymmcore-plus')}, "
        f"needs adapters of device interface {required_interface()}"
    )
    return Finding("Micro-Manager core", detail)


def _adapters() -> list[Finding]:
    folders = installed_folders()
    if not folders:
        return [
            Finding(
                _ADAPTERS,
                "no Micro-Manager found",
                remedy="mmcore install, or microscope.adapter_paths in the config",
                needed=False,
            )
        ]
    return [_judge(folder) for folder in folders]


def _judge(folder: AdapterFolder) -> Finding:
    detail = (
        f"{folder.count} in {folder.path}, device interface {folder.interface_version}"
    )
    if folder.interface_version in (None, required_interface()):
        return Finding(_ADAPTERS, detail)
    remedy = f"adapters of device interface {required_interface()}: mmcore install"
    return Finding(_ADAPTERS, detail, remedy=remedy, needed=False)


def _test_adapters() -> Finding:
    topic = "DemoCamera"
    try:
        import mm_test_adapters

        release = version("mm-test-adapters")
    except (ImportError, PackageNotFoundError):
        return Finding(topic, "none", remedy=TEST_ADAPTERS_REMEDY, needed=False)
    folder = look_into(Path(mm_test_adapters.device_adapter_path()))
    detail = f"mm-test-adapters {release}, device interface {folder.interface_version}"
    if folder.interface_version == required_interface():
        return Finding(topic, detail)
    remedy = f'pip install "mm-test-adapters=={required_interface()}.*"'
    return Finding(topic, detail, remedy=remedy, needed=False)


# A simulated camera has no reason to outrun its reader: a backlog
# beyond this would only add latency.
_BACKLOG_FRAMES = 8

Properties = Mapping[str, Mapping[str, str | int | float]]


class PatientCore(UniMMCore):
    """Micro-Manager's core; when it says that a camera has stopped, that is so.

    `UniMMCore` waits two seconds for the thread of a camera in Python and then forgets
    it: one that exposes for longer comes back to a buffer that was cleared, or into the
    next sequence.
    """

    def __init__(self, mm_path: str) -> None:
        self.taken = threading.Event()
        """Set when an image was taken out of the buffer, or none will be any more."""
        super().__init__(mm_path=mm_path)

    def popNextImage(self, *, fix: bool = True) -> NDArray[Any]:  # noqa: N802
        """Take the oldest image out of the buffer."""
        image: NDArray[Any] = super().popNextImage(fix=fix)
        self.taken.set()
        return image

    def popNextImageMD(self, *args: Any) -> NDArray[Any]:  # noqa: ANN401, N802
        """Take the oldest image out of the buffer, with its metadata."""
        image: NDArray[Any] = super().popNextImageMD(*args)
        self.taken.set()
        return image

    def _stop_acquisition_thread(self, timeout: float | None = 2) -> None:
        if self._acquisition_thread is not None:
            if timeout is not None:
                timeout += self.getExposure() / 1e3
            # Those who wait for room must be woken before it is waited for.
            self._stop_event.set()
            self.taken.set()
        super()._stop_acquisition_thread(timeout)


@contextmanager
def open_core(config: Config) -> Iterator[UniMMCore]:
    """Load the configured devices; unload them at the end.

    Raises
    ------
    MicroscopeError
        If adapters, configuration or devices cannot be loaded; names them and the
        remedy.
    ConfigError
        If the virtual microscope is not fully described, or there is no file of the
        name of `microscope.config_file`.
    """
    with bare_core() as core:
        _load(core, config)
        yield core


@contextmanager
def bare_core() -> Iterator[PatientCore]:
    """Make a core without devices; whatever is loaded by then, unload it."""
    # Any folder keeps pymmcore-plus from searching the disk for a Micro-Manager,
    # and from complaining where the virtual microscope needs none.
    core = PatientCore(mm_path=str(Path(__file__).parent))
    try:
        yield core
    finally:
        if core.isSequenceRunning():
            core.stopSequenceAcquisition()
        core.unloadAllDevices()
        # Ends the core's own thread, which calls back into Python: alive at the
        # interpreter's exit it aborts the process ("exception not rethrown").
        super(CMMCorePlus, core).registerCallback(None)


def _load(core: PatientCore, config: Config) -> None:
    microscope = config.microscope
    if isinstance(microscope, VirtualMicroscopeConfig):
        channels = [(channel.name, channel.optics) for channel in config.channels]
        room = BufferRoom(core, _BACKLOG_FRAMES, core.taken)
        load_virtual_microscope(core, microscope, channels, room=room)
    elif isinstance(microscope, DemoCameraConfig):
        folder = demo_folder(microscope.adapter_path)
        file = microscope.config_file or folder / DEMO_CONFIG
        check_folders([folder], "microscope.adapter_path")
        _load_configuration(core, file, [folder])
        _set_properties(core, microscope.properties)
    elif isinstance(microscope, MicroManagerConfig):
        folders = microscope.adapter_paths or [
            installed.path for installed in installed_folders()[:1]
        ]
        if not folders:
            msg = (
                "microscope.adapter_paths is empty and no Micro-Manager was found; "
                "give its folder, or run: mmcore install"
            )
            raise MicroscopeError(msg)
        check_folders(folders, "microscope.adapter_paths")
        _load_configuration(core, microscope.config_file, folders)
        if microscope.sequence_buffer_mb is not None:
            core.setCircularBufferMemoryFootprint(microscope.sequence_buffer_mb)
        _set_properties(core, microscope.properties)
    else:
        msg = f"source '{microscope.source}' has no Micro-Manager core"
        raise MicroscopeError(msg)
    if not core.getCameraDevice():
        msg = (
            "the Micro-Manager configuration has no camera; add one in its Hardware "
            "Configuration Wizard (core property 'Camera')"
        )
        raise MicroscopeError(msg)


def _load_configuration(core: UniMMCore, file: Path, folders: Sequence[Path]) -> None:
    if not file.is_file():
        msg = (
            f"microscope.config_file: there is no file '{file}'; give the .cfg that "
            "Micro-Manager's Hardware Configuration Wizard wrote"
        )
        raise ConfigError(msg)
    core.setDeviceAdapterSearchPaths([str(folder) for folder in folders])
    try:
        core.loadSystemConfiguration(str(file))
    # An adapter that is not there comes as an import error of a Python module,
    # because UniMMCore looks for one of that name next.
    except (RuntimeError, ImportError, AttributeError, ValueError, OSError) as error:
        looked = ", ".join(f"'{folder}'" for folder in folders)
        reason = " ".join(str(error).split())
        msg = (
            f"Micro-Manager configuration '{file}' cannot be loaded: {reason}. "
            f"Adapters were looked for in {looked}; set microscope.adapter_path(s) "
            "to the folder of your Micro-Manager, close its own window and whatever "
            "else may hold a device, and see: rtfocus doctor"
        )
        raise MicroscopeError(msg) from error


def _set_properties(core: UniMMCore, properties: Properties) -> None:
    for device, values in properties.items():
        for name, value in values.items():
            try:
                core.setProperty(device, name, value)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())
                devices = ", ".join(core.getLoadedDevices())
                msg = (
                    f"microscope.properties: '{device}.{name}' cannot be set to "
                    f"{value!r}: {reason}; loaded devices: {devices}"
                )
                raise MicroscopeError(msg) from error
    core.waitForSystem()


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the core says of itself; nothing was moved or exposed."""

    cameras: tuple[str, ...]
    camera: str
    """The one in use."""
    shape: tuple[int, int]
    """Rows and columns of its images as currently set."""
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
    config_file: Path | None, adapter_paths: Sequence[Path]
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
        description = f"{device} {core.getDeviceDescription(device)}".lower()
        if "objective" in description or "nosepiece" in description:
            return str(core.getStateLabel(device))
    return ""
