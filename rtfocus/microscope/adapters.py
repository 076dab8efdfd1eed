"""Adapters: where Micro-Manager's device adapters and configurations are found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pymmcore_plus import _discovery as discovery
from pymmcore_plus import find_micromanager

from rtfocus.errors import MicroscopeError

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
    version = discovery.get_first_device_interface_version(folder)
    return AdapterFolder(folder, len(paths), version)


def installed_folders() -> list[AdapterFolder]:
    """Return the folders that pymmcore-plus finds by itself, first choice first."""
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
        found = look_into(folder)
        if found.count == 0:
            msg = (
                f"{setting}: '{folder}' holds no device adapter; looked for "
                "*mmgr_dal_* libraries. Give the Micro-Manager folder, or run: "
                "mmcore install"
            )
            raise MicroscopeError(msg)
        wanted = required_interface()
        if found.interface_version not in (None, wanted):
            msg = (
                f"adapters in '{folder}' have device interface version "
                f"{found.interface_version}, this core needs {wanted}; get matching "
                "ones (mmcore install, or a Micro-Manager of the same date) or a "
                "pymmcore that fits them: its version has the interface as 4th number"
            )
            raise MicroscopeError(msg)


def check_config_file(path: Path, setting: str) -> None:
    """Refuse a Micro-Manager configuration that is not there."""
    if not path.is_file():
        msg = (
            f"{setting}: there is no file '{path}'; give the .cfg that "
            "Micro-Manager's Hardware Configuration Wizard wrote"
        )
        raise MicroscopeError(msg)
