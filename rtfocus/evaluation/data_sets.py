"""Data sets: the frames that a name on the command line stands for.

**Real**: planes whose distance from focus is known, published or a user's own. Rows a19
to a24 of the BBBC006 pairs and field A in actin are for validation: no shipped engine
was trained on them. A user's own pairs are ``sharp/`` beside one folder of blurred
images.

**Synthetic**: sharp validation images blurred at every level, then photographed. The
defocus is known exactly and so is the PSF: what a method leaves is its own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import InputError
from rtfocus.evaluation.samples import (
    BBBC006,
    LEVELS,
    SHARP_GROUP,
    STEP_UM,
    DataSet,
    Field,
    Sample,
    as_light,
    matching_tiffs,
    middle,
    packages,
    plane_name,
    read_plane,
    unseen,
)
from rtfocus.evaluation.scores import LEAST_SIDE_PX
from rtfocus.images.optics import in_short
from rtfocus.images.reading import find_images, open_images
from rtfocus.images.series import ImageSeries
from rtfocus.optics.formation import CameraModel, blur
from rtfocus.optics.normalisation import luminance
from rtfocus.optics.psf import compute_psf

SHARP_FOLDER = "sharp"


def folder_set(folder: Path, optics: OpticalSystem, *, offset_counts: float) -> DataSet:
    """Return the pairs of a folder, matched by file name.

    Parameters
    ----------
    folder
        Holds ``sharp`` and one or more other folders; each of these is a group.
    optics
        Of the images.
    offset_counts
        Of the camera in the dark.

    Raises
    ------
    InputError
        If there is no such folder or no image has a partner. An image that cannot be
        read is a field that says so.
    """
    sharp = folder / SHARP_FOLDER
    others = [
        place
        for place in sorted(folder.iterdir() if folder.is_dir() else ())
        if place.is_dir() and place != sharp
    ]
    if not sharp.is_dir() or not others:
        msg = (
            f"'{folder}' is no data set: needed are a folder '{SHARP_FOLDER}' and "
            "beside it folders of blurred images with the same file names"
        )
        raise InputError(msg)
    found = {place: find_images(place) for place in (sharp, *others)}
    truth = {series.name: series for series in found[sharp].series}
    pairs = [
        Field(
            f"{place.name} {series.name}",
            partial(_samples, place.name, series, truth[series.name]),
        )
        for place in others
        for series in found[place].series
        if series.name in truth
    ]
    if not pairs:
        msg = (
            f"no image below '{folder}' has the name of one in '{sharp}'; give images "
            "of one place the same name in both"
        )
        raise InputError(msg)
    title = f"{folder.name}: {len(pairs)} pairs; range 255 or that of the sharp image"
    pairs += [
        Field.unread(f"{place.name} {broken.path.stem}", broken.reason)
        for place, images in found.items()
        for broken in images.broken
    ]
    return DataSet(folder.name, title, optics, offset_counts, tuple(pairs))


def _samples(group: str, blurred: ImageSeries, sharp: ImageSeries) -> Iterator[Sample]:
    for index in blurred.indices():
        pixels, truth = blurred.read(**index), sharp.read(**index)
        span = 255.0 if truth.dtype == np.uint8 else float(np.ptp(truth))
        why = _why_not_compared(pixels, truth)
        if why is not None:
            msg = f"'{blurred.path}' cannot be compared with '{sharp.path}': {why}"
            raise InputError(msg)
        name = f"{group} {plane_name(blurred.name, index)}"
        yield Sample(name, pixels, truth, None, group, span)


def _why_not_compared(
    pixels: NDArray[np.generic], truth: NDArray[np.generic]
) -> str | None:
    """Return why a pair has no PSNR or SSIM that says anything; None: it has."""
    if pixels.shape != truth.shape:
        return f"they are {pixels.shape} and {truth.shape}; a pair has one size"
    if min(truth.shape[:2]) < LEAST_SIDE_PX:
        return f"they are {truth.shape}; a side needs {LEAST_SIDE_PX} px for SSIM"
    if not (np.isfinite(pixels).all() and np.isfinite(truth).all()):
        return "there are NaN or infinite pixels; write numbers there"
    for which, image in (("sharp", truth), ("blurred", pixels)):
        # As of a run's plane that no frame came to.
        if not np.ptp(image):
            return f"all pixels of the {which} one are equal; leave the pair out"
    return None


VALIDATION_ROWS = ("a19*", "a2*")
# Planes of the stacks are 2 um apart and focus is a plane, not a point; "10 um" lies
# at 10 to 12 um in the fitted optics. "-32 um" counts planes the other way: its blur
# fits +z with W < 0, the same side as "10 um" (tests/integration/test_psf_calibration).
_SHARP_UM = (-2.3, 2.3)
_TEN_UM = (8.8, 13.2)
_EIGHT_UM = (6.6, 11.0)
_FAR_UM = (19.8, 40.0)
_EIGHT_BIT = 255.0


def bbbc006_pairs(folder: Path) -> DataSet:
    """Nuclei, sharp and about 10 um defocused, 8 bit, validation rows."""

    def samples(path: Path) -> Iterator[Sample]:
        sharp = read_plane(path)
        blurred = read_plane(folder / "bbbc006_pairs" / "defocus10um" / path.name)
        name = path.stem
        yield Sample(name, blurred, sharp, _TEN_UM, "10 um", _EIGHT_BIT, sided=True)
        yield Sample(f"{name} sharp", sharp, sharp, _SHARP_UM, SHARP_GROUP, _EIGHT_BIT)

    title = "BBBC006 nuclei, rows a19-a24, sharp and 10 um; range 255"
    paths = matching_tiffs(folder / "bbbc006_pairs" / "sharp", VALIDATION_ROWS)
    fields = tuple(Field(path.stem, partial(samples, path)) for path in paths)
    return DataSet("bbbc006_pairs", title, BBBC006, 0.0, fields)


def bbbc006_factin(folder: Path) -> DataSet:
    """Actin, one field at 8 and 10 um, 8 bit."""

    def samples(name: str, group: str, span: tuple[float, float]) -> Iterator[Sample]:
        sharp, pixels = (
            read_plane(folder / "bbbc006_factin" / f"{one}.tif")
            for one in ("A_sharp", name)
        )
        sided = group != SHARP_GROUP
        yield Sample(name, pixels, sharp, span, group, _EIGHT_BIT, sided=sided)

    title = "BBBC006 actin, field A at 8 and 10 um; range 255"
    planes = (
        ("A_defocus08um", "8 um", _EIGHT_UM),
        ("A_defocus10um", "10 um", _TEN_UM),
        ("A_sharp", SHARP_GROUP, _SHARP_UM),
    )
    fields = tuple(Field(plane[0], partial(samples, *plane)) for plane in planes)
    return DataSet("bbbc006_factin", title, BBBC006, 0.0, fields)


def bbbc006_16bit(folder: Path) -> DataSet:
    """Nuclei at full depth: planes in focus and at the far end of the stack."""
    place = folder / "bbbc006_16bit"
    sharp = {path.name: path for path in matching_tiffs(place / "in_focus")}

    def far(path: Path) -> Iterator[Sample]:
        pixels, in_focus = read_plane(path), sharp.get(path.name)
        truth = None if in_focus is None else read_plane(in_focus)
        span = float(np.ptp(pixels if truth is None else truth))
        yield Sample(path.stem, pixels, truth, _FAR_UM, "-32 um", span, sided=True)

    def near(path: Path) -> Iterator[Sample]:
        pixels = read_plane(path)
        span = float(np.ptp(pixels))
        yield Sample(path.name, pixels, pixels, _SHARP_UM, SHARP_GROUP, span)

    title = "BBBC006 nuclei, 12-bit counts, sharp and -32 um; range of the sharp plane"
    fields = [
        Field(path.stem, partial(far, path))
        for path in matching_tiffs(place / "z00_minus32um")
    ]
    fields += [
        Field(name, partial(near, path))
        for name, path in sharp.items()
        if fnmatch(name, "a01*") or fnmatch(name, "a03*")
    ]
    return DataSet("bbbc006_16bit", title, BBBC006, 0.0, tuple(fields))


def sharp(folder: Path) -> DataSet:
    """Every kind of image in focus: what comes out should be what went in."""

    def samples(path: Path, group: str) -> Iterator[Sample]:
        for name, pixels in _planes(path):
            eight_bit = pixels.dtype == np.uint8
            span = _EIGHT_BIT if eight_bit else float(np.ptp(pixels))
            yield Sample(name, pixels, pixels, _SHARP_UM, group, span)

    title = "images in focus against themselves; range 255 or that of the image"
    fields = (
        Field(path.stem, partial(samples, path, group))
        for pattern, group in _IN_FOCUS
        for path in sorted(folder.glob(pattern))
    )
    return DataSet("sharp", title, BBBC006, 0.0, tuple(fields))


REAL_SETS: dict[str, Callable[[Path], DataSet]] = {
    one.__name__: one for one in (bbbc006_pairs, bbbc006_factin, bbbc006_16bit, sharp)
}
"""Data sets by name; each takes the folder of the published images."""

# Pattern and kind; the first ones were never trained on.
_IN_FOCUS = (
    ("bbbc006_pairs/sharp/a19*.tif", "nuclei"),
    ("bbbc006_pairs/sharp/a2*.tif", "nuclei"),
    ("bbbc006_factin/A_sharp.tif", "actin"),
    ("bbbc006_16bit/in_focus/a0[13]*.tif", "nuclei, 16 bit"),
    ("in_focus/bbbc022/*.tif", "cell painting"),
    ("in_focus/cellprofiler_*/*.tif", "cells"),
    ("in_focus/neubias/*.tif", "cells and tissue"),
    ("in_focus/stardist/*", "stained tissue"),
    ("sephace_brightfield_Set1/*1352.25*.tif", "unstained cells"),
)
_MOST_SIDE_PX = 768


def _planes(path: Path) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Yield every plane of a file, the middle of large ones."""
    for series in open_images(path):
        for index in series.indices():
            rows, columns = (middle(side, _MOST_SIDE_PX) for side in series.shape[:2])
            name = plane_name(series.name, index)
            yield name, series.read(**index)[rows, columns]


Image = NDArray[np.float32]

# Never trained on: three fields of nuclei, one of actin.
_FIELDS = {
    "bbbc006_pairs/sharp/a19_s1_w1.tif": 1.0,
    "bbbc006_pairs/sharp/a22_s1_w1.tif": 1.0,
    "bbbc006_pairs/sharp/a24_s1_w1.tif": 1.0,
    "bbbc006_factin/A_sharp.tif": 1.0,
}
# Other specimens that every shipped recipe holds back, reduced by the mean of the
# sizes at which the recipes show others of their kind.
_TEXTURES = {
    "in_focus/cellprofiler_fly/pos076_*.tif": 0.7,
    "in_focus/cellprofiler_human/actin.tif": 0.75,
    "in_focus/neubias/xyc_8bit__nuclei_nup.tif": 0.75,
    "in_focus/neubias/xyc_16bit__cell_dna_mts_actin.tif": 0.8,
}
# Width of the Gaussian before an image is reduced, relative to the new pixels.
_ANTI_ALIAS = 0.35
_SHARP_SIDE_PX = 512
_SEED = 20


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to blur and photograph the fields."""

    title: str
    optics: OpticalSystem = BBBC006
    photons: float = 3000.0
    """In the brightest pixel of the sharp field."""
    signed: bool = False
    """Both sides of focus; else the positive one."""
    fields: Mapping[str, float] = field(default_factory=lambda: _FIELDS)
    """Patterns of sharp images below the folder of the published ones, and the size
    at which they are shown."""


VARIANTS = {
    "synthetic": Variant("the optics fitted to BBBC006"),
    "synthetic_textures": Variant(
        "the optics fitted to BBBC006, other specimens", fields=_TEXTURES
    ),
    "synthetic_signed": Variant(
        "the optics fitted to BBBC006, both sides", signed=True
    ),
    "synthetic_dim": Variant("the optics fitted to BBBC006, dim", photons=300.0),
    "synthetic_even": Variant(
        "Born-Wolf PSF without aberration, NA 0.5",
        optics=OpticalSystem(0.5, 451.0, 0.65, psf_model="born_wolf"),
    ),
    "synthetic_other": Variant(
        "NA 0.6, 520 nm, 0.5 um pixels, spherical -0.25 waves, both sides",
        optics=OpticalSystem(
            0.6, 520.0, 0.5, aberrations=Aberrations(spherical_waves=-0.25)
        ),
        signed=True,
    ),
}
"""Synthetic sets by name."""


def synthetic(name: str, variant: Variant, folder: Path) -> DataSet:
    """Return the data set of a variant, made of the published images in a folder.

    Raises
    ------
    InputError
        If a pattern matches no image.
    """
    paths = [
        (path, size)
        for pattern, size in variant.fields.items()
        for path in _sharp_images(folder, pattern)
    ]
    camera = CameraModel(photons=variant.photons, gain_e_per_count=1.0, bit_depth=16)
    unit = variant.optics.defocus_unit_um / BBBC006.defocus_unit_um
    lowest = 1 - LEVELS if variant.signed else 0
    levels = range(lowest, LEVELS)

    def samples(path: Path, size: float, first: int) -> Iterator[Sample]:
        for number, (field_name, light) in enumerate(_lights(path, size), first):
            truth = camera.offset_counts + light * np.float32(variant.photons)
            for level in levels:
                z_um = level * STEP_UM * unit
                rng = np.random.default_rng([_SEED, number, level - lowest])
                blurred = light
                if level:
                    # A photograph went through focus already.
                    blurred = blur(light, compute_psf(variant.optics, z_um))
                yield Sample(
                    name=f"{field_name} {level:+d}",
                    pixels=camera.expose(blurred, rng),
                    sharp=truth,
                    defocus_um=(z_um, z_um),
                    group=str(level),
                    data_range=variant.photons,
                    sided=variant.signed and level != 0,
                )

    title = (
        f"{len(paths)} sharp images blurred with {variant.title}; "
        f"{variant.photons:g} photons at most, seed {_SEED}, range {variant.photons:g}"
    )
    found, planes = [], 0
    for path, size in paths:
        # The noise of a plane is drawn by its number among all.
        found.append(Field(path.stem, partial(samples, path, size, planes)))
        planes += sum(1 for one in open_images(path) for _ in one.indices())
    return DataSet(name, title, variant.optics, camera.offset_counts, tuple(found))


def _sharp_images(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        msg = (
            f"no image '{folder / pattern}'; say where the published images lie with "
            "--data-folder"
        )
        raise InputError(msg)
    return files


def _lights(path: Path, size: float) -> Iterator[tuple[str, Image]]:
    """Yield every plane as light: darkest percentile 0, brightest pixel 1."""
    for series in open_images(path):
        for index in series.indices():
            plane = luminance(series.read(**index).astype(np.float32))
            if size != 1.0:
                plane = zoom(gaussian_filter(plane, _ANTI_ALIAS / size), size, order=1)
            rows, columns = (middle(side, _SHARP_SIDE_PX) for side in plane.shape)
            yield plane_name(series.name, index), as_light(plane[rows, columns])


_PUBLISHED = {**REAL_SETS, unseen.__name__: unseen, packages.__name__: packages}
KNOWN = (*_PUBLISHED, *VARIANTS)
"""Names of data sets; any other one is a folder."""


def find_data_set(
    name: str,
    data_folder: Path | None,
    optics: OpticalSystem | None,
    *,
    offset_counts: float = 0.0,
) -> DataSet:
    """Return a data set by its name, or the pairs of a user's folder.

    Parameters
    ----------
    name
        Of `REAL_SETS` or `VARIANTS`, ``unseen``, ``packages``, or a folder.
    data_folder
        Where the published images lie; only sets by name need it.
    optics
        Of a user's folder; None: those fitted to BBBC006, and the title says so.
    offset_counts
        Of the camera that took the images of a user's folder.

    Raises
    ------
    InputError
        If it is neither, or the published images are missing.
    """
    if name not in KNOWN:
        if not Path(name).is_dir():
            msg = f"data set '{name}' is no folder and none of {', '.join(KNOWN)}"
            raise InputError(msg)
        data = folder_set(Path(name), optics or BBBC006, offset_counts=offset_counts)
        known = "stated" if optics else "assumed: nobody stated them (--optics CONFIG)"
        title = f"{data.title}; optics {in_short(data.optics)}, {known}"
        return replace(data, title=title)
    if data_folder is None or not data_folder.is_dir():
        lacks = "" if data_folder is None else f", but there is no '{data_folder}'"
        msg = (
            f"data set '{name}' needs the folder of the published images{lacks}; say "
            "where they lie with --data-folder"
        )
        raise InputError(msg)
    if name in _PUBLISHED:
        return _PUBLISHED[name](data_folder)
    return synthetic(name, VARIANTS[name], data_folder)
