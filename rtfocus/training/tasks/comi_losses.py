"""COMI's losses: what its networks are told of the images they made, equation 10."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.resources import resource_folder
from rtfocus.training.losses.multi_component import (
    adversarial_loss,
    content_loss,
    cycle_loss,
    discriminator_loss,
)
from rtfocus.training.networks.features import classifier_features, vgg19_features
from rtfocus.training.tasks.comi_networks import ComiNetworks
from rtfocus.training.tasks.comi_recipe import ComiSection, FeaturesSection

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

    def _content(self, wanted: Tensor, generated: Tensor) -> Tensor:
        if self._features is None:
            self._features = _load_features(self._settings.features)
            self._features.to(wanted.device)
        return content_loss(self._features, wanted, generated)


def _load_features(wanted: FeaturesSection) -> nn.Module:
    if wanted.network == "vgg19" and wanted.weights is not None:
        return vgg19_features(wanted.weights, wanted.layers)
    shipped = resource_folder("engines") / "delpnet" / "model.fp32.onnx"
    return classifier_features(wanted.weights or shipped, wanted.layers)
