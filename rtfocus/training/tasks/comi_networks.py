"""COMI's networks: two generators against two discriminators, and their optimisers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from rtfocus.training.networks.comi import Generator, PatchDiscriminator
from rtfocus.training.recipe import OptimiserRecipe
from rtfocus.training.tasks.comi_recipe import ComiSection


@dataclass(frozen=True, slots=True)
class ComiNetworks:
    """All that is trained; G_s, the restoring generator, is what is exported."""

    restoring: Generator
    """G_s, from defocused to sharp."""
    blurring: Generator
    """G_t, from sharp to defocused."""
    judge_sharp: PatchDiscriminator
    """D_t, which tells sharp images from made ones."""
    judge_blurred: PatchDiscriminator
    """D_s, which tells defocused images from made ones."""

    @classmethod
    def made(cls, settings: ComiSection) -> Self:
        """Make all four, freshly initialised; generators draw first."""
        restoring, blurring = (
            Generator(
                width=settings.width,
                residual_blocks=settings.residual_blocks,
                upsampling=settings.upsampling,
                norm=settings.norm,
            )
            for _ in range(2)
        )
        judge_sharp, judge_blurred = (
            PatchDiscriminator(
                width=settings.discriminator_width,
                strided=settings.discriminator_layers,
            )
            for _ in range(2)
        )
        return cls(restoring, blurring, judge_sharp, judge_blurred)

    def modules(self) -> dict[str, nn.Module]:
        """Return them by the names that checkpoints have."""
        return {
            "network": self.restoring,
            "blurring": self.blurring,
            "judge_sharp": self.judge_sharp,
            "judge_blurred": self.judge_blurred,
        }

    def optimisers(self, settings: OptimiserRecipe) -> dict[str, torch.optim.Optimizer]:
        """Return Adam for the restoring, the blurring and the judging networks."""
        owners = {
            "network": self.restoring,
            "blurring": self.blurring,
            "judges": nn.ModuleList([self.judge_sharp, self.judge_blurred]),
        }
        return {
            name: torch.optim.Adam(
                owner.parameters(), lr=settings.rate, betas=settings.betas, fused=True
            )
            for name, owner in owners.items()
        }


def descend(loss: Tensor, optimisers: Sequence[torch.optim.Optimizer]) -> None:
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
