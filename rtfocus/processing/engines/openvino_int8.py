"""OpenVINO int8: signed 8-bit features written as unsigned ones, of equal value.

Engines are quantised around zero, as TensorRT wants it: features are int8. On some
CPUs OpenVINO's convolutions of signed features are wrong (an error of two thirds of
the deviation of the signal with OpenVINO 2026.4 on an AMD with VNNI), those of unsigned
ones are right. ``q + 128`` in uint8 with zero point 128 is the same number.
"""

from typing import Any

import numpy as np

_LEVELS = 256


def use_unsigned_features(openvino: Any, network: Any) -> None:  # noqa: ANN401
    """Rewrite every quantised feature map of a network in place.

    Parameters
    ----------
    openvino
        The module.
    network
        Model as read from an ONNX file; one without such features stays as it is.
    """
    for node in network.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            _rewrite(openvino, node)


def _rewrite(openvino: Any, quantise: Any) -> None:  # noqa: ANN401
    """Turn quantise, to int8, to float into quantise, to uint8, to float, - 128."""
    consumers = _consumers(quantise)
    if len(consumers) != 1 or not _converts(consumers[0], openvino.Type.i8):
        return
    back = _consumers(consumers[0])
    if not all(_converts(node, openvino.Type.f32) for node in back):
        return
    make = openvino.opset13
    data, low, high = (quantise.input_value(index) for index in range(3))
    shifted = make.fake_quantize(
        data,
        low,
        high,
        make.constant(np.float32(0)),
        make.constant(np.float32(_LEVELS - 1)),
        _LEVELS,
    )
    as_float = make.convert(make.convert(shifted, "u8"), "f32")
    centred = make.subtract(as_float, make.constant(np.float32(_LEVELS // 2)))
    for node in back:
        node.output(0).replace(centred.output(0))


def _consumers(node: Any) -> list[Any]:  # noqa: ANN401
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def _converts(node: Any, to: Any) -> bool:  # noqa: ANN401
    return bool(node.get_type_name() == "Convert" and node.get_element_type() == to)
