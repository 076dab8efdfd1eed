"""Plans bench: how long the GPU plan of every engine takes to build and to find again.

Builds with TensorRT for RTX, which needs no GPU: nothing here runs on one.

Run: python -m bench.plans [--frame 2048x2048] [--capability 8.6]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine
from rtfocus.engines.card import Precision
from rtfocus.engines.registry import FoundEngine, list_engines
from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import gpu_request
from rtfocus.runtimes.tensorrt.library import (
    TensorRt,
    import_tensorrt,
    why_not_importable,
)
from rtfocus.runtimes.tensorrt.plans import (
    ANY_CARD,
    PlanCache,
    PlanTarget,
    ready_plan,
    rtx_target,
)


def build_all(
    library: TensorRt, target: PlanTarget, frame: tuple[int, int]
) -> list[dict[str, Any]]:
    """Build every shipped network in every precision; one row each."""
    rows = []
    for found in list_engines():
        for precision in found.card.files:
            row = {"engine": found.name, "precision": precision}
            rows.append(row | build(library, target, found, precision, frame))
            print(row["engine"], row["precision"], rows[-1])
    return rows


def build(
    library: TensorRt,
    target: PlanTarget,
    found: FoundEngine,
    precision: Precision | None,
    frame: tuple[int, int],
) -> dict[str, Any]:
    """Build one plan in a cache of its own, then find it again."""
    request = gpu_request(found, frame, precision)
    with tempfile.TemporaryDirectory() as folder:
        cache = PlanCache(Path(folder))
        try:
            plan = ready_plan(library, request, target, cache=cache)
        except EngineError as error:
            return {"refused": str(error)}
        begun = time.perf_counter()
        again = ready_plan(library, request, target, cache=cache)
        found_s = time.perf_counter() - begun
    assert again.build_s is None
    return {
        "largest": {name: list(s.largest) for name, s in request.inputs.items()},
        "build_s": round(plan.build_s or 0.0, 2),
        "find_s": round(found_s, 3),
        "plan_mb": round(len(plan.data) / 1e6, 1),
    }


def main() -> None:
    """Build and write the table; without the library write the reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frame", default="2048x2048", help="HxW in pixels")
    parser.add_argument("--capability", help="e.g. 8.6; default: any from 8.0 on")
    parser.add_argument("--smoke", action="store_true", help="a small frame")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    height, width = map(int, options.frame.split("x"))
    frame = (256, 256) if options.smoke else (height, width)
    payload: dict[str, Any] = {"frame": list(frame)}
    why = why_not_importable("tensorrt_rtx")
    if why is None:
        library = import_tensorrt("tensorrt_rtx")
        target = ANY_CARD
        if options.capability:
            major, minor = map(int, options.capability.split("."))
            target = rtx_target(library, (major, minor))
        payload["library"] = f"{library.name} {library.release}"
        payload["target"] = target.gpu
        payload["plans"] = build_all(library, target, frame)
    else:
        payload["not_built"] = why
    print(machine.write("plans", payload, options.out))


if __name__ == "__main__":
    main()
