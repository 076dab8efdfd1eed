"""Quantise: the int8 form of an ONNX file, ranges measured on training data.

Every convolution gets a quantise and a dequantise node before it (Q/DQ), weights in
one scale per output channel, features in one scale per tensor, zero in the middle:
what TensorRT, OpenVINO and ONNX Runtime all read. The first convolution and the
last before each output stay in float: there the image itself, or the evidence for a
label, would be rounded to 256 steps. A network may ask for more at either end.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from rtfocus.errors import EngineError

Arrays = Mapping[str, NDArray[np.float32]]

_CONVOLUTION = "Conv"


def quantise(
    source: Path,
    target: Path,
    batches: Iterable[Arrays],
    *,
    float_ends: tuple[int, int] = (1, 1),
) -> Path:
    """Write the int8 form of a float32 ONNX file.

    Parameters
    ----------
    source
        Weights in float32, stored as such.
    target
        File to write.
    batches
        Inputs by tensor name, as the network meets them; a few dozen patches.
    float_ends
        See `inner_convolutions`.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    EngineError
        If the file has no convolution between its ends.
    """
    # Slow to import, and only exports need it.
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    inner = inner_convolutions(source, float_ends)
    if not inner:
        msg = (
            f"'{source}' has no convolution between its ends; export it as fp32 or fp16"
        )
        raise EngineError(msg)
    logger = logging.getLogger()
    level = logger.level
    # It recommends pre-processing, which the exporter of torch has done.
    logger.setLevel(logging.ERROR)
    try:
        quantize_static(
            source,
            target,
            _Calibration(iter(batches)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[_CONVOLUTION],
            nodes_to_quantize=inner,
            calibrate_method=CalibrationMethod.MinMax,
            # TensorRT knows neither zero points nor quantised biases.
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                # The mean range of the batches: one bright speck does not set it.
                "CalibMovingAverage": True,
            },
        )
    finally:
        logger.setLevel(level)
    return target


def inner_convolutions(path: Path, float_ends: tuple[int, int] = (1, 1)) -> list[str]:
    """Return the names of all convolutions but the first and the last ones.

    A last one is any that reaches an output without another convolution: a network
    with two outputs has two of them.

    Parameters
    ----------
    path
        ONNX file.
    float_ends
        How many of the first and of the last convolutions, in the order of the
        graph, do not count as inner ones.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    convolutions = [node for node in graph.node if node.op_type == _CONVOLUTION]
    makers = {name: node for node in graph.node for name in node.output}
    last: set[str] = set()
    reached: set[str] = set()
    open_names = [value.name for value in graph.output]
    while open_names:
        node = makers.get(open_names.pop())
        if node is None or node.name in reached:
            continue
        reached.add(node.name)
        if node.op_type == _CONVOLUTION:
            last.add(node.name)
        else:
            open_names.extend(node.input)
    first, final = float_ends
    between = convolutions[first : len(convolutions) - final]
    return [node.name for node in between if node.name not in last]


class _Calibration:
    """Hands out batches one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterator[Arrays]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)
