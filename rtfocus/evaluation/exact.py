"""Exact: a built-in method that is told the defocus of every frame."""

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.processor import RestorationConfig
from rtfocus.errors import ConfigError
from rtfocus.evaluation.samples import DataSet, Sample
from rtfocus.frame import TileGrid
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.restorers import make_restorer
from rtfocus.processing.tiling import Montage

Image = NDArray[np.float32]

# The montage of one tile as large as the frame: one PSF everywhere.
_GRID = TileGrid(
    rows=1, columns=1, tile_px=96, stride_px=48, origin_px=47.5, signed=False
)
_LEVEL = 1


def restore_exactly(method: str, data: DataSet, sample: Sample) -> Image:
    """Restore a frame with the PSF of its own defocus.

    A frame that may be in focus comes back as it was. Where a range is known, the
    nominal defocus is its middle.

    Raises
    ------
    ConfigError
        If the defocus of the frame is not known.
    """
    span = sample.defocus_um
    if span is None:
        msg = (
            f"'{sample.name}' of {data.name}: nobody knows its defocus, so no method "
            "can be told it; leave out ':exact'"
        )
        raise ConfigError(msg)
    pixels = sample.pixels.astype(np.float32)
    if span[0] <= 0.0 <= span[1]:
        return pixels
    psf = compute_psf(data.optics, (span[0] + span[1]) / 2)
    montage = Montage(_GRID, (pixels.shape[0], pixels.shape[1]))
    restorer = make_restorer(method, RestorationConfig(), montage, {_LEVEL: psf})
    signal = pixels - np.float32(data.offset_counts)
    quantum = 1.0 if np.issubdtype(sample.pixels.dtype, np.integer) else 0.0
    labels = np.full((1, 1), _LEVEL, np.int16)
    restored = restorer.restore(signal, labels, np.empty_like(signal), quantum=quantum)
    return restored + np.float32(data.offset_counts)
