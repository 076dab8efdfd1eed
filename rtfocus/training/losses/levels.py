"""Level losses: labels of tiles that are right, nearly right or wrong."""

import torch
from torch import Tensor, nn

LEVEL_COUNT = 11
"""Labels that are levels; a further one is background."""


def loss_of(logits: Tensor, labels: Tensor, ordinal_weight: float) -> Tensor:
    """Return cross-entropy, plus a weight times the error of the mean level.

    Parameters
    ----------
    logits
        Shape (N, label, row, column), eleven levels, then background if there is one.
    labels
        Shape (N, row, column).
    ordinal_weight
        Weight of the smooth absolute error between the true level and the mean of
        the levels by their probabilities, over tiles with specimen. Cross-entropy
        alone (He 2020) does not know that level 4 is nearer to 5 than 9 is; 0
        leaves it at that.
    """
    entropy = nn.functional.cross_entropy(logits, labels)
    specimen = labels < LEVEL_COUNT
    if ordinal_weight == 0 or not specimen.any():
        return entropy
    levels = torch.arange(LEVEL_COUNT, dtype=logits.dtype, device=logits.device)
    shares = logits[:, :LEVEL_COUNT].softmax(dim=1)
    mean = torch.einsum("nlyx,l->nyx", shares, levels)
    error = nn.functional.smooth_l1_loss(
        mean[specimen], labels[specimen].to(mean.dtype)
    )
    return entropy + ordinal_weight * error


@torch.no_grad()
def accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the share of right labels, and of levels at most one off."""
    found = logits.argmax(dim=1)
    specimen = labels < LEVEL_COUNT
    close = ((found - labels).abs() <= 1) & (found < LEVEL_COUNT)
    within = close[specimen].float().mean() if specimen.any() else torch.tensor(1.0)
    return {"accuracy": (found == labels).float().mean(), "within_one": within}
