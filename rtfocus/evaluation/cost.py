"""Cost: multiply-adds of a network, counted in its ONNX graph."""

from math import prod
from typing import Any

from rtfocus.processing.engines.card import verified_file
from rtfocus.processing.engines.openvino_import import import_openvino
from rtfocus.processing.engines.registry import FoundEngine

# Leading axes of an operator's weights that are no part of one product: group and
# output channel. Transposed convolutions multiply per input, the others per output.
_PER_OUTPUT = {"Convolution": 1, "GroupConvolution": 2}
_PER_INPUT = {"ConvolutionBackpropData": 1, "GroupConvolutionBackpropData": 2}
_FRAME_PX = 512


def multiply_adds_per_pixel(found: FoundEngine) -> float | None:
    """Return the multiply-adds of convolutions and matrix products per frame pixel.

    Restorers are counted on one of their tiles, halo included, per pixel that the
    tile owns; classifiers and joint engines on a frame of about 512 pixels a side.

    Parameters
    ----------
    found
        The engine.

    Returns
    -------
    float | None
        None: no network, or OpenVINO, which reads the graph, is not installed.
    """
    card = found.card
    if not card.is_network or card.input is None:
        return None
    try:
        openvino = import_openvino()
    except ImportError:
        return None
    multiple = card.input.multiple_px
    side = round(_FRAME_PX / multiple) * multiple
    owned = side
    if card.kind == "restorer":
        side = card.input.tile_px
        owned = side - 2 * card.input.halo_px
    model = openvino.Core().read_model(verified_file(found.folder, card))
    shapes = {card.input.name: [1, card.input.channels, side, side]}
    if card.condition is not None:
        shapes[card.condition.name] = [1, len(card.condition.entries)]
    model.reshape(shapes)
    return sum(map(_multiply_adds, model.get_ops())) / owned**2


def _multiply_adds(node: Any) -> int:  # noqa: ANN401
    """Count one operator of OpenVINO's graph."""
    kind = node.get_type_name()
    if kind == "MatMul":
        inner = list(node.input(0).get_shape())
        axis = -2 if node.get_attributes()["transpose_a"] else -1
        return int(prod(node.output(0).get_shape()) * inner[axis])
    if kind in _PER_OUTPUT:
        weights = list(node.input(1).get_shape())[_PER_OUTPUT[kind] :]
        return int(prod(node.output(0).get_shape()) * prod(weights))
    if kind in _PER_INPUT:
        weights = list(node.input(1).get_shape())[_PER_INPUT[kind] :]
        return int(prod(node.input(0).get_shape()) * prod(weights))
    return 0
