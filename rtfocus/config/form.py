"""Form: what every part of a config shares, and its files as editors save them.

YAML and JSON in UTF-8 with or without a byte order mark, and in UTF-16 with one, are
read. Anything else would have to be guessed: a micro sign of code page 1252 may be
another letter of another one. It is refused, and the line is named.
"""

import codecs
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the config; its docstrings are the reference."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
    )


_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SHOWN = 60


def read_yaml(path: Path) -> Any:
    """Read a YAML or JSON file; an empty one is None.

    Raises
    ------
    OSError
        If it cannot be opened.
    ValueError
        If it is no text, or no YAML. The message goes on where the name of the
        file ends: it is one line, names what stands where, and the remedy.
    """
    return parse_yaml(decode(path.read_bytes()))


def decode(data: bytes) -> str:
    """Return the text of a file.

    Raises
    ------
    ValueError
        As `read_yaml`.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in data:
            msg = "is no text but a binary file"
            raise ValueError(msg) from error
        number = data.count(b"\n", 0, error.start) + 1
        line = data.splitlines()[number - 1].decode(encoding, errors="replace")
        msg = (
            f"is no {encoding.upper()} text: byte 0x{data[error.start]:02x} in line "
            f"{number} ({_short(line)}); save the file as UTF-8"
        )
        raise ValueError(msg) from error
    if "\0" in text:
        msg = "is no text but a binary file"
        raise ValueError(msg)
    return text


def parse_yaml(text: str) -> Any:
    """Parse YAML; an empty text is None.

    Raises
    ------
    ValueError
        As `read_yaml`.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(_explain(error, text)) from error
    except RecursionError as error:
        msg = "is nested too deeply to be meant"
        raise ValueError(msg) from error


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would take the last one in silence."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name != "<<":
                problem = f"'{name}' is given twice; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _explain(error: yaml.YAMLError, text: str) -> str:
    """Say in one line what is wrong, and where."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return "is not valid YAML: " + " ".join(str(error).split())
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    where = f"is not valid YAML: line {mark.line + 1}, column {mark.column + 1}"
    if "\t" in line[: mark.column + 1]:
        return f"{where}: indent with spaces, here is a tab"
    said = [getattr(error, part, None) for part in ("context", "problem")]
    problem = ", ".join(part for part in said if part)
    return f"{where}: {problem} ({_short(line)})" if line else f"{where}: {problem}"


def _short(line: str) -> str:
    line = line.strip()
    return f"'{line if len(line) <= _SHOWN else line[:_SHOWN] + '...'}'"
