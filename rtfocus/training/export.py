"""Export: from a checkpoint to an engine folder that runs without torch.

An ONNX file takes any number and size of frames and holds its weights itself.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import yaml
from torch import nn

from rtfocus.errors import ConfigError, EngineError
from rtfocus.files import resource_folder
from rtfocus.images.metadata import TEXT_MARK
from rtfocus.training.feed import (
    find_engine,
    identity,
    load_checkpoint,
    mean_state,
)
from rtfocus.training.onnx_forms import (
    Arrays,
    halve_weights,
    quantise,
    write_half_network,
)
from rtfocus.training.recipe import RecipeBase
from rtfocus.training.task import Graph, Task, make_task

_OPSET = 18


def write_onnx(graph: Graph, path: Path) -> None:
    """Write a graph; EngineError where torch cannot trace it."""
    dims = {
        axis: torch.export.Dim(axis)
        for axes in graph.dynamic.values()
        for axis in axes.values()
    }
    shapes = tuple(
        {place: dims[axis] for place, axis in graph.dynamic.get(name, {}).items()}
        for name in graph.inputs
    )
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter warns about its own libraries' deprecated calls.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.module.eval(),
                tuple(graph.inputs.values()),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
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
    model = program.model_proto
    # Every node carries the exporter's stack trace, with the paths of this machine.
    for part in (model.graph, model, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")
    path.write_bytes(model.SerializeToString())


Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_CALIBRATION_BATCHES = 8
# What batches call the network's input `tiles`.
_TILES = ("blurred", "crops", "patches")


def file_name(precision: Precision) -> str:
    """Return the name of a precision's file in an engine folder."""
    return f"model.{precision}.onnx"


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """Read a list such as ``fp32,fp16,int8``; fp32 is always part of it.

    Raises
    ------
    ConfigError
        Names the word that is no precision.

    Examples
    --------
    >>> parse_precisions("int8")
    ('fp32', 'int8')
    """
    words = {word.strip() for word in text.split(",")} | {"fp32"}
    unknown = sorted(words - set(PRECISIONS))
    if unknown:
        msg = f"precision '{unknown[0]}' is unknown; choose of {', '.join(PRECISIONS)}"
        raise ConfigError(msg)
    return tuple(name for name in PRECISIONS if name in words)


def write_precisions(
    task: Task[Any],
    network: nn.Module,
    folder: Path,
    precisions: Sequence[Precision] = ("fp32",),
    *,
    half_weights: bool = False,
) -> dict[Precision, str]:
    """Write a network in several precisions.

    Parameters
    ----------
    task
        Of the network; its training data sets the ranges of int8.
    network
        Trained weights, for inference.
    folder
        Where the files go.
    precisions
        ``fp32`` is written whether named or not: it is the reference. ``fp16``
        computes in half precision, ``int8`` in 8 bits between Q/DQ nodes.
    half_weights
        Store the weights of the fp32 file in 16 bits.

    Returns
    -------
    dict
        File name by precision.

    Raises
    ------
    ConfigError
        If int8 is wanted and the training data are not there.
    """
    graph = task.graph(network)
    reference = folder / file_name("fp32")
    write_onnx(graph, reference)
    files: dict[Precision, str] = {"fp32": reference.name}
    if "fp16" in precisions:
        files["fp16"] = file_name("fp16")
        write_half_network(reference, folder / files["fp16"])
    if "int8" in precisions:
        files["int8"] = file_name("int8")
        batches = calibration_inputs(task, tuple(graph.inputs))
        quantise(
            reference, folder / files["int8"], batches, float_ends=graph.float_ends
        )
    if half_weights:
        halve_weights(reference)
    return files


def calibration_inputs(task: Task[Any], names: tuple[str, ...]) -> Iterator[Arrays]:
    """Make a graph's inputs by name from training batches, always the same ones."""
    for draw in range(1, _CALIBRATION_BATCHES + 1):
        batch = task.batch(0, draw)
        (tiles,) = (entry for entry in _TILES if entry in batch)
        inputs = {name: batch[tiles if name == "tiles" else name] for name in names}
        yield {name: np.asarray(v, dtype=np.float32) for name, v in inputs.items()}


CARD_NAME = "engine.yaml"


def export_engine(
    checkpoint: Path,
    folder: Path,
    *,
    name: str | None = None,
    mean_with: Path | None = None,
    half_weights: bool = False,
    precisions: Sequence[Precision] = ("fp32",),
) -> Path:
    """Write weights and card of a checkpoint's averaged network; returns the card.

    Parameters
    ----------
    checkpoint
        Of any network.
    folder
        Of the engine; made where it is missing.
    name
        Of the engine; None: that of the folder.
    mean_with
        Checkpoint of the same network: the mean of both goes into the engine.
    half_weights
        Store weights in 16 bits, see `rtfocus.training.onnx_forms`.
    precisions
        Files to write, see `rtfocus.training.export`.

    Raises
    ------
    ConfigError
        If the checkpoint cannot be read, or int8 lacks the training data.
    """
    if mean_with is None:
        recipe, state = load_checkpoint(checkpoint)
    else:
        recipe, state = mean_state(mean_with, checkpoint)
    task, network = trained(recipe, state)
    folder.mkdir(parents=True, exist_ok=True)
    files = write_precisions(
        task, network, folder, precisions, half_weights=half_weights
    )
    card = {
        "name": name or folder.resolve().name,
        **task.card(),
        "files": dict(files),
        "sha256": {
            precision: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for precision, name in files.items()
        },
        "trained": {
            **_history(recipe, state),
            **({} if mean_with is None else {"mean_with": _earlier(mean_with)}),
            "data": [source.kind for source in recipe.sources],
            "split": "by field",
            "threads": recipe.threads,
            "weights_bits": 16 if half_weights else 32,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    }
    path = folder / CARD_NAME
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=88)
    path.write_text(f"{TEXT_MARK}\n{text}", encoding="utf-8")
    return path


def trained(recipe: RecipeBase, state: dict[str, Any]) -> tuple[Task[Any], nn.Module]:
    """Return the task of a checkpoint and its averaged network, for inference."""
    task = make_task(recipe)
    task.network.load_state_dict(state["average"])
    return task, task.network.eval()


def _history(recipe: RecipeBase, state: dict[str, Any]) -> dict[str, Any]:
    """Say how the weights came about, the runs they started from included."""
    name = f"train_{recipe.name}"
    shipped = (resource_folder("configs") / f"{name}.yaml").is_file()
    history: dict[str, Any] = {
        # A recipe of the user's own has a name that nobody else finds.
        **({"command": f"rtfocus train {name}"} if shipped else {"run": recipe.name}),
        "seed": recipe.seed,
        "steps": state["step"],
        "minutes": round(state["seconds"] / 60),
    }
    if recipe.start_from is not None:
        history["after"] = _earlier(recipe.start_from)
    return history


def _earlier(source: Path) -> dict[str, Any] | str:
    """Say where the first weights came from: a run, an engine, or a lost file."""
    folder = find_engine(source)
    if folder is not None:
        return {"engine": identity(folder)}
    if source.is_file():
        return _history(*load_checkpoint(source))
    return str(source)
