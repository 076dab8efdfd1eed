"""Recipe of COMI: losses, networks and switches of a run, Zhang et al. 2022."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rtfocus.config.section import Section
from rtfocus.training.data.pair_recipe import PairRecipe
from rtfocus.training.networks.comi import Norm, Upsampling
from rtfocus.training.recipe import Count

Weight = Annotated[float, Field(ge=0)]


class FeaturesSection(Section):
    """Network whose features the content loss compares."""

    network: Literal["classifier", "vgg19"] = "classifier"
    """``classifier``: convolutions of a defocus engine, in-domain. ``vgg19``: the
    paper's; needs its weights."""
    weights: Path | None = None
    """Weight file; None: that of the shipped engine ``delpnet``."""
    layers: Count = 2
    """Convolutions up to the features that are compared."""

    @model_validator(mode="after")
    def _vgg_needs_weights(self) -> Self:
        if self.network == "vgg19" and self.weights is None:
            msg = "vgg19 is not part of rtfocus; give 'weights', torchvision's file"
            raise ValueError(msg)
        return self


class LossSection(Section):
    """Weights of the terms of equation 10; `pixel` is ours."""

    adversarial: Weight = 1.0
    content: Weight = 1.0
    cycle: Weight = 0.001
    pixel: Weight = 0.0
    """Of the mean absolute error between generated and wanted images, both ways."""


class ComiSection(Section):
    """Switches of COMI."""

    width: Count = 64
    """Maps of the generators at full resolution; a quarter of the deepest."""
    residual_blocks: Count = 9
    """Residual blocks of each generator."""
    upsampling: Upsampling = "resize"
    """``transposed`` convolutions as in the paper, or ``resize`` and convolution."""
    norm: Norm = "none"
    """Norm of the generators."""
    discriminator_width: Count = 64
    """Maps of the discriminators' first layer."""
    discriminator_layers: Count = 3
    """Strided layers of the discriminators; 3 judge patches of 70 px."""
    paired: bool = True
    """False: sharp images of other fields; only adversarial and cycle terms apply."""
    restoring_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the start in which the restoring generator learns alone, from the
    content and pixel terms."""
    features: FeaturesSection = FeaturesSection()
    weights: LossSection = LossSection()

    @model_validator(mode="after")
    def _unpaired_has_no_truth(self) -> Self:
        weights = self.weights
        if not self.paired and (
            weights.content or weights.pixel or self.restoring_steps
        ):
            msg = (
                "unpaired training has no image to compare with; set restoring_steps, "
                "weights.content and weights.pixel to 0"
            )
            raise ValueError(msg)
        return self


class ComiRecipe(PairRecipe):
    """A training run of COMI."""

    name: str = "comi"
    network: Literal["comi"] = "comi"
    comi: ComiSection = ComiSection()
