"""Filters: convolutions, pooling, resizing and normalisation of ONNX in torch."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rtfocus.processing.gpu.torch_backend.operators import (
    Inputs,
    Node,
    Operator,
    given,
    listed,
    needed,
)


def _padded(node: Node, image: Tensor, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """Return the image and the padding left to the operator, equal on both sides.

    ONNX pads each side by itself; what torch cannot is padded beforehand.
    """
    if node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        msg = f"auto_pad {node.text('auto_pad', '')} is not written out"
        raise NotImplementedError(msg)
    pads = node.integers("pads", [0, 0, 0, 0])
    begin, end = pads[:2], pads[2:]
    if begin == end:
        return image, begin
    sides = [begin[1], end[1], begin[0], end[0]]
    return functional.pad(image, sides, value=value), [0, 0]


def _convolve(node: Node, inputs: Inputs) -> Tensor:
    image, padding = _padded(node, needed(inputs))
    return functional.conv2d(
        image,
        needed(inputs, 1),
        given(inputs, 2),
        stride=node.integers("strides", [1, 1]),
        padding=padding,
        dilation=node.integers("dilations", [1, 1]),
        groups=node.integer("group", 1),
    )


def _convolve_transposed(node: Node, inputs: Inputs) -> Tensor:
    pads = node.integers("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        msg = f"pads {pads} differ between the sides"
        raise NotImplementedError(msg)
    return functional.conv_transpose2d(
        needed(inputs),
        needed(inputs, 1),
        given(inputs, 2),
        stride=node.integers("strides", [1, 1]),
        padding=pads[:2],
        output_padding=node.integers("output_padding", [0, 0]),
        groups=node.integer("group", 1),
        dilation=node.integers("dilations", [1, 1]),
    )


def _largest(node: Node, inputs: Inputs) -> Tensor:
    image, padding = _padded(node, needed(inputs), value=-torch.inf)
    return functional.max_pool2d(
        image,
        node.integers("kernel_shape", []),
        stride=node.integers("strides", [1, 1]),
        padding=padding,
        dilation=node.integers("dilations", [1, 1]),
        ceil_mode=bool(node.integer("ceil_mode")),
    )


def _average(node: Node, inputs: Inputs) -> Tensor:
    pads = node.integers("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        msg = f"pads {pads} differ between the sides"
        raise NotImplementedError(msg)
    return functional.avg_pool2d(
        needed(inputs),
        node.integers("kernel_shape", []),
        stride=node.integers("strides", [1, 1]),
        padding=pads[:2],
        ceil_mode=bool(node.integer("ceil_mode")),
        count_include_pad=bool(node.integer("count_include_pad")),
    )


def _resize(node: Node, inputs: Inputs) -> Tensor:
    image = needed(inputs)
    if given(inputs, 3) is not None:
        size = listed(inputs, 3)[-2:]
    else:
        factors = needed(inputs, 2).flatten().tolist()[-2:]
        size = [int(n * f) for n, f in zip(image.shape[-2:], factors, strict=True)]
    mode = node.text("mode", "nearest")
    place = node.text("coordinate_transformation_mode", "half_pixel")
    if (mode, place) == ("nearest", "asymmetric"):
        # As ONNX: the pixel whose corner is nearest below.
        return functional.interpolate(image, size, mode="nearest")
    if mode == "linear" and place in ("half_pixel", "align_corners"):
        return functional.interpolate(
            image, size, mode="bilinear", align_corners=place == "align_corners"
        )
    msg = f"resize mode '{mode}' with coordinates '{place}'"
    raise NotImplementedError(msg)


def _normalise_instance(node: Node, inputs: Inputs) -> Tensor:
    return functional.instance_norm(
        needed(inputs),
        weight=needed(inputs, 1),
        bias=needed(inputs, 2),
        eps=node.number("epsilon", 1e-5),
    )


def _depth_to_space(node: Node, inputs: Inputs) -> Tensor:
    image, side = needed(inputs), node.integer("blocksize")
    if node.text("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(image, side)
    number, depth, height, width = image.shape
    blocks = image.reshape(number, side, side, depth // side**2, height, width)
    spread = blocks.permute(0, 3, 4, 1, 5, 2)
    return spread.reshape(number, depth // side**2, height * side, width * side)


FILTERS: Mapping[str, Operator] = {
    "AveragePool": _average,
    "Conv": _convolve,
    "ConvTranspose": _convolve_transposed,
    "DepthToSpace": _depth_to_space,
    "GlobalAveragePool": lambda _, x: needed(x).mean((2, 3), keepdim=True),
    "InstanceNormalization": _normalise_instance,
    "MaxPool": _largest,
    "Resize": _resize,
}
"""By ONNX name."""
