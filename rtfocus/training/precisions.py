"""Precisions: the ONNX files of one network, by the precision they compute in."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from rtfocus.errors import ConfigError
from rtfocus.training.half_network import write_half_network
from rtfocus.training.half_weights import halve_weights
from rtfocus.training.onnx_file import write_onnx
from rtfocus.training.quantise import Arrays, quantise
from rtfocus.training.task import Task

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
