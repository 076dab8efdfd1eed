"""Specimen tiles: which tiles of a frame hold something to find the defocus of.

One rule for all engines, whatever their own: else an engine that calls difficult
tiles background would look better than one that dares.
"""

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import TileGrid
from rtfocus.optics.normalisation import CELL_PX, ContrastToNoise, pad_frame

Image = NDArray[np.float32]


def specimen_tiles(frame: Image, grid: TileGrid, quantum: float) -> NDArray[np.bool_]:
    """Return True for tiles in which something stands out of the noise.

    Parameters
    ----------
    frame
        Axes (y, x), counts.
    grid
        Of the tiles.
    quantum
        Step between the camera's values; 0: real numbers.

    Returns
    -------
    NDArray[np.bool_]
        Axes (tile row, tile column).
    """
    rule = ContrastToNoise(quantum=quantum)
    padded = pad_frame(frame, CELL_PX, CELL_PX)
    sigma = max(rule.noise(padded), 1e-6 * float(np.ptp(frame)), 1e-12)
    rows, columns = (side // CELL_PX for side in padded.shape)
    cells = padded.reshape(rows, CELL_PX, columns, CELL_PX)
    means, peaks = cells.mean(axis=(1, 3)), cells.max(axis=(1, 3))
    down, across = (
        _spans(count, limit, grid)
        for count, limit in ((grid.rows, rows), (grid.columns, columns))
    )
    found = np.empty((grid.rows, grid.columns), dtype=np.bool_)
    for row, column in np.ndindex(found.shape):
        window = (down[row], across[column])
        darkest = means[window].min()
        found[row, column] = (
            means[window].max() - darkest >= rule.contrast * sigma
            or peaks[window].max() - darkest >= rule.peak * sigma
        )
    return found


def _spans(count: int, cells: int, grid: TileGrid) -> list[slice]:
    """Cells that each tile of one axis covers, at least one."""
    first = grid.origin_px - (grid.tile_px - 1) / 2
    spans = []
    for index in range(count):
        begin = (first + index * grid.stride_px) / CELL_PX
        start = min(max(round(begin), 0), cells - 1)
        stop = max(round(begin + grid.tile_px / CELL_PX), start + 1)
        spans.append(slice(start, stop))
    return spans
