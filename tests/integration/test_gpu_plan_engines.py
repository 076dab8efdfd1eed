"""Every shipped network builds: all precisions, cameras, compute capabilities."""

from functools import cache

import pytest

from rtfocus.errors import EngineError
from rtfocus.processing.engines.card_sections import Precision
from rtfocus.processing.engines.registry import FoundEngine, find_engine, list_engines
from rtfocus.processing.gpu.plan_build import Capability, build_plan
from rtfocus.processing.gpu.requests import gpu_request
from rtfocus.processing.gpu.seam import GpuRequest
from rtfocus.processing.gpu.tensorrt_import import (
    TensorRt,
    import_tensorrt,
    listed_capabilities,
    why_not_importable,
)

FRAMES = [(512, 512), (1024, 1024), (1080, 1440), (2048, 2048), (3200, 3200)]
WEIGHTS = [
    (found.name, precision)
    for found in list_engines()
    if found.card.is_network
    for precision in found.card.files
]
TURING = (7, 5)


@pytest.fixture(scope="module")
def rtx() -> TensorRt:
    """TensorRT for RTX; skips where it is not installed."""
    why = why_not_importable("tensorrt_rtx")
    if why is not None:
        pytest.skip(why)
    return import_tensorrt("tensorrt_rtx")


@cache
def engine(name: str) -> FoundEngine:
    """Return a shipped engine."""
    return find_engine(name)


@pytest.mark.parametrize(("name", "precision"), WEIGHTS)
@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: f"{frame[0]}x{frame[1]}")
def test_a_network_builds_for_a_camera(
    rtx: TensorRt, name: str, precision: Precision, frame: tuple[int, int]
) -> None:
    request = gpu_request(engine(name), frame, precision)
    assert request.precision == precision
    assert build_plan(rtx, request).startswith(b"vtrt")


@pytest.mark.parametrize(("name", "precision"), WEIGHTS)
def test_a_network_builds_for_every_card(
    rtx: TensorRt, name: str, precision: Precision
) -> None:
    request = gpu_request(engine(name), (2048, 2048), precision)
    for capability in listed_capabilities(rtx):
        if capability != TURING:
            assert build_plan(rtx, request, [capability])


@pytest.mark.parametrize(("name", "precision"), WEIGHTS)
def test_a_network_builds_for_turing_or_says_which_weights_do(
    rtx: TensorRt, name: str, precision: Precision
) -> None:
    why = refusal(rtx, gpu_request(engine(name), (2048, 2048), precision), TURING)
    # Its fp32 products of matrices are missing, nothing else is.
    assert why is None or (precision != "fp16" and "--precision fp16" in why)


def refusal(
    library: TensorRt, request: GpuRequest, capability: Capability
) -> str | None:
    """Return why a network cannot be built for a capability; None: it can."""
    try:
        build_plan(library, request, [capability])
    except EngineError as error:
        return str(error)
    return None
