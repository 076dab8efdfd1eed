"""Inputs: what may be handed to an engine, checked alike for every backend."""

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError


def check_input(
    name: str,
    tensor: str,
    shape: tuple[int, ...] | None,
    tiles: NDArray[np.float32],
    condition: NDArray[np.float32] | None,
) -> None:
    """Refuse what the network was not opened for; EngineError names the tensor.

    Parameters
    ----------
    name, tensor
        Engine and input tensor, for the message.
    shape
        (N, C, H, W) the engine was opened for; None: any.
    tiles, condition
        What `Engine.infer` was called with.
    """
    if condition is not None:
        msg = f"engine '{name}' takes no condition; its only input is '{tensor}'"
        raise EngineError(msg)
    if tiles.dtype != np.float32 or tiles.ndim != 4:
        msg = (
            f"engine '{name}': input '{tensor}' must be float32 (N, C, H, W), got "
            f"{tiles.dtype} {tiles.shape}"
        )
        raise EngineError(msg)
    if shape is not None and tiles.shape != shape:
        msg = (
            f"engine '{name}': input '{tensor}' has shape {tiles.shape}, but the "
            f"engine was opened for {shape}; open it again for this shape"
        )
        raise EngineError(msg)
