"""Metadata: lengths and times in um and s; how a result is named, made and known.

Units are symbols of OME-XML, names of OME-Zarr (UDUNITS-2) and the spellings of ImageJ;
what is unknown stays None.

A TIFF says how it was made in its OME-XML (a map annotation) and the tag Software, an
OME-Zarr in its attribute ``rtfocus``, a JSON file under ``written_by``. Only what bears
such a mark may be replaced with ``--overwrite``, and it is no input of a folder that it
lies in.
"""

import json
import math
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from rtfocus import __version__, files
from rtfocus.files import same_name
from rtfocus.images.series import ImageSeries

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

_PREFIXES = {
    "yotta": ("Y", 24),
    "zetta": ("Z", 21),
    "exa": ("E", 18),
    "peta": ("P", 15),
    "tera": ("T", 12),
    "giga": ("G", 9),
    "mega": ("M", 6),
    "kilo": ("k", 3),
    "hecto": ("h", 2),
    "deca": ("da", 1),
    "": ("", 0),
    "deci": ("d", -1),
    "centi": ("c", -2),
    "milli": ("m", -3),
    "micro": ("μ", -6),
    "nano": ("n", -9),
    "pico": ("p", -12),
    "femto": ("f", -15),
    "atto": ("a", -18),
    "zepto": ("z", -21),
    "yocto": ("y", -24),
}
_INCH_UM = 25400.0
_OTHER_LENGTHS_UM = {
    "um": 1.0,
    "micron": 1.0,
    "angstrom": 1e-4,
    "ångström": 1e-4,
    "Å": 1e-4,
    "A": 1e-4,
    "thou": _INCH_UM / 1000,
    "li": _INCH_UM / 12,
    "in": _INCH_UM,
    '"': _INCH_UM,
    "inch": _INCH_UM,
    "inches": _INCH_UM,
    "ft": 12 * _INCH_UM,
    "foot": 12 * _INCH_UM,
    "feet": 12 * _INCH_UM,
    "yd": 36 * _INCH_UM,
    "yard": 36 * _INCH_UM,
    "mi": 63360 * _INCH_UM,
    "mile": 63360 * _INCH_UM,
    "pt": _INCH_UM / 72,
    "ua": 149_597_870_700e6,
    "ly": 9_460_730_472_580_800e6,
    "pc": 3.0856775814913673e22,
    "parsec": 3.0856775814913673e22,
}
_OTHER_TIMES_S = {
    "us": 1e-6,
    "sec": 1.0,
    "msec": 1e-3,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hr": 3600.0,
    "hour": 3600.0,
    "d": 86400.0,
    "day": 86400.0,
}


def _table(
    symbol: str, names: tuple[str, ...], exponent: int, others: dict[str, float]
) -> dict[str, float]:
    """Return all units made of prefixes, in powers of ten from `exponent`."""
    table = dict(others)
    for prefix, (letter, power) in _PREFIXES.items():
        table[letter + symbol] = 10.0 ** (power + exponent)
        for name in names:
            table[prefix + name] = 10.0 ** (power + exponent)
    return table


_UM = _table("m", ("meter", "metre"), 6, _OTHER_LENGTHS_UM)
_S = _table("s", ("second",), 0, _OTHER_TIMES_S)


def length_um(value: object, unit: str | None) -> float | None:
    """Return a length in um; None if value or unit say nothing about it.

    Examples
    --------
    >>> length_um(325, "nm"), length_um("0.5", "µm"), length_um(1, "pixel")
    (0.325, 0.5, None)
    """
    return _scaled(value, unit, _UM)


def time_s(value: object, unit: str | None) -> float | None:
    """Return a time in s; None if value or unit say nothing about it."""
    return _scaled(value, unit, _S)


def coordinate_um(value: object, unit: str | None) -> float | None:
    """Return a place in um, which other than a length may be 0 or negative."""
    number = finite(value)
    factor = _factor(unit, _UM)
    return None if number is None or factor is None else _tidy(number * factor)


def finite(value: object) -> float | None:
    """Return a number of metadata, None if it is not a finite number."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def positive(value: object) -> float | None:
    """Return a number of metadata, None if it is not a finite number above 0."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def _scaled(value: object, unit: str | None, table: dict[str, float]) -> float | None:
    number = positive(value)
    factor = _factor(unit, table)
    if number is None or factor is None:
        return None
    return positive(_tidy(number * factor))


def _factor(unit: str | None, table: dict[str, float]) -> float | None:
    if not isinstance(unit, str):
        return None
    text = unit.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ")
    text = unicodedata.normalize("NFKC", _as_utf8(text))
    for spelling in (text, text.lower(), text.lower().removesuffix("s")):
        if spelling in table:
            return table[spelling]
    return None


def _as_utf8(text: str) -> str:
    """Undo UTF-8 that was read as Latin-1, as ImageJ's micro sign often is."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _tidy(number: float) -> float:
    """Drop the last digits, which are those of the conversion: 0.325, not 0.32499…."""
    return float(f"{number:.12g}")


SOFTWARE = f"rtfocus {__version__}"
"""Who wrote a result."""
NAMESPACE = "rtfocus/result"
"""Of the map annotation in OME-XML."""
WRITTEN_BY = "written_by"
"""Key of JSON results."""

RUN_ENDING = ".rtfocus"
"""Of the folder of a recorded run."""

_NAME = "rtfocus"
TEXT_MARK = f"# written by {SOFTWARE}"
"""First line of YAML results."""
_TEXT_BEGIN = TEXT_MARK.rpartition(" ")[0].encode()
_TABLE_MARK = "\ufeff"
_TABLE_BEGINS = b"time_s,position,channel,sequence,", b"image,name,plate,well,"
_ENGINE_CARD = "engine.yaml"
TIFF_ENDINGS: tuple[str, ...] = (".tif", ".tiff")
_ENDINGS = (
    *(".ome.tiff", ".ome.tif", ".ome.zarr", *TIFF_ENDINGS, ".zarr"),
    *(".png", ".jpg", ".jpeg", ".bmp"),
)
_SOFTWARE_TAG = 305
_PNG_KEY = "Software"
_ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs", ".zarray")

Provenance = Mapping[str, str]
"""Facts about one result in the order in which they are written: engine, optics, ..."""


def is_zarr(folder: Path) -> bool:
    """Tell whether a folder is a Zarr group or array."""
    return any(os.path.isfile(folder / mark) for mark in _ZARR_MARKS)


def run_at(folder: Path) -> tuple[Path, Path] | None:
    """Return header and journal of a run, whatever its folder is called; None: none."""
    header, journal = folder / "series.json", folder / "frames.ndjson"
    is_known = folder.suffix == RUN_ENDING or os.path.isfile(journal)
    return (header, journal) if is_known and os.path.isfile(header) else None


def written_by_rtfocus(path: Path) -> bool:
    """Tell whether a file or folder is a whole result that rtfocus wrote.

    The raw images of a run folder are not: they cannot be computed again. Nor is an
    OME-Zarr to which something was added.
    """
    try:
        if (path / _ENGINE_CARD).is_file():
            return _is_exported_engine(path)
        if path.is_dir():
            return _is_zarr_result(path)
        if path.suffix.lower() in TIFF_ENDINGS:
            return _is_tiff_result(path)
        if path.suffix.lower() == ".png":
            from PIL import Image

            with Image.open(path) as picture:
                return _is_ours(picture.info.get(_PNG_KEY))
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return f"{WRITTEN_BY}.npy" in archive.namelist()
        return path.is_file() and (_is_text_result(path) or _is_json_result(path))
    # A damaged file makes the parsers raise whatever they stumble over.
    except Exception:
        return False


def zarr_attributes(provenance: Provenance, nodes: list[str]) -> dict[str, Any]:
    """Return the attributes of a result's root group.

    Parameters
    ----------
    provenance
        What is known about how it was made.
    nodes
        Paths of all groups and arrays of the store, the root being ``.``.
    """
    known = sorted(node.removeprefix(".") for node in nodes)
    return {_NAME: {WRITTEN_BY: SOFTWARE, "result": dict(provenance), "nodes": known}}


def table_text(text: str) -> str:
    """Mark a CSV of more than ASCII: Excel takes its letters for others without."""
    return text if text.isascii() else _TABLE_MARK + text


def json_mark() -> dict[str, str]:
    """Return the entry that every JSON result begins with."""
    return {WRITTEN_BY: SOFTWARE}


def png_mark() -> "PngInfo":
    """Return the text that a picture is saved with: ``save(..., pnginfo=...)``."""
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text(_PNG_KEY, SOFTWARE)
    return mark


def _is_text_result(path: Path) -> bool:
    with path.open("rb") as file:
        begins = file.read(64).removeprefix(_TABLE_MARK.encode())
        return begins.startswith((_TEXT_BEGIN, *_TABLE_BEGINS))


def _is_exported_engine(folder: Path) -> bool:
    text = (folder / _ENGINE_CARD).read_text("utf-8")
    known = {_ENGINE_CARD, *yaml.safe_load(text)["files"].values()}
    there = set(_files_below(folder))
    return text.encode().startswith(_TEXT_BEGIN) and there <= known


def _is_ours(software: object) -> bool:
    return isinstance(software, str) and software.split(" ")[0] == _NAME


def _is_tiff_result(path: Path) -> bool:
    # Here, as the stores of a run need the units above and no reader of images.
    import tifffile

    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags.get(_SOFTWARE_TAG)
        return tag is not None and _is_ours(tag.value)


def _is_json_result(path: Path) -> bool:
    # A result begins with its mark; a long file of another program is not read.
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


COMPANION = "OME/METADATA.ome.xml"
"""OME-XML of all images of a collection, within its OME-Zarr."""
_CHUNK = re.compile(r"/(c/)?\d+(/\d+)*")


def _belongs(file: str, nodes: set[str]) -> bool:
    """Tell whether a file is a node's metadata or one of an array's chunks."""
    parent, _, name = file.rpartition("/")
    if name in _ZARR_MARKS:
        return parent in nodes
    if file == COMPANION:
        return True
    return any(
        file[:at] in nodes and _CHUNK.fullmatch(file[at:]) is not None
        for at in range(len(file))
    )


def result_names(series: Sequence[ImageSeries], root: Path) -> list[PurePosixPath]:
    """Name one TIFF for each image, all different on every file system.

    Parameters
    ----------
    series
        Images of one input.
    root
        The input; of a folder, the layout below it is kept.

    Returns
    -------
    list of PurePosixPath
        Relative to the output folder. A file's name keeps all but its last known
        ending; where that makes two equal, the ending too. Images of a plate lie in a
        folder of their well.
    """
    number = Counter(one.path for one in series)
    folders = [_folder_of(one, root) for one in series]
    stems = [
        files.portable_name(_stem(one.path.name) if number[one.path] == 1 else one.name)
        for one in series
    ]
    equal = Counter(map(same_name, map(str, map(PurePosixPath, folders, stems))))
    paths = []
    for one, folder, stem in zip(series, folders, stems, strict=True):
        ending = one.path.suffix.lower()
        clashes = equal[same_name(str(folder / stem))] > 1
        if clashes and number[one.path] == 1 and ending not in TIFF_ENDINGS:
            stem += ending
        paths.append(folder / stem)
    taken = {same_name(str(parent)) for path in paths for parent in path.parents}
    return [_free(path, taken) for path in paths]


def _folder_of(one: ImageSeries, root: Path) -> PurePosixPath:
    """Return where below the output folder an image lies."""
    parts = (
        one.path.parent.relative_to(root).parts
        if root != one.path and one.path.is_relative_to(root)
        else ()
    )
    if one.place is not None:
        rows, columns = one.place.rows, one.place.columns
        parts = (*parts, rows[one.place.row] + columns[one.place.column])
    return PurePosixPath(*map(files.portable_name, parts))


def _stem(name: str) -> str:
    ending = next((e for e in _ENDINGS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] or name


def _free(path: PurePosixPath, taken: set[str]) -> PurePosixPath:
    """Return `path` as a TIFF, numbered if that name is taken; it is then."""
    number, name = 1, f"{path.name}.tif"
    while same_name(str(path.with_name(name))) in taken:
        number += 1
        name = f"{path.name}_{number}.tif"
    taken.add(same_name(str(path.with_name(name))))
    return path.with_name(name)


@dataclass(frozen=True, slots=True)
class PlaneFacts:
    """When and where one plane was taken; None: unknown."""

    delta_s: float | None = None
    """End of its exposure since the series began."""
    exposure_ms: float | None = None
    z_um: float | None = None


@dataclass(frozen=True)
class OutputImage:
    """One image to write: the form of `like`, other pixels."""

    like: ImageSeries
    """Gives name, sizes, shape, pixel sizes, channels, well."""
    dtype: np.dtype[np.generic]
    planes: Iterator[NDArray[np.generic]]
    """In the order of ``like.indices()``; consumed once, one plane at a time."""
    made: Provenance = field(default_factory=dict)
    """How: engine, optics, where they come from."""
    keeps_counts: bool = True
    """Whether the planes' grey values mean what those of `like` mean."""
    taken: Sequence[PlaneFacts] = ()
    """Of every plane, in their order; empty: unknown."""
