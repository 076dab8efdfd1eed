"""Arithmetic: pointwise operators, products, reductions and rounding of ONNX in torch.

Shapes are computed on the host and may be factors of what lies on the GPU: single
values are handed over as numbers, so that nothing waits for a copy.
"""

from collections.abc import Callable, Mapping

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
        moved, kept = _pair(second, first)
        return kept, moved
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
    first = first.T if node.integer("transA") else first
    second = second.T if node.integer("transB") else second
    result = node.number("alpha", 1.0) * (first @ second)
    return result if shift is None else result + node.number("beta", 1.0) * shift


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(node: Node, inputs: Inputs) -> Tensor:
        values = needed(inputs)
        if given(inputs, 1) is not None:
            axes = listed(inputs, 1)
        else:
            axes = node.integers("axes", [])
        axes = axes or list(range(values.ndim))
        return function(values, axes, bool(node.integer("keepdims", 1)))

    return run


def _along(scale: Tensor, axis: int, ndim: int) -> Tensor:
    """Shape a scale per channel so that it multiplies along an axis."""
    if scale.ndim == 0 or scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape([-1 if place == axis else 1 for place in range(ndim)])


def _quantise(node: Node, inputs: Inputs) -> Tensor:
    values, zero = needed(inputs), given(inputs, 2)
    axis = node.integer("axis", 1) % max(values.ndim, 1)
    scale = _along(needed(inputs, 1), axis, values.ndim)
    dtype = torch.uint8 if zero is None else zero.dtype
    offset = 0 if zero is None else _along(zero, axis, values.ndim).to(values.dtype)
    limits = torch.iinfo(dtype)
    steps = torch.round(values / scale) + offset
    return torch.clamp(steps, limits.min, limits.max).to(dtype)


def _dequantise(node: Node, inputs: Inputs) -> Tensor:
    steps, scale, zero = needed(inputs), needed(inputs, 1), given(inputs, 2)
    axis = node.integer("axis", 1) % max(steps.ndim, 1)
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
    "Cast": lambda node, x: needed(x).to(TYPES[node.integer("to")]),
    "Clip": _clip,
    "DequantizeLinear": _dequantise,
    "Div": _pointwise(_divide),
    "Equal": _pointwise(torch.eq),
    "Exp": _single(torch.exp),
    "Gemm": _product,
    "Greater": _pointwise(torch.gt),
    "Identity": lambda _, x: needed(x),
    "LeakyRelu": lambda node, x: functional.leaky_relu(
        needed(x), node.number("alpha", 0.01)
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
    "Softmax": lambda node, x: needed(x).softmax(node.integer("axis", -1)),
    "Sqrt": _single(torch.sqrt),
    "Sub": _pointwise(torch.sub),
    "Tanh": _single(torch.tanh),
    "Where": _where,
}
"""By ONNX name."""
