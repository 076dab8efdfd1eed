"""Operators: arithmetic, reductions, shapes and indices of ONNX in torch.

Shapes are computed on the host and may be factors of what lies on the GPU: single
values are handed over as numbers, so that nothing waits for a copy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Inputs = list[Tensor | None]
"""Tensors in the operator's order; None: an optional one that is not given."""
Operator = Callable[["Node", Inputs], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of a network."""

    operator: str
    """ONNX name, e.g. ``Conv``."""
    name: str
    """For messages."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def get(self, name: str, default: Any = 0) -> Any:
        """Return an attribute: number, text or list."""
        return self.attributes.get(name, default)


def given(inputs: Inputs, place: int) -> Tensor | None:
    """Return an optional input; None where the node has none there."""
    return inputs[place] if place < len(inputs) else None


def needed(inputs: Inputs, place: int = 0) -> Tensor:
    """Return an input that the operator always has."""
    tensor = inputs[place]
    if tensor is None:
        msg = f"input {place} is empty"
        raise ValueError(msg)
    return tensor


def listed(inputs: Inputs, place: int) -> list[int]:
    """Return the values of an input that holds axes or sizes; they lie on the host."""
    return [int(value) for value in needed(inputs, place).flatten().tolist()]


TYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""By the number ONNX gives an element type."""


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two operands to one device; a single value on the host may stay there."""
    if first.device == second.device:
        return first, second
    if first.device.type == "cpu":
        moved, swapped = _pair(second, first)
        return swapped, moved
    if second.numel() == 1 and second.ndim <= first.ndim:
        return first, second.reshape(())
    return first, second.to(first.device, non_blocking=True)


def _pointwise(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(_: Node, inputs: Inputs) -> Tensor:
        result, *others = (t for t in inputs if t is not None)
        for other in others:
            result = function(*_pair(result, other))
        return result

    return run


def _single(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda _, inputs: function(needed(inputs))


def _clip(_: Node, inputs: Inputs) -> Tensor:
    result = needed(inputs)
    low, high = given(inputs, 1), given(inputs, 2)
    if low is not None:
        result = torch.maximum(*_pair(result, low))
    if high is not None:
        result = torch.minimum(*_pair(result, high))
    return result


def _divide(first: Tensor, second: Tensor) -> Tensor:
    whole = not first.is_floating_point()
    return torch.div(first, second, rounding_mode="trunc" if whole else None)


def _product(node: Node, inputs: Inputs) -> Tensor:
    first, second, shift = needed(inputs), needed(inputs, 1), given(inputs, 2)
    first = first.T if node.get("transA") else first
    second = second.T if node.get("transB") else second
    result: Tensor = node.get("alpha", 1.0) * (first @ second)
    return result if shift is None else result + node.get("beta", 1.0) * shift


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(node: Node, inputs: Inputs) -> Tensor:
        values = needed(inputs)
        if given(inputs, 1) is not None:
            axes = listed(inputs, 1)
        else:
            axes = node.get("axes", [])
        axes = axes or list(range(values.ndim))
        return function(values, axes, bool(node.get("keepdims", 1)))

    return run


def _along(scale: Tensor, axis: int, ndim: int) -> Tensor:
    """Shape a scale per channel so that it multiplies along an axis."""
    if scale.ndim == 0 or scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape([-1 if place == axis else 1 for place in range(ndim)])


def _quantise(node: Node, inputs: Inputs) -> Tensor:
    values, zero = needed(inputs), given(inputs, 2)
    axis = node.get("axis", 1) % max(values.ndim, 1)
    scale = _along(needed(inputs, 1), axis, values.ndim)
    dtype = torch.uint8 if zero is None else zero.dtype
    offset = 0 if zero is None else _along(zero, axis, values.ndim).to(values.dtype)
    limits = torch.iinfo(dtype)
    steps = torch.round(values / scale) + offset
    return torch.clamp(steps, limits.min, limits.max).to(dtype)


def _dequantise(node: Node, inputs: Inputs) -> Tensor:
    steps, scale, zero = needed(inputs), needed(inputs, 1), given(inputs, 2)
    axis = node.get("axis", 1) % max(steps.ndim, 1)
    values = steps.to(scale.dtype)
    if zero is not None:
        values = values - _along(zero, axis, steps.ndim).to(scale.dtype)
    return values * _along(scale, axis, steps.ndim)


def _where(_: Node, inputs: Inputs) -> Tensor:
    parts = [needed(inputs, place) for place in range(3)]
    devices = [part.device for part in parts]
    place = next((d for d in devices if d.type != "cpu"), devices[0])
    condition, first, second = (p.to(place, non_blocking=True) for p in parts)
    return torch.where(condition, first, second)


ARITHMETIC: Mapping[str, Operator] = {
    "Abs": _single(torch.abs),
    "Add": _pointwise(torch.add),
    "Cast": lambda node, x: needed(x).to(TYPES[node.get("to")]),
    "Clip": _clip,
    "DequantizeLinear": _dequantise,
    "Div": _pointwise(_divide),
    "Equal": _pointwise(torch.eq),
    "Exp": _single(torch.exp),
    "Gemm": _product,
    "Greater": _pointwise(torch.gt),
    "Identity": lambda _, x: needed(x),
    "LeakyRelu": lambda node, x: functional.leaky_relu(
        needed(x), node.get("alpha", 0.01)
    ),
    "Less": _pointwise(torch.lt),
    "Log": _single(torch.log),
    "MatMul": _pointwise(torch.matmul),
    "Max": _pointwise(torch.maximum),
    "Min": _pointwise(torch.minimum),
    "Mul": _pointwise(torch.mul),
    "Neg": _single(torch.neg),
    "Pow": _pointwise(torch.pow),
    "QuantizeLinear": _quantise,
    "Reciprocal": _single(torch.reciprocal),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": _single(functional.relu),
    "Sigmoid": _single(torch.sigmoid),
    "Softmax": lambda node, x: needed(x).softmax(node.get("axis", -1)),
    "Sqrt": _single(torch.sqrt),
    "Sub": _pointwise(torch.sub),
    "Tanh": _single(torch.tanh),
    "Where": _where,
}
"""By ONNX name."""

_LARGE = 2**31
"""ONNX writes ends beyond any axis as the largest integers there are."""


def _shape(node: Node, inputs: Inputs) -> Tensor:
    sides = list(needed(inputs).shape)
    end = node.get("end", None)
    return torch.tensor(sides[node.get("start") : end], dtype=torch.int64)


def _reshape(node: Node, inputs: Inputs) -> Tensor:
    values, sides = needed(inputs), listed(inputs, 1)
    if not node.get("allowzero"):
        sides = [values.shape[i] if n == 0 else n for i, n in enumerate(sides)]
    return values.reshape(sides)


def _gather(node: Node, inputs: Inputs) -> Tensor:
    values, index = needed(inputs), needed(inputs, 1)
    axis = node.get("axis") % values.ndim
    if index.ndim == 0 and index.device.type == "cpu":
        return values.select(axis, int(index))
    places = index.to(values.device, non_blocking=True).flatten()
    places = torch.where(places < 0, places + values.shape[axis], places)
    gathered = values.index_select(axis, places)
    sides = [*values.shape[:axis], *index.shape, *values.shape[axis + 1 :]]
    return gathered.reshape(sides)


def _gather_nd(node: Node, inputs: Inputs) -> Tensor:
    """Pick by indices of several leading axes at once, last axis of the index."""
    if node.get("batch_dims"):
        msg = f"GatherND with batch_dims {node.get('batch_dims')}"
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
    return torch.cat(parts, dim=node.get("axis"))


def _split(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    values, axis = needed(inputs), node.get("axis")
    if given(inputs, 1) is not None:
        sides = listed(inputs, 1)
    else:
        count = node.get("num_outputs", len(node.outputs))
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
    return values.permute(node.get("perm", list(range(values.ndim))[::-1]))


def _expand(_: Node, inputs: Inputs) -> Tensor:
    values, target = needed(inputs), listed(inputs, 1)
    # Both ways: an axis of the values may be longer than the one asked for.
    sides = np.broadcast_shapes(tuple(values.shape), tuple(target))
    return values.expand(sides)


def _pad(node: Node, inputs: Inputs) -> Tensor:
    values, pads = needed(inputs), listed(inputs, 1)
    if node.get("mode", "constant") != "constant" or given(inputs, 3) is not None:
        msg = f"padding with mode '{node.get('mode', '')}' or along chosen axes"
        raise NotImplementedError(msg)
    fill = given(inputs, 2)
    half = len(pads) // 2
    # torch counts axes from the last one: begin and end of each.
    sides = [side for axis in reversed(range(half)) for side in pads[axis::half]]
    return functional.pad(values, sides, value=0.0 if fill is None else float(fill))


def _flatten(node: Node, inputs: Inputs) -> Tensor:
    values, axis = needed(inputs), node.get("axis", 1)
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
