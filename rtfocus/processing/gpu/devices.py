"""Devices: which GPUs the driver shows."""

from typing import Any

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.driver import import_driver
from rtfocus.processing.gpu.seam import GpuDevice


def list_devices() -> list[GpuDevice]:
    """Return every GPU of this machine.

    Raises
    ------
    EngineError
        If PyCUDA or the driver is missing or too old; says which, with the remedy.
    """
    cuda = import_driver()
    try:
        return [_describe(cuda, index) for index in range(cuda.Device.count())]
    except cuda.Error as error:
        msg = f"the NVIDIA driver does not answer ({error}); reinstall or update it"
        raise EngineError(msg) from error


def find_device(gpu_index: int) -> GpuDevice:
    """Return one GPU by its position in the driver's list.

    Raises
    ------
    EngineError
        If there is no such GPU; lists those there are.
    """
    devices = list_devices()
    if 0 <= gpu_index < len(devices):
        return devices[gpu_index]
    there = ", ".join(f"{device.gpu_index} ({device.name})" for device in devices)
    msg = f"there is no GPU {gpu_index}; there are: {there or 'none'}"
    raise EngineError(msg)


def why_no_gpu() -> str | None:
    """Return why this machine has no usable GPU, with the remedy; None: it has."""
    try:
        return None if list_devices() else "the NVIDIA driver shows no GPU"
    except EngineError as error:
        return str(error)


def _describe(cuda: Any, gpu_index: int) -> GpuDevice:
    device = cuda.Device(gpu_index)
    major, minor = device.compute_capability()
    return GpuDevice(
        gpu_index=gpu_index,
        name=device.name(),
        compute_capability=(major, minor),
        memory_bytes=device.total_memory(),
    )
