"""Requests: what to build of an engine, the same from command line and processor."""

from rtfocus.errors import EngineError
from rtfocus.processing.engines.card import verified_file
from rtfocus.processing.engines.card_sections import Precision
from rtfocus.processing.engines.registry import FoundEngine
from rtfocus.processing.gpu.profiles import engine_inputs
from rtfocus.processing.gpu.seam import GpuRequest


def preferred_precision(found: FoundEngine) -> Precision:
    """Return the precision that runs where none is asked for.

    fp16 where the engine has it: GPUs compute it several times faster, and it stays
    within a hundredth of the reference. int8 costs quality and is only run on demand.

    Raises
    ------
    EngineError
        If the engine is no network.
    """
    if "fp32" not in found.card.files:
        msg = (
            f"engine '{found.name}' is {found.implementation}: it has no network, so "
            "there is nothing to build"
        )
        raise EngineError(msg)
    return "fp16" if "fp16" in found.card.files else "fp32"


def gpu_request(
    found: FoundEngine,
    frame: tuple[int, int],
    precision: Precision | None = None,
    *,
    tf32: bool = True,
    workspace_bytes: int | None = None,
    cuda_graphs: bool = True,
) -> GpuRequest:
    """Return the request for an engine and a camera.

    Parameters
    ----------
    found
        Engine with its card.
    frame
        Height and width of the camera's frame in pixels.
    precision
        Weights to run; None: `preferred_precision`.
    tf32
        False for comparisons of fp32 numbers.
    workspace_bytes
        Most memory one layer may take; None: no limit.
    cuda_graphs
        Whether a backend may record its kernels.

    Raises
    ------
    EngineError
        If the engine is no network, lacks these weights, or they are damaged.
    """
    chosen = precision or preferred_precision(found)
    model = verified_file(found.folder, found.card, chosen)
    return GpuRequest(
        name=found.name,
        model=model,
        weights_sha256=found.card.sha256[chosen],
        precision=chosen,
        inputs=engine_inputs(found.card, frame),
        tf32=tf32,
        workspace_bytes=workspace_bytes,
        cuda_graphs=cuda_graphs,
    )
