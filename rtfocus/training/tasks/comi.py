"""COMI's task: two generators against two discriminators, Zhang et al. 2022."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.section import Section
from rtfocus.resources import resource_folder
from rtfocus.training.data.pair_recipe import PairRecipe
from rtfocus.training.data.pairs import PairBatches
from rtfocus.training.losses.multi_component import (
    adversarial_loss,
    content_loss,
    cycle_loss,
    discriminator_loss,
)
from rtfocus.training.networks.comi import (
    Generator,
    Norm,
    PatchDiscriminator,
    Upsampling,
)
from rtfocus.training.networks.features import classifier_features, vgg19_features
from rtfocus.training.recipe import Count
from rtfocus.training.task import Arrays, Graph, Task, Tensors
from rtfocus.training.tasks.restorer import gain_db, restorer_card, restorer_graph

Weight = Annotated[float, Field(ge=0)]

_TILE_PX = 256
# Nine residual blocks at a quarter see 90 px each way, but weigh little beyond 32.
_HALO_PX = 32
_MULTIPLE_PX = 4
_COLUMNS = (
    "loss",
    "adversarial",
    "content",
    "cycle",
    "pixel",
    "judges",
    "gain_db",
)


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


class ComiTask(Task[ComiRecipe]):
    """Adversarial, content and cycle losses; four networks, three optimisers.

    The exported network is G_s, from defocused to sharp.
    """

    network: Generator

    def __init__(self, recipe: ComiRecipe) -> None:
        super().__init__(recipe)
        settings = recipe.comi
        self.network, self._blurring = (
            Generator(
                width=settings.width,
                residual_blocks=settings.residual_blocks,
                upsampling=settings.upsampling,
                norm=settings.norm,
            )
            for _ in range(2)
        )
        self._judge_sharp, self._judge_blurred = (
            PatchDiscriminator(
                width=settings.discriminator_width,
                strided=settings.discriminator_layers,
            )
            for _ in range(2)
        )
        self._features: nn.Module | None = None
        self._batches: PairBatches | None = None

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make defocused and sharp patches, and tell the step they are for."""
        if self._batches is None:
            # Made when first needed: an export needs no images.
            self._batches = PairBatches(self.recipe)
        made = self._batches.batch(step, draw)
        sharp = made["sharp"]
        if not self.recipe.comi.paired:
            # Each defocused patch meets the sharp one of its neighbour.
            sharp = np.roll(sharp, 1, axis=0)
        return {"blurred": made["blurred"], "sharp": sharp, "step": np.array(step)}

    def modules(self) -> dict[str, nn.Module]:
        """Return both generators and both discriminators."""
        return {
            "network": self.network,
            "blurring": self._blurring,
            "judge_sharp": self._judge_sharp,
            "judge_blurred": self._judge_blurred,
        }

    def make_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """Return Adam for the restoring, the blurring and the judging networks."""
        settings = self.recipe.optimiser
        judges = nn.ModuleList([self._judge_sharp, self._judge_blurred])
        owners = {
            "network": self.network,
            "blurring": self._blurring,
            "judges": judges,
        }
        return {
            name: torch.optim.Adam(
                owner.parameters(), lr=settings.rate, betas=settings.betas, fused=True
            )
            for name, owner in owners.items()
        }

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return content and pixel terms of the restoring generator alone."""
        weights = self.recipe.comi.weights
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        restored = self.network(blurred).float()
        content = self._content(sharp, restored)
        pixel = functional.l1_loss(restored, sharp)
        shown = {
            "content": content,
            "pixel": pixel,
            "gain_db": gain_db(blurred, restored, sharp),
        }
        return weights.content * content + weights.pixel * pixel, shown

    def train_step(
        self, tensors: Tensors, optimisers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, float]:
        """Take one step of the generators, then one of the discriminators."""
        if int(tensors["step"]) < self.recipe.comi.restoring_steps:
            return _columns(super().train_step(tensors, optimisers))
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        device = blurred.device.type
        with torch.autocast(device, torch.bfloat16):
            made_sharp = self.network(blurred).float()
            made_blurred = self._blurring(sharp).float()
            loss, terms = self._generator_loss(blurred, sharp, made_blurred, made_sharp)
        generators = [optimisers["network"], optimisers["blurring"]]
        _descend(loss, generators)
        with torch.autocast(device, torch.bfloat16):
            judged = discriminator_loss(
                self._judge_sharp(sharp).float(),
                self._judge_sharp(made_sharp.detach()).float(),
            ) + discriminator_loss(
                self._judge_blurred(blurred).float(),
                self._judge_blurred(made_blurred.detach()).float(),
            )
        _descend(judged, [optimisers["judges"]])
        shown = {
            **terms,
            "loss": loss,
            "judges": judged,
            "gain_db": gain_db(blurred, made_sharp, sharp),
        }
        return _columns({name: float(v.detach()) for name, v in shown.items()})

    def graph(self, network: nn.Module) -> Graph:
        """Return the restoring generator as it is."""
        return restorer_graph(network, _MULTIPLE_PX)

    def card(self) -> dict[str, Any]:
        """Return the card of a COMI engine."""
        return restorer_card(
            self.recipe.pairs,
            "Restoration by the generator of a CycleGAN, Zhang et al. 2022 (COMI).",
            tile_px=_TILE_PX,
            halo_px=_HALO_PX,
            multiple_px=_MULTIPLE_PX,
        )

    def _generator_loss(
        self, blurred: Tensor, sharp: Tensor, made_blurred: Tensor, made_sharp: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return equation 10, plus the pixel term, and its terms."""
        weights = self.recipe.comi.weights
        terms = {
            "adversarial": adversarial_loss(self._judge_sharp(made_sharp).float())
            + adversarial_loss(self._judge_blurred(made_blurred).float()),
            "cycle": cycle_loss(
                blurred,
                self._blurring(made_sharp).float(),
                sharp,
                self.network(made_blurred).float(),
            ),
        }
        if self.recipe.comi.paired:
            terms["content"] = self._content(sharp, made_sharp) + self._content(
                blurred, made_blurred
            )
            terms["pixel"] = functional.l1_loss(made_sharp, sharp) + functional.l1_loss(
                made_blurred, blurred
            )
        total = sum(
            (getattr(weights, name) * term for name, term in terms.items()),
            start=blurred.new_zeros(()),
        )
        return total, terms

    def _content(self, wanted: Tensor, generated: Tensor) -> Tensor:
        if self._features is None:
            self._features = _load_features(self.recipe.comi.features)
            self._features.to(wanted.device)
        return content_loss(self._features, wanted, generated)


def _columns(shown: Mapping[str, float]) -> dict[str, float]:
    """Return what a curve shows in one order, whichever terms the step had."""
    return {name: shown.get(name, 0.0) for name in _COLUMNS}


def _descend(loss: Tensor, optimisers: list[torch.optim.Optimizer]) -> None:
    """Take one step with these optimisers; other networks get no gradient."""
    parameters = [
        parameter
        for optimiser in optimisers
        for group in optimiser.param_groups
        for parameter in group["params"]
    ]
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss, inputs=parameters)
    for optimiser in optimisers:
        optimiser.step()


def _load_features(wanted: FeaturesSection) -> nn.Module:
    if wanted.network == "vgg19" and wanted.weights is not None:
        return vgg19_features(wanted.weights, wanted.layers)
    shipped = resource_folder("engines") / "delpnet" / "model.fp32.onnx"
    return classifier_features(wanted.weights or shipped, wanted.layers)


RECIPE = ComiRecipe
TASK = ComiTask
