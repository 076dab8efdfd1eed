"""Small real engines whose results can be computed by hand: ONNX file and card."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from network_kit import float_tensor
from onnx import helper, numpy_helper

ENTRIES = (
    "sampling",
    "spherical_waves",
    "optics_known",
    "defocus_levels",
    "defocus_known",
)
REFERENCE = {
    "numerical_aperture": 0.5,
    "wavelength_nm": 451,
    "pixel_size_um": 0.65,
}
SIGNED_LABELS: list[int | str] = [*range(-10, 11), "bg"]
KERNEL_PX = 5


MEASURES = 25
"""That `rtfocus.engines.fitted` takes of a correction."""


def write_brightness_joint(
    folder: Path,
    *,
    share: float | None = None,
    damaged: bool = False,
    more: float = 0.0,
    second_look: bool = False,
    log_error: float | None = None,
    stride_px: int = 48,
) -> Path:
    """Write a joint engine: the brighter a tile, the higher its level.

    `share` of its corrections is taken where it runs blind, whatever the image says,
    and `log_error` is the logarithm of the squared error that it states of every place.
    Of a `damaged` one a weight is NaN. Every restored pixel has `more` added, and a
    tenth of the level that it is told if it takes a `second_look`.

    ``logits`` peak at the level nearest to 20 mean - 10 over tiles of 96 px every
    `stride_px`; ``restored`` is tiles + sampling / 10, a change that tells whether the
    condition arrived.
    """
    centres = np.arange(-10, 11)
    # -(x - c)^2 without x^2, which all labels share, and never "bg".
    weight = np.append(2 * 20 * centres, 0.0)
    bias = np.append(-(centres**2) - 20 * centres, np.nan if damaged else -1e4)
    nodes = [
        _node(
            "AveragePool",
            ["tiles"],
            "mean",
            kernel_shape=[96, 96],
            strides=[stride_px] * 2,
        ),
        _node("Conv", ["mean", "weight", "bias"], "logits"),
        *_plus_condition("tiles", 0, 0.1, "brighter"),
        _node("Add", ["brighter", "more"], "enough" if second_look else "restored"),
    ]
    if second_look:
        entry = ENTRIES.index("defocus_levels")
        nodes += _plus_condition("enough", entry, 0.1, "restored")
    constants = {
        "more": np.array(more, np.float32),
        "weight": weight.astype(np.float32)[:, None, None, None],
        "bias": bias.astype(np.float32),
    }
    outputs = {
        "logits": ["n", len(SIGNED_LABELS), "rows", "columns"],
        "restored": _IMAGE,
    }
    card = {
        "kind": "joint",
        "input": {
            "name": "tiles",
            "tile_px": 96,
            "stride_px": stride_px,
            "multiple_px": 48,
        },
        "condition": {"name": "condition", "entries": list(ENTRIES)},
        "output": {"name": "logits", "labels": SIGNED_LABELS},
        "restored": {"name": "restored"},
        "background": {"name": "contrast_to_noise"},
    }
    if second_look:
        card["second_look"] = True
    if share is not None:
        odds = float(np.log(share / (1 - share)))
        layer = {"weights": [[0.0] * MEASURES], "bias": [odds]}
        measures = {"middle": [0.0] * MEASURES, "spread": [1.0] * MEASURES}
        card["evidence"] = measures | {"layers": [layer]}
    if log_error is not None:
        more_measures = [0.0] * (MEASURES + 2)
        card["expected_error"] = {
            "middle": more_measures,
            "spread": [1.0] * (MEASURES + 2),
            "layers": [{"weights": [more_measures], "bias": [log_error]}],
        }
    return _write(folder, nodes, constants, outputs, card, entries=len(ENTRIES))


def write_shift_restorer(folder: Path, *, entries: tuple[str, ...] = ENTRIES) -> Path:
    """Write a restorer of tiles: ``restored`` = tiles + last condition entry / 10.

    ``kernel`` is the tile's 5 x 5 upper left corner, so that it can be recognised.
    """
    nodes = [
        *_plus_condition("tiles", len(entries) - 1, 0.1, "restored"),
        _node("Slice", ["tiles", "first", "last", "axes"], "corner"),
        _node("Squeeze", ["corner", "channel"], "kernel"),
    ]
    constants = {
        "first": np.array([0, 0], np.int64),
        "last": np.array([KERNEL_PX, KERNEL_PX], np.int64),
        "axes": np.array([2, 3], np.int64),
        "channel": np.array([1], np.int64),
    }
    outputs = {"restored": _IMAGE, "kernel": ["n", KERNEL_PX, KERNEL_PX]}
    card = {
        "kind": "restorer",
        "input": {"name": "tiles", "tile_px": 64, "halo_px": 8, "multiple_px": 4},
        "condition": {"name": "condition", "entries": list(entries)},
        "output": {"name": "restored"},
        "kernel_output": {"name": "kernel", "size_px": KERNEL_PX},
    }
    return _write(folder, nodes, constants, outputs, card, entries=len(entries))


def write_smooth_restorer(
    folder: Path, *, channels: int = 1, any_size: bool = False
) -> Path:
    """Write a restorer without a condition: the mean of 3 x 3 pixels, per channel."""
    nodes = [
        _node("Conv", ["tiles", "box"], "restored", pads=[1, 1, 1, 1], group=channels)
    ]
    constants = {"box": np.full((channels, 1, 3, 3), 1 / 9, np.float32)}
    card = {
        "kind": "restorer",
        "input": {
            "name": "tiles",
            "channels": channels,
            "tile_px": 64,
            "halo_px": 8,
            "multiple_px": 4,
            "any_size": any_size,
        },
        "output": {"name": "restored"},
    }
    outputs = {"restored": ["n", channels, "height", "width"]}
    return _write(folder, nodes, constants, outputs, card, channels=channels)


def write_overflowing_restorer(folder: Path) -> Path:
    """Write a restorer that makes infinities of the bright half of an image."""
    nodes = [
        _node("Mul", ["tiles", "much"], "more"),
        _node("Exp", ["more"], "restored"),
    ]
    constants = {"much": np.array(200, np.float32)}
    card = {
        "kind": "restorer",
        "input": {"name": "tiles", "tile_px": 64, "halo_px": 8, "multiple_px": 4},
        "output": {"name": "restored"},
    }
    return _write(folder, nodes, constants, {"restored": _IMAGE}, card)


def write_constant_wiener(folder: Path, log_snr: float) -> Path:
    """Write a learned Wiener engine that says one ratio for every band and tile."""
    nodes = [
        _node("GlobalAveragePool", ["tiles"], "mean"),
        _node("Conv", ["mean", "nothing", "ratio"], "column"),
        _node("Squeeze", ["column", "spatial"], "log_snr"),
    ]
    bands = 12
    constants = {
        "nothing": np.zeros((bands, 1, 1, 1), np.float32),
        "ratio": np.full(bands, log_snr, np.float32),
        "spatial": np.array([2, 3], np.int64),
    }
    card = {
        "kind": "restorer",
        "implementation": "builtin:learned_wiener",
        "input": {"name": "tiles", "tile_px": 192, "halo_px": 32, "multiple_px": 192},
        "output": {"name": "log_snr"},
    }
    return _write(folder, nodes, constants, {"log_snr": ["n", bands]}, card)


_IMAGE: list[int | str] = ["n", 1, "height", "width"]


def _plus_condition(image: str, entry: int, factor: float, result: str) -> list[Any]:
    """Return nodes that add ``factor * condition[:, entry]`` to every pixel."""
    index = numpy_helper.from_array(np.array([entry], np.int64), "entry_value")
    scale = numpy_helper.from_array(np.array(factor, np.float32), "factor_value")
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "pixel_axes_value")
    names = ("entry", "factor", "pixel_axes", "told", "everywhere", "change")
    which, by, over, told, everywhere, change = (f"{result}_{one}" for one in names)
    return [
        helper.make_node("Constant", [], [which], value=index),
        helper.make_node("Constant", [], [by], value=scale),
        helper.make_node("Constant", [], [over], value=axes),
        _node("Gather", ["condition", which], told, axis=1),
        _node("Unsqueeze", [told, over], everywhere),
        _node("Mul", [everywhere, by], change),
        _node("Add", [image, change], result),
    ]


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, [output], **attributes)


def _write(
    folder: Path,
    nodes: list[Any],
    constants: dict[str, np.ndarray],
    outputs: dict[str, list[int | str]],
    card: dict[str, Any],
    *,
    entries: int = 0,
    channels: int = 1,
) -> Path:
    shapes = {"tiles": ["n", channels, "height", "width"]}
    if entries:
        shapes["condition"] = ["n", entries]
    graph = helper.make_graph(
        nodes,
        folder.name,
        [float_tensor(name, shape) for name, shape in shapes.items()],
        [float_tensor(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    path = folder / "model.fp32.onnx"
    path.write_bytes(model.SerializeToString())
    whole = {
        "name": folder.name,
        "implementation": "onnx",
        "files": {"fp32": path.name},
        "sha256": {"fp32": hashlib.sha256(path.read_bytes()).hexdigest()},
        "levels": {"step_um": 2.0, "count": 11, "signed": True},
        "normalisation": {"name": "percentile_range"},
        "optics": {"sampling_min": 0.3, "sampling_max": 1.5, "reference": REFERENCE},
        **card,
    }
    (folder / "engine.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    return folder
