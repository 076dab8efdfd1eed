"""OpenVINO import: the runtime without its usage reports.

Importing ``openvino`` sends an event to its maker from a background thread, unless
the package ``openvino_telemetry`` is missing. A microscope PC is often behind a
firewall, where that thread delays the end of the program, and nothing about a
user's work is to leave it: the package is therefore hidden, and OpenVINO uses
the stub it brings for this case.
"""

import sys
from importlib import import_module
from typing import Any


def import_openvino() -> Any:  # noqa: ANN401
    """Return the module ``openvino``; ImportError where it is not installed."""
    if "openvino" not in sys.modules:
        # None makes Python answer an import with ImportError.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")
