"""Stained sections: H&E-like tissue in colour, as brightfield sees it.

Light is absorbed, not emitted: each dye takes its share of every colour by
Beer-Lambert, so overlapping dyes multiply and empty glass is the brightest.
"""

import numpy as np
from numpy.typing import NDArray

from rtfocus.specimens.fluorescent import (
    draw_cell_bodies,
    draw_fibres,
    draw_nuclei,
    texture,
)

Image = NDArray[np.float32]

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
