"""Scene: the sharp image that the virtual microscope looks at."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.config.microscope import SpecimenConfig
from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.images.series import ImageSeries
from rtfocus.specimens.fluorescent import draw_specimen, normalise_sharp
from rtfocus.specimens.stained import draw_stained

Image = NDArray[np.float32]


def read_scene(
    config: SpecimenConfig, shape: tuple[int, int], *, rgb: bool, channel: int
) -> Image:
    """Draw or read the sharp scene; axes (y, x) or (y, x, rgb), values in [0, 1].

    Parameters
    ----------
    config
        Kind, file and seed.
    shape
        Height and width of the scene.
    rgb
        Whether the camera sees colours: ``tissue`` is then a stained section, other
        grey scenes are tinted.
    channel
        Channels of one specimen show different structures: each is drawn anew.
    """
    if config.kind == "image" or config.kind == "stack":
        scene = normalise_sharp(_first_plane(_given(config), channel), shape)
    else:
        rng = np.random.default_rng([config.seed, channel])
        if rgb and config.kind == "tissue":
            return draw_stained(shape, rng)
        scene = draw_specimen(config.kind, shape, rng)
    if rgb and scene.ndim == 2:
        return _tinted(scene)
    if not rgb and scene.ndim == 3:
        return np.asarray(scene.mean(axis=2), dtype=np.float32)
    return scene


def read_recording(
    config: SpecimenConfig, shape: tuple[int, int], *, channel: int
) -> Image:
    """Read a recorded z-stack; axes (z, y, x), one scale for all planes.

    Raises
    ------
    ConfigError
        If the file holds a single plane.
    """
    path = _given(config)
    series = open_images(path)[0]
    count = series.sizes["z"] if series.sizes["z"] > 1 else series.sizes["t"]
    if count < 2:
        msg = f"'{path}' holds one plane; a 'stack' needs several along z"
        raise ConfigError(msg)
    c = min(channel, series.sizes["c"] - 1)
    planes = np.stack([_grey(_plane(series, number, c)) for number in range(count)])
    # Levelled together, so that a plane keeps its brightness against the others.
    black, white = np.percentile(planes, [0.1, 99.9])
    planes = np.clip((planes - black) / max(float(white - black), 1e-6), 0.0, 1.0)
    return np.stack(
        [
            normalise_sharp(plane, shape, black_percentile=0, white_percentile=100)
            * np.float32(plane.max() - plane.min())
            + np.float32(plane.min())
            for plane in planes
        ]
    )


def _tinted(scene: Image) -> Image:
    """Show a grey scene as a colour camera sees blue-green fluorescence."""
    return scene[..., None] * np.array([0.25, 0.85, 1.0], dtype=np.float32)


def _given(config: SpecimenConfig) -> Path:
    if config.path is None:
        msg = f"specimen.kind '{config.kind}' needs specimen.path, an image file"
        raise ConfigError(msg)
    return config.path


def _first_plane(path: Path, channel: int) -> NDArray[np.generic]:
    series = open_images(path)[0]
    return series.read(c=min(channel, series.sizes["c"] - 1))


def _plane(series: ImageSeries, number: int, c: int) -> NDArray[np.generic]:
    if series.sizes["z"] > 1:
        return series.read(c=c, z=number)
    return series.read(t=number, c=c)


def _grey(plane: NDArray[np.generic]) -> Image:
    pixels = np.asarray(plane, dtype=np.float32)
    return pixels.mean(axis=2) if pixels.ndim == 3 else pixels
