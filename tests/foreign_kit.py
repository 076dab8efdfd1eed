"""Small real models of bioimage.io, as other people would pack them."""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Image = NDArray[np.float32]
SIDE = 40


def network(
    *,
    channels: int = 1,
    axes: str = "bcyx",
    side: int | None = None,
    nodes: list[Any] | None = None,
    elements: int = TensorProto.FLOAT,
) -> bytes:
    """Return an ONNX file: the mean of 3 x 3 pixels, or `nodes` from ``in`` to ``out``.

    Its axes are `axes`; `side` fixes height and width.
    """
    order = ["bcyx".index(axis) for axis in axes if axis in "bcyx"]
    turned = axes != "bcyx"
    inner = ("turned", "smooth") if turned else ("in", "out")
    if nodes is None:
        conv = helper.make_node(
            "Conv", [inner[0], "box"], [inner[1]], pads=[1] * 4, group=channels
        )
        nodes = [conv]
        if turned:
            back = [axes.index(axis) for axis in "bcyx"]
            for first, last, perm in (("in", "turned", back), ("smooth", "out", order)):
                turn = helper.make_node("Transpose", [first], [last], perm=perm)
                nodes.insert(0 if first == "in" else 2, turn)
    lengths = {"b": "n", "c": channels, "y": side or "height", "x": side or "width"}
    shape = [lengths[axis] for axis in axes]
    box = np.full((channels, 1, 3, 3), 1 / 9, np.float32)
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("in", elements, shape)],
        [helper.make_tensor_value_info("out", elements, shape)],
        [numpy_helper.from_array(box, "box")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def smoothed(image: Image) -> Image:
    """Return what `network` makes of an image (..., y, x)."""
    padded = np.pad(image, [(0, 0)] * (image.ndim - 2) + [(1, 1), (1, 1)])
    height, width = image.shape[-2:]
    parts = [
        padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)
    ]
    return np.asarray(np.mean(parts, axis=0), np.float32)


def counts(shape: tuple[int, ...] = (1, 1, SIDE, SIDE)) -> Image:
    """Return a test image in counts of a camera."""
    drawn = np.random.default_rng(5).gamma(2.0, 300.0, shape)
    return (drawn + 100).round().astype(np.float32)


def described_05(
    given: Image,
    gives: Image,
    weights: bytes,
    *,
    axes: str = "bcyx",
    before: list[Any] | None = None,
    after: list[Any] | None = None,
    size: Any = None,
    halo: int = 0,
    **more: Any,
) -> dict[str, bytes]:
    """Return the files of a model of spec 0.5; `more` replaces parts of its rdf."""
    size = {"min": 16, "step": 8} if size is None else size
    channels = given.shape[axes.index("c")] if "c" in axes else 1
    kinds: dict[str, Any] = {
        "b": {"type": "batch"},
        "c": {"type": "channel", "channel_names": [f"c{n}" for n in range(channels)]},
        "y": {"type": "space", "id": "y", "size": size},
        "x": {"type": "space", "id": "x", "size": size},
    }
    follows = {
        a: {
            "type": "space",
            "id": a,
            "size": {"tensor_id": "raw", "axis_id": a},
            **({"halo": halo} if halo else {}),
        }
        for a in "yx"
    }
    files = {"weights.onnx": weights, "in.npy": npy(given), "out.npy": npy(gives)}
    files["README.md"] = b"# Theirs\n\n## Validation\n\nBy eye.\n"
    rdf = {
        "type": "model",
        "format_version": "0.5.3",
        "name": "Smooth by 3 x 3",
        "description": "Mean of 3 x 3 pixels",
        "authors": [{"name": "Jane Doe"}],
        "cite": [{"text": "Doe", "url": "https://example.org/paper"}],
        "license": "MIT",
        "documentation": "README.md",
        "inputs": [
            {
                "id": "raw",
                "axes": [kinds[axis] for axis in axes],
                "data": {"type": "float32"},
                "test_tensor": file_of("in.npy", files),
                "preprocessing": before or [],
            }
        ],
        "outputs": [
            {
                "id": "clean",
                "axes": [{**kinds[axis], **follows.get(axis, {})} for axis in axes],
                "data": {"type": "float32"},
                "test_tensor": file_of("out.npy", files),
                "postprocessing": after or [],
            }
        ],
        "weights": {"onnx": {**file_of("weights.onnx", files), "opset_version": 17}},
        **more,
    }
    return files | {"rdf.yaml": yaml.safe_dump(rdf).encode()}


def described_04(
    given: Image,
    gives: Image,
    weights: bytes,
    *,
    before: list[Any] | None = None,
    after: list[Any] | None = None,
    **more: Any,
) -> dict[str, bytes]:
    """Return the files of a model of spec 0.4."""
    files = {"weights.onnx": weights, "in.npy": npy(given), "out.npy": npy(gives)}
    files["README.md"] = b"# Theirs\n"
    rdf = {
        "type": "model",
        "format_version": "0.4.10",
        "name": "Old smooth",
        "description": "Mean of 3 x 3 pixels",
        "timestamp": "2022-01-01T00:00:00",
        "authors": [{"name": "Jane Doe"}],
        "cite": [{"text": "Doe", "url": "https://example.org/paper"}],
        "license": "MIT",
        "documentation": "README.md",
        "inputs": [
            {
                "name": "raw",
                "axes": "bcyx",
                "data_type": "float32",
                "shape": {"min": [1, 1, 32, 32], "step": [0, 0, 8, 8]},
                "preprocessing": before or [],
            }
        ],
        "outputs": [
            {
                "name": "clean",
                "axes": "bcyx",
                "data_type": "float32",
                "halo": [0, 0, 8, 8],
                "shape": {
                    "reference_tensor": "raw",
                    "scale": [1.0] * 4,
                    "offset": [0.0] * 4,
                },
                "postprocessing": after or [],
            }
        ],
        "test_inputs": ["in.npy"],
        "test_outputs": ["out.npy"],
        "weights": {"onnx": {**file_of("weights.onnx", files), "opset_version": 17}},
        **more,
    }
    return files | {"rdf.yaml": yaml.safe_dump(rdf).encode()}


def file_of(name: str, files: dict[str, bytes]) -> dict[str, str]:
    """Return how a description names a file."""
    return {"source": name, "sha256": hashlib.sha256(files[name]).hexdigest()}


def npy(array: NDArray[Any]) -> bytes:
    """Return an array as a ``.npy`` file."""
    into = io.BytesIO()
    np.save(into, array, allow_pickle=True)
    return into.getvalue()


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    """Write a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for name, data in files.items():
            package.writestr(name, data)
    return path
