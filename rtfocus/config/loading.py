"""Config loading: YAML to `Config`, errors that name the key and the nearest one.

YAML and JSON in UTF-8 with or without a byte order mark, and in UTF-16 with one, are
read, as editors save them. Anything else would have to be guessed: a micro sign of code
page 1252 may be another letter of another one. It is refused, and the line is named.
"""

import codecs
import difflib
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rtfocus.config.model import Config
from rtfocus.errors import ConfigError, RtfocusError
from rtfocus.files import resource_folder

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MOST_MB = 64  # plans that list every event have some; images have more
_MOST_PLACES = 3
_MOST_SHOWN = 80  # characters of a refused value that an error repeats


def read_yaml(
    path: Path, what: str, remedy: str, kind: type[RtfocusError] = ConfigError
) -> Any:
    """Read a YAML or JSON file; an empty one is None.

    Parameters
    ----------
    what
        It is, for the message, e.g. ``recipe``.
    remedy
        Where it cannot be opened.
    kind
        Of the error.

    Raises
    ------
    kind
        If it cannot be opened, is no text, or no YAML.
    """
    try:
        if (size_mb := path.stat().st_size / 1e6) > _MOST_MB:
            msg = f"is {size_mb:.0f} MB long, {_MOST_MB} MB at most; give another file"
            raise ValueError(msg)
        return parse_yaml(decode(path.read_bytes()))
    except OSError as error:
        msg = f"{what} '{path}' cannot be read: {error.strerror}; {remedy}"
        raise kind(msg) from error
    except ValueError as error:
        msg = f"{what} '{path}' {error}"
        raise kind(msg) from error


def decode(data: bytes) -> str:
    """Return the text of a file.

    Raises
    ------
    ValueError
        If it is none. The message goes on where the name of the file ends: it is one
        line, names what stands where, and the remedy.
    """
    binary = "is no text but a binary file"
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise ValueError(binary) from error
        number = data.count(b"\n", 0, error.start) + 1
        line = data.splitlines()[number - 1].decode(encoding, errors="replace")
        msg = (
            f"is no {encoding.upper()} text: byte 0x{data[error.start]:02x} in line "
            f"{number} ({_short(line.strip())}); save the file as UTF-8"
        )
        raise ValueError(msg) from error
    if "\0" in text:
        raise ValueError(binary)
    return text


def parse_yaml(text: str) -> Any:
    """Parse YAML; an empty text is None; ValueError as in `decode`."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(_explain_yaml(error, text)) from error
    except RecursionError as error:
        msg = "is nested too deeply to be meant"
        raise ValueError(msg) from error


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would take the last one in silence."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # What the values of a date, a number or a tag raise when they are none.
        except (ValueError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{_short(node.value)} is no {kind}; if a text is meant, quote it"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark) from error

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, Any]:
        keys = set()
        for key, _ in node.value:
            # `on` is a word here: YAML 1.1 reads a key of that name as true.
            key.tag = key.tag.replace("2002:bool", "2002:str")
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in keys and name != "<<":
                problem = f"'{name}' is given twice; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if name is not None:
                keys.add(name)
        return super().construct_mapping(node, deep=deep)


def _explain_yaml(error: yaml.YAMLError, text: str) -> str:
    """Say in one line what is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return "is not valid YAML: " + " ".join(str(error).split())
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    where = f"is not valid YAML: line {mark.line + 1}, column {mark.column + 1}"
    if "\t" in line[: mark.column + 1]:
        return f"{where}: indent with spaces, here is a tab"
    parts = [getattr(error, part, None) for part in ("context", "problem")]
    problem = ", ".join(part for part in parts if part)
    excerpt = f" ({_short(line.strip())})" if line else ""
    return f"{where}: {problem}{excerpt}"


def find_config(name: Path | str) -> Path:
    """Return the path of a config given by path or by the name of a shipped one.

    Raises
    ------
    ConfigError
        If it is neither; lists the shipped names.
    """
    if isinstance(name, Path):
        return name
    if not isinstance(cast("object", name), str):
        kind = type(name).__name__
        msg = f"config is of type {kind}; give a path, a shipped name, or a Config"
        raise ConfigError(msg)
    folder = resource_folder("configs")
    # A run folder or a data folder may well be called like a shipped config.
    for path in (Path(name), folder / f"{name}.yaml"):
        if os.path.isfile(path):
            return path
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    like = near(name, names, 0.7)
    meant = f"did you mean '{like[0]}'? " if like else ""
    listed = ", ".join(one for one in names if not one.startswith("train_"))
    msg = (
        f"config '{name}' is no file and no shipped config; {meant}shipped: {listed}, "
        "and recipes of engines: rtfocus configs"
    )
    raise ConfigError(msg)


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> Config:
    """Return a YAML config, validated, with ``section.key=value`` overrides.

    Paths are relative to the file's folder; those of overrides to where you work.

    Parameters
    ----------
    path
        The file, or the name of a shipped config, e.g. ``demo``.
    overrides
        A list, e.g. ``["run.name=day1", "camera.gain_e_per_count=0.6"]``, or a string.

    Raises
    ------
    ConfigError
        Names the file, the key path, the value, the rule, and for an unknown key
        the nearest valid one.
    """
    path = find_config(path)
    remedy = "'rtfocus configs' lists those that come with rtfocus"
    data = read_yaml(path, "config", remedy)
    data = {} if data is None else data
    if not isinstance(data, dict):
        kind = type(data).__name__
        msg = f"config '{path}' must be a mapping of sections, got {kind}"
        raise ConfigError(msg)
    return _overridden(data, overrides, str(path), path.parent).read_from(path)


def overridden(settings: Config, overrides: Iterable[str]) -> Config:
    """Return `settings` with overrides, which are those of `load_config`."""
    return _overridden(settings.model_dump(), overrides, "--set", Path.cwd())


def _overridden(
    data: dict[str, Any], overrides: Iterable[str], origin: str, folder: Path
) -> Config:
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    typed = [_apply_override(data, override) for override in overrides]
    config = parse_config(data, origin=origin, overrides=overrides)
    resolved: Config = _resolve_paths(config, folder, typed)
    return resolved


def parse_config(
    data: Mapping[str, Any], *, origin: str = "config", overrides: Iterable[str] = ()
) -> Config:
    """Validate a mapping; paths stay relative; ConfigError as in `load_config`."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        # With the origin alone, users would look for an override in the file.
        faulty = {fault["loc"][0] for fault in error.errors() if fault["loc"]}
        given = [one[:80] for one in overrides if re.split("[.=]", one)[0] in faulty]
        if given and origin != "--set":
            origin += f" with --set {' '.join(given)}"
        msg = f"{origin}: " + "; ".join(map(_explain, error.errors()))
        raise ConfigError(msg) from error


def restoring_in(settings: Config, orientations: int) -> Config:
    """Return `settings` that restore in the mean over so many orientations."""
    data = settings.model_dump()
    for part in (data["processing"], *data["channels"]):
        if part["restoration"] is not None:
            part["restoration"]["orientations"] = orientations
    return parse_config(data)


def with_engine(settings: Config, key: str, value: object) -> Config:
    """Return `settings` with one ``classifier`` or ``restoration`` for all channels."""
    data = settings.model_dump()
    data["processing"][key] = value
    for channel in data["channels"]:
        channel[key] = None
    return parse_config(data)


def _apply_override(data: dict[str, Any], override: str) -> list[str]:
    """Set one ``a.b.c=value`` and return the key; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals:
        msg = f"--set '{override}' is not of the form section.key=value"
        raise ConfigError(msg)
    *parents, last = key.strip().split(".")
    if not all((*parents, last)):
        msg = f"--set '{override}': the key '{key}' has an empty part"
        raise ConfigError(msg)
    node: Any = data
    for parent in parents:
        node = _child(node, parent, override)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        msg = f"--set '{override}': the value {error}"
        raise ConfigError(msg) from error
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        msg = f"--set '{override}': '{'.'.join(parents)}' is a value, not a section"
        raise ConfigError(msg)
    return [*parents, last]


def _child(node: Any, name: str, override: str) -> Any:
    """Step into a section or list entry, making the section where it is missing."""
    if isinstance(node, list):
        return node[_list_index(node, name, override)]
    if not isinstance(node, dict):
        msg = f"--set '{override}': '{name}' lies below a value, not a section"
        raise ConfigError(msg)
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _list_index(node: list[Any], name: str, override: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        msg = f"--set '{override}': '{name}' is no index below {len(node)}"
        raise ConfigError(msg)
    return int(name)


def _explain(detail: ErrorDetails) -> str:
    """One sentence per fault: key path, value, rule, remedy."""
    # A discriminated union adds its tag (the source) to the location.
    location = tuple(
        part
        for i, part in enumerate(detail["loc"])
        if not (i == 1 and detail["loc"][0] == "microscope")
        # So does a value of several types, in pydantic's words.
        and "[" not in str(part)
    )
    context = detail.get("ctx", {})
    cause: Any = context.get("error")
    key = _key_of(location, cause)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        name, section = str(detail["loc"][-1]), detail["loc"][:-1]
        match section:
            case ("microscope", source) if name in _valid_keys(("microscope",)):
                other = f"'{key}' is of another microscope.source than '{source}'"
                return f"{other}; leave it out"
        if 0 < len(places := list(_places(name, Config))) <= _MOST_PLACES:
            return f"unknown key '{key}'; did you mean {' or '.join(places)}?"
        return f"unknown key '{key}'; {hint(name, _valid_keys(section), 0.4)}"
    if detail["type"] == "invalid_key" and isinstance(detail["input"], int):
        return f"'{key}': a number is no key; decimals have a point, not a comma"
    if (tag := context.get("tag")) is not None:
        return f"'{key}.source': choose {context['expected_tags']} (got {_short(tag)})"
    value = getattr(cause, "value", detail["input"])
    given = "" if isinstance(value, dict | list) else f" (got {_short(value)})"
    rule = detail["msg"].removeprefix("Value error, ")
    rule = rule.split(" for <class 'pathlib.")[0]
    return f"'{key}': {rule}{given}" if key else rule


def _key_of(location: Iterable[int | str], cause: object) -> str:
    """Return the key that a fault is about: where it is, and what its cause names."""
    return ".".join(map(str, (*location, *getattr(cause, "keys", ()))))


_SAYS_ALL = ("missing", "value_error", "extra_forbidden")
"""Faults reported with the value, unless their cause names it."""


def fault_in_words(fault: ErrorDetails) -> str:
    """Return key, rule and value of one fault of a card, a recipe or a description."""
    cause: object = fault.get("ctx", {}).get("error")
    text = fault["msg"].removeprefix("Value error, ")
    if fault["type"] not in _SAYS_ALL or hasattr(cause, "value"):
        text += f" (got {getattr(cause, 'value', fault['input'])!r:.80})"
    key = _key_of(fault["loc"], cause)
    return f"'{key}': {text}" if key else text


def hint(key: str, valid: list[str], likeness: float) -> str:
    """Return what a key that is not known may mean; `likeness` from 0 to 1."""
    match = near(key, valid, likeness)
    return f"did you mean '{match[0]}'?" if match else f"valid: {', '.join(valid)}"


def near(key: str, valid: list[str], likeness: float) -> list[str]:
    """Return the valid key most like one, alone; empty: none is like it."""
    return difflib.get_close_matches(key, valid, n=1, cutoff=likeness)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `location`, walking the models' annotations."""
    candidates: list[Any] = [Config]
    for part in (one for one in location if not isinstance(one, int)):
        fields = map(_fields, candidates)
        below = [one for known in fields for one in models_in(known.get(part))]
        # A discriminated union adds its tag to the location: not a field, but which.
        candidates = below or [
            one for one in candidates if part in get_args(_fields(one).get("source"))
        ]
    return sorted({name for model in candidates for name in _fields(model)})


def _places(name: str, model: Any, above: str = "") -> Iterator[str]:
    """Return where a key of this name is valid, quoted."""
    for key, annotation in _fields(model).items():
        if key == name:
            yield f"'{above}{key}'"
        below = f"{above}{key}{'[]' if get_origin(annotation) is list else ''}."
        for section in models_in(annotation):
            yield from _places(name, section, below)


def _fields(model: Any) -> dict[str, Any]:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: info.annotation for name, info in model.model_fields.items()}
    return dict(getattr(model, "__annotations__", {}))


def models_in(annotation: Any) -> list[Any]:
    """All section classes inside an annotation such as ``list[A] | B | None``."""
    inner = get_args(annotation)
    if not inner:
        is_section = hasattr(annotation, "__pydantic_config__") or (
            isinstance(annotation, type) and issubclass(annotation, BaseModel)
        )
        return [annotation] if is_section else []
    return [model for part in inner for model in models_in(part)]


def _resolve_paths(
    section: Any, folder: Path, typed: Sequence[list[str]] = (), *at: str
) -> Any:
    """Make input paths absolute; `run.folder` stays relative to where one works."""
    if isinstance(section, Path):
        here = _resolve(section, Path.cwd())
        if any(list(at[: len(key)]) == key for key in typed):
            return here
        beside = _resolve(section, folder)
        if os.path.exists(here) and not os.path.exists(beside):
            where = "paths in a config begin at its folder"
            msg = f"{'.'.join(at)}: {where}, and there is no '{beside}'; write '{here}'"
            raise ConfigError(msg)
        return beside
    if isinstance(section, list):
        numbered = enumerate(section)
        return [_resolve_paths(one, folder, typed, *at, str(n)) for n, one in numbered]
    if not isinstance(section, BaseModel):
        return section
    names = type(section).model_fields.keys() - {"run", "folder"}
    paths = {n: getattr(section, n) for n in names}
    resolved = {n: _resolve_paths(v, folder, typed, *at, n) for n, v in paths.items()}
    return section.model_copy(update=resolved)


def _resolve(path: Path, folder: Path) -> Path:
    try:
        path = path.expanduser()
    except RuntimeError as error:
        msg = f"'{path}': this user has no home folder; write the whole path"
        raise ConfigError(msg) from error
    try:
        return path if path.is_absolute() else (folder / path).resolve()
    # Half of a character, links in a circle.
    except (OSError, ValueError, RuntimeError) as error:
        msg = f"{str(path)!r} leads nowhere ({error}); give another path"
        raise ConfigError(msg) from error
