"""Own fields: the sharp planes of a laboratory's images, checked and split by field.

Of a z-stack the sharpest plane is taken, of a large plane the liveliest window. What
cannot be learned from is left out and named. Images that show the same place (time
points, channels, single planes of a stack, copies) stand on one side of the split,
whatever their files are called: their thumbnails correlate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter, uniform_filter

from rtfocus.autofocus.appearance import FREQUENCIES, amplitude_spectrum, sharpness
from rtfocus.calibration.pairs import structured_window
from rtfocus.calibration.through_focus import spread_out
from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError, InputError
from rtfocus.evaluation.samples import plane_name
from rtfocus.images.optics import EXAMPLE, StatedOptics, find_optics, in_short
from rtfocus.images.reading import FoundImages
from rtfocus.images.series import ImageSeries

Image = NDArray[np.float32]
Side = Literal["training", "validation", "test"]
Index = dict[str, int]
"""Place of a plane on the axes t, c, z."""

LEAST_FIELDS = 5
"""Different fields below which nothing can be learned and judged."""
FEW_FIELDS = 10
"""Below it the figures rest on one held-out field."""
_MOST_FIELDS = 80
_MOST_TIMES = 3
_MOST_SIDE_PX = 1024
_LEAST_SIDE_PX = 216
_HELD_OUT_MOST = 8
_MOST_SATURATED = 0.01
_LEAST_STACK = 3
# Amplitudes below the cutoff of the optics: how far down detail must reach, and how
# much of it must be left in the finer band. Nuclei 10 um out of focus: 0.15.
_LEAST_REACH, _LEAST_DETAIL = 0.2, 0.17
_COARSE, _FINE = (0.05, 0.2), (0.2, 0.45)
# Of the sharpest image of the same place.
_AS_SHARP = 0.8
# Of the sharpest plane: others of a stack are out of focus below it.
_OUT_OF_FOCUS = 0.75
_THUMBNAIL_PX = 64
_GROUND_PX = 5
_ALIKE = 0.6


@dataclass(frozen=True, slots=True)
class OwnField:
    """One sharp plane, cut and stored."""

    file: str
    """TIFF below the folder of the fields."""
    source: str
    """Image and plane it came from."""
    side: Side
    blurred: tuple[str, ...] = ()
    """TIFFs of the same window in other planes of its stack, out of focus."""


@dataclass(frozen=True, slots=True)
class OwnFields:
    """What a folder of images gave."""

    fields: tuple[OwnField, ...]
    optics: OpticalSystem
    left_out: tuple[str, ...]
    """Images that were not taken, one line each, with the reason."""

    def of(self, side: Side) -> list[OwnField]:
        """Return the fields of one side of the split."""
        return [one for one in self.fields if one.side == side]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A plane that may become a field."""

    field: OwnField
    sharp: float
    thumbnail: Image


class _LeftOutError(Exception):
    """Why an image cannot be learned from."""


def choose_fields(
    images: FoundImages,
    folder: Path,
    *,
    stated: StatedOptics | None = None,
    channel: str | None = None,
) -> OwnFields:
    """Choose, check, cut, store and split the sharp planes of some images.

    One plane is in memory at a time.

    Parameters
    ----------
    images
        The images.
    folder
        Takes the cut planes; there and empty.
    stated
        Optics as the user gives them; files complete them.
    channel
        Name or number of the channel to take; None: images have one.

    Raises
    ------
    ConfigError
        If optics are missing or differ, a channel must be named, or fewer than
        `LEAST_FIELDS` fields are left; says why images were left out.
    """
    optics = _common_optics(images.series, stated, channel)
    left_out = [one.reason for one in images.broken]
    if len(images.series) > _MOST_FIELDS:
        more = f"of {len(images.series)} images {_MOST_FIELDS} are taken, evenly spaced"
        left_out.append(more)
    candidates: list[_Candidate] = []
    for series in _spread(images.series, _MOST_FIELDS):
        for stack in _stacks(series, _channel_number(series, channel)):
            try:
                stem = f"{len(candidates):03}"
                candidates.append(_cut(series, stack, optics, folder, stem))
            except (_LeftOutError, InputError) as error:
                left_out.append(f"'{plane_name(series.name, stack[0])}' {error}")
    groups = _groups([one.thumbnail for one in candidates])
    chosen, blurred = _sharpest([(candidates[n] for n in group) for group in groups])
    left_out += blurred
    if len(chosen) < LEAST_FIELDS:
        raise ConfigError(_too_few(len(chosen), left_out))
    sides = _sides(len(chosen))
    fields = tuple(
        replace(one.field, side=side)
        for group, side in zip(chosen, sides, strict=True)
        for one in group
    )
    return OwnFields(fields, optics, tuple(left_out))


def _too_few(count: int, left_out: Sequence[str]) -> str:
    why = f"; left out: {'; '.join(left_out[:3])}" if left_out else ""
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return (
        f"{count} different sharp fields are too few, needed are {LEAST_FIELDS} and "
        f"better {FEW_FIELDS}: three parts to train on, one to choose by, one to judge "
        f"by{why}{more}; give more fields in focus, or z-stacks through focus"
    )


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return all, or as many as allowed, evenly spaced."""
    return [items[n] for n in spread_out(len(items), most)]


def _channel_number(series: ImageSeries, channel: str | None) -> int:
    count, names = series.sizes["c"], series.channel_names
    listed = ", ".join(names) or f"0 to {count - 1}"
    if channel is None and count > 1:
        msg = (
            f"'{series.path}' has {count} channels ({listed}) and optics hold for one; "
            "say which with --channel"
        )
        raise ConfigError(msg)
    if channel is None:
        return 0
    if channel in names:
        return names.index(channel)
    if channel.isdecimal() and int(channel) < count:
        return int(channel)
    msg = f"'{series.path}' has no channel '{channel}'; it has {listed}"
    raise ConfigError(msg)


def _common_optics(
    series: Sequence[ImageSeries], stated: StatedOptics | None, channel: str | None
) -> OpticalSystem:
    """Return the optics that all images have; refuse a mixture."""
    common: tuple[OpticalSystem, Path] | None = None
    for one in series:
        optics = find_optics(one, _channel_number(one, channel), stated=stated)
        if optics.system is None:
            msg = (
                f"the optics of '{one.path}' are unknown ({optics.source}); state "
                f"them: --optics {EXAMPLE}"
            )
            raise ConfigError(msg)
        common = common or (optics.system, one.path)
        if optics.system != common[0]:
            msg = (
                f"'{one.path}' has other optics ({in_short(optics.system)}) than "
                f"'{common[1]}' ({in_short(common[0])}); an engine is trained for one "
                "objective and pixel size: give a folder of each"
            )
            raise ConfigError(msg)
    if common is None:
        msg = "there is no image to learn from; give a folder of images"
        raise ConfigError(msg)
    return common[0]


def _stacks(series: ImageSeries, channel: int) -> list[list[Index]]:
    """Return the planes among which the sharpest is looked for.

    Those along z; of images that name no z those along t, as plain files of several
    pages do for stacks too.
    """
    times, depth = series.sizes["t"], series.sizes["z"]
    if depth == 1:
        return [[{"t": t, "c": channel, "z": 0} for t in range(times)]]
    return [
        [{"t": t, "c": channel, "z": z} for z in range(depth)]
        for t in _spread(range(times), _MOST_TIMES)
    ]


def _cut(
    series: ImageSeries,
    stack: Sequence[Index],
    optics: OpticalSystem,
    folder: Path,
    stem: str,
) -> _Candidate:
    """Cut and store the sharpest plane of a stack, or the only one."""
    if len(series.shape) == 3:
        msg = "is colour; networks see one: save one colour, e.g. green, as grey"
        raise _LeftOutError(msg)
    if min(series.shape) < _LEAST_SIDE_PX:
        msg = f"is {series.shape} px; a side needs {_LEAST_SIDE_PX} at least"
        raise _LeftOutError(msg)
    place, sharps = _sharpest_plane(series, stack)
    pixels = series.read(**stack[place])
    _refuse_spoilt(pixels)
    spectrum, noise = amplitude_spectrum(pixels)
    _refuse_blurred(spectrum, noise, optics)
    window = structured_window(pixels.astype(np.float32), _MOST_SIDE_PX)
    tifffile.imwrite(folder / f"{stem}.tif", pixels[window])
    blurred = []
    if series.sizes["z"] > 1:
        for z in _out_of_focus(sharps, place):
            other = series.read(**stack[z])
            if np.isfinite(other).all():
                blurred.append(f"{stem}_z{z}.tif")
                tifffile.imwrite(folder / blurred[-1], other[window])
    name = plane_name(series.name, stack[place])
    field = OwnField(f"{stem}.tif", name, "training", tuple(blurred))
    return _Candidate(field, sharpness(spectrum, noise), _thumbnail(pixels))


def _sharpest_plane(
    series: ImageSeries, stack: Sequence[Index]
) -> tuple[int, list[float]]:
    """Return the place of the sharpest plane, and how sharp each is."""
    if len(stack) == 1:
        return 0, [1.0]
    sharps = []
    for index in stack:
        pixels = series.read(**index)
        usable = bool(np.isfinite(pixels).all())
        sharps.append(sharpness(*amplitude_spectrum(pixels)) if usable else 0.0)
    place = int(np.argmax(sharps))
    if series.sizes["z"] >= _LEAST_STACK and place in (0, len(stack) - 1):
        end = "first" if place == 0 else "last"
        msg = f"is sharpest in its {end} plane: its focus lies outside the stack"
        raise _LeftOutError(msg)
    return place, sharps


def _out_of_focus(sharps: Sequence[float], place: int) -> Iterator[int]:
    """Choose planes on both sides that are clearly out of focus, halfway or last."""
    for end in (0, len(sharps) - 1):
        for z in dict.fromkeys(((place + end) // 2, end)):
            if z != place and sharps[z] < _OUT_OF_FOCUS * sharps[place]:
                yield z
                break


def _refuse_spoilt(pixels: NDArray[np.generic]) -> None:
    values = pixels.astype(np.float32)
    if not np.isfinite(values).all():
        msg = "holds NaN or infinite pixels; write numbers there"
        raise _LeftOutError(msg)
    top = float(values.max())
    if float(values.min()) == top:
        msg = "is empty: all pixels are equal"
        raise _LeftOutError(msg)
    share = float((values == top).mean())
    if share > _MOST_SATURATED:
        msg = f"is saturated: {share:.0%} of its pixels hold {top:g}; expose less"
        raise _LeftOutError(msg)


def _refuse_blurred(
    spectrum: NDArray[np.float64], noise: float, optics: OpticalSystem
) -> None:
    """Refuse a plane that shows no detail near what its optics resolve."""
    cutoff = 2 * optics.numerical_aperture / (optics.wavelength_nm * 1e-3)
    cutoff = min(cutoff * optics.pixel_size_um, 0.5)
    frequencies = FREQUENCIES[spectrum > noise]
    amplitude = [
        float(np.sqrt(np.mean((spectrum[ring] * FREQUENCIES[ring]) ** 2)))
        for low, high in (_COARSE, _FINE)
        for ring in [(low * cutoff <= FREQUENCIES) & (high * cutoff > FREQUENCIES)]
    ]
    reach = float(frequencies.max(initial=0.0)) / cutoff
    if reach < _LEAST_REACH or amplitude[1] < _LEAST_DETAIL * amplitude[0]:
        msg = "is blurred or dark: no detail near what its optics resolve"
        raise _LeftOutError(msg)


def _thumbnail(pixels: NDArray[np.generic]) -> Image:
    """Return a small image without its ground, of length 1."""
    sides = [side // _THUMBNAIL_PX for side in pixels.shape]
    step_y, step_x = sides
    whole = pixels[: step_y * _THUMBNAIL_PX, : step_x * _THUMBNAIL_PX]
    blocks = whole.astype(np.float32).reshape(
        _THUMBNAIL_PX, step_y, _THUMBNAIL_PX, step_x
    )
    small = np.log(blocks.mean(axis=(1, 3)) - float(whole.min()) + 1.0)
    small = small - gaussian_filter(small, _GROUND_PX)
    small /= np.sqrt(uniform_filter(small**2, 4 * _GROUND_PX)) + 1e-6
    return np.asarray(small / max(float(np.linalg.norm(small)), 1e-9))


def _groups(thumbnails: Sequence[Image]) -> list[list[int]]:
    """Gather the numbers of images that show the same place, shifts allowed."""
    spectra = [fft.rfft2(one) for one in thumbnails]
    group = list(range(len(thumbnails)))
    for one, other in (
        (a, b) for b in range(len(spectra)) for a in range(b) if group[a] != group[b]
    ):
        alike = fft.irfft2(spectra[one] * np.conj(spectra[other]), (_THUMBNAIL_PX,) * 2)
        if float(alike.max()) > _ALIKE:
            joined, gone = sorted((group[one], group[other]))
            group = [joined if name == gone else name for name in group]
    return [
        [n for n, name in enumerate(group) if name == label]
        for label in dict.fromkeys(group)
    ]


def _sharpest(
    groups: Sequence[Iterator[_Candidate]],
) -> tuple[list[list[_Candidate]], list[str]]:
    """Keep the images of a place that are about as sharp as its sharpest."""
    chosen, left_out = [], []
    for group in map(list, groups):
        best = max(group, key=lambda one: one.sharp)
        chosen.append([one for one in group if one.sharp >= _AS_SHARP * best.sharp])
        left_out += [
            f"'{one.field.source}' is less sharp than '{best.field.source}', which "
            "shows the same place"
            for one in group
            if one.sharp < _AS_SHARP * best.sharp
        ]
    return chosen, left_out


def _sides(count: int) -> list[Side]:
    """Deal fields out: every fifth is for validation, every fifth for the test."""
    sides: list[Side] = ["training"] * count
    held_out = 0
    for place in range(count):
        if place % 5 in (2, 4) and held_out < 2 * _HELD_OUT_MOST:
            sides[place] = "validation" if place % 5 == 2 else "test"
            held_out += 1
    return sides
