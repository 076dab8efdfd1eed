"""Optics of images: as a user states them, as a file knows them, and who comes first.

A user gives short values on a command line, or a file. A config's optics come first,
then those a user states, completed by what the file says, then the file alone. Nothing
is guessed: with a part missing the optics are unknown, and the caller must do without
or ask.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.loading import read_yaml
from rtfocus.errors import ConfigError
from rtfocus.images.series import ImageSeries

EXAMPLE = "NA=0.75,wavelength=520,pixel=0.325"

_SHORT_NAMES = {
    "NA": "numerical_aperture",
    "wavelength": "wavelength_nm",
    "pixel": "pixel_size_um",
    "n": "refractive_index",
    "model": "psf_model",
    "apodisation": "apodisation",
    "offset": "defocus_offset_um",
}
_ABERRATION_NAMES = {
    "spherical": "spherical_waves",
    "astigmatism": "astigmatism_waves",
    "oblique": "astigmatism_oblique_waves",
    "coma_x": "coma_x_waves",
    "coma_y": "coma_y_waves",
}


def read_optics(text: str) -> OpticalSystem:
    """Read optics as a user gives them.

    Parameters
    ----------
    text
        A YAML file, as `rtfocus psf fit` writes it, or values by short name: NA,
        wavelength (nm), pixel (um), n, model, apodisation, offset (of defocus, um),
        and in waves spherical, astigmatism, oblique (astigmatism), coma_x and coma_y.

    Raises
    ------
    ConfigError
        If it is neither, or the values are no optics.

    Examples
    --------
    >>> optics = read_optics("NA=0.75,wavelength=520,pixel=0.325,spherical=-0.2")
    >>> optics.numerical_aperture, optics.aberrations.spherical_waves
    (0.75, -0.2)
    """
    return make_optics(stated_optics(text), text)


def stated_optics(text: str) -> dict[str, Any]:
    """Return what a user states of the optics, which need not be all.

    Parameters
    ----------
    text
        As for `read_optics`.

    Returns
    -------
    dict
        Fields of `OpticalSystem`.

    Raises
    ------
    ConfigError
        If it is no file and no values, a name is unknown, or no optics have one of
        the values.

    Examples
    --------
    >>> stated_optics("NA=0.75,wavelength=520")
    {'numerical_aperture': '0.75', 'wavelength_nm': '520'}
    """
    stated = dict(_read_values(text) if "=" in text else _read_file(Path(text)))
    given = {name: value for name, value in stated.items() if value is not None}
    make_optics({**_ANY, **given}, text)
    return stated


def make_optics(stated: Mapping[str, Any], origin: str) -> OpticalSystem:
    """Check stated optics.

    Parameters
    ----------
    stated
        Fields of `OpticalSystem`.
    origin
        As the user gave them, for the message.

    Raises
    ------
    ConfigError
        If something is missing or no optics have such values.
    """
    try:
        return TypeAdapter(OpticalSystem).validate_python(dict(stated))
    except ValidationError as error:
        faults = "; ".join(map(_fault_text, error.errors()))
        msg = f"optics '{origin}': {faults}; e.g. {EXAMPLE}"
        raise ConfigError(msg) from error


def checked_optics(given: object) -> OpticalSystem:
    """Return the optics that a script gives, which has checked itself when made.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    if isinstance(given, OpticalSystem):
        return given
    like = "rtfocus.Optics(numerical_aperture, wavelength_nm, pixel_size_um)"
    msg = f"optics are a {type(given).__name__}; give {like}"
    raise ConfigError(msg)


def _fault_text(fault: ErrorDetails) -> str:
    rule = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"]:  # of several values together, which it names
        return rule
    if fault["type"] == "unexpected_keyword_argument":
        inner = len(fault["loc"]) > 1
        known = fields(Aberrations if inner else OpticalSystem)
        rule = f"unknown; known are {', '.join(field.name for field in known)}"
    key = ".".join(map(str, fault["loc"]))
    return f"'{key}': {rule} (got {fault['input']!r:.60})"


def _read_values(text: str) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    aberrations: dict[str, str] = {}
    keys: set[str] = set()
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name in keys:
            msg = f"optics '{text}': '{name}' is there twice"
            raise ConfigError(msg)
        keys.add(name)
        if name in _ABERRATION_NAMES:
            aberrations[_ABERRATION_NAMES[name]] = value
        elif name in _SHORT_NAMES:
            values[_SHORT_NAMES[name]] = value
        else:
            known = ", ".join((*_SHORT_NAMES, *_ABERRATION_NAMES))
            msg = f"optics '{text}': '{name}' is unknown; known are {known}"
            raise ConfigError(msg)
    return {**values, "aberrations": aberrations} if aberrations else values


def _read_file(path: Path) -> Mapping[str, Any]:
    data = read_yaml(path, "optics", f"give a YAML file, or values: {EXAMPLE}")
    channels = data.get("channels") if isinstance(data, dict) else None
    if isinstance(channels, list) and channels:
        data = channels[0]
    if isinstance(data, dict) and "optics" in data:
        data = data["optics"]
    if not isinstance(data, dict):
        msg = f"optics '{path}' states none; give a YAML file with optics, or {EXAMPLE}"
        raise ConfigError(msg)
    return data


_ANY = {
    "numerical_aperture": 0.1,
    "wavelength_nm": 500,
    "pixel_size_um": 1,
    "refractive_index": 5,
}
"""Stand for what is not stated where the rest is checked: they fit to anything."""
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
    """Fields of `OpticalSystem`, see `rtfocus.images.optics.stated_optics`."""
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
    index = f"{optics.refractive_index:g}"
    text += f",n={index}" if index != "1" else ""
    text += f",model={optics.psf_model}" if optics.psf_model != "pupil" else ""
    for name, field in _ABERRATION_NAMES.items():
        waves = getattr(optics.aberrations, field)
        text += f",{name}={waves:g}" if waves else ""
    for name in ("apodisation", "offset"):
        value = getattr(optics, _SHORT_NAMES[name])
        text += f",{name}={value:g}" if value else ""
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
    of_file = _values_of_file(image, channel)
    values = {**of_file, **(stated.values if stated is not None else {})}
    missing = [key for key in _NEEDED if key not in values]
    if missing:
        source = f"no {', no '.join(_NEEDED[key] for key in missing)}"
        if stated is not None:
            short = (name for name, key in _SHORT_NAMES.items() if key in missing)
            source += f"; complete --optics by {'= and '.join(short)}="
        return ImageOptics(None, source)
    origin = stated.origin if stated is not None else str(image.path)
    optics = make_optics(values, origin)
    if stated is None:
        return ImageOptics(optics, "the file")
    _refuse_other_pixels(image, optics, "--optics")
    added = [_NEEDED[key] for key in of_file if key in _NEEDED.keys() - stated.values]
    completed = f", {', '.join(added)} from the file" if added else ""
    return ImageOptics(optics, f"--optics{completed}")


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


def _values_of_file(image: ImageSeries, channel: int) -> dict[str, float]:
    described = image.channels[channel] if channel < len(image.channels) else None
    values = {
        "numerical_aperture": image.numerical_aperture,
        "wavelength_nm": described.emission_nm if described is not None else None,
        "pixel_size_um": image.pixel_size_um,
        "refractive_index": image.refractive_index,
    }
    return {key: value for key, value in values.items() if value is not None}


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
