"""Signed classes bench: a classifier of five classes on patches whose class is known.

Precision, recall, calibration and confusion under the training's optics, under shifted
ones (another objective; in colour also other dyes) and on real planes.

Run: python -m bench.signed_classes ENGINE_FOLDER RECIPE
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import CELL_PX, ContrastToNoise
from rtfocus.training.networks.wei_classifier import (
    LABELS,
    PATCH_PX,
    SignedScenes,
    class_of,
    cut_patch,
    photograph,
)
from rtfocus.training.recipe import SignedClassRecipe, load_recipe
from rtfocus.training.scenes import DrawnCamera, data_folder, draw_camera, load_fields

_BINS = 10


Protocol = Literal["same", "shifted"]
"""What stays the same over the first test set of Wei et al. 2024 and differs in its
second one: optics, stain and light."""

_RULE = ContrastToNoise()
_CELLED_PX = PATCH_PX // CELL_PX * CELL_PX
# Light of the three colours, relative to the brightest: as balanced by hand.
_BALANCE = {"same": (0.92, 1.0), "shifted": (0.6, 1.0)}
_DIMMER = 0.35
# Another laboratory's dyes: shares of the absorbance that go to other colours.
_OTHER_STAIN = np.array([[0.7, 0.1, 0.2], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
_DARKEST = 1e-3


@dataclass
class ClassScore:
    """What a classifier said of patches whose class is known.

    Parameters
    ----------
    labels
        Label of every class, in the order of the probabilities.
    """

    labels: tuple[int, ...]
    confusion: NDArray[np.int64] = field(init=False)
    """Patches by true class (row) and found class (column)."""

    def __post_init__(self) -> None:
        count = len(self.labels)
        self.confusion = np.zeros((count, count), dtype=np.int64)
        # By confidence: patches, of these right, sum of the confidences.
        self._bins = np.zeros((3, _BINS))

    def add(
        self, true: NDArray[np.integer], probabilities: NDArray[np.floating]
    ) -> None:
        """Count patches: classes (N,) and probabilities (N, classes)."""
        found = probabilities.argmax(axis=1)
        np.add.at(self.confusion, (true, found), 1)
        confidence = probabilities.max(axis=1)
        place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
        for row, values in enumerate((np.ones(len(true)), found == true, confidence)):
            np.add.at(self._bins[row], place, values)

    @property
    def accuracy(self) -> float:
        """Share of right classes."""
        return _share(np.trace(self.confusion), self.confusion.sum())

    @property
    def precision(self) -> list[float]:
        """Per class: share of the patches found to be of it that are."""
        found = self.confusion.sum(axis=0)
        return [
            _share(n, total)
            for n, total in zip(np.diag(self.confusion), found, strict=True)
        ]

    @property
    def recall(self) -> list[float]:
        """Per class: share of its patches that were found."""
        true = self.confusion.sum(axis=1)
        return [
            _share(n, total)
            for n, total in zip(np.diag(self.confusion), true, strict=True)
        ]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean gap of confidence and accuracy, 10 bins."""
        patches, right, confidence = self._bins
        return _share(np.abs(right - confidence).sum(), patches.sum())

    @property
    def sign_right(self) -> float:
        """Of patches off focus that were not called focus, those on their side."""
        signs = np.sign(self.labels)
        off = self.confusion[np.ix_(signs != 0, signs != 0)]
        same = np.equal.outer(signs[signs != 0], signs[signs != 0])
        return _share(off[same].sum(), off.sum())

    def summary(self) -> dict[str, Any]:
        """Return everything as plain numbers."""
        pairs = zip(self.precision, self.recall, strict=True)
        f1 = [2 * p * r / max(p + r, 1e-12) for p, r in pairs]
        return {
            "patches": int(self.confusion.sum()),
            "accuracy": round(self.accuracy, 4),
            "sign_right": round(self.sign_right, 4),
            "calibration_error": round(self.calibration_error, 4),
            "precision": [round(p, 4) for p in self.precision],
            "recall": [round(r, 4) for r in self.recall],
            "f1": [round(f, 4) for f in f1],
            "confusion": self.confusion.tolist(),
        }


def _share(part: float, total: float) -> float:
    return float(part / total) if total else float("nan")


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


def shifted_optics(reference: OpticalSystem) -> OpticalSystem:
    """Return the optics of the second test: another objective of the same kind."""
    spherical = reference.aberrations.spherical_waves
    return replace(
        reference,
        numerical_aperture=reference.numerical_aperture * 0.93,
        pixel_size_um=reference.pixel_size_um * 1.08,
        aberrations=Aberrations(
            spherical_waves=0.75 * spherical,
            astigmatism_waves=0.05,
            coma_x_waves=0.04,
        ),
    )


def stain_otherwise(light: Image) -> Image:
    """Return a section as other dyes would show it; axes (y, x, colour)."""
    absorbance = -np.log(np.maximum(light, _DARKEST))
    return np.asarray(np.exp(-0.75 * absorbance @ _OTHER_STAIN), dtype=np.float32)


class ShiftedScenes(SignedScenes):
    """Scenes of another laboratory: another objective and other dyes."""

    side = 1

    def draw_scene(self, rng: np.random.Generator) -> tuple[Image, bool]:
        """Return light in other colours, and whether it is ideally sharp."""
        light, ideal = super().draw_scene(rng)
        return light if light.ndim == 2 else stain_otherwise(light), ideal

    def draw_optics(self, rng: np.random.Generator) -> OpticalSystem:
        """Return the other objective, always the same."""
        del rng
        return shifted_optics(self.signed.reference)


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches of one test scene."""

    patches: Image
    """Share of the camera's full scale, shape (N, channels, 224, 224)."""
    labels: NDArray[np.int64]
    """Index into `LABELS`, shape (N,)."""


def held_out_patches(
    recipe: SignedClassRecipe, protocol: Protocol, scenes: int
) -> Iterator[Patches]:
    """Make the patches of a number of test scenes, each at every plane.

    The shifted protocol has another objective, less light and, in colour, other
    dyes and another balance. Fluorescence patches that the background rule calls
    empty are left out: they have no defocus.
    """
    made = ShiftedScenes if protocol == "shifted" else SignedScenes
    source = made(recipe, load_fields(recipe), validation=True)
    dimming = _DIMMER if protocol == "shifted" else 1.0
    for number in range(scenes):
        rng = np.random.default_rng([recipe.seed, 9, protocol == "shifted", number])
        scene = source.entry(number)
        low, high = recipe.signed.photons
        photons = dimming * float(np.sqrt(low * high))
        patches, labels = [], []
        for plane, defocus_um in zip(scene.planes, scene.defocus_um, strict=True):
            camera = draw_camera(rng, (photons, photons))
            patch = photograph(cut_patch(plane, rng), camera, rng, _BALANCE[protocol])
            if len(patch) == 1 and _is_empty(patch[0], camera):
                continue
            patches.append(patch)
            labels.append(class_of(defocus_um, recipe.signed))
        if patches:
            yield Patches(np.stack(patches), np.array(labels))


def _is_empty(patch: Image, camera: DrawnCamera) -> bool:
    counts = patch[:_CELLED_PX, :_CELLED_PX] * np.float32(camera.full)
    found = _RULE.tiles(
        counts,
        tile_px=_CELLED_PX,
        stride_px=_CELLED_PX,
        noise=camera.dark_noise(),
    )
    return bool(found[0, 0])


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
