"""Real pairs: registered images of one field, in focus and out of it."""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.training.data.pair_recipe import RealPairsRecipe

Image = NDArray[np.float32]
Pair = tuple[Image, Image]
"""Blurred and sharp image, both on the scale of the blurred one's percentiles."""


def load_real_pairs(
    wanted: RealPairsRecipe, folder: Path, *, validation: bool
) -> list[Pair]:
    """Read the pairs of one side of the split, normalised.

    Raises
    ------
    ConfigError
        If there is no such file, or a field has no partner of the same shape.
    """
    paths = sorted(folder.glob(wanted.sharp))
    if not paths:
        msg = f"real pairs: no file matches '{folder / wanted.sharp}'"
        raise ConfigError(msg)
    pairs = []
    for path in paths:
        held_out = any(fnmatch(path.name, pattern) for pattern in wanted.validation)
        if held_out == validation:
            pairs.append(_load(path, folder / wanted.blurred / path.name))
    return pairs


def _load(sharp_path: Path, blurred_path: Path) -> Pair:
    if not blurred_path.is_file():
        msg = f"real pairs: '{sharp_path}' has no partner '{blurred_path}'"
        raise ConfigError(msg)
    sharp, blurred = (
        open_images(path)[0].read().astype(np.float32)
        for path in (sharp_path, blurred_path)
    )
    if sharp.shape != blurred.shape:
        msg = (
            f"real pairs: '{sharp_path}' is {sharp.shape}, '{blurred_path}' is "
            f"{blurred.shape}; register and cut them to one field"
        )
        raise ConfigError(msg)
    offset, scale = (np.float32(v) for v in PercentileRange().fit(blurred))
    return (blurred - offset) / scale, (sharp - offset) / scale
