"""Diagnosis: what this machine has for acquiring, for ``rtfocus doctor``."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rtfocus.findings import Finding
from rtfocus.microscope.adapters import (
    TEST_ADAPTERS_REMEDY,
    AdapterFolder,
    installed_folders,
    look_into,
    required_interface,
)
from rtfocus.microscope.core import bare_core

_ADAPTERS = "device adapters"


def describe() -> list[Finding]:
    """Look at core, adapters and test adapters; nothing is loaded or changed."""
    return [_core(), *_adapters(), _test_adapters()]


def _core() -> Finding:
    with bare_core() as core:
        release = core.getVersionInfo()
    found = (
        f"{release}, pymmcore-plus {version('pymmcore-plus')}, "
        f"needs adapters of device interface {required_interface()}"
    )
    return Finding("Micro-Manager core", found)


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
    found = (
        f"{folder.count} in {folder.path}, device interface {folder.interface_version}"
    )
    if folder.interface_version in (None, required_interface()):
        return Finding(_ADAPTERS, found)
    remedy = f"adapters of device interface {required_interface()}: mmcore install"
    return Finding(_ADAPTERS, found, remedy=remedy, needed=False)


def _test_adapters() -> Finding:
    topic = "DemoCamera"
    try:
        import mm_test_adapters

        release = version("mm-test-adapters")
    except (ImportError, PackageNotFoundError):
        return Finding(topic, "none", remedy=TEST_ADAPTERS_REMEDY, needed=False)
    folder = look_into(Path(mm_test_adapters.device_adapter_path()))
    found = f"mm-test-adapters {release}, device interface {folder.interface_version}"
    if folder.interface_version == required_interface():
        return Finding(topic, found)
    remedy = f"pip install 'mm-test-adapters=={required_interface()}.*'"
    return Finding(topic, found, remedy=remedy, needed=False)
