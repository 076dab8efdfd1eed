"""rtfocus: finds, corrects and records defocus while a microscope acquires.

Importing it is instant: what it offers is loaded when it is first used. See
`docs/reference/python.md`, and `rtfocus/__init__.pyi` for the same names with types.
"""

import importlib
import os

__version__ = "0.2.0"

# The loop brings its own threads. BLAS threads spin while they wait and take the
# cores from them: a matrix product of 0.3 ms was seen to last 70 ms. Read when
# NumPy is first imported; a user's own setting holds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_HOMES = {
    "Config": "rtfocus.config",
    "ConfigError": "rtfocus.errors",
    "DefocusMap": "rtfocus.frame",
    "EngineError": "rtfocus.errors",
    "Estimate": "rtfocus.frame",
    "ImageProcessor": "rtfocus.offline",
    "IncompleteError": "rtfocus.errors",
    "InputError": "rtfocus.errors",
    "MicroscopeError": "rtfocus.errors",
    "Optics": "rtfocus.api",
    "OutputError": "rtfocus.errors",
    "RtfocusError": "rtfocus.errors",
    "Run": "rtfocus.runs",
    "TransportError": "rtfocus.errors",
    "WriterError": "rtfocus.errors",
    "acquire": "rtfocus.api",
    "classify": "rtfocus.api",
    "estimates": "rtfocus.streaming",
    "fit_psf": "rtfocus.api",
    "focus": "rtfocus.focusing",
    "focus_of_stack": "rtfocus.batch.findings",
    "load_config": "rtfocus.config",
    "open_run": "rtfocus.runs",
    "process": "rtfocus.api",
    "restore": "rtfocus.api",
    "run": "rtfocus.api",
    "stream": "rtfocus.streaming",
}
"""Module that each name comes from."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Load what is asked for the first time."""
    if name not in _HOMES:
        msg = f"module 'rtfocus' has no attribute '{name}'"
        raise AttributeError(msg)
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # Tab completion: what is offered, and not the modules that are imported here.
    return sorted({*(name for name in globals() if name[0] == "_"), *__all__})
