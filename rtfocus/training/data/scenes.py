"""Scenes: sharp pictures to blur, cut from real fields or drawn."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rtfocus.specimens.fluorescent import draw_specimen
from rtfocus.training.data.fields import Field
from rtfocus.training.recipe import RecipeBase, SpecimenRecipe

Image = NDArray[np.float32]

_LEAST_SIDE_PX = 216
_LARGEST_DRAWN_PX = 320


@dataclass(frozen=True, slots=True)
class Scene:
    """One sharp picture."""

    light: Image
    """Axes (y, x), in [0, 1]."""
    ideal: bool
    """True: drawn, has never been through a microscope."""


class SceneSource:
    """Draws scenes from one side of the split, each source by its share."""

    def __init__(
        self, recipe: RecipeBase, fields: list[Field], *, validation: bool
    ) -> None:
        self.fields = [field for field in fields if field.validation == validation]
        self._side_px = recipe.pool.side_px
        self._specimens = recipe.specimens
        counts = {id(f.source): 0 for f in self.fields}
        for field in self.fields:
            counts[id(field.source)] += 1
        shares = [f.source.share / counts[id(f.source)] for f in self.fields]
        if recipe.specimens is not None:
            shares.append(recipe.specimens.share)
        self._shares = np.array(shares) / sum(shares)

    def draw(self, rng: np.random.Generator) -> Scene:
        """Draw the next scene."""
        place = int(rng.choice(len(self._shares), p=self._shares))
        if place == len(self.fields) and self._specimens is not None:
            return self._draw_specimen(self._specimens, rng)
        field = self.fields[place]
        return Scene(self._cut_field(field, rng), ideal=False)

    def _draw_specimen(
        self, specimens: SpecimenRecipe, rng: np.random.Generator
    ) -> Scene:
        kind = specimens.kinds[int(rng.integers(len(specimens.kinds)))]
        side = min(_LARGEST_DRAWN_PX, self._side_px)
        scale = float(rng.uniform(*specimens.scale))
        light = draw_specimen(kind, (side, side), rng, scale=scale)
        return Scene(light, ideal=True)

    def _cut_field(self, field: Field, rng: np.random.Generator) -> Image:
        """Cut a window of a field, resized by a random factor."""
        low, high = field.source.zoom
        zoom = float(rng.uniform(low, high))
        if rng.random() < field.source.native_share:
            zoom = 1.0
        zoom = max(zoom, _LEAST_SIDE_PX / min(field.image.shape))
        wanted = int(self._side_px / zoom)
        window = []
        for side in field.image.shape:
            start = int(rng.integers(max(side - wanted, 0) + 1))
            window.append(slice(start, start + wanted))
        scene = _resize(field.image[tuple(window)], zoom)
        # Fields in focus are not equally sharp: neither are those to come.
        softness = rng.uniform(0, field.source.softness_px)
        return np.asarray(ndimage.gaussian_filter(scene, softness), dtype=np.float32)


def _resize(image: Image, zoom: float) -> Image:
    """Resize an image; a reduction does not alias."""
    if zoom == 1:
        return image
    # Half a new pixel wide: keeps most of the sharpness that reduction gains.
    smooth = ndimage.gaussian_filter(image, 0.35 / zoom) if zoom < 1 else image
    order = 1 if zoom < 1 else 3
    resized = ndimage.zoom(smooth, zoom, order=order)
    return np.asarray(np.clip(resized, 0, 1), dtype=np.float32)
