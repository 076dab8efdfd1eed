"""Micro-Manager folders: NDTiff data sets, and one TIFF per frame.

NDTiff is read by its index (tifffile reads the entries): tifffile's own series have
no place for positions or for rows and columns of tiles, and the ndstorage package
brings dask. Each combination of axes beyond time, channel and z is an image.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from rtfocus.errors import InputError, one_line
from rtfocus.images.series import (
    Facts,
    ImageChannel,
    ImageSeries,
    StagePosition,
    native_dtype,
    rising,
)
from rtfocus.images.tiff import read_tiff
from rtfocus.images.tiff_file import frame_facts, known_facts, summary_facts

INDEX = "NDTiff.index"
_AXES = ("time", "channel", "z")
"""Axes of one image."""
# Pixel types of the index: bytes of one sample, samples.
_PIXELS = {0: ("u1", 1), 2: ("u1", 3), **dict.fromkeys((1, 3, 4, 5, 6), ("u2", 1))}
# Versions 2.0 and 1.4 of the one-file-per-frame storage.
_NAMES = (
    re.compile(
        r"img_channel(?P<channel>\d+)_position(?P<position>\d+)"
        r"_time(?P<time>\d+)_z(?P<z>\d+)\.tiff?",
        re.IGNORECASE,
    ),
    re.compile(
        r"img_(?P<time>\d{6,9})_(?P<channel>.+)_(?P<z>\d{3})\.tiff?", re.IGNORECASE
    ),
)
_MOST_GAPS = 1000
"""Planes that an index may ask for each one it has; more come from a broken file."""

Value = int | str


@dataclass(frozen=True)
class Frame:
    """One plane of a data set: its place, and where its pixels lie."""

    axes: dict[str, Value]
    file: Path
    offset: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = "u2"
    metadata: tuple[int, int] = (0, 0)
    """Offset and length of its JSON in the file."""


def is_ndtiff(folder: Path) -> bool:
    """Tell whether a folder is an NDTiff data set."""
    return os.path.isfile(folder / INDEX)


def ndtiff_files(folder: Path) -> set[str]:
    """Return the names of the files of an NDTiff data set."""
    try:
        return {entry[1] for entry in tifffile.read_ndtiff_index(folder / INDEX)}
    # A damaged index makes the parser raise whatever it stumbles over.
    except Exception:
        return set()


def read_ndtiff(folder: Path) -> list[ImageSeries]:
    """Open every image of an NDTiff data set.

    Raises
    ------
    InputError
        If the index is broken or a file that it names is missing.
    """
    try:
        frames = list(_ndtiff_frames(folder))
        absent = next((f.file for f in frames if not f.file.is_file()), None)
        if absent is not None:
            msg = f"'{folder}' lacks '{absent.name}', which its index names; copy it"
            raise InputError(msg)
        if not frames:
            msg = f"'{folder}' holds no image: its {INDEX} is empty or broken"
            raise InputError(msg)
        return list(_images(folder, frames, _ndtiff_facts, _read_ndtiff))
    except InputError:
        raise
    # A damaged index makes the parser raise whatever it stumbles over.
    except Exception as error:
        msg = f"'{folder}' cannot be read as NDTiff: {one_line(error)}"
        raise InputError(msg) from error


def _ndtiff_frames(folder: Path) -> Iterator[Frame]:
    for entry in tifffile.read_ndtiff_index(folder / INDEX):
        axes, name, offset, width, height, kind, compression, *metadata = entry
        if kind not in _PIXELS or compression:
            msg = f"pixel type {kind}, compression {compression} are not known"
            raise ValueError(msg)
        if Path(name).name != name or min(width, height) < 1:
            msg = f"file '{name}' with {height} x {width} pixels is none of a data set"
            raise ValueError(msg)
        dtype, samples = _PIXELS[kind]
        colours = (samples,) if samples > 1 else ()
        yield Frame(
            axes={str(axis).lower(): value for axis, value in axes.items()},
            file=folder / name,
            offset=offset,
            shape=(height, width, *colours),
            dtype=dtype,
            metadata=(metadata[0], metadata[1]),
        )


def _ndtiff_facts(frames: list[Frame]) -> Facts:
    """Return what the summary and the metadata of the first frames say."""
    try:
        with tifffile.FileHandle(frames[0].file) as file:
            summary = tifffile.read_micromanager_metadata(file, {"Summary"})
        stack = [frame_facts(_metadata(frame)) for frame in _first_stack(frames)]
    except (OSError, ValueError, struct.error):
        return {}
    facts: Facts = {**summary_facts(summary.get("Summary") or {}), **stack[0]}
    return facts | _of_stage(stack)


def _metadata(frame: Frame) -> dict[str, Any]:
    with frame.file.open("rb") as file:
        file.seek(frame.metadata[0])
        found = json.loads(file.read(frame.metadata[1]))
    return found if isinstance(found, dict) else {}


def _first_stack(frames: list[Frame]) -> list[Frame]:
    """Return the first frame and the next above or below it, in the order of z."""
    others = [
        frame
        for frame in frames
        if {**frame.axes, "z": 0} == {**frames[0].axes, "z": 0}
        and frame.axes.get("z") != frames[0].axes.get("z")
    ]
    return sorted(
        (frames[0], *others[:1]),
        key=lambda frame: _order((("z", frame.axes.get("z", 0)),)),
    )


def _of_stage(stack: list[Facts]) -> Facts:
    """Return where the stage stood at the first frame, and which way z runs."""
    places = [one.get("stage") or StagePosition() for one in stack]
    rises = rising([place.z_um for place in places])
    return known_facts({"stage": stack[0].get("stage"), "z_rises": rises})


def _read_ndtiff(frame: Frame) -> NDArray[np.generic]:
    with frame.file.open("rb") as file:
        order = ">" if file.read(2) == b"MM" else "<"
        file.seek(frame.offset)
        dtype = np.dtype(frame.dtype).newbyteorder(order)  # type: ignore[arg-type]
        size = int(np.prod(frame.shape)) * dtype.itemsize
        data = file.read(size)
    if len(data) < size:
        msg = f"'{frame.file.name}' ends before it"
        raise OSError(msg)
    return np.frombuffer(data, dtype).reshape(frame.shape)


def take_frames(files: list[Path]) -> list[Path]:
    """Return those files of one folder that are named as Micro-Manager's frames."""
    for pattern in _NAMES:
        frames = [file for file in files if pattern.fullmatch(file.name)]
        if frames:
            return frames
    return []


def read_frames(folder: Path, files: list[Path]) -> list[ImageSeries]:
    """Open the frames of one folder as images with axes.

    Raises
    ------
    InputError
        If the first frame cannot be read.
    """
    frames = [frame for file in files for frame in _named_frame(file)]
    (first, *_) = read_tiff(frames[0].file)
    frames = [
        replace(frame, shape=first.shape, dtype=first.dtype.str) for frame in frames
    ]
    companions = (
        [folder / "metadata.txt"] if (folder / "metadata.txt").is_file() else []
    )
    summary = _summary(companions[0]) if companions else {}
    known: Facts = {
        "pixel_size_y_um": first.pixel_size_y_um,
        "pixel_size_x_um": first.pixel_size_x_um,
    }
    common: Facts = {**summary_facts(summary), **known_facts(known)}

    def facts_of(group: list[Frame]) -> Facts:
        stack = [read_tiff(frame.file)[0].stage for frame in _first_stack(group)]
        return common | _of_stage([{"stage": stage} for stage in stack])

    return [
        replace(image, files=(*image.files, *companions))
        for image in _images(folder, frames, facts_of, _read_frame)
    ]


def _named_frame(file: Path) -> Iterator[Frame]:
    for pattern in _NAMES:
        match = pattern.fullmatch(file.name)
        if match:
            axes = {
                k: int(v) if v.isdecimal() else v for k, v in match.groupdict().items()
            }
            yield Frame(axes=axes, file=file)
            return


def _read_frame(frame: Frame) -> NDArray[np.generic]:
    return read_tiff(frame.file)[0].read()


def _summary(path: Path) -> dict[str, Any]:
    """Return the summary of metadata.txt, also of one that was cut off."""
    try:
        text = path.read_text("utf-8", errors="replace")
        start = text.index("{", text.index('"Summary"'))
        summary, _ = json.JSONDecoder().raw_decode(text, start)
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _images(
    folder: Path,
    frames: list[Frame],
    facts_of: Callable[[list[Frame]], Facts],
    read: Callable[[Frame], NDArray[np.generic]],
) -> Iterator[ImageSeries]:
    """Yield one image per combination of the axes that are not t, c, z."""
    groups: dict[tuple[tuple[str, Value], ...], list[Frame]] = {}
    for frame in frames:
        beyond = [(a, v) for a, v in frame.axes.items() if a not in _AXES]
        beyond.sort(key=lambda one: (one[0] == "column", one[0]))
        groups.setdefault(tuple(beyond), []).append(frame)
    files = tuple(dict.fromkeys(frame.file for frame in frames))
    names = _channel_names(frames, facts_of(frames))
    for place in sorted(groups, key=_order):
        group = groups[place]
        label = "_".join(v if isinstance(v, str) else f"{a}{v}" for a, v in place)
        image = _image(folder, group, names, read)
        merged = facts = facts_of(group)
        merged["channels"] = _channels(names, facts, image.sizes["c"])
        if label:
            merged["position"] = label
        several = len(groups) > 1
        yield replace(
            image,
            name=f"{folder.name}_{label}" if label and several else folder.name,
            files=(folder, *files),
            **merged,
        )


def _order(place: tuple[tuple[str, Value], ...]) -> list[tuple[str, bool, int, str]]:
    return [
        (a, isinstance(v, str), v if isinstance(v, int) else 0, str(v))
        for a, v in place
    ]


def _channel_names(frames: list[Frame], facts: Facts) -> list[Value]:
    """Return the values of axis c in the file's order."""
    met = dict.fromkeys(frame.axes.get("channel", 0) for frame in frames)
    named = [channel.name for channel in facts.get("channels", ())]
    if all(isinstance(value, int) for value in met):
        return sorted(met, key=int)
    if set(met) <= set(named):
        return [name for name in named if name in met]
    return list(met)


def _channels(names: list[Value], facts: Facts, count: int) -> tuple[ImageChannel, ...]:
    """Return the channels by name, with what the summary says of them."""
    known = facts.get("channels", ())
    by_name = {channel.name: channel for channel in known}
    channels = [
        known[name]
        if isinstance(name, int) and 0 <= name < len(known)
        else by_name.get(str(name), ImageChannel(name=str(name)))
        if isinstance(name, str)
        else ImageChannel()
        for name in names
    ]
    return tuple(channels) if len(channels) == count else ()


def _image(
    folder: Path,
    frames: list[Frame],
    channels: list[Value],
    read: Callable[[Frame], NDArray[np.generic]],
) -> ImageSeries:
    first = frames[0]
    other = next(
        (f for f in frames if (f.shape, f.dtype) != (first.shape, first.dtype)), None
    )
    if other is not None:
        msg = f"'{folder}': frames of {first.shape} and of {other.shape} in one image"
        raise InputError(msg)
    times = _values(folder, frames, "time")
    depths = _values(folder, frames, "z")
    places = {
        (
            times.index(frame.axes.get("time", 0)),
            channels.index(frame.axes.get("channel", 0)),
            depths.index(frame.axes.get("z", 0)),
        ): frame
        for frame in frames
    }
    planes = len(times) * len(channels) * len(depths)
    if planes > _MOST_GAPS * len(frames):
        msg = (
            f"'{folder}': {len(frames)} frames of {planes} planes; its index is broken"
        )
        raise InputError(msg)
    dtype = np.dtype(first.dtype)

    def read_plane(t: int, c: int, z: int) -> NDArray[np.generic]:
        frame = places.get((t, c, z))
        return np.zeros(first.shape, dtype) if frame is None else read(frame)

    missing = planes - len(places)
    note = f"{missing} of {planes} planes were never written; they are 0"
    return ImageSeries(
        name=folder.name,
        path=folder,
        sizes={"t": len(times), "c": len(channels), "z": len(depths)},
        shape=first.shape,
        dtype=native_dtype(dtype),
        read_plane=read_plane,
        notes=(note,) if missing else (),
    )


def _values(folder: Path, frames: list[Frame], axis: str) -> list[Value]:
    """Return all indices of an axis; numbers left out between them are gaps."""
    met = dict.fromkeys(frame.axes.get(axis, 0) for frame in frames)
    numbers = [value for value in met if isinstance(value, int)]
    if len(numbers) < len(met):
        return list(met)
    span = max(numbers) - min(numbers) + 1
    if span > _MOST_GAPS * len(frames):
        msg = f"'{folder}': axis {axis} of {span} planes has {len(met)}; it is broken"
        raise InputError(msg)
    return list(range(min(numbers), max(numbers) + 1))
