"""Half weights: an ONNX file whose large weights are stored in 16 bits.

They are cast back to float32 before they are used, which runtimes do once, while
loading: the engine computes as before, from weights rounded to 11 bits, and its
file is half as large.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

# Biases and shapes stay as they are: they are small, and a bias may be large.
_LEAST_VALUES = 256


def halve_weights(path: Path) -> None:
    """Store the large float32 weights of an ONNX file as float16, in place."""
    model = onnx.load(str(path))
    graph = model.graph
    kept, casts = [], []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _LEAST_VALUES:
            kept.append(weight)
            continue
        half = f"{weight.name}_half"
        kept.append(numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(
            helper.make_node("Cast", [half], [weight.name], to=TensorProto.FLOAT)
        )
    del graph.initializer[:]
    graph.initializer.extend(kept)
    # Casts come first: nodes of a graph stand in the order they run.
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def float_weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Return the weights of a graph by name in float32, however they are stored."""
    # Weights stored in 16 bits pass through a cast that has the weight's own name.
    names = {n.input[0]: n.output[0] for n in graph.node if n.op_type == "Cast"}
    return {
        names.get(weight.name, weight.name): torch.tensor(
            numpy_helper.to_array(weight)
        ).float()
        for weight in graph.initializer
    }
