"""Checkerboard bench: the lattice that trained restorers leave, and what they gain.

Real pairs of the recipe's validation side, whole fields through the network of each
checkpoint; the sharp and the blurred field say what an image without lattice has.

Run: python bench/checkerboard.py CHECKPOINT [CHECKPOINT ...]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rtfocus.processing.quality import psnr
from rtfocus.training.checkerboard import checkerboard_ratio
from rtfocus.training.checkpoint import load_checkpoint
from rtfocus.training.data.fields import data_folder
from rtfocus.training.data.real_pairs import Pair, load_real_pairs
from rtfocus.training.export import trained

Image = np.ndarray
# Sides that every network can halve as often as it does.
_MULTIPLE_PX = 16


def restored_by(network: torch.nn.Module) -> Callable[[Image], Image]:
    """Return a function that restores a whole field."""

    @torch.no_grad()
    def restore(blurred: Image) -> Image:
        return network(torch.from_numpy(blurred)[None, None])[0, 0].numpy()

    return restore


def cut(image: Image) -> Image:
    """Cut a field to sides that the network can halve."""
    height, width = (side - side % _MULTIPLE_PX for side in image.shape)
    return np.ascontiguousarray(image[:height, :width])


def report(name: str, pairs: list[Pair], restore: Callable[[Image], Image]) -> None:
    """Print the mean lattice at both periods and the mean PSNR."""
    ratios: dict[int, list[float]] = {2: [], 4: []}
    scores = []
    for blurred, sharp in pairs:
        image = restore(cut(blurred))
        for period_px, values in ratios.items():
            values.append(checkerboard_ratio(image, period_px=period_px))
        wanted = cut(sharp)
        scores.append(psnr(wanted, image, data_range=float(np.ptp(wanted))))
    print(
        f"{name:<24} period 2 px {np.mean(ratios[2]):6.3f}   "
        f"period 4 px {np.mean(ratios[4]):6.3f}   PSNR {np.mean(scores):6.2f} dB"
    )


def main() -> None:
    """Measure the sharp and blurred fields, then each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for place, path in enumerate(options.checkpoints):
        recipe, state = load_checkpoint(path)
        _, network = trained(recipe, state)
        pairs = [
            pair
            for wanted in recipe.pairs.real
            for pair in load_real_pairs(wanted, data_folder(recipe), validation=True)
        ]
        if place == 0:
            print(f"{len(pairs)} pairs; lattice 1 = none; PSNR over the sharp range")
            report("sharp", [(sharp, sharp) for _, sharp in pairs], np.asarray)
            report("blurred", pairs, np.asarray)
        report(recipe.name, pairs, restored_by(network))


if __name__ == "__main__":
    main()
