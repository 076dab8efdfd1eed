"""Weight mean: one checkpoint between two, where each is better at something else.

Weights of a run and of the run that started from them lie in one valley: half way
between them a network keeps most of what either is good at (model soups, Wortsman
et al. 2022). Run: python -m rtfocus.training.weight_mean FIRST SECOND OUTPUT
"""

import sys
from pathlib import Path

import torch

from rtfocus.errors import ConfigError
from rtfocus.training.checkpoint import load_checkpoint, save_checkpoint


def write_mean(first: Path, second: Path, output: Path) -> None:
    """Write the checkpoint of `second` with the mean of both averaged weights.

    Raises
    ------
    ConfigError
        If a checkpoint cannot be read or the two are of different networks.
    """
    (_, one), (recipe, other) = load_checkpoint(first), load_checkpoint(second)
    shapes = [
        {name: value.shape for name, value in state["average"].items()}
        for state in (one, other)
    ]
    if shapes[0] != shapes[1]:
        msg = (
            f"'{first}' and '{second}' hold different networks; give two of one recipe"
        )
        raise ConfigError(msg)
    mean = {
        # Whole numbers, such as the batches that BatchNorm has seen, have no mean.
        name: torch.lerp(one["average"][name], value, 0.5)
        if value.is_floating_point()
        else value
        for name, value in other["average"].items()
    }
    save_checkpoint(output, recipe, {**other, "average": mean})


if __name__ == "__main__":
    write_mean(*map(Path, sys.argv[1:4]))
