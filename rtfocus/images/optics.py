"""Optics of images: what is known of them, and who says it.

A config's optics come first, then those a user states, completed by what the file
says, then the file alone. Nothing is guessed: with a part missing the optics are
unknown, and the caller must do without or ask.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtfocus.channel import OpticalSystem
from rtfocus.config.optics import make_optics
from rtfocus.errors import ConfigError
from rtfocus.images.series import ImageSeries

_NEEDED = {
    "numerical_aperture": "NA",
    "wavelength_nm": "emission wavelength",
    "pixel_size_um": "pixel size",
}


@dataclass(frozen=True, slots=True)
class ImageOptics:
    """The optics of one channel of an image."""

    system: OpticalSystem | None
    """None: unknown."""
    source: str
    """Who says so; where unknown, what is missing."""

    def describe(self) -> str:
        """Return values and source in one line."""
        if self.system is None:
            return f"unknown ({self.source})"
        return f"{in_short(self.system)}, from {self.source}"


@dataclass(frozen=True, slots=True)
class StatedOptics:
    """Optics a user gives for images, perhaps in part."""

    values: Mapping[str, Any]
    """Fields of `OpticalSystem`, see `rtfocus.config.optics.stated_optics`."""
    origin: str
    """As the user gave them."""


def in_short(optics: OpticalSystem) -> str:
    """Return optics as ``--optics`` takes them.

    Examples
    --------
    >>> in_short(OpticalSystem(0.75, 520, 0.325))
    'NA=0.75,wavelength=520,pixel=0.325'
    """
    text = (
        f"NA={optics.numerical_aperture:g},wavelength={optics.wavelength_nm:g},"
        f"pixel={optics.pixel_size_um:g}"
    )
    index, waves = optics.refractive_index, optics.aberrations.spherical_waves
    text += f",n={index:g}" if index != 1 else ""
    text += f",spherical={waves:g}" if waves else ""
    return text


def find_optics(
    image: ImageSeries,
    channel: int,
    *,
    configured: OpticalSystem | None = None,
    stated: StatedOptics | None = None,
) -> ImageOptics:
    """Return the optics of one channel of an image.

    Parameters
    ----------
    image
        Its metadata complete what is stated, and must not contradict it.
    channel
        Index on axis c.
    configured
        Of the config's channel of that name.
    stated
        By the user for these images; takes the place of the config's.

    Raises
    ------
    ConfigError
        If the pixel size contradicts that of the file, or values are no optics.
    InputError
        If the file's pixels are not square.
    """
    if stated is None and configured is not None:
        _refuse_other_pixels(image, configured, "the config's optics")
        return ImageOptics(configured, "the config")
    said = _said_by_file(image, channel)
    values = {**said, **(stated.values if stated is not None else {})}
    missing = [name for key, name in _NEEDED.items() if key not in values]
    if missing:
        return ImageOptics(None, f"no {', no '.join(missing)}")
    origin = stated.origin if stated is not None else str(image.path)
    found = make_optics(values, origin)
    if stated is None:
        return ImageOptics(found, "the file")
    _refuse_other_pixels(image, found, "--optics")
    added = [_NEEDED[key] for key in said if key in _NEEDED.keys() - stated.values]
    completed = f", {', '.join(added)} from the file" if added else ""
    return ImageOptics(found, f"--optics{completed}")


def refuse_other_reference(
    image: ImageSeries, unknown: ImageOptics, engine: str, reference: OpticalSystem
) -> None:
    """Refuse to run an engine blind on pixels of another size than it was made for.

    Parameters
    ----------
    image
        Whose optics are unknown.
    unknown
        What is missing.
    engine
        Name of the engine.
    reference
        The optics it takes for granted when run blind.

    Raises
    ------
    ConfigError
        If the file states another pixel size.
    InputError
        If the file's pixels are not square.
    """
    size_um = image.pixel_size_um
    if size_um is not None and not reference.has_pixels_of(size_um):
        msg = (
            f"'{image.path}' has pixels of {size_um:g} um and says nothing else of its "
            f"optics ({unknown.source}); engine '{engine}' run blind takes "
            f"{reference.pixel_size_um:g} um for granted: complete them, e.g. "
            "--optics NA=0.75,wavelength=520"
        )
        raise ConfigError(msg)


def _said_by_file(image: ImageSeries, channel: int) -> dict[str, float]:
    described = image.channels[channel] if channel < len(image.channels) else None
    found = {
        "numerical_aperture": image.numerical_aperture,
        "wavelength_nm": described.emission_nm if described is not None else None,
        "pixel_size_um": image.pixel_size_um,
        "refractive_index": image.refractive_index,
    }
    return {key: value for key, value in found.items() if value is not None}


def _refuse_other_pixels(image: ImageSeries, optics: OpticalSystem, who: str) -> None:
    size_um = image.pixel_size_um
    if size_um is not None and not optics.has_pixels_of(size_um):
        msg = (
            f"'{image.path}' has pixels of {size_um:g} um, {who} say "
            f"{optics.pixel_size_um:g} um; correct the optics, or give those of this "
            f"image, e.g. --optics NA={optics.numerical_aperture:g},"
            f"wavelength={optics.wavelength_nm:g}"
        )
        raise ConfigError(msg)
