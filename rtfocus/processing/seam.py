"""Seam: what the live loop asks of a processor and a processor of an engine.

The seam is the frame, because tiles must be able to stay on a GPU; engines
below it see arrays only, never sockets or threads.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.frame import (
    DefocusMap,
    Estimate,
    FrameHeader,
    FrameResult,
    SeriesStart,
    TileGrid,
)
from rtfocus.slots import Slot


class FrameProcessor(Protocol):
    """Estimates and restores whole frames, several in flight.

    Lifecycle: `start` once per series, then for every slot `submit`, `wait_estimate`,
    `wait_result` in this order (from different threads if wanted), then `close`.
    The caller owns the slot and must not release it before `wait_result` returned
    and the result's arrays are no longer needed: they belong to the slot.
    """

    def start(self, series: SeriesStart, slots: int) -> TileGrid | None:
        """Prepare engines, PSFs and per-slot buffers; EngineError where none fits.

        Returns the grid of the defocus maps; None where no channel is classified.
        """
        ...

    def submit(self, slot: Slot, *, unrestored: str | None = None) -> None:
        """Begin work on a frame; waits while the processor is full.

        `unrestored` is why restoration is to be left out; None: restore.
        """
        ...

    def wait_estimate(self, slot: Slot) -> tuple[Estimate, DefocusMap] | None:
        """Wait for the defocus of a frame; None: this channel has no classifier."""
        ...

    def wait_result(self, slot: Slot) -> FrameResult:
        """Wait for everything about a frame; raises what went wrong with it."""
        ...

    def backends(self) -> dict[str, str]:
        """Tell what each engine of the series runs on, for the report."""
        ...

    def close(self) -> None:
        """Stop threads and free buffers; called twice does nothing."""
        ...


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


def frame_fault(header: FrameHeader, series: SeriesStart) -> EngineError | None:
    """Return what is wrong with a frame that is not of its series; None: nothing."""
    if tuple(header.shape) == tuple(series.shape) and header.dtype == series.dtype:
        return None
    return EngineError(
        f"frame {header.sequence} is {header.shape} {header.dtype}, the series "
        f"is {series.shape} {series.dtype}; start a new series for it"
    )
