"""Every shipped network builds: all precisions, cameras, compute capabilities."""

from functools import cache

import pytest

from rtfocus.engines.card import Precision
from rtfocus.engines.registry import FoundEngine, find_engine, list_engines
from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import GpuRequest, gpu_request
from rtfocus.runtimes.tensorrt.library import (
    Capability,
    TensorRt,
    listed_capabilities,
)
from rtfocus.runtimes.tensorrt.plans import build_plan

CAMERA = (2048, 2048)
CAMERAS = [(512, 512), (1024, 1024), (1080, 1440), CAMERA, (3200, 3200)]
NETWORKS = [found for found in list_engines() if found.card.is_network]
WEIGHTS = [(found.name, p) for found in NETWORKS for p in found.card.files]
# To restorers cameras differ in the number of tiles alone, which the plan leaves open.
PROFILES = [
    (found.name, precision, camera)
    for found in NETWORKS
    for precision in found.card.files
    for camera in (CAMERAS if found.card.kind != "restorer" else [CAMERA])
]
TURING = (7, 5)


@cache
def engine(name: str) -> FoundEngine:
    """Return a shipped engine."""
    return find_engine(name)


@pytest.mark.parametrize(("name", "precision", "camera"), PROFILES)
def test_a_network_builds_for_a_camera(
    rtx: TensorRt, name: str, precision: Precision, camera: tuple[int, int]
) -> None:
    request = gpu_request(engine(name), camera, precision)
    assert request.precision == precision
    assert build_plan(rtx, request).startswith(b"vtrt")


@pytest.mark.parametrize(("name", "precision"), WEIGHTS)
def test_a_network_builds_for_every_card_by_name(
    rtx: TensorRt, name: str, precision: Precision
) -> None:
    request = gpu_request(engine(name), CAMERA, precision)
    named = [c for c in listed_capabilities(rtx) if c != TURING]
    assert len(named) > 3
    assert build_plan(rtx, request, named)


@pytest.mark.parametrize(("name", "precision"), WEIGHTS)
def test_a_network_builds_for_turing_or_says_which_weights_do(
    rtx: TensorRt, name: str, precision: Precision
) -> None:
    why = refusal(rtx, gpu_request(engine(name), CAMERA, precision), TURING)
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
