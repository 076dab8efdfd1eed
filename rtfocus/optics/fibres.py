"""Fibres: curved filaments that run alike where they are neighbours."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rtfocus.optics.cells import texture

Image = NDArray[np.float32]


def draw_fibres(
    shape: tuple[int, int],
    rng: np.random.Generator,
    scale: float,
    *,
    area_per_fibre_px: float = 420.0,
    length_px: tuple[float, float] = (40.0, 220.0),
) -> Image:
    """Draw fibres of unequal brightness, about one pixel wide; unbounded above.

    All fibres walk at once in half-pixel steps along a smooth field of directions,
    each with its own curvature, and leave light between the pixels they pass.
    """
    count = max(8, round(shape[0] * shape[1] / (area_per_fibre_px * scale**2)))
    steps = rng.uniform(*length_px, count) * scale * 2.0
    longest = int(steps.max())
    field = 0.9 * texture(shape, rng, 40.0 * scale)
    heading = rng.normal(0.0, 0.35, count) + rng.uniform(0.0, np.pi)
    strength = 0.5 * np.clip(rng.lognormal(-0.4, 0.5, count), 0.1, 2.5)
    # Start outside as well, so that the border is as full as the middle.
    limits = np.array(shape)
    place = rng.uniform(-0.15, 1.15, (count, 2)) * limits
    image = np.zeros(shape, dtype=np.float32)
    for step in range(longest):
        nearest = np.clip(place.astype(int), 0, limits - 1)
        turn = heading + field[nearest[:, 0], nearest[:, 1]]
        place = place + 0.5 * np.stack([np.sin(turn), np.cos(turn)], axis=1)
        heading = heading + rng.normal(0.0, 0.03, count)
        going = step < steps
        _deposit(image, place[going], strength[going])
    return np.asarray(ndimage.gaussian_filter(image, 0.5 * np.sqrt(scale)))


def _deposit(
    image: Image, places: NDArray[np.float64], strength: NDArray[np.float64]
) -> None:
    """Share the light of each place among its four pixels."""
    corner = np.floor(places).astype(int)
    share = places - corner
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - share[:, 0]) * np.abs(1 - dx - share[:, 1])
            rows, columns = corner[:, 0] + dy, corner[:, 1] + dx
            seen = (rows >= 0) & (rows < image.shape[0])
            seen &= (columns >= 0) & (columns < image.shape[1])
            light = (strength * weight)[seen].astype(np.float32)
            np.add.at(image, (rows[seen], columns[seen]), light)
