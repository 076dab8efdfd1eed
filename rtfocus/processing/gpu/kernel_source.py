"""Kernel source: the CUDA text of ``kernels/`` as one unit, and what each takes."""

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "kernels"
_FIRST = "common.cu"

_KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
# Codes of `struct`; the layout of a launch's arguments is that of a C struct.
_CODES = {
    "int": "i",
    "unsigned": "I",
    "float": "f",
    "double": "d",
    "long long": "q",
}


@cache
def read_source() -> str:
    """Return the text of all kernels, ready for a compiler."""
    rest = sorted(path for path in FOLDER.glob("*.cu") if path.name != _FIRST)
    files = [FOLDER / _FIRST, *rest]
    return "\n".join(
        f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}' for path in files
    )


@cache
def signatures() -> dict[str, str]:
    """Return the argument types of every kernel as codes of `struct`.

    Examples
    --------
    >>> signatures()["project"]
    'PPif'
    """
    return {
        name: "".join(_code(argument) for argument in arguments.split(","))
        for name, arguments in _KERNEL.findall(read_source())
    }


def _code(argument: str) -> str:
    """Return the code of one argument, e.g. ``const float* image``: ``P``."""
    declared, _, _ = argument.strip().rpartition(" ")
    return "P" if declared.endswith("*") else _CODES[declared]
