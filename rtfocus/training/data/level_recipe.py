"""Recipe of the level data: sharp images blurred at every defocus level."""

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

# Cells of 24 px, at least one tile, at most what every scene holds.
Side = Annotated[int, Field(ge=96, le=216, multiple_of=24)]


class BlurRecipe(Section):
    """The family of PSFs that sharp images are blurred with."""

    reference: OpticalSystem
    """Optics the defocus levels belong to, as fitted to real pairs."""
    level_step_um: Positive = 2.0
    """Distance between neighbouring levels under the reference optics."""
    farthest_um: Positive = 36.0
    """The last level stands for everything from its own defocus up to this."""
    jitter_um: Annotated[float, Field(ge=0)] = 0.4
    """Largest distance of a trained plane from its level's defocus."""
    reference_share: Fraction = 0.45
    """Share of entries blurred with exactly the reference optics."""
    near_share: Fraction = 0.30
    """Share blurred with optics near the reference; the rest is drawn widely."""
    negative_share: Fraction = 0.15
    """Share of entries on the other side of focus."""
    kept_focus_share: Fraction = 0.5
    """Share of drawn scenes whose level 0 is not blurred, as with photographs."""


class TileOptimiserRecipe(OptimiserRecipe):
    """Optimiser of a network that labels tiles."""

    batch_tiles: Count = 128
    """Tiles per step; crops of 96, 144 and 192 px hold 1, 4 and 9."""
    crop_sides_px: tuple[Side, ...] = (96, 144, 192)
    """Sides of the crops, one drawn per step."""
    ordinal_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the error of the mean level beside the cross-entropy."""


class LevelRecipe(RecipeBase):
    """A training run on images blurred at every level."""

    blur: BlurRecipe
    optimiser: TileOptimiserRecipe = TileOptimiserRecipe()
