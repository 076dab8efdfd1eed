"""Specimens: sharp scenes to put under the virtual microscope, seeded.

All are float32 in [0, 1], axes (y, x), drawn at any size; lengths are in pixels
of the frame. They are meant to look like what a 20x fluorescence camera sees:
objects of unequal brightness, texture inside them, dim structure around them.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtfocus.optics.cells import draw_cell_bodies, draw_nuclei, texture
from rtfocus.optics.fibres import draw_fibres

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
    for axis, wanted in enumerate(shape or pixels.shape[:2]):
        # Centred, mirrored without repeating the edge: 0 1 2 3 2 1 0 1 ...
        side = pixels.shape[axis]
        start = (side - wanted) // 2
        turn = max(2 * (side - 1), 1)
        place = np.arange(start, start + wanted) % turn
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
