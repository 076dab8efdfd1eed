"""Provenance: what a result says of how it was made, and how a result is recognised.

A TIFF says it in its OME-XML (a map annotation) and the tag Software, an OME-Zarr in
its attribute ``rtfocus``, a JSON file under ``written_by``. Only what bears such a mark
may be replaced with ``--overwrite``, and it is no input of a folder that it lies in.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tifffile
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rtfocus import __version__

SOFTWARE = f"rtfocus {__version__}"
"""Who wrote a result."""
NAMESPACE = "rtfocus/result"
"""Of the map annotation in OME-XML."""
WRITTEN_BY = "written_by"
"""Key of JSON results."""

_NAME = "rtfocus"
TEXT_MARK = f"# written by {SOFTWARE}"
"""First line of YAML results."""
_ENGINE_CARD = "engine.yaml"
_TIFF_ENDINGS = (".tif", ".tiff")
_SOFTWARE_TAG = 305
_PNG_KEY = "Software"

Provenance = Mapping[str, str]
"""Facts about one result in the order in which they are told: engine, optics, ..."""


def written_by_rtfocus(path: Path) -> bool:
    """Tell whether a file or folder is a whole result that rtfocus wrote.

    The raw images of a run folder are none: nobody can compute them again. Nor is an
    OME-Zarr that somebody has added something to.
    """
    try:
        if (path / _ENGINE_CARD).is_file():
            return _is_exported_engine(path)
        if path.is_dir():
            return _is_zarr_result(path)
        if path.suffix.lower() in _TIFF_ENDINGS:
            return _is_tiff_result(path)
        if path.suffix.lower() == ".png":
            with Image.open(path) as picture:
                return _is_ours(picture.info.get(_PNG_KEY))
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return f"{WRITTEN_BY}.npy" in archive.namelist()
        return path.is_file() and _is_json_result(path)
    # A damaged file makes the parsers raise whatever they stumble over.
    except Exception:
        return False


def zarr_attributes(made: Provenance, nodes: list[str]) -> dict[str, Any]:
    """Return the attributes of a result's root group.

    Parameters
    ----------
    made
        What is known about how it was made.
    nodes
        Paths of all groups and arrays of the store, the root being ``""``.
    """
    mark = {WRITTEN_BY: SOFTWARE, "result": dict(made), "nodes": sorted(nodes)}
    return {_NAME: mark}


def json_mark() -> dict[str, str]:
    """Return the entry that every JSON result begins with."""
    return {WRITTEN_BY: SOFTWARE}


def png_mark() -> PngInfo:
    """Return the text that a picture is saved with: ``save(..., pnginfo=...)``."""
    mark = PngInfo()
    mark.add_text(_PNG_KEY, SOFTWARE)
    return mark


def _is_exported_engine(folder: Path) -> bool:
    text = (folder / _ENGINE_CARD).read_text("utf-8")
    known = {_ENGINE_CARD, *yaml.safe_load(text)["files"].values()}
    there = set(_files_below(folder))
    return text.startswith(TEXT_MARK.rpartition(" ")[0]) and there <= known


def _is_ours(software: object) -> bool:
    return isinstance(software, str) and software.split(" ")[0] == _NAME


def _is_tiff_result(path: Path) -> bool:
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags.get(_SOFTWARE_TAG)
        return tag is not None and _is_ours(tag.value)


def _is_json_result(path: Path) -> bool:
    # A result begins with its mark; a long file of somebody's is not read.
    with path.open("rb") as file:
        begins = file.read(200).lstrip()
        if not begins.startswith(b"{") or WRITTEN_BY.encode() not in begins:
            return False
        file.seek(0)
        return _is_ours(json.load(file).get(WRITTEN_BY))


def _is_zarr_result(folder: Path) -> bool:
    if (folder / ".zattrs").is_file():
        mark = json.loads((folder / ".zattrs").read_text("utf-8"))[_NAME]
    else:
        document = json.loads((folder / "zarr.json").read_text("utf-8"))
        mark = document["attributes"][_NAME]
    if not _is_ours(mark[WRITTEN_BY]):
        return False
    nodes = set(mark["nodes"])
    return all(_belongs(file, nodes) for file in _files_below(folder))


def _files_below(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    ]


_METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zarray")
_COMPANION = "OME/METADATA.ome.xml"
_CHUNK = re.compile(r"/(c/)?\d+(/\d+)*")


def _belongs(file: str, nodes: set[str]) -> bool:
    """Tell whether a file is a node's metadata or one of an array's chunks."""
    parent, _, name = file.rpartition("/")
    if name in _METADATA:
        return parent in nodes
    if file == _COMPANION:
        return True
    return any(
        file[:at] in nodes and _CHUNK.fullmatch(file[at:]) is not None
        for at in range(len(file))
    )
