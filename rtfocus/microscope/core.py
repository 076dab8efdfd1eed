"""Core: a Micro-Manager core with the configured devices in it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pymmcore_plus import CMMCorePlus
from pymmcore_plus.experimental.unicore import UniMMCore

from rtfocus.config import Config
from rtfocus.config.microscope import (
    DemoCameraConfig,
    MicroManagerConfig,
    VirtualMicroscopeConfig,
)
from rtfocus.errors import MicroscopeError
from rtfocus.microscope.adapters import (
    DEMO_CONFIG,
    check_config_file,
    check_folders,
    demo_folder,
    installed_folders,
)
from rtfocus.microscope.virtual import load_virtual_microscope

# A simulated camera has no reason to outrun whoever takes its frames: a backlog
# beyond this would only add latency.
_BACKLOG_FRAMES = 8

Properties = Mapping[str, Mapping[str, str | int | float]]


@contextmanager
def open_core(config: Config) -> Iterator[UniMMCore]:
    """Load the configured devices; unload them at the end.

    Raises
    ------
    MicroscopeError
        If adapters, configuration or devices cannot be loaded; names them and the
        remedy.
    ConfigError
        If the virtual microscope is not fully described.
    """
    with bare_core() as core:
        _load(core, config)
        yield core


@contextmanager
def bare_core() -> Iterator[UniMMCore]:
    """Make a core without devices; whatever is loaded by then, unload it."""
    # Any folder keeps pymmcore-plus from searching the disk for a Micro-Manager,
    # and from complaining where the virtual microscope needs none.
    core = UniMMCore(mm_path=str(Path(__file__).parent))
    try:
        yield core
    finally:
        if core.isSequenceRunning():
            core.stopSequenceAcquisition()
        core.unloadAllDevices()
        # Ends the core's own thread, which calls back into Python: alive at the
        # interpreter's exit it aborts the process ("exception not rethrown").
        super(CMMCorePlus, core).registerCallback(None)


def _load(core: UniMMCore, config: Config) -> None:
    microscope = config.microscope
    if isinstance(microscope, VirtualMicroscopeConfig):
        channels = [(channel.name, channel.optics) for channel in config.channels]
        load_virtual_microscope(
            core, microscope, channels, backlog_frames=_BACKLOG_FRAMES
        )
    elif isinstance(microscope, DemoCameraConfig):
        folder = demo_folder(microscope.adapter_path)
        file = microscope.config_file or folder / DEMO_CONFIG
        check_folders([folder], "microscope.adapter_path")
        _load_configuration(core, file, [folder])
        _set_properties(core, microscope.properties)
    elif isinstance(microscope, MicroManagerConfig):
        folders = microscope.adapter_paths or [
            found.path for found in installed_folders()[:1]
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
    check_config_file(file, "microscope.config_file")
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
            "to the folder of your Micro-Manager, and see: rtfocus doctor"
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
