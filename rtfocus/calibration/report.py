"""Report: a calibration as a folder with config, figures and picture."""

import json
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml

from rtfocus.calibration.result import Calibration
from rtfocus.channel import OpticalSystem
from rtfocus.config import parse_config
from rtfocus.drawing.panels import save_panels
from rtfocus.errors import InputError

CONFIG_NAME = "optics.yaml"
FIGURES_NAME = "fit.json"
PICTURE_NAME = "fit.png"
REPORT_NAMES = (CONFIG_NAME, FIGURES_NAME, PICTURE_NAME)
"""The files of a calibration."""
_COLUMNS = 3


def write_calibration(folder: Path, found: Calibration, *, channel: str) -> list[Path]:
    """Write a calibration and return the paths written.

    Parameters
    ----------
    folder
        Made if needed; files of an earlier calibration are replaced.
    found
        What to write.
    channel
        Name of the channel in the config: ``channels`` of ``optics.yaml`` is one
        entry with the fitted optics.

    Raises
    ------
    InputError
        If the disk refuses it.
    """
    figures = {
        "statement": found.statement,
        "warnings": list(found.warnings),
        "optics": asdict(found.system),
        **found.figures,
    }
    paths = [folder / name for name in REPORT_NAMES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(config_text(found, channel=channel), encoding="utf-8")
        paths[1].write_text(
            json.dumps(figures, indent=1, allow_nan=False), encoding="utf-8"
        )
        save_panels(paths[2], found.panels, columns=_COLUMNS)
    except OSError as error:
        msg = f"'{folder}' cannot be written: {error}"
        raise InputError(msg) from error
    return paths


def config_text(found: Calibration, *, channel: str) -> str:
    """Return the YAML of one channel, its comment saying how it was found."""
    entry = {"name": channel, "optics": optics_block(found.system)}
    data = {"channels": [entry]}
    # What is written must load: the same check as for a config by hand.
    parse_config(data, origin="fitted optics")
    said = [found.statement, *(f"Doubtful: {w}." for w in found.warnings)]
    comment = "\n".join(
        fill(text, 78, initial_indent="# ", subsequent_indent="# ") for text in said
    )
    return f"{comment}\n{yaml.safe_dump(data, sort_keys=False)}"


def optics_block(system: OpticalSystem) -> dict[str, Any]:
    """Return the optics as a config writes them: rounded, without the defaults."""
    plain = OpticalSystem(
        system.numerical_aperture, system.wavelength_nm, system.pixel_size_um
    )
    given = {
        name: value
        for name, value in _rounded(asdict(system)).items()
        if name in ("numerical_aperture", "wavelength_nm", "pixel_size_um")
        or value != asdict(plain)[name]
    }
    aberrations = given.get("aberrations")
    if aberrations is not None:
        given["aberrations"] = {k: v for k, v in aberrations.items() if v}
    return given


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Round to a thousandth: finer than any fit can tell."""
    return {
        name: _rounded(value)
        if isinstance(value, dict)
        else round(value, 4 if name == "pixel_size_um" else 3)
        if isinstance(value, float)
        else value
        for name, value in values.items()
    }
