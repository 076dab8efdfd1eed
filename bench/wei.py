"""Wei bench: re-blur similarity (Table 4) and restoration per class (Table 6).

Real: the recipe's validation pairs, whole fields cut to sides the network takes, full
scale 255. Drawn: held-out scenes of one defocus each, patches scored on the frame's
range of percentiles; in focus the target is the input itself, which counts as 60 dB.
The re-blur leaves out half a kernel at the border; it is compared with the recorded
patch, noise and all, and with what the true PSF makes of the sharp one.

Run: python -m bench.wei engines/wei_unet [--patches 400] [--picture failures.png]
A checkpoint, such as that of a single stage, may stand for the engine.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from rtfocus.drawing.figures import Panel, save_panels
from rtfocus.evaluation.scores import match_intensity, psnr, ssim
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.training.commands import trained
from rtfocus.training.feed import load_checkpoint
from rtfocus.training.networks.wei_kernel import reblur
from rtfocus.training.networks.wei_unet import WeiUNetRecipe, defocus_classes
from rtfocus.training.pairs import PairBatches
from rtfocus.training.recipe import load_recipe
from rtfocus.training.scenes import data_folder

Image = NDArray[np.float32]
Run = Callable[[Image, Image], list[Image]]
Restore = Callable[[Image, float | None], tuple[Image, Image]]

RECIPE = Path(__file__).parents[1] / "configs" / "train_wei_end_to_end.yaml"
CLASSES = ("f-2", "f-1", "f0", "f+1", "f+2")
RANGE = 255.0
# What an image that equals its target counts as, in dB.
_EQUAL_DB = 60.0
_MULTIPLE_PX = 16


@dataclass(frozen=True)
class Example:
    """A drawn patch and what became of it."""

    place: int
    gain_db: float
    blurred: Image
    restored: Image
    sharp: Image


def restore_with(path: Path) -> Restore:
    """Return a function from normalised image and level to restored one and kernel.

    `path` is an engine folder or a checkpoint. Level None: nothing is told.
    """
    run = _by_torch(path) if path.suffix == ".pt" else _by_onnx_runtime(path)

    def restore(image: Image, level: float | None) -> tuple[Image, Image]:
        told = (0.0, 0.0) if level is None else (level, 1.0)
        restored, kernel = run(image[None, None], np.array([told], np.float32))
        return restored[0, 0], kernel[0]

    return restore


def _by_torch(checkpoint: Path) -> Run:
    _, network = trained(*load_checkpoint(checkpoint))

    @torch.no_grad()
    def run(tiles: Image, condition: Image) -> list[Image]:
        found = network(torch.from_numpy(tiles), torch.from_numpy(condition))
        return [tensor.numpy() for tensor in found]

    return run


def _by_onnx_runtime(folder: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.fp32.onnx", options)

    def run(tiles: Image, condition: Image) -> list[Image]:
        given = {"tiles": tiles, "condition": condition}
        return list(session.run(["restored", "kernel"], given))

    return run


def blur_with(image: Image, kernel: Image) -> Image:
    """Return the inner part of an image convolved with a kernel."""
    found = reblur(torch.from_numpy(image)[None, None], torch.from_numpy(kernel)[None])
    return np.asarray(found[0, 0])


def inner(image: Image, kernel: Image) -> Image:
    """Return the part of an image that `blur_with` gives."""
    half = kernel.shape[0] // 2
    return image[half:-half, half:-half]


def score_fields(recipe: WeiUNetRecipe, restore: Restore) -> None:
    """Print the figures of the real validation pairs."""
    folder, wanted = data_folder(recipe), recipe.pairs.real[0]
    rows = []
    for path in sorted(folder.glob(wanted.sharp)):
        if not any(path.match(pattern) for pattern in wanted.validation):
            continue
        sharp, blurred = (
            _cut(open_images(p)[0].read().astype(np.float32))
            for p in (path, folder / wanted.blurred / path.name)
        )
        offset, scale = PercentileRange().fit(blurred)
        restored, kernel = restore(
            np.asarray((blurred - offset) / scale, np.float32), None
        )
        image = restored * scale + offset
        again, recorded = blur_with(sharp, kernel), inner(blurred, kernel)
        rows.append(
            (
                psnr(sharp, blurred, data_range=RANGE),
                ssim(sharp, blurred, data_range=RANGE),
                psnr(sharp, image, data_range=RANGE),
                ssim(sharp, image, data_range=RANGE),
                ssim(recorded, again, data_range=RANGE),
                ssim(recorded, match_intensity(recorded, again), data_range=RANGE),
            )
        )
    means = np.mean(rows, axis=0)
    print(f"{len(rows)} real pairs, blind")
    print("  blurred   {:.2f} dB / {:.3f}".format(*means[:2]))
    print("  restored  {:.2f} dB / {:.3f}".format(*means[2:4]))
    print("  re-blur SSIM {:.4f}, gain and offset matched {:.4f}".format(*means[4:]))


def score_classes(
    recipe: WeiUNetRecipe, restore: Restore, patches: int
) -> list[Example]:
    """Print the figures of drawn patches per class, blind and told the class.

    Returns the patches with what became of them.
    """
    update = {"real_share": 0.0, "varying_share": 0.0, "batch_patches": 10}
    update |= {"psf_px": recipe.wei_kernel.size_px}
    pairs = recipe.pairs.model_copy(update=update)
    # Every batch is drawn from ten scenes, two of them new.
    pool = recipe.pool.model_copy(update={"entries": 10, "refresh_steps": 1})
    drawn = recipe.model_copy(update={"pairs": pairs, "pool": pool})
    batches = PairBatches(drawn, validation=True)
    found: dict[int, list[tuple[float, ...]]] = {place: [] for place in range(5)}
    examples = []
    for step in range(patches // 10):
        batch = batches.batch(2 * step)
        for sharp, blurred, levels, psf in zip(
            batch["sharp"][:, 0],
            batch["blurred"][:, 0],
            batch["levels"].mean(axis=(1, 2)),
            batch["psf"][:, 0],
            strict=True,
        ):
            row, blind = _score_patch(restore, sharp, blurred, float(levels), psf)
            place = _class_of(float(levels), recipe)
            found[place].append(row)
            examples.append(Example(place, row[2] - row[0], blurred, blind, sharp))
    print("drawn patches     blurred         blind           told        re-blur SSIM")
    print("class   n       dB    SSIM      dB    SSIM      dB    SSIM   recorded true")
    everything = [row for rows in found.values() for row in rows]
    for name, rows in zip(
        (*CLASSES, "all"), (*found.values(), everything), strict=True
    ):
        if rows:
            values = np.mean(rows, axis=0)
            text = "   ".join(f"{v:6.3f}" for v in values)
            print(f"{name:<5} {len(rows):4d}   {text}")
    return examples


def save_worst(path: Path, examples: list[Example]) -> None:
    """Write the patch of each class that gained least: blurred, restored, sharp."""
    worst: dict[int, Example] = {}
    for one in sorted(examples, key=lambda one: one.gain_db):
        worst.setdefault(one.place, one)
    panels = []
    for _, one in sorted(worst.items()):
        low, high = float(one.sharp.min()), float(one.sharp.max())
        for caption, image in (
            ("blurred", one.blurred),
            (f"{CLASSES[one.place]} {one.gain_db:+.1f} dB", one.restored),
            ("sharp", one.sharp),
        ):
            panels.append(Panel(caption, image, low, high))
    save_panels(path, panels, columns=3)


def _score_patch(
    restore: Restore, sharp: Image, blurred: Image, level: float, psf: Image
) -> tuple[tuple[float, ...], Image]:
    blind, kernel = restore(blurred, None)
    told, _ = restore(blurred, level)
    again = blur_with(sharp, kernel)
    scores = []
    for image in (blurred, blind, told):
        scores += [
            min(psnr(sharp, image, data_range=1), _EQUAL_DB),
            ssim(sharp, image, data_range=1),
        ]
    scores.append(ssim(inner(blurred, kernel), again, data_range=1))
    scores.append(ssim(blur_with(sharp, psf), again, data_range=1))
    return tuple(scores), blind


def _class_of(level: float, recipe: WeiUNetRecipe) -> int:
    edges = recipe.stage.class_edges
    return int(defocus_classes(torch.tensor([level]), torch.ones(1), edges)[0])


def _cut(image: Image) -> Image:
    height, width = (side - side % _MULTIPLE_PX for side in image.shape)
    return np.ascontiguousarray(image[:height, :width])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--patches", type=int, default=400)
    parser.add_argument("--picture", type=Path, help="PNG of the worst patches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = cast("WeiUNetRecipe", load_recipe(options.recipe))
    restore = restore_with(options.engine)
    score_fields(recipe, restore)
    examples = score_classes(recipe, restore, options.patches)
    if options.picture is not None:
        save_worst(options.picture, examples)


if __name__ == "__main__":
    main()
