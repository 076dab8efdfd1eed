"""Ablations: classifiers with and without what their papers add, at one budget.

He 2020: background label (table 1), BatchNorm momentum and Dropout (figures 4 and
5), known networks (table 2). Wei 2024: channel normalisation, colour exchange and
attention (table 1). Every network sees the same number of batches of the same kind
and is scored on scenes that it was not trained on:
``python -m bench.ablations --steps 300``.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.machine import describe
from bench.signed_classes import PROTOCOLS, score_synthetic
from rtfocus.files import resource_folder
from rtfocus.training.level_tiles import (
    BACKGROUND,
    Batches,
    Blurring,
    LevelRecipe,
)
from rtfocus.training.recipe import RecipeBase, SignedClassRecipe, validate_recipe
from rtfocus.training.scenes import load_fields
from rtfocus.training.task import Arrays
from rtfocus.training.trainer import Trainer

Row = dict[str, Any]
Changes = Mapping[str, Any]

_LEVEL_BATCHES = 60
_BARE = {"channel_normalisation": False, "channel_exchange": False, "attention": False}
# Single tiles for all, as the rivals need them and the paper has them.
_HE: dict[str, Changes] = {
    "DelpNet": {},
    "DelpNet without bg": {"delpnet": {"background": False}},
    "DelpNet, momentum 0.99": {"delpnet": {"batch_norm_momentum": 0.01}},
    "DelpNet without Dropout": {"delpnet": {"dropout": 0.0}},
    "ResNet18": {"network": "resnet18", "delpnet": None},
    "MobileNet v2": {"network": "mobilenet_v2", "delpnet": None},
}
_WEI: dict[str, Changes] = {
    "baseline": {"wei": _BARE},
    "+ channel normalisation": {"wei": {**_BARE, "channel_normalisation": True}},
    "+ exchange of colours": {"wei": {"attention": False}},
    "+ attention (Wei's)": {"wei": {}},
}


def he_recipe(changes: Changes, optimiser: Changes, pool: Changes) -> RecipeBase:
    """Return a recipe of He's comparison: from nothing, single tiles."""
    data = _read("train_delpnet_fine")
    data.pop("start_from")
    data["optimiser"] |= {"crop_sides_px": [96], "average_decay": 0.98}
    return _recipe(data, changes, optimiser, pool)


def wei_recipe(changes: Changes, optimiser: Changes, pool: Changes) -> RecipeBase:
    """Return a recipe of Wei's comparison, in colour."""
    data = _read("train_wei_classifier_colour")
    data["optimiser"] |= {"average_decay": 0.98}
    return _recipe(data, changes, optimiser, pool)


def he_row(recipe: RecipeBase, scenes: int) -> Row:
    """Train a network for levels and score it on tiles of held-out fields.

    `running`: with the statistics that BatchNorm kept while training, as the papers
    use it; the other shares are of averaged weights with exact statistics.
    `seen`: on the fields of the training, blurred anew. The paper's split at random
    puts levels of one field on both sides and measures this.
    """
    assert isinstance(recipe, LevelRecipe)
    trainer, row = _train(recipe)
    held_out = _level_tiles(recipe, scenes, validation=True)
    seen = _level_tiles(recipe, scenes, validation=False)
    for name, network, tiles in (
        ("", trainer.average, held_out),
        ("running_", trainer.task.network, held_out),
        ("seen_", trainer.average, seen),
    ):
        true = np.concatenate([one["labels"][:, 0, 0] for one in tiles])
        found = np.concatenate([_labels(network, one["crops"]) for one in tiles])
        row[f"{name}accuracy"] = round(accuracy(true, found), 4)
        row[f"{name}within_one"] = round(within_one(true, found), 4)
    return row


def _level_tiles(recipe: LevelRecipe, scenes: int, *, validation: bool) -> list[Arrays]:
    """Return tiles with their labels from scenes of one side of the split."""
    switches = getattr(recipe, "delpnet", None)
    pool = recipe.pool.model_copy(update={"entries": scenes})
    # Another seed: no scene is one of the training's own.
    recipe = recipe.model_copy(update={"pool": pool, "seed": recipe.seed + 1000})
    batches = Batches(
        recipe,
        Blurring(recipe, load_fields(recipe), validation=validation),
        background=switches is None or switches.background,
    )
    return [batches.batch(0, draw) for draw in range(1, _LEVEL_BATCHES + 1)]


def accuracy(true: np.ndarray, found: np.ndarray) -> float:
    """Return the share of all tiles with the right one of all labels (table 1)."""
    return float((found == true).mean())


def within_one(true: np.ndarray, found: np.ndarray) -> float:
    """Return the share of tiles with a specimen at most one level off."""
    seen = true != BACKGROUND
    close = (found != BACKGROUND) & (np.abs(found - true) <= 1)
    return float(close[seen].mean())


def wei_row(recipe: RecipeBase, scenes: int) -> Row:
    """Train a signed classifier and score it on both test protocols."""
    assert isinstance(recipe, SignedClassRecipe)
    trainer, row = _train(recipe)
    for protocol in PROTOCOLS:
        score = score_synthetic(
            lambda patches: _logits(trainer.average, patches), recipe, protocol, scenes
        )
        row[protocol] = round(score.accuracy, 4)
    return row


def _train(recipe: RecipeBase) -> tuple[Trainer, Row]:
    trainer = Trainer(recipe)
    started = time.perf_counter()
    while not trainer.finished:
        trainer.train_step()
    seconds = time.perf_counter() - started
    trainer.finish_average()
    count = sum(p.numel() for p in trainer.task.network.parameters())
    row = {"steps": trainer.step, "seconds": round(seconds), "parameters": count}
    return trainer, row


@torch.no_grad()
def _logits(network: nn.Module, patches: np.ndarray) -> np.ndarray:
    found: np.ndarray = network.eval()(torch.from_numpy(patches)).float().numpy()
    return found


def _labels(network: nn.Module, crops: np.ndarray) -> np.ndarray:
    found: np.ndarray = _logits(network, crops).reshape(len(crops), -1).argmax(axis=1)
    return found


def _read(name: str) -> dict[str, Any]:
    path = resource_folder("configs") / f"{name}.yaml"
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return data


def _recipe(
    data: dict[str, Any], changes: Changes, optimiser: Changes, pool: Changes
) -> RecipeBase:
    data["optimiser"] |= optimiser
    data["pool"] |= pool
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return validate_recipe(data)


COMPARISONS: dict[
    str,
    tuple[
        dict[str, Changes],
        Callable[[Changes, Changes, Changes], RecipeBase],
        Callable[[RecipeBase, int], Row],
    ],
] = {"he": (_HE, he_recipe, he_row), "wei": (_WEI, wei_recipe, wei_row)}


def main() -> None:
    """Train and score every form of the chosen comparisons."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=300, help="per network")
    parser.add_argument("--batch", type=int, default=24, help="tiles or patches")
    parser.add_argument("--scenes", type=int, default=16, help="test scenes")
    parser.add_argument("--entries", type=int, default=32, help="scenes in memory")
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": describe(), "rows": {}}
    console = Console(width=140)
    for name, (variants, recipe_of, row_of) in COMPARISONS.items():
        if options.only not in (None, name):
            continue
        batch = "batch_tiles" if name == "he" else "batch_patches"
        optimiser = {
            "steps": options.steps,
            "warmup_steps": max(1, options.steps // 10),
            batch: options.batch,
        }
        rows: dict[str, Row] = {}
        for variant, changes in variants.items():
            recipe = recipe_of(changes, optimiser, {"entries": options.entries})
            rows[variant] = row_of(recipe, options.scenes)
            console.print(variant, rows[variant])
            report["rows"][name] = rows
            # Written after every row: a run that is stopped keeps its rows.
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
        console.print(_table(name, rows))


def _table(title: str, rows: Mapping[str, Row]) -> Table:
    keys = list(next(iter(rows.values())))
    table = Table("network", *keys, title=title)
    for name, row in rows.items():
        table.add_row(name, *(str(row[key]) for key in keys))
    return table


if __name__ == "__main__":
    main()
