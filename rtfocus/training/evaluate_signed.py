"""Evaluation of signed classifiers: the same optics, shifted optics, real planes.

``python -m rtfocus.training.evaluate_signed ENGINE_FOLDER RECIPE``. The shifted
protocol differs from training in objective and light, in colour also in dyes.
"""

import argparse
import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.training.class_score import ClassScore
from rtfocus.training.data.fields import data_folder
from rtfocus.training.data.signed_patches import held_out_patches
from rtfocus.training.data.signed_recipe import SignedClassRecipe
from rtfocus.training.data.signed_scenes import Protocol
from rtfocus.training.networks.wei_classifier import LABELS, PATCH_PX
from rtfocus.training.recipe import load_recipe

Image = NDArray[np.float32]
Predict = Callable[[Image], NDArray[np.float32]]
"""Patches (N, channels, 224, 224) to logits (N, classes)."""

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
REAL_SETS = (
    ("nuclei, sharp", "bbbc006_pairs/sharp/*.tif", ("a19*", "a2*")),
    ("nuclei, 10 um", "bbbc006_pairs/defocus10um/*.tif", ("a19*", "a2*")),
    ("nuclei 16 bit, -32 um", "bbbc006_16bit/z00*/*.tif", ("*",)),
    ("actin, 10 um", "bbbc006_factin/A_defocus10um.tif", ("*",)),
)
"""Name, files and those of them that were never trained on."""


def engine_predictor(folder: Path, threads: int = 1) -> Predict:
    """Open an engine folder with ONNX Runtime."""
    card = yaml.safe_load((folder / "engine.yaml").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / card["files"]["fp32"], options, providers=["CPUExecutionProvider"]
    )
    name = card["input"]["name"]

    def predict(patches: Image) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {name: patches})[0]
        return logits[:, :, 0, 0]

    return predict


def score_synthetic(
    predict: Predict, recipe: SignedClassRecipe, protocol: Protocol, scenes: int
) -> ClassScore:
    """Score a classifier on held-out scenes at every plane of the recipe's stack."""
    score = ClassScore(LABELS)
    for made in held_out_patches(recipe, protocol, scenes):
        score.add(made.labels, probabilities(predict(made.patches)))
    return score


def label_real(predict: Predict, folder: Path) -> dict[str, dict[str, int]]:
    """Return how often every label was given to patches of real planes."""
    found: dict[str, dict[str, int]] = {}
    for name, files, only in REAL_SETS:
        counts = dict.fromkeys(map(str, LABELS), 0)
        for path in sorted(folder.glob(files)):
            if any(fnmatch(path.name, pattern) for pattern in only):
                frame = open_images(path)[0].read().astype(np.float32)
                for label in predict(_patches(frame)).argmax(axis=1):
                    counts[str(LABELS[int(label)])] += 1
        found[name] = counts
    return found


def probabilities(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the softmax over the last axis (Wei 2024, equation 4)."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def _patches(frame: Image) -> Image:
    """Cut a frame into whole patches side by side."""
    rows, columns = (side // PATCH_PX for side in frame.shape)
    cut = frame[: rows * PATCH_PX, : columns * PATCH_PX]
    grid = cut.reshape(rows, PATCH_PX, columns, PATCH_PX).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(-1, 1, PATCH_PX, PATCH_PX))


def main() -> None:
    """Evaluate a signed engine, show the tables and write them as JSON if wanted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", type=Path, help="engine folder")
    parser.add_argument("recipe", type=Path, help="recipe with optics and split")
    parser.add_argument("--scenes", type=int, default=40, help="per protocol")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    if not isinstance(recipe, SignedClassRecipe):
        msg = f"recipe '{options.recipe}' trains no signed classifier"
        raise ConfigError(msg)
    predict = engine_predictor(options.engine)
    report: dict[str, Any] = {
        name: score_synthetic(predict, recipe, name, options.scenes).summary()
        for name in PROTOCOLS
    }
    if not recipe.signed.colour:
        report["real"] = label_real(predict, data_folder(recipe))
    _show(report, Console(width=120))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table("protocol", "patches", "accuracy", "sign", "ECE", "recall by class")
    for name in PROTOCOLS:
        row = report[name]
        keys = ("patches", "accuracy", "sign_right", "calibration_error", "recall")
        table.add_row(name, *(str(row[key]) for key in keys))
    console.print(table)
    for name, counts in report.get("real", {}).items():
        console.print(f"{name}: {counts}")


if __name__ == "__main__":
    main()
