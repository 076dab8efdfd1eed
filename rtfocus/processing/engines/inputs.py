"""Inputs: what may be handed to an engine, checked alike for every backend."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError

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
