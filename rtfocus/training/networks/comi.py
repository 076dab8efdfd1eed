"""COMI: what the CycleGAN of Zhang et al. 2022 learns, and from which losses.

The multi-component loss has adversarial, content and cycle terms. s stands for a
defocused (source) image, t for a sharp (target) one, G_s makes sharp from defocused,
G_t defocused from sharp, D_t judges sharp and D_s defocused images (equations 5 to 10).
"""

from collections.abc import Mapping
from math import log
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.networks.comi_networks import (
    ComiNetworks,
    ComiRecipe,
    ComiSection,
    FeaturesSection,
    descend,
)
from rtfocus.training.onnx_forms import float_weights
from rtfocus.training.task import (
    Arrays,
    RestorerTask,
    Tensors,
    gain_db,
    mixed_precision,
)

# Contrast below which a patch is empty; it is not magnified to look like one that
# is not. In units of the frame's own range.
_LEAST_DEVIATION = 0.05


def log_probability(logits: Tensor, *, real: bool) -> Tensor:
    """Return log D, or log(1 - D) where `real` is False, of each image.

    The discriminator's probability D is the average over its map of judgements.

    Parameters
    ----------
    logits
        Map (N, 1, n, n).

    Returns
    -------
    Tensor
        Shape (N,), not positive.
    """
    judgements = functional.logsigmoid(logits if real else -logits).flatten(1)
    return torch.logsumexp(judgements, dim=1) - log(judgements.shape[1])


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Return what a discriminator minimises: half of equation 5, negated."""
    return -(
        log_probability(real, real=True).mean()
        + log_probability(generated, real=False).mean()
    )


def adversarial_loss(generated: Tensor) -> Tensor:
    """Return what a generator minimises: -log D of what it made.

    Equation 5 has it minimise log(1 - D), which has the same optimum and hardly
    any slope where the discriminator is sure.
    """
    return -log_probability(generated, real=True).mean()


def content_loss(features: nn.Module, target: Tensor, generated: Tensor) -> Tensor:
    """Return the mean squared distance of the features of two images (eq. 6, 7).

    Both are standardised by the contrast of the wanted one, as the classifier whose
    features these are expects it; so gain and offset of a frame do not matter.

    Parameters
    ----------
    features
        Frozen network from (N, 1, H, W) to feature maps.
    wanted, generated
        Images (N, 1, H, W).
    """
    with torch.no_grad():
        centre = target.mean(dim=(1, 2, 3), keepdim=True)
        spread = target.std(dim=(1, 2, 3), keepdim=True).clamp_min(_LEAST_DEVIATION)
        aim = features((target - centre) / spread)
    generated_features = features((generated - centre) / spread)
    return functional.mse_loss(generated_features.float(), aim.float())


def cycle_loss(
    source: Tensor, source_again: Tensor, target: Tensor, target_again: Tensor
) -> Tensor:
    """Return the mean absolute error of both round trips (eq. 9)."""
    return functional.l1_loss(source_again, source) + functional.l1_loss(
        target_again, target
    )


# Maps of VGG-19's convolutions; 0 stands for a 2 x 2 max pool. The places in the
# list are torchvision's, so that its weight files fit.
_VGG19 = (64, 64, 0, 128, 128, 0, *(256,) * 4, 0, *(512,) * 4, 0, *(512,) * 4)


def classifier_features(weights: Path, layers: int) -> nn.Module:
    """Return the first convolutions of an exported defocus classifier, frozen.

    BatchNorm is part of the exported convolutions; each is followed by its ReLU.

    Parameters
    ----------
    weights
        ONNX file of an engine like ``engines/delpnet/model.fp32.onnx``.
    layers
        How many convolutions; more look at more of the image, more coarsely.

    Returns
    -------
    nn.Module
        From (N, 1, H, W) to the maps after the last of them.

    Raises
    ------
    ConfigError
        If the file cannot be read or has fewer convolutions.
    """
    try:
        graph = onnx.load(str(weights)).graph
    except Exception as error:  # onnx raises whatever its parser met
        msg = (
            f"content features: '{weights}' cannot be read: {error}; "
            "name the model.fp32.onnx of a classifier"
        )
        raise ConfigError(msg) from error
    values = float_weights(graph)
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    if len(nodes) < layers:
        msg = (
            f"content features: '{weights}' has {len(nodes)} convolutions, "
            f"{layers} are wanted; lower 'layers'"
        )
        raise ConfigError(msg)
    modules: list[nn.Module] = []
    for node in nodes[:layers]:
        settings = {item.name: list(item.ints) for item in node.attribute}
        kernel = values[node.input[1]]
        convolution = nn.Conv2d(
            kernel.shape[1],
            kernel.shape[0],
            kernel.shape[2],
            stride=settings["strides"][0],
            padding=settings["pads"][0],
        )
        offset = values[node.input[2]]
        convolution.load_state_dict({"weight": kernel, "bias": offset})
        modules += [convolution, nn.ReLU()]
    return _frozen(nn.Sequential(*modules))


class Vgg19Features(nn.Module):
    """The first convolutions of VGG-19, fed a grey image in all three colours."""

    def __init__(self, convolutions: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, made = 3, 0
        for width in _VGG19:
            if made == convolutions:
                break
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
            made += 1
        self.features = nn.Sequential(*layers)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the maps after the last convolution's ReLU of (N, 1, H, W)."""
        maps: Tensor = self.features(tiles.expand(-1, 3, -1, -1))
        return maps


def vgg19_features(weights: Path, layers: int) -> nn.Module:
    """Return the first convolutions of VGG-19, frozen.

    Parameters
    ----------
    weights
        The weight file of torchvision's ``vgg19``, which the user has.
    layers
        How many convolutions, 1 to 16.

    Raises
    ------
    ConfigError
        If the file cannot be read or holds another network.
    """
    network = Vgg19Features(layers)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        values = {name: state[name] for name in network.state_dict()}
        network.load_state_dict(values)
    except Exception as error:  # torch raises whatever the unpickler met
        msg = (
            f"content features: '{weights}' is no weight file of torchvision's vgg19: "
            f"{error}; leave 'weights' out to use the defocus classifier"
        )
        raise ConfigError(msg) from error
    return _frozen(network)


def _frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False).eval()


Terms = dict[str, Tensor]


class ComiLosses:
    """Losses of the generators and of the discriminators.

    Parameters
    ----------
    settings
        Weights of the terms, and the features that are compared.
    networks
        What is judged, and what judges.
    """

    def __init__(self, settings: ComiSection, networks: ComiNetworks) -> None:
        self._settings = settings
        self._networks = networks
        self._features: nn.Module | None = None

    def of_restoring(self, restored: Tensor, sharp: Tensor) -> tuple[Tensor, Terms]:
        """Return content and pixel terms of the restoring generator alone."""
        terms = {
            "content": self._content(sharp, restored),
            "pixel": functional.l1_loss(restored, sharp),
        }
        return self._weighted(terms), terms

    def of_generators(
        self, blurred: Tensor, sharp: Tensor, made_blurred: Tensor, made_sharp: Tensor
    ) -> tuple[Tensor, Terms]:
        """Return equation 10, plus the pixel term, and its terms."""
        networks = self._networks
        terms = {
            "adversarial": adversarial_loss(networks.judge_sharp(made_sharp).float())
            + adversarial_loss(networks.judge_blurred(made_blurred).float()),
            "cycle": cycle_loss(
                blurred,
                networks.blurring(made_sharp).float(),
                sharp,
                networks.restoring(made_blurred).float(),
            ),
        }
        if self._settings.paired:
            terms["content"] = self._content(sharp, made_sharp) + self._content(
                blurred, made_blurred
            )
            terms["pixel"] = functional.l1_loss(made_sharp, sharp) + functional.l1_loss(
                made_blurred, blurred
            )
        return self._weighted(terms), terms

    def of_judges(
        self, blurred: Tensor, sharp: Tensor, made_blurred: Tensor, made_sharp: Tensor
    ) -> Tensor:
        """Return what both discriminators minimise; the generators learn nothing."""
        judge_sharp = self._networks.judge_sharp
        judge_blurred = self._networks.judge_blurred
        return discriminator_loss(
            judge_sharp(sharp).float(), judge_sharp(made_sharp.detach()).float()
        ) + discriminator_loss(
            judge_blurred(blurred).float(), judge_blurred(made_blurred.detach()).float()
        )

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        weights = self._settings.weights
        parts = [getattr(weights, name) * term for name, term in terms.items()]
        return torch.stack(parts).sum()

    def _content(self, target: Tensor, generated: Tensor) -> Tensor:
        if self._features is None:
            self._features = _load_features(self._settings.features)
            self._features.to(target.device)
        return content_loss(self._features, target, generated)


def _load_features(section: FeaturesSection) -> nn.Module:
    if section.network == "vgg19" and section.weights is not None:
        return vgg19_features(section.weights, section.layers)
    shipped = resource_folder("engines") / "delpnet" / "model.fp32.onnx"
    return classifier_features(section.weights or shipped, section.layers)


_COLUMNS = (
    "loss",
    "adversarial",
    "content",
    "cycle",
    "pixel",
    "judges",
    "gain_db",
)


class ComiTask(RestorerTask[ComiRecipe]):
    """Adversarial, content and cycle losses; four networks, three optimisers.

    The exported network is G_s, from defocused to sharp.
    """

    in_parts = False
    description = (
        "Restoration by the generator of a CycleGAN, Zhang et al. 2022 (COMI)."
    )
    # Nine residual blocks at a quarter see 90 px each way, but weigh little beyond 32.
    halo_px = 32
    multiple_px = 4
    any_size = True

    def __init__(self, recipe: ComiRecipe) -> None:
        super().__init__(recipe)
        self._networks = ComiNetworks.made(recipe.comi)
        self.network = self._networks.restoring
        self._losses = ComiLosses(recipe.comi, self._networks)

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make defocused and sharp patches, and tell the step they are for."""
        batch = {**super().batch(step, draw), "step": np.array(step)}
        if not self.recipe.comi.paired:
            # Each defocused patch meets the sharp one of its neighbour.
            batch["sharp"] = np.roll(batch["sharp"], 1, axis=0)
        return batch

    def modules(self) -> dict[str, nn.Module]:
        """Return both generators and both discriminators."""
        return self._networks.modules()

    def make_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """Return Adam for the restoring, the blurring and the judging networks."""
        return self._networks.optimisers(self.recipe.optimiser)

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return content and pixel terms of the restoring generator alone."""
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        restored = self.network(blurred).float()
        loss, terms = self._losses.of_restoring(restored, sharp)
        return loss, {**terms, "gain_db": gain_db(blurred, restored, sharp)}

    def train_step(
        self, tensors: Tensors, optimisers: Mapping[str, torch.optim.Optimizer]
    ) -> dict[str, float]:
        """Take one step of the generators, then one of the discriminators."""
        if int(tensors["step"]) < self.recipe.comi.restoring_steps:
            return _columns(super().train_step(tensors, optimisers))
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        device = blurred.device.type
        with mixed_precision(device):
            made_sharp = self.network(blurred).float()
            made_blurred = self._networks.blurring(sharp).float()
            images = blurred, sharp, made_blurred, made_sharp
            loss, terms = self._losses.of_generators(*images)
        descend(loss, [optimisers["network"], optimisers["blurring"]])
        with mixed_precision(device):
            judged = self._losses.of_judges(*images)
        descend(judged, [optimisers["judges"]])
        figures = {
            **terms,
            "loss": loss,
            "judges": judged,
            "gain_db": gain_db(blurred, made_sharp, sharp),
        }
        return _columns({name: float(v.detach()) for name, v in figures.items()})


def _columns(figures: Mapping[str, float]) -> dict[str, float]:
    """Return what a curve shows in one order, whichever terms the step had."""
    return {name: figures.get(name, 0.0) for name in _COLUMNS}


NETWORKS = {"comi": (ComiRecipe, ComiTask)}
