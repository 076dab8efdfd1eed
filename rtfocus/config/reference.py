"""Reference: every key of a config with default and meaning, from the models."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from rtfocus.channel import OpticalSystem
from rtfocus.config.microscope import (
    DemoCameraConfig,
    MicroManagerConfig,
    ReplayConfig,
    VirtualMicroscopeConfig,
)
from rtfocus.config.model import Config

_SOURCES = (
    VirtualMicroscopeConfig,
    DemoCameraConfig,
    MicroManagerConfig,
    ReplayConfig,
)


def reference() -> str:
    """Return the reference as Markdown: one table per section."""
    lines: list[str] = []
    for name, info in Config.model_fields.items():
        if name == "microscope":
            for source in _SOURCES:
                default = source.model_fields["source"]
                word = get_args(default.annotation)[0]
                lines += _table(f"microscope: source {word}", source, "microscope")
        elif name == "channels":
            lines += _table("channels (a list)", _section(info), "channels.N")
        else:
            lines += _table(name, _section(info), name)
    lines += [f"### optics: {_first_line(OpticalSystem)}", "", *_HEAD]
    lines += [_row(*entry) for entry in _optics_rows()]
    return "\n".join(lines) + "\n"


_HEAD = ["| key | default | meaning |", "|---|---|---|"]


def _table(title: str, section: type[BaseModel], prefix: str) -> list[str]:
    head = [f"### {title}: {_first_line(section)}", "", *_HEAD]
    return [*head, *(_row(*entry) for entry in _rows(section, prefix)), ""]


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, info in section.model_fields.items():
        inner = _section(info)
        key = f"{prefix}.{name}"
        if inner is None or _is_optional(info):
            yield key, _default(info), info.description or ""
        # A channel's restoration has the keys of processing.restoration.
        if inner is not None and key != "channels.N.restoration":
            yield from _rows(inner, key)


def _section(info: FieldInfo) -> Any:
    """Return the model a field holds, also inside a list or an option."""
    for part in (info.annotation, *get_args(info.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _is_optional(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    return _as_yaml(info.get_default())


def _as_yaml(value: object) -> str:
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    if isinstance(value, bool) or value is None:
        return words[value]
    return str(value)


def _optics_rows() -> Iterator[tuple[str, str, str]]:
    described = TypeAdapter(OpticalSystem).json_schema()["properties"]
    for one in fields(OpticalSystem):
        default = one.default if one.default is not MISSING else None
        shown = _as_yaml(default) if one.default is not MISSING else "required"
        if one.default_factory is not MISSING:
            shown = "none"
        text = described[one.name].get("description", "")
        if is_dataclass(one.type):
            text += " " + ", ".join(f"`{part.name}`" for part in fields(one.type))
        yield f"optics.{one.name}", shown, text


def _row(key: str, default: str, meaning: str) -> str:
    text = " ".join(meaning.split()).replace("``", "`").replace("|", "\\|")
    return f"| `{key}` | `{default}` | {text} |"


def _first_line(model: type) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]
