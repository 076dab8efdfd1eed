"""TIFF: plain, ImageJ, OME and Micro-Manager files through tifffile.

Axes other than t, c, z (positions, tiles, angles ...) make images of their own.
Axes that the file does not name take, outermost first, those of t, z, c that are
free; an innermost one of at most 4 beside another is c. The user gets a note.
"""

import itertools
import logging
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from rtfocus.errors import InputError, one_line
from rtfocus.images.metadata import TIFF_ENDINGS
from rtfocus.images.ome_xml import OmeImage, OmeMetadata, read_ome_xml
from rtfocus.images.series import (
    MOST_IMAGES,
    MOST_PLANES,
    Facts,
    ImageSeries,
    IncompleteSetError,
    native_dtype,
    stem_of,
)
from rtfocus.images.tiff_file import (
    Layout,
    OpenTiff,
    TiffPlanes,
    imagej_facts,
    plain_facts,
    stack_facts,
)

# What it warns of is harmless, or we report it as a note or an error.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

_COLOURS = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
_NEEDED = (270, 273, 279, 324, 325, 50839, 51123)
"""Tags of which nothing may lack: where the pixels lie, and what they are."""
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 16: 8}  # of a number of each type
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)


def read_tiff(path: Path) -> list[ImageSeries]:
    """Open every image of a TIFF and of the set it belongs to.

    Raises
    ------
    InputError
        If it is no TIFF, holds no image, or a file of its set is missing.
    """
    try:
        return _read_tiff(path)
    except InputError:
        raise
    # A damaged file makes the parser raise whatever it stumbles over.
    except Exception as error:
        msg = f"'{path}' cannot be read as TIFF: {one_line(error)}"
        raise InputError(msg) from error


def _read_tiff(path: Path, companion: str | None = None) -> list[ImageSeries]:
    source = OpenTiff(path, companion)
    with source.opened() as file:
        ome = _ome_of(file, companion)
        if ome is not None and ome.master is not None and companion is None:
            return _read_through_master(path, ome.master)
        _refuse_broken_index(path, file)
        files = _files_of_set(path, file, ome)
        missing = [file for file in files if not file.is_file()]
        series = list(file.series)
        _refuse_cut_off(path, file, series)
        facts = _facts_of(file, series, ome)
        images = [
            image
            for number, one in enumerate(series)
            if not missing or _is_whole(number, series, ome, missing)
            for image in _describe(source, files, number, one, facts[number])
        ]
    if missing:
        names = ", ".join(f"'{file.name}'" for file in missing)
        msg = f"'{path}' belongs to a set of files that lacks {names}; put it beside it"
        raise IncompleteSetError(msg, _name_images(path, images))
    if not images:
        msg = f"'{path}' holds no image"
        raise InputError(msg)
    return _name_images(path, images)


def _is_whole(
    number: int,
    series: list[tifffile.TiffPageSeries],
    ome: OmeMetadata | None,
    missing: list[Path],
) -> bool:
    """Tell whether a series of a set needs none of its missing files."""
    if ome is None or series[number].kind != "ome":
        return False
    image = _matched(series, ome.images)[number]
    needed = {Path(name.replace("\\", "/")).name for name in image.files.values()}
    return bool(image.sizes) and not needed & {file.name for file in missing}


def _read_through_master(path: Path, master: str) -> list[ImageSeries]:
    """Read a file whose metadata lie in another one, which is named in it."""
    beside = path.parent / Path(master).name
    if not beside.is_file():
        msg = f"'{path}' needs '{beside}', which is missing; put it beside"
        raise InputError(msg)
    if beside.suffix.lower() in TIFF_ENDINGS:
        return _read_tiff(beside)
    return [
        replace(image, files=(*image.files, beside))
        for image in _read_tiff(path, beside.read_text("utf-8"))
    ]


def _refuse_broken_index(path: Path, file: tifffile.TiffFile) -> None:
    """Refuse a Micro-Manager stack of more planes than tifffile could list."""
    if not file.is_mmstack:
        return
    metadata = file.micromanager_metadata or {}
    summary, index = metadata["Summary"], metadata["IndexMap"]
    keys = ("Channels", "Slices", "Frames", "Positions")
    lengths = [
        max(int(most) + 1, int(summary.get(key, 1)))
        for most, key in zip(index[:, :4].max(axis=0), keys, strict=True)
    ]
    if math.prod(lengths) > MOST_PLANES:
        msg = f"'{path}': its index asks for {lengths} planes; it is broken"
        raise InputError(msg)


def _ome_of(file: tifffile.TiffFile, companion: str | None) -> OmeMetadata | None:
    if companion is not None:
        return read_ome_xml(companion)
    return read_ome_xml(file.ome_metadata) if file.ome_metadata else None


def _files_of_set(
    path: Path, file: tifffile.TiffFile, ome: OmeMetadata | None
) -> tuple[Path, ...]:
    """Return all files of the set that a file belongs to, itself first."""
    files = [path]
    if ome is not None:
        files += _named_files(path, ome)
        if ome.master is not None:
            files.append(path.parent / Path(ome.master).name)
    for series in file.series:
        if series.is_multifile:
            pages = (page for page in series if page is not None)
            files += [path.parent / page.parent.filehandle.name for page in pages]
    return tuple(dict.fromkeys(files))


def _named_files(path: Path, ome: OmeMetadata) -> Iterator[Path]:
    """Yield the other files that OME-XML names; this one may have been renamed."""
    named = {uuid: name for image in ome.images for uuid, name in image.files.items()}
    alone = len(named) == 1 and ome.uuid is None
    for uuid, name in named.items():
        other = path.parent / Path(name.replace("\\", "/")).name
        if uuid == ome.uuid or alone or other.name.lower() == path.name.lower():
            continue
        yield other


def _facts_of(
    file: tifffile.TiffFile,
    series: list[tifffile.TiffPageSeries],
    ome: OmeMetadata | None,
) -> list[list[tuple[str, Facts]]]:
    """Return names and metadata of each series, one for each of its positions."""
    if ome is not None and series and series[0].kind == "ome":
        plain = plain_facts(file)
        return [
            [_with_size((one.name, one.facts), plain)]
            for one in _matched(series, ome.images)
        ]
    if series and series[0].kind == "mmstack":
        return [stack_facts(file, ome)]
    facts = imagej_facts(file) if file.is_imagej else plain_facts(file)
    return [[(one.name, facts)] for one in series]


def _with_size(named: tuple[str, Facts], plain: Facts) -> tuple[str, Facts]:
    """Take the pixel size of the TIFF tags where the OME-XML has none."""
    name, facts = named
    if facts.get("pixel_size_x_um") is None and facts.get("pixel_size_y_um") is None:
        return name, {**facts, **plain}
    return named


def _matched(
    series: list[tifffile.TiffPageSeries], images: list[OmeImage]
) -> list[OmeImage]:
    """Return the Image element of each series; tifffile leaves out empty ones."""
    left = iter(images)
    matches: list[OmeImage] = []
    for one in series:
        lengths = dict(zip(one.axes, one.shape, strict=True))
        for image in left:
            same_size = image.sizes["y"] == lengths.get("Y")
            if image.name == one.name and (same_size or len(series) == len(images)):
                matches.append(image)
                break
        else:
            matches.append(OmeImage(name=one.name, sizes={}, facts={}))
    return matches


def _describe(
    source: OpenTiff,
    files: tuple[Path, ...],
    number: int,
    series: tifffile.TiffPageSeries,
    named_facts: list[tuple[str, Facts]],
) -> Iterator[ImageSeries]:
    """Yield a series, once for each index of its axes that are not t, c, z."""
    _refuse_packed(source.path, series)
    axes, unnamed, axis_notes = _canonical_axes(series.axes, series.shape)
    lengths = dict(zip(axes, series.shape, strict=True))
    samples, rgb, more = _samples(series, lengths.get("S", 1))
    dtype = np.dtype(series.dtype)
    if dtype.kind == "c":
        msg = f"'{source.path}' has complex pixels; save magnitude or parts as real"
        raise InputError(msg)
    own = [axis for axis in axes if axis not in "TCZYXS"]
    if math.prod(lengths[axis] for axis in own) > MOST_IMAGES:
        msg = f"'{source.path}' has more than {MOST_IMAGES} images"
        raise InputError(msg)
    sizes = {axis: lengths.get(axis.upper(), 1) for axis in "tcz"}
    sizes["c"] *= 1 if rgb else samples
    gaps = _gaps(series, axes)
    for place in itertools.product(*(range(lengths[axis]) for axis in own)):
        fixed = dict(zip(own, place, strict=True))
        written, gaps_told = _count_planes(gaps, axes, fixed)
        if not written:  # a position that an aborted acquisition never came to
            continue
        layout = Layout(axes, series.shape, fixed, samples, rgb)
        position = fixed.get("R", 0)
        name, facts = named_facts[position if len(named_facts) > position else 0]
        label = "_".join([name or "", *(f"{a.lower()}{n}" for a, n in fixed.items())])
        if len(named_facts) > 1 and own == ["R"]:
            label = name
        yield ImageSeries(
            name=label.strip("_") or str(number),
            path=_path_of(series, source.path),
            sizes=sizes,
            shape=(lengths["Y"], lengths["X"], *((samples,) if rgb else ())),
            dtype=native_dtype(dtype),
            read_plane=TiffPlanes(source, number, layout),
            files=files,
            notes=(*axis_notes, *more, *gaps_told),
            unnamed_axes=unnamed,
            **_fitting(facts, sizes["c"]),
        )


def _fitting(facts: Facts, channels: int) -> Facts:
    """Drop channels whose number is not that of the pixels."""
    if len(facts.get("channels", ())) == channels:
        return facts
    return {**facts, "channels": ()}


def _path_of(series: tifffile.TiffPageSeries, path: Path) -> Path:
    """Return the file in which a series begins."""
    name = str(series.keyframe.parent.filehandle.name)
    # tifffile follows links: the file that was opened keeps the name it was given.
    real = path.resolve()
    if name == real.name:
        return path
    return (real if path.is_symlink() else path).parent / name


def _refuse_cut_off(
    path: Path, file: tifffile.TiffFile, series: list[tifffile.TiffPageSeries]
) -> None:
    """Refuse a file that ends before its pixels, before any work is done on it."""
    needed = 0
    for one in series:
        if 0 in one.shape:
            msg = f"'{path}' has an image of {one.shape}: no pixels; copy it again"
            raise InputError(msg)
        offset = None if one.is_multifile else one.dataoffset
        if offset is not None:
            size = int(np.prod(one.shape, dtype=np.int64))
            needed = max(needed, offset + size * np.dtype(one.dtype).itemsize)
            continue
        for page in one:
            if page is not None and page.parent is file:
                ends = zip(page.dataoffsets, page.databytecounts, strict=False)
                needed = max(needed, *(sum(end) for end in ends), 0)
    needed = max(needed, *(_end_of_page(file, file.pages[n].offset) for n in (0, -1)))
    if needed > file.filehandle.size:
        msg = (
            f"'{path}' is cut off: it needs {needed} bytes at least, it has "
            f"{file.filehandle.size}; copy it again"
        )
        raise InputError(msg)


def _end_of_page(file: tifffile.TiffFile, at: int) -> int:
    """Return where a page's tags end, and those of a page beyond: tifffile skips it."""
    form, handle = file.tiff, file.filehandle
    handle.seek(at)
    (count,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    entries = handle.read(count * form.tagsize)
    (following,) = struct.unpack(form.offsetformat, handle.read(form.offsetsize))
    end = handle.tell()
    for start in range(0, len(entries), form.tagsize):
        code, kind = struct.unpack_from(form.tagformat1, entries, start)
        number, value = struct.unpack_from(form.tagformat2, entries, start + 4)
        size = number * _BYTES.get(kind, 0)
        if code in _NEEDED and size > form.tagoffsetthreshold:
            end = max(end, struct.unpack(form.offsetformat, value)[0] + size)
    if file.pages[-1].offset <= at < following < handle.size:
        return max(end, _end_of_page(file, following))
    return max(end, following + 1 if following else 0)


def _refuse_packed(path: Path, series: tifffile.TiffPageSeries) -> None:
    """Refuse what tifffile cannot unpack by itself where imagecodecs is missing."""
    page = series.keyframe
    known = tifffile.TIFF.DECOMPRESSORS, tifffile.TIFF.UNPREDICTORS
    if page.compression not in known[0] or page.predictor not in known[1]:
        kind = getattr(page.compression, "name", page.compression)
        import_imagecodecs(path, f"is compressed by {kind}")


def _gaps(series: tifffile.TiffPageSeries, axes: str) -> NDArray[np.bool_] | None:
    """Return which planes were never written, over the axes that pages have."""
    if series.kind not in ("ome", "mmstack"):
        return None
    outer = [n for n, axis in enumerate(axes) if axis not in "YXS"]
    gaps = np.array([page is None for page in series], dtype=bool)
    lengths = [series.shape[n] for n in outer]
    return gaps.reshape(lengths) if gaps.size == np.prod(lengths) else None


def _count_planes(
    gaps: NDArray[np.bool_] | None, axes: str, fixed: dict[str, int]
) -> tuple[int, list[str]]:
    """Return how many planes of one image were written, and notes about gaps."""
    if gaps is None:
        return 1, []
    outer = [axis for axis in axes if axis not in "YXS"]
    own = gaps[tuple(fixed.get(axis, slice(None)) for axis in outer)]
    missing = int(own.sum())
    note = f"{missing} of {own.size} planes were never written; they are 0"
    return own.size - missing, [note] if missing else []


def _name_images(path: Path, images: list[ImageSeries]) -> list[ImageSeries]:
    """Name images after their file; of several in one file each by its own name."""
    if len({image.path for image in images}) == len(images):
        return [replace(image, name=stem_of(image.path)) for image in images]
    stem = stem_of(path)
    return [
        replace(
            image,
            name=image.name if image.name.startswith(stem) else f"{stem}_{image.name}",
        )
        for image in images
    ]


def _canonical_axes(axes: str, shape: tuple[int, ...]) -> tuple[str, str, list[str]]:
    """Give unnamed axes (I, Q) a name among T, Z, C, and say so.

    Raises
    ------
    ValueError
        If there are more of them than names, or two axes with one name.
    """
    known = list(axes)
    unnamed = [i for i, axis in enumerate(axes) if axis in "IQ"]
    free = [axis for axis in "TZC" if axis not in known]
    given: dict[int, str] = {}
    if len(unnamed) > 1 and shape[unnamed[-1]] <= 4 and "C" in free:
        given[unnamed.pop()] = "C"
        free.remove("C")
    for place in unnamed:
        if not free:
            msg = (
                f"axes '{axes}' of {shape} have more than three without a name; save "
                "it as OME-TIFF, which names them"
            )
            raise ValueError(msg)
        given[place] = free.pop(0)
    for place, axis in given.items():
        known[place] = axis
    if len(set(known)) != len(known) or not {"Y", "X"} <= set(known):
        msg = f"axes '{axes}' are not t, c, z, y, x, rgb and positions"
        raise ValueError(msg)
    notes = [
        f"the file does not say what its axis of {shape[place]} planes is; "
        f"read as {axis.lower()}"
        for place, axis in sorted(given.items())
    ]
    return "".join(known), "".join(given.values()).lower(), notes


def _samples(
    series: tifffile.TiffPageSeries, samples: int
) -> tuple[int, bool, list[str]]:
    """Return how many samples of a pixel are read, whether they are RGB, and notes."""
    page = series.keyframe
    notes = []
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
        notes.append("the colours of its palette are left out")
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        notes.append("0 is white in the file; values are kept as they are")
    extra = [kind for kind in page.extrasamples if kind in _ALPHA]
    # An alpha channel lies between colours. Programs that take a stack of four images
    # for colours write planes, and call the fourth alpha: it is an image.
    is_apart = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    if samples > 1 and extra and len(page.extrasamples) == 1 and not is_apart:
        samples -= 1
        notes.append("its alpha channel is left out")
    return samples, page.photometric in _COLOURS and samples == 3, notes


def import_imagecodecs(path: Path, why: str) -> Any:  # noqa: ANN401 no type stubs
    """Return the module ``imagecodecs``, which the extra ``codecs`` brings.

    Parameters
    ----------
    path, why
        File that needs it, and what the file has, for the message.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        return import_module("imagecodecs")
    except ImportError as error:
        msg = f"'{path}' {why}: pip install \"rtfocus[codecs]\", or save it without"
        raise InputError(msg) from error
