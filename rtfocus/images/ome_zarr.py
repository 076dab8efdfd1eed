"""OME-Zarr: reads versions 0.3, 0.4 and 0.5 through zarr-python.

Single images, bioformats2raw collections, plates, and rtfocus run folders'
images alike: every multiscales group below the path is one series. The attributes
are read as they are: models that validate them refuse images without units or with
axes in another order, whose pixels are readable.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, WrapperStore

from rtfocus.errors import InputError, one_line
from rtfocus.images.metadata import finite, is_zarr, length_um, positive, run_at, time_s
from rtfocus.images.ome_xml import OmeImage, read_ome_xml
from rtfocus.images.series import (
    MOST_IMAGES,
    MOST_PLANES,
    ContrastWindow,
    Facts,
    ImageChannel,
    ImageSeries,
    IncompleteSetError,
    PlatePlace,
    native_dtype,
    stem_of,
)

_DEEPEST = 6
"""Groups within groups: plate, row, well, field are four."""


class RunStore(WrapperStore[LocalStore]):
    """A group of a run: where a frame's file is gone reading fails.

    zarr takes an absent file for zeros; the journal says whether there was one.
    """

    def __init__(self, path: Path, header_file: Path, journal: Path) -> None:
        super().__init__(LocalStore(path, read_only=True))
        self._below = path.relative_to(journal.parent).as_posix()
        self._recorded = _recorded(header_file, header_file.stat().st_mtime_ns, journal)

    async def get(self, key: str, *how: Any, **more: Any) -> Any:  # noqa: ANN401
        """Return what a file holds; None: it never was; OSError: it is gone."""
        found = await super().get(key, *how, **more)
        # One without a byte is taken for zeros, too.
        if not found and "/c." in key and f"{self._below}/{key}" in self._recorded:
            # It may have come after it was looked for.
            if not (found := await super().get(key, *how, **more)):
                msg = f"its file '{key}' is gone or empty, as rtfocus check tells"
                raise OSError(msg)
        return found


class _Recorded:
    """Files that a run's journal tells of, below its folder: read on at every look."""

    def __init__(self, header_file: Path, _changed_ns: int, journal: Path) -> None:
        header = msgspec.json.decode(header_file.read_bytes())
        self._shard_frames = int(header["store"]["shard_frames"])
        sites = header["series"]["positions"]
        self._places = [f"{p}/" for p in range(len(sites))] if len(sites) > 1 else [""]
        if all(site.get("plate_row") and site.get("plate_column") for site in sites):
            wells = [(p["plate_row"], p["plate_column"], p.get("field")) for p in sites]
            self._places = [f"{row}/{column}/{n or 0}/" for row, column, n in wells]
        self._journal, self._inode, self._taken = journal, 0, 0
        self._files: set[str] = set()

    def __contains__(self, file_name: str) -> bool:
        with self._journal.open("rb") as file:
            now = os.fstat(file.fileno())
            if now.st_ino != self._inode or now.st_size < self._taken:  # repaired
                self._inode, self._taken, self._files = now.st_ino, 0, set()
            taken = file.seek(self._taken)
            for text in file:
                # The last line may be under way; of damage the check tells.
                if text.endswith(b"\n"):
                    taken += len(text)
                    with suppress(ValueError, LookupError, TypeError, RecursionError):
                        self._take(msgspec.json.decode(text, type=dict))
        self._taken = taken
        return file_name in self._files

    def _take(self, line: dict[str, Any]) -> None:
        t, p, c, z = (dict.get(line["index"], axis, 0) for axis in "tpcz")
        for name in line["stored"] if line["status"] == "written" else ():
            outer = name if name in ("raw", "restored") else "defocus"
            inner = "" if name in ("raw", "restored", "defocus") else f"{name}/"
            shard = f"0/c.{t // self._shard_frames}.{c}.{z}.0.0"
            self._files.add(f"{outer}.ome.zarr/{self._places[p]}{inner}{shard}")


_recorded = lru_cache(maxsize=1)(_Recorded)  # one for all positions of a run


def open_zarr(path: Path) -> "zarr.Group | zarr.Array[Any]":
    """Open a path for reading; of what lies in a run folder no frame is made up."""
    path = path.resolve()  # a link leads to the same frames
    run = next(filter(None, map(run_at, path.parents)), None)
    return zarr.open(path if run is None else RunStore(path, *run), mode="r")


def outermost_zarr(path: Path) -> Path:
    """Return the outermost Zarr group that a path lies in, or is."""
    outermost = path
    for parent in path.absolute().parents:
        if is_zarr(parent):
            outermost = parent
        # Rows of a plate may lack metadata of their own.
        elif not is_zarr(parent.parent):
            break
    return outermost


def read_ome_zarr(path: Path) -> list[ImageSeries]:
    """Open every image of an OME-Zarr at its full resolution.

    Raises
    ------
    InputError
        If the path is no Zarr group or holds no multiscales image.
    """
    try:
        return _read_ome_zarr(path)
    except InputError:
        raise
    # Damaged metadata make the parser raise whatever it stumbles over.
    except Exception as error:
        msg = f"'{path}' cannot be read as OME-Zarr: {one_line(error)}"
        raise InputError(msg) from error


def _read_ome_zarr(path: Path) -> list[ImageSeries]:
    root = open_zarr(path)
    if not isinstance(root, zarr.Group):
        msg = f"'{path}' is a Zarr array without OME metadata; give its OME-Zarr group"
        raise InputError(msg)
    lacking: list[str] = []
    groups = [
        replace(image, place=place or image.place)
        for name, group, place in _groups(path, root, lacking)
        for image in _describe(path, name, group)
    ]
    files = tuple(dict.fromkeys((path, outermost_zarr(path))))
    images = [replace(image, files=files) for image in _with_ome_xml(path, groups)]
    if lacking:
        first, more = lacking[0], len(lacking) - 1
        others = f" and {more} more" if more else ""
        msg = f"'{path}' lacks {first}{others}, which its metadata list"
        raise IncompleteSetError(msg, images)
    if not images:
        msg = f"'{path}' holds no OME-Zarr image (no 'multiscales' metadata)"
        raise InputError(msg)
    return images


def _groups(
    path: Path, root: zarr.Group, lacking: list[str]
) -> Iterator[tuple[str, zarr.Group, PlatePlace | None]]:
    """Yield all multiscales groups, names joined by underscores."""
    plate = _ome(root).get("plate")
    if isinstance(plate, dict):
        yield from _fields(root, plate, lacking)
        return
    companion = root.get("OME")
    listed = _ome(companion).get("series") if isinstance(companion, zarr.Group) else ()
    lacking += [f"image '{name}'" for name in listed or () if str(name) not in root]
    yield from ((name, group, None) for name, group in _images(path, root, "", 0))


def _images(
    folder: Path, group: zarr.Group, name: str, depth: int
) -> Iterator[tuple[str, zarr.Group]]:
    """Yield the images of a group, depth first, in natural order."""
    if "multiscales" in _ome(group):
        yield name, group
        return
    # zarr would warn of every folder that it did not make.
    inside = [one.name for one in folder.iterdir() if depth < _DEEPEST and is_zarr(one)]
    for key in sorted(inside, key=_natural):
        child = group[key] if key not in ("labels", "OME") else None
        if isinstance(child, zarr.Group):
            label = f"{name}_{key}" if name else key
            yield from _images(folder / key, child, label, depth + 1)


def _fields(
    root: zarr.Group, plate: dict[str, Any], lacking: list[str]
) -> Iterator[tuple[str, zarr.Group, PlatePlace]]:
    """Yield the fields of a plate's wells; note those listed that are not there."""
    wells = plate.get("wells", [])
    rows = _plate_axis(plate.get("rows"), wells, "rowIndex", 0)
    columns = _plate_axis(plate.get("columns"), wells, "columnIndex", 1)
    title = str(plate.get("name") or stem_of(Path(str(root.store_path))))
    for well in wells:
        row, column = str(well["path"]).split("/")
        group = root.get(str(well["path"]))
        if not isinstance(group, zarr.Group):
            lacking.append(f"field '{well['path']}'")
            continue
        for number, field in enumerate(_ome(group)["well"]["images"]):
            image = group.get(str(field["path"]))
            if not isinstance(image, zarr.Group):
                lacking.append(f"field '{well['path']}/{field['path']}'")
                continue
            place = PlatePlace(
                plate=title,
                rows=rows,
                columns=columns,
                row=rows.index(row),
                column=columns.index(column),
                field=number,
                acquisition=field.get("acquisition"),
            )
            yield f"{row}_{column}_{field['path']}", image, place


def _plate_axis(
    listed: object, wells: list[dict[str, Any]], key: str, part: int
) -> tuple[str, ...]:
    """Return the names of a plate's rows or columns; old ones list only wells."""
    if isinstance(listed, list) and listed:
        return tuple(str(one["name"]) for one in listed)
    names = {str(well["path"]).split("/")[part]: well.get(key, 0) for well in wells}
    return tuple(sorted(names, key=lambda name: (names[name], _natural(name))))


def _natural(key: str) -> tuple[int, str]:
    return (int(key), "") if key.isdecimal() else (1 << 30, key)


def _ome(group: zarr.Group) -> dict[str, Any]:
    attributes: dict[str, Any] = dict(group.attrs)
    inner: dict[str, Any] = attributes.get("ome", attributes)
    return inner


@dataclass(frozen=True)
class _Axis:
    name: str
    unit: str | None
    length: int
    scale: float | None


def _describe(path: Path, name: str, group: zarr.Group) -> Iterator[ImageSeries]:
    """Yield an image, once for each index of axes that are not t, c, z."""
    ome = _ome(group)
    whose = f"'{path}': image '{name}'" if name else f"'{path}'"
    try:
        array, axes = _full_resolution(ome, group)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        why = one_line(error)
        msg = f"{whose} has broken multiscales metadata: {why}; export it again"
        raise InputError(msg) from error
    lengths = {axis.name: axis.length for axis in axes}
    is_image = isinstance(array, zarr.Array) and {"y", "x"} <= set(lengths)
    if not is_image or 0 in lengths.values():
        msg = f"{whose} has axes {lengths}; it needs y and x, and none of length 0"
        raise InputError(msg)
    own = [axis for axis in axes if axis.name not in "tczyx"]
    if math.prod(axis.length for axis in own) > MOST_IMAGES:
        msg = f"{whose} has more than {MOST_IMAGES} images"
        raise InputError(msg)
    if math.prod(lengths.get(axis, 1) for axis in "tcz") > MOST_PLANES:
        msg = f"{whose} has more than {MOST_PLANES} planes"
        raise InputError(msg)
    facts = _facts(ome, axes, lengths.get("c", 1))
    notes = _unread_transformations(ome["multiscales"][0])
    if (several := len(ome["multiscales"])) > 1:
        notes += (f"the first of {several} multiscales is read, the others left out",)
    for place in itertools.product(*(range(axis.length) for axis in own)):
        fixed = {axis.name: n for axis, n in zip(own, place, strict=True)}
        parts = [stem_of(path), name, *(f"{axis}{n}" for axis, n in fixed.items())]
        yield ImageSeries(
            name="_".join(part for part in parts if part),
            path=path,
            sizes={axis: lengths.get(axis, 1) for axis in "tcz"},
            shape=(lengths["y"], lengths["x"]),
            dtype=native_dtype(array.dtype),
            read_plane=_plane_reader(array, [axis.name for axis in axes], fixed),
            pixels=path / array.path,
            notes=notes,
            **facts,
        )


def _full_resolution(ome: dict[str, Any], group: zarr.Group) -> tuple[Any, list[_Axis]]:
    """Return the largest array of the first multiscales and its axes."""
    if not ome["multiscales"]:
        msg = "it lists no image"
        raise ValueError(msg)
    scales = ome["multiscales"][0]
    if "coordinateSystems" in scales:
        msg = "its version is newer than 0.5, which is the last that is read"
        raise ValueError(msg)
    if not scales["datasets"]:
        msg = "it names no array"
        raise ValueError(msg)
    level = scales["datasets"][0]
    if level["path"] not in group:
        msg = f"it names the array '{level['path']}', which is not there"
        raise ValueError(msg)
    array = group[level["path"]]
    return array, _axes(scales, level, getattr(array, "shape", ()))


def _axes(
    scales: dict[str, Any], level: dict[str, Any], shape: tuple[int, ...]
) -> list[_Axis]:
    """Return the axes with the scale of the data set times the global one."""
    # Up to version 0.2 an image has these five axes and does not say so.
    listed = scales.get("axes") or list("tczyx")
    named = [one if isinstance(one, dict) else {"name": one} for one in listed]
    steps = _scale_of(level, len(shape))
    factors = _scale_of(scales, len(shape))
    if len(named) != len(shape):
        msg = f"it names {len(named)} axes of an array that has {len(shape)}"
        raise ValueError(msg)
    axes = []
    for axis, length, step, factor in zip(named, shape, steps, factors, strict=True):
        known = [number for number in (step, factor) if number is not None]
        scale = float(np.prod(known)) if known else None
        axes.append(_Axis(str(axis["name"]).lower(), axis.get("unit"), length, scale))
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        msg = f"axes {names} have one name twice"
        raise ValueError(msg)
    return axes


def _scale_of(holder: dict[str, Any], ndim: int) -> list[float | None]:
    for transform in holder.get("coordinateTransformations") or []:
        if transform.get("type") == "scale" and "scale" in transform:
            scale = [positive(number) for number in transform["scale"]]
            if len(scale) != ndim:
                msg = f"a scale of {len(scale)} numbers for {ndim} axes"
                raise ValueError(msg)
            return scale
    return [None] * ndim


def _unread_transformations(scales: dict[str, Any]) -> tuple[str, ...]:
    """Tell of what places or scales an image in a way that is not understood."""
    notes = []
    for holder in (scales["datasets"][0], scales):
        for transform in holder.get("coordinateTransformations") or []:
            kind = transform.get("type")
            if kind not in ("scale", "translation", "identity"):
                notes.append(f"its transformation of type '{kind}' is not read")
            elif kind == "scale" and None in map(positive, transform.get("scale", ())):
                numbers = one_line(ValueError(transform["scale"]))
                notes.append(f"its scale {numbers} is not positive along every axis")
    remedy = "; sizes that it would give are unknown: state those that count"
    return tuple(note + remedy for note in notes)


def _facts(ome: dict[str, Any], axes: list[_Axis], channels: int) -> Facts:
    lengths = {axis.name: length_um(axis.scale, axis.unit) for axis in axes}
    times = {axis.name: time_s(axis.scale, axis.unit) for axis in axes}
    return {
        "pixel_size_y_um": lengths["y"],
        "pixel_size_x_um": lengths["x"],
        "z_step_um": lengths.get("z"),
        "time_step_s": times.get("t"),
        "channels": _channels(ome, channels),
    }


def _channels(ome: dict[str, Any], count: int) -> tuple[ImageChannel, ...]:
    omero = ome.get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(listed, list) or len(listed) != count:
        return ()
    return tuple(_channel(one if isinstance(one, dict) else {}) for one in listed)


def _channel(one: dict[str, Any]) -> ImageChannel:
    label, color, window = one.get("label"), one.get("color"), one.get("window")
    display = None
    if isinstance(window, dict):
        start, end = finite(window.get("start")), finite(window.get("end"))
        if start is not None and end is not None:
            low, high = finite(window.get("min")), finite(window.get("max"))
            display = ContrastWindow(start=start, end=end, low=low, high=high)
    return ImageChannel(
        name=str(label) if label not in (None, "") else None,
        color=_color(color),
        window=display,
    )


def _color(text: object) -> str | None:
    digits = str(text).removeprefix("#").upper()
    valid = len(digits) in (6, 8) and all(c in "0123456789ABCDEF" for c in digits)
    return digits[:6] if valid else None


def _with_ome_xml(path: Path, images: list[ImageSeries]) -> list[ImageSeries]:
    """Fill in what a bioformats2raw collection keeps in OME/METADATA.ome.xml."""
    companion = path / "OME" / "METADATA.ome.xml"
    if not companion.is_file():
        return images
    described = read_ome_xml(companion.read_bytes()).images
    if len(described) != len(images):
        return images
    return [_with_ome(image, one) for image, one in zip(images, described, strict=True)]


def _with_ome(image: ImageSeries, one: OmeImage) -> ImageSeries:
    facts = one.facts
    fitting = len(facts.get("channels", ())) == image.sizes["c"]
    return replace(
        image,
        name=f"{stem_of(image.path)}_{one.name}" if one.name else image.name,
        channels=image.channels or (facts.get("channels", ()) if fitting else ()),
        numerical_aperture=facts.get("numerical_aperture"),
        refractive_index=facts.get("refractive_index"),
        position=facts.get("position"),
        stage=facts.get("stage"),
        z_rises=facts.get("z_rises"),
        place=image.place or facts.get("place"),
    )


def _plane_reader(
    array: "zarr.Array[Any]", axes: list[str], fixed: dict[str, int]
) -> Callable[[int, int, int], NDArray[np.generic]]:
    """Return what reads a plane of an array whose axes are in any order."""
    is_upright = axes.index("y") < axes.index("x")

    def read(t: int, c: int, z: int) -> NDArray[np.generic]:
        place = {"t": t, "c": c, "z": z, **fixed}
        plane = np.asarray(array[tuple(place.get(axis, slice(None)) for axis in axes)])
        return plane if is_upright else plane.T

    return read
