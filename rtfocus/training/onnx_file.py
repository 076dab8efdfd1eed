"""ONNX file: a graph with any number and size of frames, weights inside the file."""

import logging
import warnings
from pathlib import Path

import torch

from rtfocus.errors import EngineError
from rtfocus.training.task import Graph

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
