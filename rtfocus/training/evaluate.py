"""Evaluation: an engine's labels on fields that it has never seen.

Synthetic: the recipe's validation fields, blurred at every level with exactly
the reference optics and photographed by one stated camera. Real: planes whose
distance from focus is known. Run it with
``python -m rtfocus.training.evaluate ENGINE_FOLDER RECIPE``.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.optics.camera import CameraModel
from rtfocus.optics.normalisation import (
    ContrastToNoise,
    LocalStandardisation,
    pad_frame,
)
from rtfocus.training.data.fields import Field, data_folder, load_fields
from rtfocus.training.data.level_recipe import LevelRecipe
from rtfocus.training.data.level_scenes import FULL_SCALE, Blurring
from rtfocus.training.networks.delpnet import LABELS
from rtfocus.training.recipe import load_recipe
from rtfocus.training.scoring import Score

Image = NDArray[np.float32]
Labels = NDArray[np.int64]

BACKGROUND = LABELS.index("bg")
CAMERAS = {
    "bright": CameraModel(photons=3000, gain_e_per_count=1.0, bit_depth=12),
    "dim": CameraModel(photons=300, gain_e_per_count=0.25, bit_depth=12),
}
"""Cameras of the synthetic test; photons at the brightest point of the field."""


@dataclass(frozen=True, slots=True)
class RealSet:
    """Real planes at a known distance from focus."""

    name: str
    files: str
    """Glob pattern inside the data folder."""
    only: tuple[str, ...]
    """Patterns of the file names that were never trained on."""
    lowest: int
    """Lowest level that counts as right."""
    highest: int
    """Highest level that counts as right."""


REAL_SETS = (
    RealSet("nuclei, sharp", "bbbc006_pairs/sharp/*.tif", ("a19*", "a2*"), 0, 1),
    RealSet("nuclei, 10 um", "bbbc006_pairs/defocus10um/*.tif", ("a19*", "a2*"), 4, 6),
    RealSet(
        "nuclei 16 bit, sharp", "bbbc006_16bit/in_focus/*.tif", ("a01*", "a03*"), 0, 1
    ),
    RealSet("nuclei 16 bit, -32 um", "bbbc006_16bit/z00*/*.tif", ("*",), 9, 10),
    RealSet("actin, sharp", "bbbc006_factin/A_sharp.tif", ("*",), 0, 1),
    RealSet("actin, 8 um", "bbbc006_factin/A_defocus08um.tif", ("*",), 3, 5),
    RealSet("actin, 10 um", "bbbc006_factin/A_defocus10um.tif", ("*",), 4, 6),
)


class EngineUnderTest:
    """An engine folder, run by ONNX Runtime as its card says."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        card = yaml.safe_load((folder / "engine.yaml").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        weights = folder / card["files"]["fp32"]
        self._session = onnxruntime.InferenceSession(
            weights, options, providers=["CPUExecutionProvider"]
        )
        self._input = card["input"]
        normalisation = dict(card["normalisation"])
        rule = dict(card["background"])
        del normalisation["name"], rule["name"]
        self._normalisation = LocalStandardisation(**normalisation)
        self._rule = ContrastToNoise(**rule)

    def classify(self, frame: Image) -> tuple[Labels, NDArray[np.bool_]]:
        """Return the found labels and the tiles that the rule calls background."""
        tile = self._input["tile_px"]
        padded = pad_frame(frame, self._input["multiple_px"], tile)
        tiles = self._normalisation.apply(padded)[None, None]
        logits = self._session.run(None, {self._input["name"]: tiles})[0][0]
        empty = self._rule.tiles(
            padded,
            tile_px=tile,
            stride_px=self._input["stride_px"],
            start_px=self._input["origin_px"] - tile // 2,
        )
        return np.asarray(logits.argmax(axis=0), dtype=np.int64), empty


def evaluate_synthetic(
    engine: EngineUnderTest,
    recipe: LevelRecipe,
    fields: Iterable[Field],
    camera: CameraModel,
) -> dict[str, Score]:
    """Score an engine on blurred fields, by kind of specimen."""
    blurring = Blurring(recipe, list(fields), validation=True)
    scores: dict[str, Score] = {}
    for number, field in enumerate(blurring.fields):
        entry = blurring.field_entry(field)
        rng = np.random.default_rng([recipe.seed, 4, number])
        score = scores.setdefault(entry.kind, Score())
        # The last plane lies beyond the last level: not part of this test.
        for plane, level in zip(entry.planes[:-1], entry.levels[:-1], strict=True):
            light = plane.astype(np.float32) / FULL_SCALE
            frame = camera.expose(light, rng).astype(np.float32)
            found, empty = engine.classify(frame)
            score.add(np.where(empty, BACKGROUND, level), found)
    return scores


def evaluate_real(engine: EngineUnderTest, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the share of tiles with specimen that are right, by real set."""
    results = {}
    for wanted in REAL_SETS:
        score = Score()
        shares = []
        for frame in _frames(folder, wanted):
            found, empty = engine.classify(frame)
            one = Score()
            # The true level is a range here: only the found ones are counted.
            one.add(np.where(empty, BACKGROUND, wanted.lowest), found)
            shares.append(one.share_between(wanted.lowest, wanted.highest))
            score.merge(one)
        results[wanted.name] = {
            "fields": len(shares),
            "tiles": score.tiles,
            "levels": f"{wanted.lowest}-{wanted.highest}",
            "share": round(score.share_between(wanted.lowest, wanted.highest), 4),
            "worst_field": round(min(shares), 4) if shares else None,
            "found": score.confusion[:-1].sum(axis=0).tolist(),
        }
    return results


def _frames(folder: Path, wanted: RealSet) -> Iterator[Image]:
    for path in sorted(folder.glob(wanted.files)):
        if any(fnmatch(path.name, pattern) for pattern in wanted.only):
            yield open_images(path)[0].read().astype(np.float32)


def evaluate(folder: Path, recipe: LevelRecipe) -> dict[str, Any]:
    """Evaluate an engine folder on everything; returns plain numbers."""
    engine = EngineUnderTest(folder)
    fields = load_fields(recipe)
    report: dict[str, Any] = {"synthetic": {}, "confusion": {}}
    for name, camera in CAMERAS.items():
        scores = evaluate_synthetic(engine, recipe, fields, camera)
        everything = Score()
        for score in scores.values():
            everything.merge(score)
        kinds = {kind: score.summary() for kind, score in scores.items()}
        report["synthetic"][name] = {**kinds, "all": everything.summary()}
        report["confusion"][name] = everything.confusion.tolist()
    report["real"] = evaluate_real(engine, data_folder(recipe))
    return report


def _show(report: dict[str, Any], console: Console) -> None:
    for camera, kinds in report["synthetic"].items():
        table = Table("kind", "tiles", "exact", "within one", "by level", title=camera)
        for kind, row in kinds.items():
            levels = " ".join(
                "-" if share is None else f"{share:.2f}"
                for share in row["accuracy_per_level"]
            )
            exact, close = (
                "-" if row[key] is None else f"{row[key]:.3f}"
                for key in ("accuracy", "within_one")
            )
            table.add_row(kind, str(row["tiles"]), exact, close, levels)
        console.print(table)
    table = Table("real set", "tiles", "levels", "right", "worst field", "found")
    for name, row in report["real"].items():
        cells = [name, *(row[k] for k in ("tiles", "levels", "share", "worst_field"))]
        table.add_row(*map(str, cells), str(row["found"]))
    console.print(table)


def main() -> None:
    """Evaluate an engine, show the tables and write them as JSON if wanted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", type=Path, help="engine folder")
    parser.add_argument("recipe", type=Path, help="recipe with the split")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    if not isinstance(recipe, LevelRecipe):
        msg = f"recipe '{options.recipe}' trains no classifier of levels"
        raise ConfigError(msg)
    report = evaluate(options.engine, recipe)
    _show(report, Console(width=140))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
