"""Seam: what CPU code asks of a network ready to run."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Outputs = Mapping[str, NDArray[np.float32]]
"""Output tensors of a network by name."""


class Engine(Protocol):
    """A network ready to run on batches of tiles, CPU side.

    Not for use from several threads at once.
    """

    name: str
    """Folder name in ``engines/``."""
    backend: str
    """Runtime, e.g. ``openvino``."""
    precision: str
    """Numbers it computes in: ``f32``, ``bf16`` or ``int8``."""

    def infer(
        self, tiles: NDArray[np.float32], condition: NDArray[np.float32] | None = None
    ) -> Outputs:
        """Run the network.

        Parameters
        ----------
        tiles
            Axes (N, C, H, W), in the units the engine's card asks for.
        condition
            Axes (N, entries); None: the engine has no such input.

        Returns
        -------
        Outputs
            New arrays, by the names the engine was opened with.

        Raises
        ------
        EngineError
            If a tensor is not what the engine was opened for; names it.
        """
        ...

    def close(self) -> None:
        """Free the runtime; called twice does nothing."""
        ...
