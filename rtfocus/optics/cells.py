"""Cells: nuclei with chromatin and cell bodies, the material of specimens."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Image = NDArray[np.float32]


def texture(shape: tuple[int, int], rng: np.random.Generator, size: float) -> Image:
    """Smooth noise of mean 0 and standard deviation 1; `size` in px."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, size, mode="wrap")
    return np.asarray(smooth / max(float(smooth.std()), 1e-6), dtype=np.float32)


def draw_nuclei(
    shape: tuple[int, int],
    rng: np.random.Generator,
    scale: float,
    coverage: float = 0.17,
) -> Image:
    """Draw nuclei over a faint uneven background; `coverage` is their share of area."""
    image = np.zeros(shape, dtype=np.float32)
    size = 12.5 * scale
    chromatin = 0.6 * texture(shape, rng, 0.16 * size) + 0.4 * texture(
        shape, rng, 0.07 * size
    )
    count = max(1, round(coverage * shape[0] * shape[1] / (np.pi * size**2)))
    centres = _scatter(shape, count, 1.7 * size, rng)
    for centre in centres:
        _add_nucleus(image, chromatin, centre, size, rng)
    haze = np.clip(0.006 + 0.003 * texture(shape, rng, 60.0 * scale), 0, None)
    image += haze.astype(np.float32)
    return image


def _scatter(
    shape: tuple[int, int], count: int, distance: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Places that keep a distance, mostly; about a third touch a neighbour."""
    limits = np.array(shape, dtype=np.float64)
    placed = np.empty((count, 2))
    for i in range(count):
        # The last of eight tries stands, so a crowded frame stays crowded.
        for _ in range(8):
            if i > 0 and rng.random() < 0.35:
                turn = rng.uniform(0, 2 * np.pi)
                step = 1.1 * distance * np.array([np.sin(turn), np.cos(turn)])
                placed[i] = placed[rng.integers(i)] + step
            else:
                placed[i] = rng.uniform(-0.02, 1.02, 2) * limits
            apart = np.hypot(*(placed[:i] - placed[i]).T)
            if apart.min(initial=np.inf) >= distance or rng.random() < 0.03:
                break
    return placed


def _add_nucleus(
    image: Image,
    chromatin: Image,
    centre: NDArray[np.float64],
    size: float,
    rng: np.random.Generator,
) -> None:
    """Paint one nucleus: a lobed ellipse with chromatin, nucleoli and a soft rim."""
    brightness = float(np.clip(rng.lognormal(-1.05, 0.45), 0.08, 1.0))
    radius = size * rng.uniform(0.75, 1.25)
    stretch = rng.uniform(1.0, 1.9)
    if rng.random() < 0.05:  # mitotic: small, dense and bright
        radius, stretch, brightness = 0.6 * size, 2.2, 0.95
    turn = rng.uniform(0, np.pi)
    lobes = rng.normal(0.0, [0.06, 0.035, 0.02])
    phases = rng.uniform(0, 2 * np.pi, 3)
    window, y, x = _around(image.shape, centre, 1.8 * stretch * radius)
    along = (x * np.cos(turn) + y * np.sin(turn)) / np.sqrt(stretch)
    across = (y * np.cos(turn) - x * np.sin(turn)) * np.sqrt(stretch)
    angle = np.arctan2(across, along)
    border = radius * (
        1.0
        + sum(
            lobe * np.cos(order * angle + phase)
            for order, lobe, phase in zip((2, 3, 4), lobes, phases, strict=True)
        )
    )
    depth = border - np.hypot(along, across)
    inside = np.clip(depth / 1.2 + 0.5, 0.0, 1.0)
    # Thinner towards the rim: a flattened ellipsoid seen from above.
    body = 0.55 + 0.45 * np.sqrt(np.clip(depth / radius, 0.0, 1.0))
    grain = 1.0 + 0.16 * chromatin[window]
    for _ in range(rng.integers(1, 5)):
        place = rng.uniform(-0.5, 0.5, 2) * radius
        spot = (along - place[0]) ** 2 + (across - place[1]) ** 2
        grain -= 0.4 * np.exp(-spot / (2.0 * (0.14 * radius) ** 2))
    painted = brightness * inside * body * np.clip(grain, 0.15, None)
    # Overlapping nuclei add up, as they do in widefield.
    image[window] += painted.astype(np.float32)


def _around(
    shape: tuple[int, ...], centre: NDArray[np.float64], reach: float
) -> tuple[tuple[slice, slice], NDArray[np.float64], NDArray[np.float64]]:
    """Window around a point, clipped to the image, with offsets y and x from it."""
    low = np.clip(np.floor(centre - reach), 0, shape).astype(int)
    high = np.clip(np.ceil(centre + reach) + 1, low, shape).astype(int)
    y, x = np.mgrid[low[0] : high[0], low[1] : high[1]].astype(np.float64)
    window = (slice(low[0], high[0]), slice(low[1], high[1]))
    return window, y - centre[0], x - centre[1]


def draw_cell_bodies(
    shape: tuple[int, int], rng: np.random.Generator, scale: float
) -> Image:
    """Broad soft-edged cytoplasm, brighter in some cells than in others."""
    level = texture(shape, rng, 22.0 * scale) + 0.3 * texture(shape, rng, 7.0 * scale)
    body = 1.0 / (1.0 + np.exp(-4.0 * (level + 0.1)))
    unequal = np.clip(0.7 + 0.25 * texture(shape, rng, 40.0 * scale), 0.1, 1.0)
    return np.asarray(body * unequal, dtype=np.float32)
