"""Shaping: what moves values without computing them, and the shapes themselves.

Shapes are tensors on the host, as are axes and sizes stored in a file, so that
reading one never waits for the GPU.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rtfocus.processing.gpu.torch_backend.node import (
    Inputs,
    Node,
    Operator,
    given,
    listed,
    needed,
)

_LARGE = 2**31
"""ONNX writes ends beyond any axis as the largest integers there are."""


def _shape(node: Node, inputs: Inputs) -> Tensor:
    sides = list(needed(inputs).shape)
    end = node.attributes.get("end")
    return torch.tensor(sides[node.integer("start") : end], dtype=torch.int64)


def _reshape(node: Node, inputs: Inputs) -> Tensor:
    values, wanted = needed(inputs), listed(inputs, 1)
    if not node.integer("allowzero"):
        wanted = [values.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    return values.reshape(wanted)


def _gather(node: Node, inputs: Inputs) -> Tensor:
    values, index = needed(inputs), needed(inputs, 1)
    axis = node.integer("axis") % values.ndim
    if index.ndim == 0 and index.device.type == "cpu":
        return values.select(axis, int(index))
    places = index.to(values.device, non_blocking=True).flatten()
    places = torch.where(places < 0, places + values.shape[axis], places)
    taken = values.index_select(axis, places)
    sides = [*values.shape[:axis], *index.shape, *values.shape[axis + 1 :]]
    return taken.reshape(sides)


def _gather_nd(node: Node, inputs: Inputs) -> Tensor:
    """Pick by indices of several leading axes at once, last axis of the index."""
    if node.integer("batch_dims"):
        msg = f"GatherND with batch_dims {node.integer('batch_dims')}"
        raise NotImplementedError(msg)
    values, index = needed(inputs), needed(inputs, 1)
    places = index.to(values.device, non_blocking=True).unbind(-1)
    return values[tuple(places)]


def _range(_: Node, inputs: Inputs) -> Tensor:
    start, end, step = (needed(inputs, place) for place in range(3))
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def _slice(_: Node, inputs: Inputs) -> Tensor:
    values = needed(inputs)
    starts, ends = listed(inputs, 1), listed(inputs, 2)
    axes = list(range(len(starts))) if given(inputs, 3) is None else listed(inputs, 3)
    steps = [1] * len(starts) if given(inputs, 4) is None else listed(inputs, 4)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            msg = f"slice with the step {step}"
            raise NotImplementedError(msg)
        window = [slice(None)] * values.ndim
        window[axis] = slice(start, None if end >= _LARGE else end, step)
        values = values[tuple(window)]
    return values


def _concatenate(node: Node, inputs: Inputs) -> Tensor:
    parts = [part for part in inputs if part is not None]
    return torch.cat(parts, dim=node.integer("axis"))


def _split(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    values, axis = needed(inputs), node.integer("axis")
    if given(inputs, 1) is not None:
        sides = listed(inputs, 1)
    else:
        count = node.integer("num_outputs", len(node.outputs))
        each = -(-values.shape[axis] // count)
        sides = [each] * (count - 1) + [values.shape[axis] - each * (count - 1)]
    starts = [sum(sides[:place]) for place in range(len(sides))]
    return tuple(
        values.narrow(axis, start, side)
        for start, side in zip(starts, sides, strict=True)
    )


def _squeeze(_: Node, inputs: Inputs) -> Tensor:
    values = needed(inputs)
    if given(inputs, 1) is None:
        return values.squeeze()
    return values.squeeze(tuple(listed(inputs, 1)))


def _unsqueeze(_: Node, inputs: Inputs) -> Tensor:
    values, axes = needed(inputs), listed(inputs, 1)
    ndim = values.ndim + len(axes)
    for axis in sorted(axis % ndim for axis in axes):
        values = values.unsqueeze(axis)
    return values


def _transpose(node: Node, inputs: Inputs) -> Tensor:
    values = needed(inputs)
    return values.permute(node.integers("perm", list(range(values.ndim))[::-1]))


def _expand(_: Node, inputs: Inputs) -> Tensor:
    values, wanted = needed(inputs), listed(inputs, 1)
    # Both ways: an axis of the values may be longer than the one asked for.
    sides = np.broadcast_shapes(tuple(values.shape), tuple(wanted))
    return values.expand(sides)


def _pad(node: Node, inputs: Inputs) -> Tensor:
    values, pads = needed(inputs), listed(inputs, 1)
    if node.text("mode", "constant") != "constant" or given(inputs, 3) is not None:
        msg = f"padding with mode '{node.text('mode', '')}' or along chosen axes"
        raise NotImplementedError(msg)
    fill = given(inputs, 2)
    half = len(pads) // 2
    # torch counts axes from the last one: begin and end of each.
    sides = [side for axis in reversed(range(half)) for side in pads[axis::half]]
    return functional.pad(values, sides, value=0.0 if fill is None else float(fill))


def _flatten(node: Node, inputs: Inputs) -> Tensor:
    values, axis = needed(inputs), node.integer("axis", 1)
    return values.reshape([values.shape[:axis].numel(), -1])


SHAPING: Mapping[str, Operator] = {
    "Concat": _concatenate,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""By ONNX name."""
