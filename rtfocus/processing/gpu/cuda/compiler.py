"""Compiler: CUDA text to machine code of one GPU, kept in a folder of the user.

NVRTC compiles for the card itself rather than to PTX: machine code of a newer
toolkit still loads with the drivers of the same major release, PTX does not.
No nvcc is needed on the user's machine.
"""

import ctypes
import hashlib
import logging
import re
from functools import cache
from pathlib import Path

from rtfocus.errors import EngineError
from rtfocus.machine import cache_folder, write_atomically
from rtfocus.processing.gpu.cuda.driver import NVRTC, load_library

logger = logging.getLogger(__name__)

_OPTIONS = ("--std=c++17", "--generate-line-info")


def compiled_kernels(capability: tuple[int, int], folder: Path | None = None) -> bytes:
    """Return the machine code of all kernels, compiled now or at an earlier start.

    For a compute capability, e.g. (8, 6); the folder of the cache is by default the
    user's.

    Raises
    ------
    EngineError
        If NVRTC is missing, refuses the text or does not know the GPU.
    """
    library = load_library(NVRTC)
    key = "\0".join((read_source(), *_OPTIONS, repr(capability), _release(library)))
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    place = (folder or cache_folder() / "kernels") / f"{digest}.cubin"
    if place.is_file():
        return place.read_bytes()
    code = compile_for(capability)
    _keep(place, code)
    return code


def why_driver_too_old(driver_release: int) -> str | None:
    """Return why a driver cannot load what NVRTC compiles here; None: it can.

    Parameters
    ----------
    driver_release
        Newest CUDA release the driver serves, as it says itself: 12040 is 12.4.

    Raises
    ------
    EngineError
        If NVRTC cannot be loaded.
    """
    release = _release(load_library(NVRTC))
    least = int(release.partition(".")[0])
    if driver_release // 1000 >= least:
        return None
    serves = f"{driver_release // 1000}.{driver_release % 1000 // 10}"
    return (
        f"the NVIDIA driver serves CUDA {serves}, NVRTC is of CUDA {release}; update "
        f"the driver, or: pip install {NVRTC.package}-cu{driver_release // 1000} and "
        f"pip uninstall {NVRTC.package}"
    )


def compile_for(capability: tuple[int, int], text: str | None = None) -> bytes:
    """Compile CUDA text for one compute capability; None: all kernels.

    Raises
    ------
    EngineError
        With NVRTC's own words.
    """
    library = load_library(NVRTC)
    program = ctypes.c_void_p()
    source = (read_source() if text is None else text).encode()
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), source, b"rtfocus.cu", 0, None, None
        ),
    )
    try:
        architecture = f"--gpu-architecture=sm_{capability[0]}{capability[1]}"
        options = [option.encode() for option in (*_OPTIONS, architecture)]
        status = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        if status:
            raise _refused(library, program, architecture, status)
        return _take(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _refused(
    library: ctypes.CDLL, program: ctypes.c_void_p, architecture: str, status: int
) -> EngineError:
    log = _take(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
    reason = log.strip() or _name(library, status)
    return EngineError(
        f"NVRTC {_release(library)} cannot compile the kernels with {architecture}: "
        f"{reason}; if it does not know this GPU: pip install -U {NVRTC.package}"
    )


def _take(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """Fetch one of a program's results."""
    size = ctypes.c_size_t()
    _check(library, library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, library[f"nvrtcGet{what}"](program, buffer))
    return buffer.raw


def _release(library: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        msg = f"NVRTC failed: {_name(library, status)}"
        raise EngineError(msg)


def _name(library: ctypes.CDLL, status: int) -> str:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return str(library.nvrtcGetErrorString(status).decode())


def _keep(place: Path, code: bytes) -> None:
    try:
        write_atomically(place, code)
    except OSError as error:
        # Only the next start is slower for it.
        logger.warning("compiled kernels are not kept in '%s': %s", place, error)


FOLDER = Path(__file__).parents[1] / "kernels"
_FIRST = "common.cu"

_KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
# Codes of `struct`; the layout of a launch's arguments is that of a C struct.
_CODES = {"int": "i", "unsigned": "I", "float": "f", "double": "d", "long long": "q"}


@cache
def read_source() -> str:
    """Return the text of all kernels, ready for a compiler."""
    others = sorted(path for path in FOLDER.glob("*.cu") if path.name != _FIRST)
    files = [FOLDER / _FIRST, *others]
    return "\n".join(
        f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}' for path in files
    )


@cache
def signatures() -> dict[str, str]:
    """Return the argument types of every kernel as codes of `struct`.

    Examples
    --------
    >>> signatures()["project"]
    'PPiff'
    """
    return {
        name: "".join(_code(argument) for argument in arguments.split(","))
        for name, arguments in _KERNEL.findall(read_source())
    }


def _code(argument: str) -> str:
    """Return the code of one argument, e.g. ``const float* image``: ``P``."""
    declared, _, _ = argument.strip().rpartition(" ")
    return "P" if declared.endswith("*") else _CODES[declared]
