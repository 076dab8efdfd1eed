"""Foreign models: a model of bioimage.io becomes an engine, once it has proved itself.

It is run on its own test tensors, with the steps around its network, and admitted only
if what it is said to give comes out. Then it restores images as they are, as a
`rtfocus.engines.spec_steps.StepsCard` says.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib import format as npy
from numpy.typing import NDArray

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import EngineCard, input_of
from rtfocus.engines.registry import FoundEngine
from rtfocus.engines.spec_steps import (
    Binarize,
    Image,
    ScaleMeanVariance,
    ScaleRange,
    ShownImage,
    Sigmoid,
    StepsCard,
    Values,
)
from rtfocus.errors import EngineError
from rtfocus.machine import usable_threads
from rtfocus.processing.cpu.classifier import TileNetwork
from rtfocus.runtimes.cpu_backends import open_engine
from rtfocus.runtimes.cpu_engine import straighten
from rtfocus.sharing.description import Model, Side, TensorWords, Tolerance

WEIGHTS_NAME = "model.fp32.onnx"

_TILE_PX = 256
_LARGEST_TILE_PX = 2048
_HALO_PX = 32
"""Overlap where the model states none: its tiles would meet in seams."""
_FAR = 3.0
"""Distance beyond which values are not on the scale of the input."""
_MOST_RELATIVE, _MOST_OF_LARGEST, _MOST_PER_MILLION = 1e-2, 1e-2, 5000
"""The spec's bounds of what a model may allow itself."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How images are cut for a network."""

    px: int
    """Side, halo included."""
    halo_px: int


def card_of(model: Model, network: onnx.ModelProto, sha256: str) -> dict[str, Any]:
    """Return the card of a model, its name and what it was tested for left out.

    Raises
    ------
    EngineError
        What goes on after the model's name.
    """
    for fault in (*_faults_of_network(network), *_faults_of_words(model)):
        raise EngineError(fault)
    (given,), (gives,) = _given_by_caller(network), network.graph.output
    lengths = given.type.tensor_type.shape.dim
    tile = _tile(model, tuple(one.dim_value or None for one in lengths))
    final = model.output.dtype
    as_stated = [] if final in ("float32", "float64") else [_cast(final)]
    return {
        "kind": "restorer",
        "implementation": "onnx",
        "description": model.description,
        "files": {"fp32": WEIGHTS_NAME},
        "sha256": {"fp32": sha256},
        "input": {
            "name": given.name,
            "channels": model.input.channels,
            "tile_px": tile.px,
            "halo_px": tile.halo_px,
        },
        "output": {"name": gives.name},
        "steps": {
            "input_axes": model.input.axes,
            "output_axes": model.output.axes,
            "before": list(model.input.steps),
            "after": [*model.output.steps, *as_stated],
        },
        "trained": dict(model.origin),
    }


def _cast(dtype: str) -> dict[str, Any]:
    return {"id": "ensure_dtype", "kwargs": {"dtype": dtype}}


def _given_by_caller(network: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs of a network without those that the file gives a value."""
    inside = {tensor.name for tensor in network.graph.initializer}
    return [one for one in network.graph.input if one.name not in inside]


def _faults_of_network(network: onnx.ModelProto) -> Iterator[str]:
    given, gives = _given_by_caller(network), network.graph.output
    for what, tensors in (("input", given), ("output", gives)):
        if len(tensors) != 1:
            names = [tensor.name for tensor in tensors]
            yield f"has a network with the {what}s {names}; one can be served"
            return
        dtype = tensors[0].type.tensor_type.elem_type
        if dtype != onnx.TensorProto.FLOAT:
            words = {number: word for word, number in onnx.TensorProto.DataType.items()}
            yield (
                f"has a network whose {what} is {words.get(dtype, 'unknown').lower()}; "
                "float32 can be served: ask its authors for it"
            )


def _faults_of_words(model: Model) -> Iterator[str]:
    given, gives = model.input, model.output
    for what, words in (("input", given), ("output", gives)):
        if not {"y", "x"} <= set(words.axes):
            yield f"has an {what} with the axes '{words.axes}'; an image has y and x"
    if given.channels not in (1, 3) or gives.channels != given.channels:
        yield (
            f"makes {gives.channels} channels of {given.channels}; a restorer makes 1 "
            "of 1, or 3 of 3"
        )
    if given.highest is not None and given.highest <= 1 and not given.steps:
        yield (
            f"takes values up to {given.highest:g} and does not say how those of a "
            "camera get there; ask its authors for a scale_range before the network"
        )
    for step in (*given.steps, *gives.steps):
        named = step["kwargs"].get("reference_tensor")
        if named not in (None, given.name):
            yield f"refers to the tensor '{named}'; its input is '{given.name}'"


def _tile(model: Model, shape: tuple[int | None, ...]) -> Tile:
    """Return tiles that network and description allow, of a usual size."""
    stated_sides = model.input.sides
    sides = [_side(model.input, shape, axis, stated_sides.get(axis)) for axis in "yx"]
    stated = model.output.halo_px
    side_px = max(_TILE_PX, 4 * stated)
    for px in range(1, _LARGEST_TILE_PX + 1):
        fits = all(_takes(side, px) for side in sides)
        fixed = any(side.step == 0 for side in sides)
        if fits and (fixed or px >= side_px):
            halo_px = stated or min(_HALO_PX, px // 8)
            if 2 * halo_px < px:
                return Tile(px, halo_px)
    least = " x ".join(f"{side.min} + n {side.step}" for side in sides)
    msg = (
        f"takes images of {least} pixels with a halo of {stated}; square tiles up to "
        f"{_LARGEST_TILE_PX} pixels are cut, and these do not fit"
    )
    raise EngineError(msg)


def _side(
    words: TensorWords, shape: tuple[int | None, ...], axis: str, said: Side | None
) -> Side:
    """Return the lengths that both the network and its description allow."""
    fixed = None
    if len(shape) == len(words.axes):
        fixed = shape[words.axes.index(axis)]
    if said is None:
        return Side(min=1, step=1) if fixed is None else Side(min=fixed)
    if fixed is None:
        return said
    if not _takes(said, fixed):
        msg = (
            f"has a network for {fixed} pixels along {axis}, and is described for "
            f"{said.min} + n {said.step}"
        )
        raise EngineError(msg)
    return Side(min=fixed)


def _takes(side: Side, px: int) -> bool:
    if side.step == 0:
        return px == side.min
    return px >= side.min and (px - side.min) % side.step == 0


def read_test_tensor(data: bytes, words: TensorWords) -> NDArray[np.float32]:
    """Read a test tensor; axes (N, channel, y, x).

    Raises
    ------
    EngineError
        What goes on after the model's name.
    """
    tensor = _read_npy(data, words.test.source)
    if tensor.ndim != len(words.axes):
        msg = (
            f"has a test tensor '{words.test.source}' of shape {tensor.shape} for the "
            f"axes '{words.axes}'"
        )
        raise EngineError(msg)
    image = straighten(tensor, words.axes, words.name).astype(np.float32)
    if image.shape[1] != words.channels or 0 in image.shape:
        msg = (
            f"has a test tensor '{words.test.source}' of shape {tensor.shape}, and is "
            f"described for {words.channels} channels"
        )
        raise EngineError(msg)
    return image


def _read_npy(data: bytes, name: str) -> NDArray[Any]:
    """Read an array without ever making an object, or more memory than there is."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else None
        shape, fortran, dtype = (read or npy.read_array_header_2_0)(file)
    except ValueError as error:
        msg = f"has a test tensor '{name}' that is no .npy file: {error}"
        raise EngineError(msg) from error
    body = memoryview(data)[file.tell() :]
    if dtype.kind not in "biuf" or prod(shape) * dtype.itemsize != len(body):
        msg = f"has a test tensor '{name}' that is damaged, or holds no plain numbers"
        raise EngineError(msg)
    flat = np.frombuffer(body, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of a model's own test."""

    largest: float
    """Largest difference from its test tensor."""
    values: Values
    """Which values it gives."""


def prove(
    folder: Path, card: EngineCard, model: Model, raw: Image, expected: Image
) -> Proof:
    """Run a model on its own test tensors, and on a tile.

    Parameters
    ----------
    folder
        Holds the weights.
    card
        Of the model, its values those of the spec.
    model
        Its description.
    raw, expected
        Test tensors, axes (N, channel, y, x).

    Raises
    ------
    EngineError
        What goes on after the model's name: by how much it misses what it says.
    """
    engine = FoundEngine(folder, card)
    if expected.shape != raw.shape:
        msg = (
            f"makes {_size(expected)} pixels of {_size(raw)}; a restorer gives images "
            "of the size of its input"
        )
        raise EngineError(msg)
    steps = card.steps or StepsCard()
    shown = [steps.show(image) for image in raw]
    outputs = _run(engine, np.stack([one.image for one in shown]))
    given = np.stack(
        [steps.give(*one) for one in zip(outputs, shown, raw, strict=True)]
    )
    largest = _compare(given, expected, model.tolerance)
    _try_tile(engine)
    return Proof(largest, _values(steps, given, shown, raw))


def _size(image: Image) -> str:
    return " x ".join(map(str, image.shape[1:]))


def _run(found: FoundEngine, images: Image) -> Image:
    """Run the network in float32; one that cannot be run is refused in one line."""
    name = found.card.output.name if found.card.output else ""
    settings = ProcessingConfig(precision="f32")
    try:
        engine = open_engine(
            found,
            settings,
            shape=(1, *images.shape[1:]),
            outputs=(name,),
            threads=usable_threads(),
        )
        try:
            outputs = [engine.infer(image[None])[name] for image in images]
        finally:
            engine.close()
    except EngineError as error:
        why = " ".join(str(error).split())
        msg = f"cannot be run on its own test tensor: {why}"
        raise EngineError(msg) from error
    result = np.concatenate(outputs)
    if result.shape != images.shape:
        msg = (
            f"has a network that makes {_size(result)} of {_size(images)}; a restorer "
            "gives an image of the size of its input"
        )
        raise EngineError(msg)
    return np.asarray(result, np.float32)


def _compare(given: Image, expected: Image, allowed: Tolerance) -> float:
    """Return the largest difference; EngineError where too many values differ."""
    relative = min(allowed.relative_tolerance, _MOST_RELATIVE)
    largest = float(np.max(np.abs(expected), initial=0.0))
    # As the spec, no more than a hundredth of the largest value; its default anyway.
    absolute = min(allowed.absolute_tolerance, max(1e-3, _MOST_OF_LARGEST * largest))
    most = min(allowed.mismatched_elements_per_million, _MOST_PER_MILLION)
    apart = np.abs(given.astype(np.float64) - expected)
    # So put that what is no number differs, too.
    wrong = int(np.sum(~(apart <= absolute + relative * np.abs(expected))))
    if wrong * 1e6 > most * apart.size:
        msg = (
            f"does not reproduce its own test tensor: {wrong} of {apart.size} values "
            f"differ by more than {absolute:g} + {relative:g} of the value, the "
            f"largest by {float(np.nanmax(apart)):.3g}; get the package again, or ask "
            "its authors"
        )
        raise EngineError(msg)
    return float(np.max(apart))


def _try_tile(engine: FoundEngine) -> None:
    """Run the network on a tile as images are cut for it."""
    tiles = input_of(engine.card)
    empty = np.zeros((1, tiles.channels, tiles.tile_px, tiles.tile_px), np.float32)
    try:
        network = TileNetwork(engine, ProcessingConfig(precision="f32"))
        try:
            network.restored(empty, None)
        finally:
            network.close()
    except EngineError as error:
        why = " ".join(str(error).split())
        msg = f"cannot be run on a tile of {tiles.tile_px} pixels: {why}"
        raise EngineError(msg) from error


def _values(
    steps: StepsCard, given: Image, shown: list[ShownImage], raw: Image
) -> Values:
    """Tell which values a model gives, by those it gives of its test tensor."""
    if any(isinstance(step, Binarize | Sigmoid) for step in steps.after):
        return Values.own
    near = {Values.input: _distance(given, raw)}
    goes_back = any(
        isinstance(step, ScaleMeanVariance)
        or (isinstance(step, ScaleRange) and step.kwargs.reference_tensor is not None)
        for step in steps.after
    )
    if shown[0].lines and not goes_back:
        undone = steps.model_copy(update={"values": Values.shown, "after": []})
        back = [undone.give(*one) for one in zip(given, shown, raw, strict=True)]
        near[Values.shown] = _distance(np.stack(back), raw)
    best = min(near, key=lambda values: near[values])
    return best if near[best] <= _FAR else Values.own


def _distance(given: Image, raw: Image) -> float:
    """Return how far two images' brightness and contrast are apart; 0: not at all."""
    spread, least = float(raw.std()), 1e-6 * (1.0 + float(np.abs(raw).max()))
    shift = abs(float(given.mean()) - float(raw.mean())) / (spread + least)
    ratio = (float(given.std()) + least) / (spread + least)
    return shift + abs(float(np.log(ratio)))
