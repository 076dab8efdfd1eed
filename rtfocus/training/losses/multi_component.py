"""Multi-component loss of COMI: adversarial, content and cycle terms.

s stands for a defocused (source) image, t for a sharp (target) one, G_s makes
sharp from defocused, G_t defocused from sharp, D_t judges sharp and D_s defocused
images (Zhang et al. 2022, equations 5 to 10).
"""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

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


def content_loss(features: nn.Module, wanted: Tensor, generated: Tensor) -> Tensor:
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
        centre = wanted.mean(dim=(1, 2, 3), keepdim=True)
        spread = wanted.std(dim=(1, 2, 3), keepdim=True).clamp_min(_LEAST_DEVIATION)
        aim = features((wanted - centre) / spread)
    made = features((generated - centre) / spread)
    return functional.mse_loss(made.float(), aim.float())


def cycle_loss(
    source: Tensor, source_again: Tensor, target: Tensor, target_again: Tensor
) -> Tensor:
    """Return the mean absolute error of both round trips (eq. 9)."""
    return functional.l1_loss(source_again, source) + functional.l1_loss(
        target_again, target
    )
