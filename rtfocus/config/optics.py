"""Optics: read as a user gives them on a command line, in short values or a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError

EXAMPLE = "NA=0.75,wavelength=520,pixel=0.325"

_SHORT_NAMES = {
    "NA": "numerical_aperture",
    "wavelength": "wavelength_nm",
    "pixel": "pixel_size_um",
    "n": "refractive_index",
    "model": "psf_model",
}
_ABERRATION_NAMES = {
    "spherical": "spherical_waves",
    "astigmatism": "astigmatism_waves",
}


def read_optics(text: str) -> OpticalSystem:
    """Read optics as a user gives them.

    Parameters
    ----------
    text
        A YAML file, as `rtfocus psf fit` writes it, or values by short name: NA,
        wavelength (nm), pixel (um), n, spherical and astigmatism (waves), model.

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
    """Return what a user states of the optics, which need not be all, not checked.

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
        If it is no file and no values, or a name is unknown.

    Examples
    --------
    >>> stated_optics("NA=0.75,wavelength=520")
    {'numerical_aperture': '0.75', 'wavelength_nm': '520'}
    """
    return dict(_read_values(text) if "=" in text else _read_file(Path(text)))


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
        faults = "; ".join(
            f"'{'.'.join(str(part) for part in fault['loc'])}': {fault['msg']}"
            for fault in error.errors()
        )
        msg = f"optics '{origin}': {faults}; e.g. {EXAMPLE}"
        raise ConfigError(msg) from error


def _read_values(text: str) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    aberrations: dict[str, str] = {}
    seen: set[str] = set()
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name in seen:
            msg = f"optics '{text}': '{name}' is there twice"
            raise ConfigError(msg)
        seen.add(name)
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
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        msg = (
            f"optics '{path}' cannot be read: {error}; give a YAML file, or values: "
            f"{EXAMPLE}"
        )
        raise ConfigError(msg) from error
    channels = data.get("channels") if isinstance(data, dict) else None
    if isinstance(channels, list) and channels:
        data = channels[0]
    if isinstance(data, dict) and "optics" in data:
        data = data["optics"]
    if not isinstance(data, dict):
        msg = f"optics '{path}' states none; give a YAML file with optics, or {EXAMPLE}"
        raise ConfigError(msg)
    return data
