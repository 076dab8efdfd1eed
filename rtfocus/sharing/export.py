"""bioimage.io: an engine as a model package (spec 0.5) that other programs run.

The package holds the ONNX weights as they are, tensors to test them with, the
engine's README and, under ``config.rtfocus``, its whole card: it is also an engine
folder, so ``rtfocus engines add`` takes it, unpacked or not.

What restores is exported. The range of a frame's percentiles is ``scale_range`` of
the spec; the spec has no way back from it, so restored values stay on the scale on
which the two percentiles are 0 and 1. Two-dimensional inputs only.
"""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from scipy import ndimage

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import (
    CARD_NAME,
    EngineCard,
    InputCard,
    input_of,
    verified_file,
)
from rtfocus.engines.registry import FoundEngine, parts
from rtfocus.errors import EngineError
from rtfocus.files import whole
from rtfocus.processing.classify import Conditions
from rtfocus.runtimes.cpu_backends import open_engine
from rtfocus.sharing.admission import PROOF

FORMAT_VERSION = "0.5.3"
_README = "README.md"
_EPS = 1e-6

Image = NDArray[np.float32]
Section = dict[str, Any]


def export_bioimageio(
    engine: FoundEngine,
    target: Path,
    *,
    authors: list[str],
    cite: str,
    licence: str,
    overwrite: bool = False,
) -> Path:
    """Write an engine as a model package of bioimage.io.

    Parameters
    ----------
    engine
        A network that restores and sees the range of percentiles.
    target
        The ``.zip``.
    authors
        Names, at least one.
    cite
        DOI (``10.…``) or address (``https://…``) to cite.
    licence
        SPDX identifier of the weights' licence.
    overwrite
        Replace what stands at `target`.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    EngineError
        If the spec cannot say what the engine needs, or its weights are damaged.
    OutputError
        If `target` exists or cannot be written.
    """
    card = engine.card
    _refuse_unspeakable(card)
    model = verified_file(engine.folder, card, "fp32")
    files = _files_of(engine)
    tensors = _test_tensors(engine)
    for name, tensor in tensors.items():
        files[f"test_{name}.npy"] = _npy(tensor)
    rdf = {
        "type": "model",
        "format_version": FORMAT_VERSION,
        # The spec wants five letters at least.
        "name": f"rtfocus {card.name}",
        "description": card.description or f"Engine {card.name} of rtfocus",
        "authors": [{"name": author} for author in authors],
        "cite": [_citation(card, cite)],
        "license": licence,
        "documentation": _README,
        "tags": ["fluorescence-light-microscopy", "restoration", "defocus", "2d"],
        "attachments": [_checked(name, files) for name in _files_beside(card)],
        "inputs": list(_inputs(card, files)),
        "outputs": list(_outputs(card, tensors, files)),
        "weights": {
            "onnx": {
                **_checked(model.name, files),
                "opset_version": _opset(files[model.name]),
            }
        },
        "config": {"rtfocus": card.model_dump(mode="json", exclude_none=True)},
    }
    files["rdf.yaml"] = yaml.safe_dump(
        rdf, sort_keys=False, allow_unicode=True
    ).encode()
    with whole(target, overwrite=overwrite) as part:
        _write_zip(part, files)
    return target


def _files_of(engine: FoundEngine) -> dict[str, bytes]:
    """Return card, readme and weights of an engine, by their names in the package."""
    card = engine.card
    weights = {
        name: verified_file(engine.folder, card, precision).read_bytes()
        for precision, name in card.files.items()
    }
    card_bytes = (engine.folder / CARD_NAME).read_bytes()
    return {CARD_NAME: card_bytes, _README: _readme(engine).encode(), **weights}


def _write_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as package:
        for name, data in files.items():
            # One date: the same engine gives the same package, byte for byte.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, data)


def _refuse_unspeakable(card: EngineCard) -> None:
    """Refuse what other programs could not run by the spec alone."""
    why = None
    if card.implementation != "onnx":
        why = f"is {card.implementation}: a network alone is not what it does"
    elif card.kind == "classifier":
        why = "gives labels, no image"
    elif card.steps is not None and PROOF not in card.figures:
        why = "has steps around its network, which are not exported"
    elif card.steps is not None:
        why = "came from such a package, which is the one to hand on"
    elif card.normalisation.get("name") != "percentile_range":
        why = f"needs '{card.normalisation.get('name')}', which the spec cannot say"
    if why is not None:
        msg = (
            f"engine '{card.name}' {why}; export one that restores by itself, or hand "
            "on its folder: rtfocus engines add takes it"
        )
        raise EngineError(msg)


def _files_beside(card: EngineCard) -> list[str]:
    """Files of the engine folder that are no part of the model's description."""
    return [CARD_NAME, *(name for key, name in card.files.items() if key != "fp32")]


def _checked(name: str, files: dict[str, bytes]) -> Section:
    return {"source": name, "sha256": hashlib.sha256(files[name]).hexdigest()}


def _opset(weights: bytes) -> int:
    """Return the version of the standard operators that an ONNX file uses."""
    named = onnx.load_model_from_string(weights).opset_import
    return int(next(one.version for one in named if one.domain in ("", "ai.onnx")))


def _citation(card: EngineCard, cite: str) -> Section:
    key = "url" if "://" in cite else "doi"
    return {"text": f"{card.name}: {card.description}", key: cite}


def _readme(engine: FoundEngine) -> str:
    """Return the engine's README with the section that the spec asks for."""
    path = engine.folder / _README
    text = path.read_text("utf-8") if path.is_file() else f"# {engine.name}\n"
    figures = [f"- {name}: {value}" for name, value in engine.card.figures.items()]
    figures_text = figures or ["Figures, and how they were measured: above."]
    scale = (
        "Restored values are on the scale on which the input's two percentiles are 0 "
        "and 1. Optics and levels: `config.rtfocus`."
    )
    return "\n".join(
        [text.rstrip(), "", "## Validation", "", *figures_text, "", scale, ""]
    )


def _test_tensors(found: FoundEngine) -> dict[str, Image]:
    """Run the engine on a scene that is always the same, in the spec's way."""
    card = found.card
    tiles = input_of(card)
    side = _least_px(tiles)
    noise = np.random.default_rng(1)
    points = noise.random((side, side)) < 0.004
    beads = ndimage.gaussian_filter(points * 4e4, 2.5) + 100
    plane = noise.poisson(beads).astype(np.float32)
    image = np.repeat(plane[None, None], tiles.channels, axis=1)
    tensors = {tiles.name: image}
    condition = None
    if card.condition is not None:
        condition = _test_condition(card)
        tensors[card.condition.name] = condition
    low, high = np.percentile(image, _percentiles(card), axis=(2, 3), keepdims=True)
    seen = ((image - low) / (high - low + _EPS)).astype(np.float32)
    names = tuple(_output_names(card))
    engine = open_engine(
        found, ProcessingConfig(precision="f32"), shape=seen.shape, outputs=names
    )
    try:
        outputs = engine.infer(seen, condition)
        return tensors | {n: np.array(outputs[n], np.float32) for n in names}
    finally:
        engine.close()


def _test_condition(card: EngineCard) -> Image:
    """Return the condition of the network in its test: own optics, one level off."""
    levels, optics = parts(card)
    known = Conditions(card, optics.reference, blind=False, signed=levels.signed)
    rows = known.rows(np.array([levels.step_um], np.float32))
    assert rows is not None  # a card with a condition has rows
    return rows


def _percentiles(card: EngineCard) -> tuple[float, float]:
    rule = card.normalisation
    return rule.get("low_percent", 0.5), rule.get("high_percent", 99.8)


def _output_names(card: EngineCard) -> Iterator[str]:
    # In the order of the network's own: programs of the spec take them as they come.
    for part in (card.output, card.restored, card.kernel_output):
        if part is not None:
            yield part.name


def _least_px(tiles: InputCard) -> int:
    """Side of the smallest image: a tile, on the grid that the network needs."""
    return -(-tiles.tile_px // tiles.multiple_px) * tiles.multiple_px


def _npy(tensor: Image) -> bytes:
    into = io.BytesIO()
    np.save(into, tensor, allow_pickle=False)
    return into.getvalue()


def _inputs(card: EngineCard, files: dict[str, bytes]) -> Iterator[Section]:
    tiles = input_of(card)
    low, high = _percentiles(card)
    size = {"min": _least_px(tiles), "step": tiles.multiple_px}
    yield {
        "id": tiles.name,
        "description": "image in counts of the camera",
        "axes": [
            {"type": "batch"},
            _channels(["grey"] if tiles.channels == 1 else ["red", "green", "blue"]),
            *({"type": "space", "id": id_, "size": size} for id_ in "yx"),
        ],
        "data": {"type": "float32"},
        "test_tensor": _checked(f"test_{tiles.name}.npy", files),
        "preprocessing": [
            {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
            {
                "id": "scale_range",
                "kwargs": {
                    "axes": ["y", "x"],
                    "min_percentile": low,
                    "max_percentile": high,
                    "eps": _EPS,
                },
            },
        ],
    }
    if card.condition is not None:
        name = card.condition.name
        yield {
            "id": name,
            "description": "what is known beside the pixels; all 0: nothing",
            "axes": [{"type": "batch"}, _channels(list(card.condition.entries))],
            "data": {"type": "float32"},
            "test_tensor": _checked(f"test_{name}.npy", files),
        }


def _outputs(
    card: EngineCard, tensors: dict[str, Image], files: dict[str, bytes]
) -> Iterator[Section]:
    tiles = input_of(card)
    for name in _output_names(card):
        yield {
            "id": name,
            "axes": list(_output_axes(card, tiles, name, tensors[name])),
            "data": {"type": "float32"},
            "test_tensor": _checked(f"test_{name}.npy", files),
        }


def _output_axes(
    card: EngineCard, tiles: InputCard, name: str, tensor: Image
) -> Iterator[Section]:
    """Axes of an output; sizes by those of the image where they follow it."""
    yield {"type": "batch"}
    if card.kernel_output is not None and name == card.kernel_output.name:
        side = card.kernel_output.size_px
        yield from ({"type": "space", "id": axis, "size": side} for axis in "yx")
        return
    labels = (
        [] if card.output is None or card.kind == "restorer" else card.output.labels
    )
    if card.output is not None and name == card.output.name and labels:
        yield _channels([_label(label) for label in labels])
        # Patches that lie in the image: as many as strides, less what one is longer.
        longer = round(tiles.tile_px / tiles.stride_px) - 1
        for axis in "yx":
            size = {"tensor_id": tiles.name, "axis_id": axis, "offset": -longer}
            yield {"type": "space", "id": axis, "size": size, "scale": tiles.stride_px}
        return
    yield _channels([f"restored{n}" for n in range(tensor.shape[1])])
    for axis in "yx":
        size = {"tensor_id": tiles.name, "axis_id": axis}
        halo = {"halo": tiles.halo_px} if tiles.halo_px else {}
        yield {"type": "space", "id": axis, "size": size, **halo}


def _channels(names: list[str]) -> Section:
    return {"type": "channel", "channel_names": names}


def _label(label: int | str) -> str:
    """Name of a channel: letters, digits and underscores."""
    if isinstance(label, str):
        return label
    return f"level_{'minus_' if label < 0 else ''}{abs(label)}"
