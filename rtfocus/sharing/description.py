"""Description: what a model of bioimage.io says of itself, in spec 0.4 or 0.5.

Both become one `Model`, whose steps are those of spec 0.5. What cannot be restored
with is refused here, by what the description says; the rest the network has to prove.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rtfocus.config.loading import fault_in_words
from rtfocus.engines.spec_steps import KNOWN_STEPS
from rtfocus.errors import EngineError
from rtfocus.sharing.package import in_one_line

_AXIS_LETTERS = {"batch": "b", "channel": "c", **dict(zip("bcyx", "bcyx", strict=True))}
_AXIS_NAMES = {"b": "batch", "c": "channel", "y": "y", "x": "x"}
_CODE = {
    "pytorch_state_dict": "a state dict, which runs its architecture's code",
    "torchscript": "a TorchScript, which is a program",
    "tensorflow_saved_model_bundle": "a TensorFlow program",
    "tensorflow_js": "a TensorFlow program",
    "keras_hdf5": "a Keras file, which may hold code",
    "keras_v3": "a Keras file, which may hold code",
}
_WITHOUT_AXES = ("scale_linear", "fixed_zero_mean_unit_variance")
_LONGEST_NAME = 60


class _Described(BaseModel):
    """What of a description counts here; the rest of it is for others."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class File(_Described):
    """A file of the package."""

    source: str
    sha256: str | None = None


class Tolerance(_Described):
    """How far a value may be from the test tensor's; the spec's own bounds."""

    relative_tolerance: Annotated[float, Field(ge=0)] = 1e-3
    absolute_tolerance: Annotated[float, Field(ge=0)] = 1e-3
    mismatched_elements_per_million: Annotated[int, Field(ge=0)] = 100
    output_ids: list[str] = []
    weights_formats: list[str] = []


class Side(_Described):
    """Lengths an axis may have: ``min + n * step``; step 0: only the one."""

    min: Annotated[int, Field(gt=0)]
    step: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class TensorWords:
    """What is said of the image that goes in, or comes out."""

    name: str
    axes: str
    """Letters of ``bcyx`` in the network's order."""
    channels: int
    sides: Mapping[str, Side]
    """Of y and x; empty where they follow another tensor's."""
    halo_px: int
    dtype: str
    highest: float | None
    """Largest value there may be; None: not stated."""
    steps: Sequence[Mapping[str, Any]]
    """Before or after the network, as spec 0.5 writes them."""
    test: File


@dataclass(frozen=True, slots=True)
class Model:
    """A model with one image in, one image out, and ONNX weights."""

    name: str
    """That a folder can have."""
    description: str
    weights: File
    outside: File | None
    """Weights that lie beside the ONNX file."""
    input: TensorWords
    output: TensorWords
    tolerance: Tolerance
    documentation: str | None
    origin: Mapping[str, Any]
    """Who made it, under which licence; for people."""


class _Reference(_Described):
    tensor_id: str
    axis_id: str
    offset: int = 0


class _Axis(_Described):
    type: str
    id: str = ""
    size: int | Side | _Reference | None = None
    scale: float = 1.0
    halo: Annotated[int, Field(ge=0)] = 0
    channel_names: list[Any] = []

    @property
    def letter(self) -> str:
        """Of ``bcyx``; EngineError for another."""
        of = self.id if self.type == "space" else self.type
        letter = _AXIS_LETTERS.get(of)
        if letter is None:
            msg = f"has an axis '{self.id or self.type}': only 2-D images are restored"
            raise EngineError(msg)
        return letter


class _Data(_Described):
    type: str = "float32"
    range: tuple[float | None, float | None] = (None, None)


class _Tensor05(_Described):
    id: str = ""
    axes: Annotated[list[_Axis], Field(min_length=1)]
    data: _Data | Annotated[list[_Data], Field(min_length=1)] = _Data()
    test_tensor: File | None = None
    preprocessing: list[dict[str, Any]] = []
    postprocessing: list[dict[str, Any]] = []


class _Shape(_Described):
    min: list[int] = []
    step: list[int] = []


class _Tensor04(_Described):
    name: str
    axes: str
    data_type: str = "float32"
    data_range: tuple[float, float] | None = None
    shape: list[int] | _Shape
    halo: list[int] | None = None
    preprocessing: list[dict[str, Any]] = []
    postprocessing: list[dict[str, Any]] = []


class _Weights(File):
    dependencies: Any = None
    external_data: File | None = None


class _Rdf(_Described):
    type: str
    format_version: str | float
    name: str
    id: str | None = None
    description: str = ""
    documentation: str | File | None = None
    version: Any = None
    license: Any = None
    authors: list[Any] = []
    cite: list[Any] = []
    run_mode: Any = None
    inputs: list[Any]
    outputs: list[Any]
    test_inputs: list[str | File] = []
    test_outputs: list[str | File] = []
    weights: dict[str, Any]
    config: dict[Any, Any] | None = None


def read_model(given: Mapping[str, Any]) -> Model:
    """Understand a description.

    Raises
    ------
    EngineError
        What goes on after the model's name: what it says, the rule and the remedy.
    """
    try:
        return _model(_Rdf.model_validate(given))
    except (TypeError, ValueError) as error:  # pydantic's too
        faults = str(error)
        if isinstance(error, ValidationError):
            faults = "; ".join(map(fault_in_words, error.errors()[:5]))
        msg = f"is not described as bioimage.io's spec 0.4 or 0.5 asks for: {faults}"
        raise EngineError(msg) from error


def _model(rdf: _Rdf) -> Model:
    version = ".".join(str(rdf.format_version).split(".")[:2])
    if rdf.type != "model" or version not in ("0.4", "0.5"):
        msg = (
            f"is a {rdf.type} of spec {rdf.format_version}; models of spec 0.4 and 0.5 "
            "can be added: bring it up to date with bioimageio.core"
        )
        raise EngineError(msg)
    if rdf.run_mode is not None:
        msg = "asks for a run mode of its own; ask its authors for a plain model"
        raise EngineError(msg)
    for what, tensors in (("input", rdf.inputs), ("output", rdf.outputs)):
        if len(tensors) != 1:
            msg = (
                f"has {len(tensors)} {what}s; only models with one image in and one "
                "image out can be added"
            )
            raise EngineError(msg)
    weights = _onnx_of(rdf.weights)
    read = _read_04 if version == "0.4" else _read_05
    shown, gives = read(rdf)
    return Model(
        name=_name_of(rdf),
        description=in_one_line(rdf.description or rdf.name),
        weights=File(source=weights.source, sha256=weights.sha256),
        outside=weights.external_data,
        input=shown,
        output=gives,
        tolerance=_tolerance(rdf, gives.name),
        documentation=rdf.documentation.source
        if isinstance(rdf.documentation, File)
        else rdf.documentation,
        origin=dict(_origin(rdf)),
    )


def _onnx_of(weights: Mapping[str, Any]) -> _Weights:
    if "onnx" not in weights:
        formats = [_CODE.get(key, key) for key in weights] or ["nothing"]
        msg = (
            f"brings no ONNX weights but {', '.join(formats)}; ask its authors for the "
            "ONNX weights, or convert it with bioimageio.core and add what comes out"
        )
        raise EngineError(msg)
    onnx = _Weights.model_validate(weights["onnx"])
    if onnx.dependencies is not None:
        msg = (
            "has ONNX weights with dependencies of their own, which would run code; "
            "ask its authors for weights without"
        )
        raise EngineError(msg)
    return onnx


def _read_05(rdf: _Rdf) -> tuple[TensorWords, TensorWords]:
    given, gives = (_Tensor05.model_validate(t[0]) for t in (rdf.inputs, rdf.outputs))
    return (
        _words_05(given, given.preprocessing, "input"),
        _words_05(gives, gives.postprocessing, "output"),
    )


def _words_05(tensor: _Tensor05, steps: list[dict[str, Any]], what: str) -> TensorWords:
    data = tensor.data[0] if isinstance(tensor.data, list) else tensor.data
    if tensor.test_tensor is None:
        msg = f"has no test tensor for its {what}, so nothing tells that it works here"
        raise EngineError(msg)
    axes = {axis.letter: axis for axis in tensor.axes}
    if len(axes) < len(tensor.axes):
        msg = f"names an axis of its {what} twice"
        raise EngineError(msg)
    names = {axis.id or axis.type: letter for letter, axis in axes.items()}
    known = [dict(_step_05(step, names)) for step in steps]
    channel = axes.get("c")
    return TensorWords(
        name=tensor.id or what,
        axes="".join(axes),
        channels=1 if channel is None else len(channel.channel_names),
        sides=_sides(axes),
        halo_px=max(axis.halo for axis in axes.values()),
        dtype=data.type,
        highest=data.range[1],
        steps=known,
        test=tensor.test_tensor,
    )


def _sides(axes: Mapping[str, _Axis]) -> dict[str, Side]:
    """Return the sizes of y and x; one may follow the other of the same tensor."""
    sides: dict[str, Side] = {}
    for letter in "yx":
        size = axes[letter].size if letter in axes else None
        if isinstance(size, _Reference) and size.axis_id in set("yx") - {letter}:
            other = axes.get(size.axis_id)
            same = other is not None and other.scale == axes[letter].scale
            size = (
                other.size if other is not None and same and not size.offset else None
            )
        if isinstance(size, int):
            size = Side(min=size)
        if isinstance(size, Side):
            sides[letter] = size
    return sides


def _step_05(step: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Any]:
    yield "id", known_step(step.get("id"))
    kwargs = dict(step.get("kwargs") or {})
    for key in ("axis", "axes"):
        value = kwargs.get(key)
        if isinstance(value, str):
            kwargs[key] = _axis_name(value, names)
        elif isinstance(value, list):
            kwargs[key] = [_axis_name(str(one), names) for one in value]
    yield "kwargs", kwargs


def _axis_name(axis: str, names: Mapping[str, str]) -> str:
    letter = names.get(axis) or _AXIS_LETTERS.get(axis, "")
    return _AXIS_NAMES.get(letter, axis)


def _read_04(rdf: _Rdf) -> tuple[TensorWords, TensorWords]:
    given, gives = (_Tensor04.model_validate(t[0]) for t in (rdf.inputs, rdf.outputs))
    return (
        _words_04(given, given.preprocessing, rdf.test_inputs, "input"),
        _words_04(gives, gives.postprocessing, rdf.test_outputs, "output"),
    )


def _words_04(
    tensor: _Tensor04,
    steps: list[dict[str, Any]],
    tests: list[str | File],
    what: str,
) -> TensorWords:
    if len(tests) != 1:
        msg = (
            f"has {len(tests)} test tensors for its {what}; by one it could be told "
            "that it works here"
        )
        raise EngineError(msg)
    axes = tensor.axes
    strange = [axis for axis in axes if axis not in _AXIS_NAMES]
    if strange:
        msg = f"has an axis '{strange[0]}': only 2-D images are restored"
        raise EngineError(msg)
    low = tensor.shape.min if isinstance(tensor.shape, _Shape) else tensor.shape
    step = tensor.shape.step if isinstance(tensor.shape, _Shape) else [0] * len(low)
    if low and not len(low) == len(step) == len(axes):
        msg = f"has axes '{axes}' and {len(low)} lengths for its {what}"
        raise EngineError(msg)
    sides = {a: Side(min=n, step=s) for a, n, s in zip(axes, low, step, strict=False)}
    (test,) = tests
    return TensorWords(
        name=tensor.name,
        axes=axes,
        channels=sides["c"].min if "c" in sides else 1,
        sides={axis: sides[axis] for axis in "yx" if axis in sides},
        halo_px=max(tensor.halo or [0]),
        dtype=tensor.data_type,
        highest=None if tensor.data_range is None else tensor.data_range[1],
        steps=[dict(_step_04(one)) for one in steps],
        test=test if isinstance(test, File) else File(source=test),
    )


def _step_04(step: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a step of spec 0.4 as one of spec 0.5."""
    name = known_step(step.get("name"))
    kwargs = dict(step.get("kwargs") or {})
    mode = kwargs.pop("mode", "fixed" if "mean" in kwargs else "per_sample")
    axes = kwargs.pop("axes", None)
    if name == "zero_mean_unit_variance" and mode == "fixed":
        name = "fixed_zero_mean_unit_variance"
        kwargs.pop("eps", None)
    if any(isinstance(value, list) for value in kwargs.values()):
        # Over the pixels together, so one for every channel.
        kwargs["axis"] = "channel"
    elif axes is not None and name not in _WITHOUT_AXES:
        over = [_AXIS_NAMES.get(axis, axis) for axis in axes]
        kwargs["axes"] = [*(["batch"] if mode == "per_dataset" else []), *over]
    yield "id", name
    yield "kwargs", kwargs


def known_step(name: object) -> str:
    """Return the name of a step; EngineError for one that is not done here."""
    if name not in KNOWN_STEPS:
        msg = f"asks for the step '{name}'; those that are done are "
        raise EngineError(msg + ", ".join(KNOWN_STEPS))
    return str(name)


def _name_of(rdf: _Rdf) -> str:
    """Return a name for the engine's folder: nickname, id, or from the title."""
    of_zoo = (rdf.config or {}).get("bioimageio")
    nickname = of_zoo.get("nickname") if isinstance(of_zoo, dict) else None
    for given in (nickname, rdf.id):
        if isinstance(given, str) and re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", given):
            return given[:_LONGEST_NAME]
    words = re.findall(r"\w+", rdf.name.lower())
    return "-".join(words)[:_LONGEST_NAME].strip("-_") or "model"


def _tolerance(rdf: _Rdf, output: str) -> Tolerance:
    """Return what the model allows, as bioimageio.core would find it."""
    config = (rdf.config or {}).get("bioimageio")
    config = config if isinstance(config, dict) else {}
    stated = config.get("reproducibility_tolerance") or []
    for one in map(
        Tolerance.model_validate, stated if isinstance(stated, list) else []
    ):
        formats, outputs = one.weights_formats, one.output_ids
        if (not formats or "onnx" in formats) and (not outputs or output in outputs):
            return one
    old = config.get("test_kwargs")
    old = old.get("onnx", old) if isinstance(old, dict) else None
    if not isinstance(old, dict):
        return Tolerance()
    if isinstance(old.get("decimal"), int):
        near = 1.5 * 10.0 ** -old["decimal"]
        return Tolerance(relative_tolerance=0, absolute_tolerance=near)
    return Tolerance.model_validate(old)


def _origin(rdf: _Rdf) -> Iterator[tuple[str, Any]]:
    title = in_one_line(rdf.name)
    yield "model", f"{title} (bioimage.io, spec {rdf.format_version})"
    people = [a.get("name", "") if isinstance(a, dict) else str(a) for a in rdf.authors]
    for key, value in (
        ("id", rdf.id),
        ("version", rdf.version),
        ("authors", ", ".join(map(str, people))),
        ("licence", rdf.license),
        ("cite", "; ".join(_citation(entry) for entry in rdf.cite)),
    ):
        if value:
            yield key, in_one_line(str(value))


def _citation(entry: object) -> str:
    if not isinstance(entry, dict):
        return str(entry)
    return str(entry.get("doi") or entry.get("url") or entry.get("text") or "")
