"""Specimens: sharp scenes drawn at random, to put under the virtual microscope.

Fluorescent ones are float32 in [0, 1], axes (y, x), drawn at any size; lengths are in
pixels of the frame. They are meant to look like what a 20x fluorescence camera sees:
objects of unequal brightness, texture inside them, dim structure around them.

In stained sections (H&E-like, in colour, as brightfield sees them) light is absorbed,
not emitted: each dye takes its share of every colour by Beer-Lambert, so overlapping
dyes multiply and empty glass is the brightest.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

Image = NDArray[np.float32]
SpecimenKind = Literal["nuclei", "filaments", "tissue", "beads"]
SPECIMEN_KINDS: tuple[SpecimenKind, ...] = get_args(SpecimenKind)


def draw_specimen(
    kind: SpecimenKind,
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: float = 1.0,
) -> Image:
    """Draw one procedural specimen.

    Parameters
    ----------
    kind
        ``nuclei``: separate and touching textured ellipses; ``filaments``: curved
        fibres of cells; ``tissue``: crowded cells in a fibrous matrix; ``beads``:
        sub-resolution points.
    shape
        Height and width in pixels.
    rng
        Source of every random choice; the same state gives the same specimen.
    scale
        Size of the objects; 1.0 gives nuclei of about 26 px, as at 0.65 um/px.

    Returns
    -------
    Image
        Values in [0, 1]; the brightest object lies near 1.

    Raises
    ------
    ValueError
        If the kind is unknown, the shape is empty or the scale is not positive.
    """
    if kind not in _DRAWINGS:
        msg = f"specimen kind {kind!r} is unknown; choose from {SPECIMEN_KINDS}"
        raise ValueError(msg)
    if min(shape) < 1 or scale <= 0:
        msg = f"shape={shape}, scale={scale} hold no specimen; both must be > 0"
        raise ValueError(msg)
    image = _DRAWINGS[kind](shape, rng, scale)
    return np.asarray(np.clip(image, 0.0, 1.0), dtype=np.float32)


def normalise_sharp(
    image: ArrayLike,
    shape: tuple[int, int] | None = None,
    *,
    black_percentile: float = 0.1,
    white_percentile: float = 99.9,
) -> Image:
    """Turn any sharp image into a specimen.

    Parameters
    ----------
    image
        Axes (y, x) or (y, x, colour), any number type, finite.
    shape
        Height and width wanted: a larger frame is filled with mirror images, a
        smaller one is cut from the centre. None: as it is.
    black_percentile, white_percentile
        What becomes 0 and 1, over all colours; beyond them it is clipped.

    Returns
    -------
    Image
        Values in [0, 1]; a flat image becomes 0.

    Raises
    ------
    ValueError
        If the image has neither 2 nor 3 axes or holds values that are not finite.
    """
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        msg = f"image of shape {pixels.shape}; need axes (y, x) or (y, x, colour)"
        raise ValueError(msg)
    if not np.isfinite(pixels).all():
        msg = "image holds values that are not finite; replace them first"
        raise ValueError(msg)
    black, white = np.percentile(pixels, [black_percentile, white_percentile])
    scaled = np.clip((pixels - black) / max(white - black, 1e-6), 0.0, 1.0)
    pixels = np.asarray(scaled, dtype=np.float32)
    for axis, target in enumerate(shape or pixels.shape[:2]):
        # Centred, mirrored without repeating the edge: 0 1 2 3 2 1 0 1 ...
        side = pixels.shape[axis]
        start = (side - target) // 2
        turn = max(2 * (side - 1), 1)
        place = np.arange(start, start + target) % turn
        pixels = np.take(pixels, np.minimum(place, turn - place) % side, axis=axis)
    return np.asarray(np.ascontiguousarray(pixels), dtype=np.float32)


def _nuclei(shape: tuple[int, int], rng: np.random.Generator, scale: float) -> Image:
    return draw_nuclei(shape, rng, scale)


def _filaments(shape: tuple[int, int], rng: np.random.Generator, scale: float) -> Image:
    """Stress fibres in cell bodies that differ in brightness."""
    cells = draw_cell_bodies(shape, rng, scale)
    fibres = draw_fibres(shape, rng, scale)
    inside = 0.15 + 0.85 * cells
    return np.asarray(0.02 + 0.12 * cells + 0.30 * fibres * inside)


def _tissue(shape: tuple[int, int], rng: np.random.Generator, scale: float) -> Image:
    """Crowded nuclei, cytoplasm that varies and bundles of fibres between them."""
    nuclei = draw_nuclei(shape, rng, 0.75 * scale, coverage=0.42)
    cells = draw_cell_bodies(shape, rng, 0.8 * scale)
    fibres = draw_fibres(shape, rng, scale, area_per_fibre_px=300.0)
    grain = np.clip(1.0 + 0.25 * texture(shape, rng, 1.5 * scale), 0.0, None)
    bundles = texture(shape, rng, 18.0 * scale) > 0.4
    matrix = 0.16 * cells * grain + 0.10 * fibres * bundles
    return np.asarray(0.7 * nuclei + matrix * np.exp(-2.0 * nuclei) + 0.02)


def _beads(shape: tuple[int, int], rng: np.random.Generator, scale: float) -> Image:
    """Points of one brightness class, sub-pixel places, some as pairs."""
    count = max(3, round(shape[0] * shape[1] / (900.0 * scale**2)))
    centres = rng.uniform(0.0, 1.0, (count, 2)) * shape
    brightness = np.clip(rng.normal(0.7, 0.12, count), 0.3, 1.0)
    image = np.full(shape, 0.01, dtype=np.float32)
    width = 0.6
    for centre, peak in zip(centres, brightness, strict=True):
        low = np.maximum(np.floor(centre).astype(int) - 3, 0)
        rows, columns = (slice(low[k], low[k] + 8) for k in (0, 1))
        y = np.arange(shape[0])[rows, None] - centre[0]
        x = np.arange(shape[1])[None, columns] - centre[1]
        image[rows, columns] += peak * np.exp(-(y**2 + x**2) / (2.0 * width**2))
    return image


_DRAWINGS: dict[
    SpecimenKind, Callable[[tuple[int, int], np.random.Generator, float], Image]
] = {"nuclei": _nuclei, "filaments": _filaments, "tissue": _tissue, "beads": _beads}


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


def draw_fibres(
    shape: tuple[int, int],
    rng: np.random.Generator,
    scale: float,
    *,
    area_per_fibre_px: float = 420.0,
) -> Image:
    """Draw fibres of unequal brightness, about one pixel wide; unbounded above.

    All fibres walk at once in half-pixel steps along a smooth field of directions,
    each with its own curvature, and leave light between the pixels they pass.
    """
    count = max(8, round(shape[0] * shape[1] / (area_per_fibre_px * scale**2)))
    lengths_px = rng.uniform(40.0, 220.0, count) * scale
    steps = 2.0 * lengths_px
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
            is_inside = (rows >= 0) & (rows < image.shape[0])
            is_inside &= (columns >= 0) & (columns < image.shape[1])
            light = (strength * weight)[is_inside].astype(np.float32)
            np.add.at(image, (rows[is_inside], columns[is_inside]), light)


# Absorbance of red, green and blue per unit of dye: Ruifrok and Johnston 2001.
_HAEMATOXYLIN = (0.65, 0.70, 0.29)
_EOSIN = (0.07, 0.99, 0.11)


def draw_stained(
    shape: tuple[int, int], rng: np.random.Generator, *, scale: float = 1.0
) -> Image:
    """Draw a stained tissue section.

    Parameters
    ----------
    shape
        Height and width in pixels.
    rng
        Source of every random choice; dye strengths vary with it as between labs.
    scale
        Size of the objects, see `draw_specimen`.

    Returns
    -------
    Image
        Transmitted light in [0, 1], axes (y, x, colour), colours red, green, blue.

    References
    ----------
    .. [1] A. C. Ruifrok, D. A. Johnston, Anal. Quant. Cytol. Histol. 23, 2001.
    """
    nuclei = np.clip(draw_nuclei(shape, rng, 0.75 * scale, coverage=0.35), 0.0, 1.0)
    bodies = draw_cell_bodies(shape, rng, scale)
    fibres = np.clip(draw_fibres(shape, rng, scale, area_per_fibre_px=250.0), 0.0, 1.5)
    grain = np.clip(1.0 + 0.3 * texture(shape, rng, 1.2 * scale), 0.2, None)
    haematoxylin = rng.uniform(1.6, 2.6) * nuclei + 0.08 * bodies * grain
    eosin = rng.uniform(0.35, 0.7) * bodies * grain + rng.uniform(0.2, 0.5) * fibres
    absorbance = haematoxylin[..., None] * np.array(_HAEMATOXYLIN) + eosin[
        ..., None
    ] * np.array(_EOSIN)
    return np.asarray(0.96 * np.exp(-absorbance), dtype=np.float32)
