"""Engine: what CPU code asks of a network ready to run, and what it may be handed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError

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


Shape = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input tensors an engine was opened for."""

    engine: str
    """Name of the engine, for messages."""
    tiles: str
    """Tensor of the pixels."""
    shape: Shape | None
    """(N, C, H, W); None: any."""
    condition: str | None = None
    """Tensor of what is known beside the pixels; None: there is none."""
    entries: int = 0
    """Columns of the condition."""

    def check(
        self, tiles: NDArray[np.float32], condition: NDArray[np.float32] | None
    ) -> None:
        """Refuse what the network was not opened for; EngineError names the tensor."""
        if tiles.dtype != np.float32 or tiles.ndim != 4:
            msg = (
                f"engine '{self.engine}': input '{self.tiles}' must be float32 "
                f"(N, C, H, W), got {tiles.dtype} {tiles.shape}"
            )
            raise EngineError(msg)
        if self.shape is not None and tiles.shape != self.shape:
            msg = (
                f"engine '{self.engine}': input '{self.tiles}' has shape "
                f"{tiles.shape}, but the engine was opened for {self.shape}; open it "
                "again for this shape"
            )
            raise EngineError(msg)
        self._check_condition(len(tiles), condition)

    def _check_condition(
        self, number: int, condition: NDArray[np.float32] | None
    ) -> None:
        if self.condition is None:
            if condition is not None:
                msg = (
                    f"engine '{self.engine}' takes no condition; its only input is "
                    f"'{self.tiles}'"
                )
                raise EngineError(msg)
            return
        wanted = (number, self.entries)
        if condition is None:
            msg = f"engine '{self.engine}' needs its input '{self.condition}' {wanted}"
            raise EngineError(msg)
        if condition.dtype != np.float32 or condition.shape != wanted:
            msg = (
                f"engine '{self.engine}': input '{self.condition}' must be float32 "
                f"{wanted}, got {condition.dtype} {condition.shape}"
            )
            raise EngineError(msg)
