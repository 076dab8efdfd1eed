"""Admission: an engine from a folder, a model package or an address, whole or not.

A package that rtfocus exported holds its card; any other is a foreign model. Of a
package only what its description names is taken, each file compared with its checksum,
and no file that runs code.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import yaml
from google.protobuf.message import DecodeError, Message

from rtfocus.config.loading import decode, parse_yaml
from rtfocus.engines.card import (
    CARD_NAME,
    EngineCard,
    output_of,
    parse_card,
    read_card,
    verified_file,
)
from rtfocus.engines.registry import FoundEngine, add_engine
from rtfocus.engines.spec_steps import Values
from rtfocus.errors import EngineError
from rtfocus.processing.classify import background_of, normalisation_of
from rtfocus.sharing.description import Model, read_model
from rtfocus.sharing.foreign import WEIGHTS_NAME, card_of, prove, read_test_tensor
from rtfocus.sharing.package import (
    RDF_NAMES,
    TENSOR_BYTES,
    TEXT_BYTES,
    WEIGHTS_BYTES,
    Package,
    fetched,
    is_address,
    is_safe,
    open_package,
    page_of,
    verified,
)

_MOST_VALUES = 100_000
_README = "README.md"
_DESCRIPTION = "description.yaml"
"""A foreign model's own, kept for its authors, licence and citations."""
PROOF = "largest difference from its test tensor"
"""Figure on the card of a foreign model that gave its own test's values."""
Files = dict[str, bytes]
"""What is written to the engine's folder, by name."""


def add_model(
    source: str | Path,
    *,
    name: str | None = None,
    values: Values | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> FoundEngine:
    """Add an engine to the user's own, where configs find it by its name.

    Parameters
    ----------
    source
        Folder with a card, or a model package: a zip, the folder it was packed from,
        or its address.
    name
        Of the engine; None: as its card or description says.
    values
        Of a foreign model: which values it gives, see `Values`; None: what
        its test tensors look like.
    tell
        Gets a line about what was fetched.

    Raises
    ------
    EngineError
        If anything is not in order; nothing is left of it then.
    """
    if isinstance(source, str) and is_address(source):
        with fetched(source, tell) as path:
            return _add(path, source, name, values)
    return _add(Path(source), str(source), name, values)


def _add(
    path: Path, origin: str, name: str | None, values: Values | None
) -> FoundEngine:
    if not path.exists():
        if page := page_of(origin):
            msg = (
                f"'{origin}' is the name of a model in the web, which is not looked "
                f"up: open {page}, and give the address of its download, https://..., "
                "or the zip"
            )
            raise EngineError(msg)
        msg = (
            f"'{origin}' does not exist; give a folder with an {CARD_NAME}, or a model "
            "package: a .zip, its folder or its address"
        )
        raise EngineError(msg)
    if name is None and (path / CARD_NAME).is_file():
        _refuse_other_networks(path)
        return add_engine(path)
    with (
        open_package(path, origin) as package,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        for file, data in _engine_files(package, name, values).items():
            (Path(scratch) / file).write_bytes(data)
        _refuse_other_networks(Path(scratch))
        return add_engine(Path(scratch))


def _refuse_other_networks(folder: Path) -> None:
    """Refuse a card of rules that do not exist, or of another network's tensors."""
    card = read_card(folder)
    if card.normalisation:
        normalisation_of(card)
    background_of(card)
    inputs = {f"{one.name} FLOAT" for one in (card.input, card.condition) if one}
    results = (card.output, card.restored, card.kernel_output)
    outputs = {one.name for one in results if one}
    kind_of = onnx.TensorProto.DataType.Name
    for precision in card.files:
        file = verified_file(folder, card, precision)
        try:
            graph = read_network(file.read_bytes()).graph
        except EngineError as error:
            msg = f"engine '{card.name}' {error}"
            raise EngineError(msg) from error
        given = {tensor.name for tensor in graph.output}
        weights = {tensor.name for tensor in graph.initializer}
        tensors = (one for one in graph.input if one.name not in weights)
        taken = {f"{t.name} {kind_of(t.type.tensor_type.elem_type)}" for t in tensors}
        if taken != inputs or not outputs <= given:
            msg = (
                f"engine '{card.name}': '{file.name}' takes {sorted(taken)} and gives "
                f"{sorted(given)}, its card says {sorted(inputs)} and "
                f"{sorted(outputs)}; correct the card or export the network again"
            )
            raise EngineError(msg)
        _refuse_other_labels(card, graph)


def _refuse_other_labels(card: EngineCard, graph: onnx.GraphProto) -> None:
    """Refuse an output of another number of labels, where the file tells it."""
    output = output_of(card)
    for tensor in graph.output if output.labels else ():
        sides = [dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
        labels = sides[1] if len(sides) > 1 else 0
        if tensor.name == output.name and labels not in (0, len(output.labels)):
            msg = (
                f"engine '{card.name}': '{output.name}' of its network has {labels} "
                f"labels, its card lists {len(output.labels)}; correct output.labels"
            )
            raise EngineError(msg)


def _engine_files(package: Package, name: str | None, values: Values | None) -> Files:
    """Return the files of the engine that a package holds."""
    names = [rdf for rdf in RDF_NAMES if rdf in package]
    if not names and CARD_NAME in package:
        return _of_card(package, _card_in(package), name)
    if not names:
        msg = (
            f"'{package.origin}' holds no {' or '.join(RDF_NAMES[:2])} and no "
            f"{CARD_NAME}: it is neither a model package of bioimage.io nor an engine"
        )
        raise EngineError(msg)
    rdf = _read_rdf(package, names[0])
    config = rdf.get("config")
    ours = config.get("rtfocus") if isinstance(config, dict) else None
    if ours is not None:
        return _exported_files(package, rdf, ours, name)
    try:
        return _admitted(package, rdf, names[0], name, values)
    except EngineError as error:
        # One line of what comes from below, and whose it is.
        why = " ".join(str(error).split())
        msg = why if package.origin in why else f"'{package.origin}' {why}"
        raise EngineError(msg) from error


def _read_rdf(package: Package, rdf: str) -> dict[str, Any]:
    document = _yaml(package, rdf)
    if not isinstance(document, dict):
        msg = f"'{rdf}' in '{package.origin}' describes nothing: it is no mapping"
        raise EngineError(msg)
    return document


def _admitted(
    package: Package,
    rdf: Mapping[str, Any],
    rdf_name: str,
    name: str | None,
    values: Values | None,
) -> Files:
    """Return the engine that a foreign model becomes, once it has proved itself."""
    model = read_model(rdf)
    weights = _weights(package, model)
    said = card_of(model, read_network(weights), hashlib.sha256(weights).hexdigest())
    tensors = [
        read_test_tensor(
            verified(package, words.test.source, words.test.sha256, TENSOR_BYTES), words
        )
        for words in (model.input, model.output)
    ]
    said["name"] = name or model.name
    card = parse_card(said, f"made of '{rdf_name}' in '{package.origin}'")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        (Path(scratch) / WEIGHTS_NAME).write_bytes(weights)
        proof = prove(Path(scratch), card, model, *tensors)
    said["steps"]["values"] = values or proof.values
    said["figures"] = {PROOF: proof.largest}
    card = parse_card(said, f"made of '{rdf_name}' in '{package.origin}'")
    files = {
        CARD_NAME: dumped(card, card.name),
        WEIGHTS_NAME: weights,
        _DESCRIPTION: package.read(rdf_name, TEXT_BYTES),
    }
    words = (model.documentation or "").removeprefix("./")
    if words.lower().endswith(".md") and words in package:
        files[_README] = package.read(words, TEXT_BYTES)
    return files


def _weights(package: Package, model: Model) -> bytes:
    """Return the ONNX file of a model, with the weights that lie beside it."""
    source = model.weights.source
    weights = verified(package, source, model.weights.sha256, WEIGHTS_BYTES)
    beside = PurePosixPath(source.removeprefix("./")).parent
    stated = {}
    if (said := model.outside) is not None:
        stated[PurePosixPath(said.source).as_posix()] = said.sha256

    def read(location: str) -> bytes:
        path = (beside / location).as_posix()
        if not location or not is_safe(location) or path not in package:
            msg = (
                f"has an ONNX file whose weights lie in other files, '{location}', "
                "which is not beside it in the package; get the whole package, or ask "
                "its authors for one file with all of them"
            )
            raise EngineError(msg)
        return verified(package, path, stated.get(path), WEIGHTS_BYTES)

    return with_weights_inside(weights, read, WEIGHTS_BYTES)


def read_network(weights: bytes) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises
    ------
    EngineError
        What goes on after the model's name, if it is none, or is damaged.
    """
    try:
        network = onnx.load_model_from_string(weights)
    except DecodeError as error:
        msg = f"has an ONNX file that is damaged ({error}); get it again"
        raise EngineError(msg) from error
    if not network.HasField("graph"):
        msg = "has an ONNX file that holds no network; export it again"
        raise EngineError(msg)
    return network


def with_weights_inside(
    weights: bytes, read: Callable[[str], bytes], most_bytes: int
) -> bytes:
    """Return an ONNX file that holds the weights which it keeps in other files.

    Parameters
    ----------
    weights
        The file; one that is whole is returned as it is.
    read
        Gives what a file holds by the path that the ONNX file says, which may lead
        anywhere: refusing is up to it.
    most_bytes
        What all weights together may have.

    Raises
    ------
    EngineError
        What goes on after the model's name, if they are not all there.
    """
    network, read = read_network(weights), cache(read)
    elsewhere = [
        tensor
        for tensor in _tensors(network)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    left = most_bytes - len(weights)
    for tensor in elsewhere:
        values = _values_of(tensor, read)
        left -= len(values)
        if left < 0:
            msg = "has more weights in other files than can be meant; it is not read"
            raise EngineError(msg)
        tensor.raw_data = bytes(values)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return network.SerializeToString() if elsewhere else weights


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a message holds, however deep."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)


def _values_of(tensor: onnx.TensorProto, read: Callable[[str], bytes]) -> memoryview:
    """Return the values of a tensor that lie in another file."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    whole = memoryview(read(location))
    try:
        start = int(said.get("offset", "0"))
        length = int(said.get("length", len(whole) - start))
    except ValueError as error:
        msg = f"has weights '{tensor.name}' at no place of '{location}': {error}"
        raise EngineError(msg) from error
    if min(start, length) < 0 or start + length > len(whole):
        msg = (
            f"has weights '{tensor.name}' at bytes {start} to {start + length} of "
            f"'{location}', which has {len(whole)}; get the whole package again"
        )
        raise EngineError(msg)
    return whole[start : start + length]


def _exported_files(
    package: Package, rdf: Mapping[str, Any], ours: object, name: str | None
) -> Files:
    """Return what rtfocus exported; the card under ``config.rtfocus`` is the word."""
    for source, sha256 in _checksums(rdf):
        verified(package, source, sha256, WEIGHTS_BYTES)
    given = dict(ours) if isinstance(ours, dict) else ours
    if isinstance(given, dict) and given.get("kind") == "restorer":
        # Exported with the default of a key that restorers do not have.
        given["input"] = {
            key: value
            for key, value in dict(given.get("input") or {}).items()
            if key != "stride_px"
        }
    card = parse_card(given, f"config.rtfocus in '{package.origin}'")
    if CARD_NAME in package and _card_in(package) != card:
        msg = (
            f"'{package.origin}': its {CARD_NAME} says something else than "
            "config.rtfocus of its description; export the engine again"
        )
        raise EngineError(msg)
    return _of_card(package, card, name)


def _card_in(package: Package) -> EngineCard:
    where = f"'{CARD_NAME}' in '{package.origin}'"
    return parse_card(_yaml(package, CARD_NAME), where)


def _yaml(package: Package, name: str) -> Any:  # noqa: ANN401
    """Read a YAML file; its anchors stand for no more than can be meant."""
    try:
        content = parse_yaml(decode(package.read(name, TEXT_BYTES)))
        if _values_in(content, {}) > _MOST_VALUES:
            msg = f"stands for more than {_MOST_VALUES} values by its anchors"
            raise ValueError(msg)
    except ValueError as error:
        msg = f"'{name}' in '{package.origin}' {error}"
        raise EngineError(msg) from error
    return content


def _values_in(part: object, known: dict[int, float]) -> float:
    """Count values, those that anchors repeat as often as they do."""
    if not isinstance(part, dict | list):
        return 1
    if id(part) not in known:
        # One that holds itself has no end.
        known[id(part)] = math.inf
        values = [*part.values()] if isinstance(part, dict) else part
        known[id(part)] = 1 + sum(_values_in(value, known) for value in values)
    return known[id(part)]


def _of_card(package: Package, card: EngineCard, name: str | None) -> Files:
    """Return the files of an engine that has its card with it."""
    files = {
        file: package.read(file, WEIGHTS_BYTES)
        for file in card.files.values()
        if file not in (CARD_NAME, _README)
    }
    if _README in package:
        files[_README] = package.read(_README, TEXT_BYTES)
    if name is None and CARD_NAME in package:
        return files | {CARD_NAME: package.read(CARD_NAME, TEXT_BYTES)}
    return files | {CARD_NAME: dumped(card, name or card.name)}


def dumped(card: EngineCard, name: str) -> bytes:
    """Return the card as a file, under a name."""
    values = card.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    text = yaml.safe_dump({**values, "name": name}, sort_keys=False, allow_unicode=True)
    return text.encode()


def _checksums(part: object) -> Iterator[tuple[str, str]]:
    """Yield every file of a description that has a checksum."""
    if isinstance(part, dict):
        source, sha256 = part.get("source"), part.get("sha256")
        if isinstance(source, str) and isinstance(sha256, str):
            yield source, sha256
        for value in part.values():
            yield from _checksums(value)
    if isinstance(part, list):
        for value in part:
            yield from _checksums(value)
