"""Blurring: draws sharp scenes and optics, and blurs one with the other.

Every entry is a pure function of (recipe, seed, generation), so a training run
that was killed finds exactly the images again that it had.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.optics.blur import blur_stack
from rtfocus.optics.levels import DefocusLevels
from rtfocus.optics.normalisation import CELL_PX, ContrastToNoise
from rtfocus.optics.psf import compute_psf
from rtfocus.training.data.fields import Field
from rtfocus.training.data.level_recipe import BlurRecipe, LevelRecipe
from rtfocus.training.data.scenes import SceneSource

Image = NDArray[np.float32]
Planes = NDArray[np.uint16]

FULL_SCALE = 65535
_NO_BLUR = np.ones((1, 1), dtype=np.float32)
_NOISE = ContrastToNoise(quantum=0.0)


@dataclass(frozen=True, slots=True)
class Entry:
    """One scene at every defocus level."""

    planes: Planes
    """Axes (plane, y, x); full scale = brightest point of the sharp scene."""
    levels: tuple[int, ...]
    """Defocus level of every plane; the last level has two planes."""
    noise: tuple[float, ...]
    """Noise that every plane already holds, as a share of full scale."""


class Blurring:
    """Makes entries of the training set or of the validation set."""

    def __init__(
        self, recipe: LevelRecipe, fields: list[Field], *, validation: bool
    ) -> None:
        """Choose the fields of one side of the split."""
        self._recipe = recipe
        self._validation = validation
        self._scenes = SceneSource(recipe, fields, validation=validation)
        self.fields = self._scenes.fields
        self._scale = DefocusLevels(step_um=recipe.blur.level_step_um)

    def entry(self, generation: int) -> Entry:
        """Draw scene and optics number `generation` and blur it at every level."""
        side = 1 if self._validation else 0
        rng = np.random.default_rng([self._recipe.seed, side, generation])
        scene = self._scenes.draw(rng)
        optics = draw_optics(self._recipe.blur, rng)
        blur = self._recipe.blur
        # A photograph has been through a microscope, a drawn scene has not.
        keep_focus = not scene.ideal or bool(rng.random() < blur.kept_focus_share)
        return self._blur(scene.light, optics, rng, keep_focus)

    def _blur(
        self,
        scene: Image,
        optics: OpticalSystem,
        rng: np.random.Generator,
        keep_focus: bool,
    ) -> Entry:
        blur = self._recipe.blur
        levels = [*range(self._scale.count), self._scale.count - 1]
        side = 1 if rng.random() >= blur.negative_share else -1
        psfs = []
        for place, level in enumerate(levels):
            jitter = rng.uniform(-blur.jitter_um, blur.jitter_um)
            defocus_um = side * (self._scale.defocus_um(level) + jitter)
            if place == self._scale.count:
                farther = rng.uniform(self._scale.values_um[-1], blur.farthest_um)
                # The far end is blur beyond recognition on either side of focus.
                defocus_um = float(farther * rng.choice([-1, 1]))
            unit = optics.defocus_unit_um / blur.reference.defocus_unit_um
            is_sharp = level == 0 and keep_focus
            psfs.append(
                _NO_BLUR if is_sharp else compute_psf(optics, defocus_um * unit)
            )
        planes = np.clip(blur_stack(scene, psfs), 0, 1)
        height, width = (n // CELL_PX * CELL_PX for n in scene.shape)
        noise = tuple(_NOISE.noise(plane[:height, :width]) for plane in planes)
        stored = np.rint(planes * FULL_SCALE).astype(np.uint16)
        return Entry(stored, tuple(levels), noise)


def draw_optics(blur: BlurRecipe, rng: np.random.Generator) -> OpticalSystem:
    """Draw the optics of one entry: reference, near it, or from a wide blur."""
    base = blur.reference
    chance = rng.random()
    if chance < blur.reference_share:
        return base
    spherical = base.aberrations.spherical_waves
    if chance < blur.reference_share + blur.near_share:
        return replace(
            base,
            numerical_aperture=base.numerical_aperture * rng.uniform(0.95, 1.05),
            pixel_size_um=base.pixel_size_um * rng.uniform(0.94, 1.06),
            aberrations=Aberrations(
                spherical_waves=spherical + rng.normal(0, 0.05),
                astigmatism_waves=rng.normal(0, 0.03),
            ),
        )
    if rng.random() < 0.3:
        return replace(base, psf_model="born_wolf")
    return replace(
        base,
        numerical_aperture=base.numerical_aperture * rng.uniform(0.85, 1.2),
        pixel_size_um=base.pixel_size_um * rng.uniform(0.85, 1.15),
        aberrations=Aberrations(
            spherical_waves=rng.uniform(1.4 * spherical, -0.6 * spherical),
            astigmatism_waves=rng.normal(0, 0.08),
            coma_x_waves=rng.normal(0, 0.05),
        ),
        apodisation=float(rng.uniform(0, 0.5)),
    )
