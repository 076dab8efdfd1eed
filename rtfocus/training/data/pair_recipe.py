"""Recipe of the pair data: blurred patches beside the sharp ones they came from."""

from typing import Annotated

from pydantic import Field

from rtfocus.channel import OpticalSystem
from rtfocus.config.section import Section
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
    varying_share: Fraction = 0.25
    """Share of entries whose patches are tilted or stepped in depth."""
    sharp_share: Fraction = 0.08
    """Share of patches in focus; there the target is the input itself."""
    photons: tuple[Positive, Positive] = (150.0, 20_000.0)
    """Range of photons at the brightest point."""
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
