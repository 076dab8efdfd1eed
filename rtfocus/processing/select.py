"""Select: which device processes frames, from an ordered list with reasons."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from rtfocus.config.model import Config
from rtfocus.processing.choice import usable
from rtfocus.processing.device import Device
from rtfocus.processing.processor import FrameProcessor


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device: whether this machine can use it, and how it is opened."""

    name: str
    """As in ``processing.device``."""
    why_unavailable: Callable[[], str | None]
    """Reason why not, with the remedy; None: available."""
    open_device: Callable[[Config], Device]


# GPU code is imported only where a GPU is looked for.
def _why_no_gpu() -> str | None:
    driver = import_module("rtfocus.processing.gpu.cuda.driver")
    why: str | None = driver.why_no_gpu() or driver.why_not_loadable(driver.NVRTC)
    return why


def _open_gpu(config: Config) -> Device:
    device: Device = import_module("rtfocus.processing.gpu.device").GpuDevice(config)
    return device


def _open_cpu(config: Config) -> Device:
    device: Device = import_module("rtfocus.processing.cpu.device").CpuDevice(config)
    return device


# ORDER MATTERS for "auto": fastest first.
DEVICES: tuple[DeviceKind, ...] = (
    DeviceKind("gpu", _why_no_gpu, _open_gpu),
    DeviceKind("cpu", lambda: None, _open_cpu),
)


def open_processor(config: Config) -> FrameProcessor:
    """Open the processor of ``processing.device``; for ``auto`` the best there is.

    For ``auto`` a GPU that cannot run a series leaves it to the CPU, and says so.

    Raises
    ------
    EngineError
        If the device that is asked for is unavailable; says what is missing.
    """
    found = usable(
        "frame processor",
        config.processing.device,
        DEVICES,
        lambda kind: kind.why_unavailable(),
        "; or set processing.device to cpu or auto",
    )
    return FrameProcessor(config, [kind.open_device(config) for kind in found])
