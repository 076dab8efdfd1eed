"""Recipe of the signed data: patches on either side of focus, in five classes."""

from typing import Annotated

from pydantic import Field

from rtfocus.channel import OpticalSystem
from rtfocus.config.section import Section
from rtfocus.training.recipe import (
    Count,
    Fraction,
    OptimiserRecipe,
    Positive,
    RecipeBase,
)


class SignedRecipe(Section):
    """Planes through focus and what makes their sides differ.

    With spherical aberration W = 0 the PSFs of +z and -z are the same and no image
    tells them apart; (z, W) and (-z, -W) are the same too. So W is never 0 here and
    always negative.
    """

    reference: OpticalSystem
    """Optics of the planes: those of the training and of the first test."""
    colour: bool = False
    """Stained sections in three colours; false: fluorescence, one channel."""
    step_um: Positive = 0.5
    """Distance between planes; nearer to focus than half of it counts as focus."""
    inner_um: Positive = 5.5
    """Classes -1 and 1 reach up to this, itself included."""
    farthest_um: Positive = 10.0
    """Last plane on either side."""
    beyond_um: Annotated[float, Field(ge=0)] = 0.0
    """Largest defocus of one more plane behind the last, on either side; 0: none."""
    jitter_um: Annotated[float, Field(ge=0)] = 0.0
    """Largest distance of a trained plane from its place."""
    reference_share: Fraction = 0.7
    """Share of scenes with exactly the reference optics; the rest is drawn near."""
    photons: tuple[Positive, Positive] = (800.0, 10_000.0)
    """Range of photons at the brightest point."""


class PatchOptimiserRecipe(OptimiserRecipe):
    """Optimiser of a network that labels whole patches."""

    batch_patches: Count = 32
    """Patches per step."""


class SignedClassRecipe(RecipeBase):
    """A training run on signed classes."""

    signed: SignedRecipe
    optimiser: PatchOptimiserRecipe = PatchOptimiserRecipe()
