"""Driver: PyCUDA imported when it is needed, its errors as ours, one GPU per thread.

Nothing else imports PyCUDA. Objects of the driver are made and dropped in the one
thread that owns the GPU; others enqueue on its streams or wait for its events.

cuFFT, called through ctypes, is the named dependency of the classical restorations on
a GPU (package ``nvidia-cufft``).
"""

import ctypes
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from rtfocus.errors import EngineError
from rtfocus.processing.device import LostDeviceError
from rtfocus.processing.gpu.work import DeviceArray, Work
from rtfocus.runtimes.gpu import Gpu


class OutOfGpuMemoryError(EngineError):
    """A reservation failed; with smaller settings the same series may fit."""


class LostGpuError(LostDeviceError):
    """The GPU stopped answering; no later call in this process will succeed."""


@cache
def import_driver() -> Any:
    """Return the module ``pycuda.driver``, initialised.

    Raises
    ------
    EngineError
        If PyCUDA or the driver is missing; says which, with the remedy.
    """
    try:
        cuda = import_module("pycuda.driver")
    except ImportError as error:
        msg = (
            f"no NVIDIA GPU can be used: PyCUDA cannot be imported ({error}); install "
            "the NVIDIA driver and rtfocus[gpu]"
        )
        raise EngineError(msg) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise _no_answer(error) from error
    return cuda


def _no_answer(error: Exception) -> EngineError:
    msg = f"the NVIDIA driver does not answer ({error}); reinstall or update it"
    return EngineError(msg)


@cache
def load_driver_library() -> ctypes.CDLL:
    """Load the driver itself, for the few calls that PyCUDA lacks or gets wrong."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        msg = f"the NVIDIA driver cannot be loaded ({error}); install it"
        raise EngineError(msg) from error


def check_status(status: int, what: str) -> None:
    """Raise EngineError unless a driver call made through ctypes succeeded."""
    if status:
        text = ctypes.c_char_p()
        load_driver_library().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown").decode(errors="replace")
        msg = f"{what} failed: {reason} (CUDA error {status})"
        raise EngineError(msg)


@contextmanager
def current_context(gpu_index: int) -> Iterator[None]:
    """Make the primary context of a GPU current in this thread for a block.

    TensorRT and torch live in that one; a context made anew would not be theirs.

    Raises
    ------
    EngineError
        If the driver gives none: the GPU is full, or in exclusive use.
    """
    cuda = import_driver()
    try:
        context = cuda.Device(gpu_index).retain_primary_context()
        context.push()
    except cuda.MemoryError as error:
        raise _out_of_memory(gpu_index, "opening a context", error) from error
    except cuda.Error as error:
        msg = (
            f"GPU {gpu_index} gives no context ({error}); if another process has it "
            f"for itself end that one, or share it (nvidia-smi -i {gpu_index} -c "
            "DEFAULT), or name another in processing.gpu.index; else restart the "
            "machine or update the driver"
        )
        raise EngineError(msg) from error
    try:
        yield
    finally:
        context.pop()


@contextmanager
def translated(gpu_index: int, doing: str) -> Iterator[None]:
    """Turn PyCUDA's errors in a block into ours.

    Parameters
    ----------
    gpu_index
        For the message.
    doing
        What the block does, e.g. ``"copying frame 7"``.

    Raises
    ------
    OutOfGpuMemoryError
        If memory ran out.
    LostGpuError
        For anything else: the driver's errors are final for the process.
    """
    cuda = import_driver()
    try:
        yield
    except cuda.MemoryError as error:
        raise _out_of_memory(gpu_index, doing, error) from error
    except cuda.Error as error:
        msg = (
            f"GPU {gpu_index} failed while {doing} ({error}); start again, and if it "
            "recurs look into the system log for Xid errors, update the driver, or set "
            "processing.device: cpu"
        )
        raise LostGpuError(msg) from error


def _out_of_memory(gpu_index: int, doing: str, error: Exception) -> OutOfGpuMemoryError:
    msg = f"GPU {gpu_index} has no memory left for {doing} ({error})"
    return OutOfGpuMemoryError(f"{msg}; end other programs that use it")


def list_devices() -> list[Gpu]:
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
        raise _no_answer(error) from error


def find_device(gpu_index: int) -> Gpu:
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


def _describe(cuda: Any, gpu_index: int) -> Gpu:
    device = cuda.Device(gpu_index)
    major, minor = device.compute_capability()
    return Gpu(
        gpu_index=gpu_index,
        name=device.name(),
        compute_capability=(major, minor),
        memory_bytes=device.total_memory(),
    )


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """One of NVIDIA's libraries and where it may come from."""

    name: str
    """E.g. ``nvrtc``."""
    linux: tuple[str, ...]
    """File names, newest first."""
    windows: tuple[str, ...]
    package: str
    """Wheel that holds it."""


NVRTC = NativeLibrary(
    "nvrtc",
    ("libnvrtc.so.13", "libnvrtc.so.12"),
    ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll"),
    "nvidia-cuda-nvrtc",
)
CUFFT = NativeLibrary(
    "cufft",
    ("libcufft.so.12", "libcufft.so.11"),
    ("cufft64_12.dll", "cufft64_11.dll"),
    "nvidia-cufft",
)


@cache
def load_library(library: NativeLibrary) -> ctypes.CDLL:
    """Load a library: first from wheels, then wherever the system finds it.

    Raises
    ------
    EngineError
        Names the files that were looked for and the remedy.
    """
    names = library.windows if sys.platform == "win32" else library.linux
    candidates = [str(path) for path in _in_wheels(names)] + list(names)
    reasons = []
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            reasons.append(str(error))
    msg = (
        f"{library.name} cannot be loaded ({'; '.join(reasons)}); "
        f'pip install {library.package}, or "rtfocus[gpu]"'
    )
    raise EngineError(msg)


def why_not_loadable(library: NativeLibrary) -> str | None:
    """Return why a library cannot be used on this machine; None: it can."""
    try:
        load_library(library)
    except EngineError as error:
        return str(error)
    return None


def _in_wheels(names: tuple[str, ...]) -> list[Path]:
    """Return the files of these names in ``nvidia/`` of any folder of ``sys.path``."""
    folders = [Path(entry) / "nvidia" for entry in sys.path]
    return [
        path
        for name in names
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.rglob(name))
    ]


_REAL_TO_COMPLEX = 0x2A
_COMPLEX_TO_REAL = 0x2C
_FUNCTIONS = {_REAL_TO_COMPLEX: "cufftExecR2C", _COMPLEX_TO_REAL: "cufftExecC2R"}
_OUT_OF_MEMORY = 2
_NAMES = {
    1: "invalid plan",
    2: "no memory",
    3: "invalid type",
    4: "invalid value",
    5: "internal error",
    6: "execution failed",
    7: "set-up failed",
    8: "invalid size",
}
# Plans kept beside those of whole frames: rectangles of changing size share good
# transform sizes.
_MOST_PLANS = 64

Shape = tuple[int, ...]


class CudaTransforms:
    """Implements `rtfocus.processing.gpu.work.Transforms` with cuFFT.

    Parameters
    ----------
    kept
        Shapes whose plans stay until `close`, as recordings ask: planned at once.
        Those of other shapes are made when first needed, the oldest forgotten.

    Raises
    ------
    EngineError
        If cuFFT is missing or cannot plan one of them.
    """

    def __init__(self, kept: set[Shape]) -> None:
        self._library = load_library(CUFFT)
        self._plans: OrderedDict[tuple[Shape, int], ctypes.c_int] = OrderedDict()
        self._kept = frozenset(kept)
        try:
            for shape in sorted(kept):
                for kind in (_REAL_TO_COMPLEX, _COMPLEX_TO_REAL):
                    self._plan(shape, kind)
        except EngineError:
            self.close()
            raise

    def forward(self, work: Work, image: DeviceArray, spectrum: DeviceArray) -> None:
        """Enqueue image -> half spectrum."""
        self._execute(_REAL_TO_COMPLEX, work, image, spectrum, image.shape)

    def inverse(self, work: Work, spectrum: DeviceArray, image: DeviceArray) -> None:
        """Enqueue half spectrum -> image, times height * width; spoils `spectrum`."""
        self._execute(_COMPLEX_TO_REAL, work, spectrum, image, image.shape)

    def close(self) -> None:
        """Free plans and their work space."""
        for plan in self._plans.values():
            self._library.cufftDestroy(plan)
        self._plans.clear()

    def _plan(self, shape: Shape, kind: int) -> ctypes.c_int:
        """Return the plan of a shape, made now or before."""
        key = shape, kind
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        self._forget_oldest()
        plan = ctypes.c_int()
        sides = (ctypes.c_int * 2)(*shape[-2:])
        batch = shape[0] if len(shape) == 3 else 1
        status = self._library.cufftPlanMany(
            ctypes.byref(plan), 2, sides, None, 1, 0, None, 1, 0, kind, batch
        )
        self._check(status, "planning", shape)
        self._plans[key] = plan
        return plan

    def _forget_oldest(self) -> None:
        """Make room for a plan; cuFFT waits for the GPU before it frees one."""
        free = [key for key in self._plans if key[0] not in self._kept]
        if len(free) >= _MOST_PLANS:
            self._library.cufftDestroy(self._plans.pop(free[0]))

    def _execute(
        self,
        kind: int,
        work: Work,
        source: DeviceArray,
        target: DeviceArray,
        shape: Shape,
    ) -> None:
        plan, function = self._plan(shape, kind), _FUNCTIONS[kind]
        stream = ctypes.c_void_p(work.handle)
        self._check(self._library.cufftSetStream(plan, stream), "set-up", shape)
        status = self._library[function](
            plan, ctypes.c_void_p(source.address), ctypes.c_void_p(target.address)
        )
        self._check(status, function, shape)

    def _check(self, status: int, what: str, shape: Shape) -> None:
        if not status:
            return
        reason = _NAMES.get(status, f"error {status}")
        msg = f"cuFFT {what} for {' x '.join(map(str, shape))} px: {reason}"
        if status == _OUT_OF_MEMORY:
            msg += "; lower processing.gpu.frames_in_flight"
            raise OutOfGpuMemoryError(msg)
        raise EngineError(msg)
