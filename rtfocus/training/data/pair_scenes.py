"""Pair scenes: one sharp picture at several signed defoci, and the optics it has.

Every entry is a pure function of (recipe, side of the split, generation).
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import Section
from rtfocus.optics.formation import blur_stack
from rtfocus.optics.psf import compute_psf
from rtfocus.training.data.scenes import SceneSource, SharpField
from rtfocus.training.recipe import Count, Fraction, Positive, RecipeBase


class RealPairsRecipe(Section):
    """Registered real images of one field, in focus and out of it."""

    sharp: str
    """Glob pattern of the sharp images inside the data folder."""
    blurred: str
    """Folder of the blurred ones, under the same file names."""
    validation: tuple[str, ...] = ()
    """Patterns of file names that are kept out of training, whole fields."""


class PairsRecipe(Section):
    """How blurred patches are made. Defocus in levels is signed."""

    reference: OpticalSystem
    """Optics the defocus levels belong to, as fitted to real pairs."""
    level_step_um: Positive = 2.2
    """Distance between neighbouring levels under the reference optics."""
    farthest_level: Positive = 10.5
    """Largest defocus on either side, in levels."""
    patch_px: Count = 144
    """Side of a patch; a multiple of 48."""
    batch_patches: Count = 12
    """Patches per step."""
    planes: Count = 8
    """Defoci per pool entry."""
    reference_share: Fraction = 0.35
    """Share of entries blurred with exactly the reference optics."""
    near_share: Fraction = 0.25
    """Share blurred with optics near the reference; the rest is drawn widely."""
    born_wolf_share: Fraction = 0.1
    """Share of the widely drawn ones that follow Born and Wolf, even in z."""
    gaussian_share: Fraction = 0.0
    """Share of the widely drawn ones blurred by Gaussians as wide as their defocus;
    nobody is told which level that is."""
    sampling_factors: tuple[Positive, Positive] = (0.6, 1.6)
    """Range of the widely drawn pixel sizes, in those of the reference. Finer pixels
    than those see less defocus, so that the blur spans no more of them."""
    varying_share: Fraction = 0.25
    """Share of entries whose patches are tilted or stepped in depth."""
    sharp_share: Fraction = 0.08
    """Share of patches in focus; there the target is the input itself."""
    photons: tuple[Positive, Positive] = (150.0, 20_000.0)
    """Range of photons at the brightest point."""
    counting_share: Fraction = 0.0
    """Share of pictures by a detector that counts photons, as in a confocal
    microscope: hardly a background, no read noise."""
    absorbing_share: Fraction = 0.12
    """Share of entries seen dark on bright, as in brightfield."""
    relief_share: Fraction = 0.06
    """Share of entries with edges brighter and darker than their ground."""
    real: tuple[RealPairsRecipe, ...] = ()
    """Real pairs mixed in."""
    real_share: Fraction = 0.12
    """Share of patches from real pairs."""
    psf_px: Annotated[int, Field(ge=0)] = 0
    """Side of the PSF handed out with each patch, odd; 0: none."""


class PairRecipe(RecipeBase):
    """A training run on pairs."""

    pairs: PairsRecipe


Image = NDArray[np.float32]

_NO_BLUR = np.ones((1, 1), dtype=np.float32)
# Levels between the planes of an entry whose patches vary in depth.
_DENSE_STEP = 0.7
# Of the reference sampling: up to here optics count as near it.
_NEAR = 1.15
# The finest sampling, in that of the reference, that sees all of the defocus.
_FINEST_IN_FULL = 0.5
# Of spherical aberration, in waves: no wider than real objectives.
_WIDEST_SPHERICAL = 0.65


@dataclass(frozen=True, slots=True)
class PairScene:
    """One scene at several defoci."""

    sharp: Image
    """Axes (y, x)."""
    planes: Image
    """Blurred, axes (plane, y, x)."""
    levels: NDArray[np.float32]
    """Signed defocus of every plane in levels, ascending."""
    psfs: tuple[Image, ...]
    """PSF of every plane."""
    sampling: float
    """Pixel size in units of lambda / NA."""
    spherical_waves: float
    """Never positive: (z, W) and (-z, -W) make the same PSF."""
    dense: bool
    """True: planes so close that depths between them may be interpolated."""
    is_defocus: bool
    """False: blurred otherwise, its levels only say how far."""


class PairScenes:
    """Makes the scenes of the training set or of the validation set."""

    def __init__(
        self, recipe: PairRecipe, fields: list[SharpField], *, validation: bool
    ) -> None:
        self._recipe = recipe
        self._side = 1 if validation else 0
        self._scenes = SceneSource(recipe, fields, validation=validation)

    def entry(self, generation: int) -> PairScene:
        """Draw scene, optics and defoci number `generation` and blur."""
        pairs = self._recipe.pairs
        rng = np.random.default_rng([self._recipe.seed, 5, self._side, generation])
        scene = self._scenes.draw(rng)
        light = _modality(scene.light, pairs, rng)
        optics = draw_pair_optics(pairs, rng)
        dense = bool(rng.random() < pairs.varying_share)
        levels = _draw_levels(pairs, optics, dense, rng)
        gaussian = _draws(pairs.gaussian_share, rng) and is_wide(pairs, optics)
        # What one level is in these optics: the same share of the defocus unit.
        step_um = (
            pairs.level_step_um
            * optics.defocus_unit_um
            / pairs.reference.defocus_unit_um
        )
        # A photograph has been through a microscope, a drawn scene has not.
        keep_focus = not scene.ideal or bool(rng.random() < 0.5)
        in_focus = _NO_BLUR if keep_focus else compute_psf(optics, 0.0)
        make_psf = _gaussian_psf if gaussian else compute_psf
        psfs = tuple(make_psf(optics, float(z)) for z in levels * step_um)
        planes = np.clip(blur_stack(light, (in_focus, *psfs)), 0, 1)
        return PairScene(
            sharp=planes[0],
            planes=planes[1:],
            levels=levels,
            psfs=psfs,
            sampling=optics.sampling,
            spherical_waves=(
                optics.aberrations.spherical_waves
                if optics.psf_model == "pupil"
                else 0.0
            ),
            dense=dense,
            is_defocus=not gaussian,
        )


def draw_pair_optics(pairs: PairsRecipe, rng: np.random.Generator) -> OpticalSystem:
    """Draw optics: the reference, near it, or from a wide family; never W > 0."""
    base = pairs.reference
    chance = rng.random()
    if chance < pairs.reference_share:
        return base
    if chance < pairs.reference_share + pairs.near_share:
        spherical = base.aberrations.spherical_waves + rng.normal(0, 0.05)
        return replace(
            base,
            numerical_aperture=base.numerical_aperture * rng.uniform(0.95, 1.05),
            pixel_size_um=base.pixel_size_um * rng.uniform(0.94, 1.06),
            aberrations=Aberrations(
                spherical_waves=min(spherical, 0.0),
                astigmatism_waves=rng.normal(0, 0.03),
            ),
        )
    factor = float(np.exp(rng.uniform(*np.log(pairs.sampling_factors))))
    wide = replace(base, pixel_size_um=base.pixel_size_um * factor)
    if rng.random() < pairs.born_wolf_share:
        return replace(wide, psf_model="born_wolf")
    return replace(
        wide,
        numerical_aperture=base.numerical_aperture * rng.uniform(0.9, 1.1),
        aberrations=Aberrations(
            spherical_waves=-_WIDEST_SPHERICAL * rng.random(),
            astigmatism_waves=rng.normal(0, 0.06),
            coma_x_waves=rng.normal(0, 0.04),
        ),
        apodisation=float(rng.uniform(0, 0.5)),
    )


def _draws(share: float, rng: np.random.Generator) -> bool:
    """Draw whether; a share of 0 draws nothing, as before there was one."""
    return share > 0 and bool(rng.random() < share)


def is_wide(pairs: PairsRecipe, optics: OpticalSystem) -> bool:
    """Return whether optics are neither the reference nor near it."""
    nearness = optics.sampling / pairs.reference.sampling
    return not 1 / _NEAR < nearness < _NEAR


def _gaussian_psf(optics: OpticalSystem, defocus_um: float) -> Image:
    """Return a Gaussian of the width that the disc of a defocus has."""
    # A disc of radius R has the deviation R / 2 along each axis.
    radius_px = abs(defocus_um) * optics.numerical_aperture / optics.pixel_size_um
    sigma = max(0.5 * radius_px / optics.refractive_index, 0.05)
    place = np.arange(-ceil(3.5 * sigma), ceil(3.5 * sigma) + 1)
    profile = np.exp(-0.5 * (place / sigma) ** 2)
    psf = profile[:, None] * profile
    return np.asarray(psf / psf.sum(), dtype=np.float32)


def _draw_levels(
    pairs: PairsRecipe, optics: OpticalSystem, dense: bool, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw the defocus of every plane, ascending."""
    farthest, count = pairs.farthest_level, pairs.planes
    finer = optics.sampling / (pairs.reference.sampling * _FINEST_IN_FULL)
    if finer < 1:
        farthest = max(farthest * finer, 1.01 * _DENSE_STEP * count / 2)
    if dense:
        reach = _DENSE_STEP * count
        first = rng.uniform(-farthest, farthest - reach)
        levels = first + _DENSE_STEP * np.arange(count)
    else:
        edges = np.linspace(-farthest, farthest, count + 1)
        levels = rng.uniform(edges[:-1], edges[1:])
    return levels.astype(np.float32)


def _modality(light: Image, pairs: PairsRecipe, rng: np.random.Generator) -> Image:
    """Show some scenes as brightfield does: absorbing, or as relief."""
    chance = rng.random()
    if chance < pairs.absorbing_share:
        return np.asarray(1 - rng.uniform(0.3, 0.95) * light, dtype=np.float32)
    if chance < pairs.absorbing_share + pairs.relief_share:
        ground = ndimage.gaussian_filter(light, rng.uniform(1.0, 4.0))
        edges = light - ground
        contrast = rng.uniform(0.2, 0.5) / max(float(np.abs(edges).max()), 1e-6)
        return np.asarray(np.clip(0.5 + contrast * edges, 0, 1), dtype=np.float32)
    return light
