"""Export: from a checkpoint to an engine folder that runs without torch.

BatchNorm is folded into the convolutions, the graph takes frames of any size
and number, and the card says all that a processor must know to feed it.
"""

import copy
import hashlib
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rtfocus.errors import EngineError
from rtfocus.optics.normalisation import ContrastToNoise
from rtfocus.training.checkpoint import load_checkpoint
from rtfocus.training.dataset import NORMALISATION
from rtfocus.training.delpnet import GEOMETRY, LABELS, DelpNet
from rtfocus.training.recipe import Recipe

CARD_NAME = "engine.yaml"
WEIGHTS_NAME = "model.fp32.onnx"
INPUT_NAME = "tiles"
OUTPUT_NAME = "logits"

# Optics drawn in training lie within these factors of the reference sampling.
_SAMPLING_RANGE = (0.7, 1.5)
_OPSET = 18


def export_engine(checkpoint: Path, folder: Path) -> Path:
    """Write weights and card of a checkpoint's averaged network; returns the card.

    Raises
    ------
    ConfigError
        If the checkpoint cannot be read.
    """
    recipe, state = load_checkpoint(checkpoint)
    network = network_of(recipe, state)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS_NAME
    write_onnx(fold_batch_norm(network), weights)
    card = {"name": folder.resolve().name, **describe(recipe, state, network)}
    card["sha256"] = {"fp32": hashlib.sha256(weights.read_bytes()).hexdigest()}
    path = folder / CARD_NAME
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=88)
    path.write_text(text, encoding="utf-8")
    return path


def network_of(recipe: Recipe, state: dict[str, Any]) -> DelpNet:
    """Return the averaged network of a checkpoint, ready for inference."""
    switches = recipe.delpnet
    network = DelpNet(
        dropout=switches.dropout, batch_norm_momentum=switches.batch_norm_momentum
    )
    network.load_state_dict(state["average"])
    return network.eval()


def fold_batch_norm(network: DelpNet) -> DelpNet:
    """Return a copy whose convolutions hold their BatchNorm; Dropout is gone."""
    folded = copy.deepcopy(network).eval()
    layers: list[nn.Module] = []
    for layer in folded.features:
        if isinstance(layer, nn.BatchNorm2d):
            layers.append(fuse_conv_bn_eval(layers.pop(), layer))  # type: ignore[type-var]
        elif not isinstance(layer, nn.Dropout2d):
            layers.append(layer)
    folded.features = nn.Sequential(*layers)
    return folded


def write_onnx(network: DelpNet, path: Path) -> None:
    """Write a network with any number and size of frames, weights inside the file."""
    sides = {
        0: torch.export.Dim("number"),
        2: torch.export.Dim("height"),
        3: torch.export.Dim("width"),
    }
    # Two frames of unequal sides: a side of one would be taken for a constant.
    example = torch.zeros(2, 1, 144, 192)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter warns about its own libraries' deprecated calls.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=(sides,),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                opset_version=_OPSET,
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    if program is None:
        msg = (
            f"torch wrote no ONNX program for '{path}'; use torch 2.13 (rtfocus[train])"
        )
        raise EngineError(msg)
    program.save(str(path), external_data=False)


def describe(recipe: Recipe, state: dict[str, Any], network: DelpNet) -> dict[str, Any]:
    """Return the card without name and checksum."""
    blur = recipe.blur
    reference = blur.reference
    low, high = (factor * reference.sampling for factor in _SAMPLING_RANGE)
    rule = asdict(ContrastToNoise())
    # The step between values belongs to the camera, not to the engine.
    del rule["quantum"]
    return {
        "kind": "classifier",
        "implementation": "onnx",
        "description": "Defocus level of patches, He et al. 2020 (DelpNet).",
        "files": {"fp32": WEIGHTS_NAME},
        "sha256": {},
        "input": {
            "name": INPUT_NAME,
            "channels": 1,
            "tile_px": GEOMETRY.tile_px,
            "stride_px": GEOMETRY.stride_px,
            "origin_px": GEOMETRY.centre_px,
            "multiple_px": GEOMETRY.stride_px,
        },
        "output": {"name": OUTPUT_NAME, "labels": list(LABELS)},
        "levels": {"step_um": blur.level_step_um, "count": 11, "signed": False},
        "normalisation": {"name": "local_standardisation", **asdict(NORMALISATION)},
        "background": {"name": "contrast_to_noise", **rule},
        "optics": {
            "sampling_min": round(low, 3),
            "sampling_max": round(high, 3),
            "reference": asdict(reference),
        },
        "trained": {
            **_history(recipe, state),
            "data": [source.kind for source in recipe.sources],
            "split": "by field",
            "threads": recipe.threads,
            "parameters": network.parameter_count,
        },
    }


def _history(recipe: Recipe, state: dict[str, Any]) -> dict[str, Any]:
    """Say how the weights came about, the runs they started from included."""
    history: dict[str, Any] = {
        "command": f"rtfocus train train_{recipe.name}",
        "seed": recipe.seed,
        "steps": state["step"],
        "tiles": state["step"] * recipe.optimiser.batch_tiles,
        "minutes": round(state["seconds"] / 60),
    }
    if recipe.start_from is not None and recipe.start_from.is_file():
        history["after"] = _history(*load_checkpoint(recipe.start_from))
    return history
