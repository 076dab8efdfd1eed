"""Synthetic sets: sharp validation images blurred at every level, then photographed.

The defocus is known exactly and so is the PSF: what a method leaves is its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import InputError
from rtfocus.evaluation.samples import BBBC006, DataSet, Sample, middle, plane_name
from rtfocus.images import open_images
from rtfocus.optics.blur import blur
from rtfocus.optics.camera import CameraModel
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.camera import luminance

Image = NDArray[np.float32]

STEP_UM = 2.2
"""Between levels, in the optics fitted to BBBC006; scaled for others."""
LEVELS = 11

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
_MOST_SIDE_PX = 512
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


def synthetic(
    name: str, folder: Path, *, fields: Mapping[str, float] | None = None
) -> DataSet:
    """Return one of `VARIANTS`.

    Parameters
    ----------
    name
        Key of `VARIANTS`.
    folder
        Of the published images.
    fields
        Patterns of sharp images below it with their size; None: those of the variant.

    Raises
    ------
    InputError
        If a pattern matches no image.
    """
    variant = VARIANTS[name]
    wanted = variant.fields if fields is None else fields
    paths = [
        (path, size)
        for pattern, size in wanted.items()
        for path in _matching(folder, pattern)
    ]
    camera = CameraModel(photons=variant.photons, gain_e_per_count=1.0, bit_depth=16)
    unit = variant.optics.defocus_unit_um / BBBC006.defocus_unit_um
    lowest = 1 - LEVELS if variant.signed else 0
    levels = range(lowest, LEVELS)

    def samples() -> Iterator[Sample]:
        lights = (one for path, size in paths for one in _lights(path, size))
        for number, (field_name, light) in enumerate(lights):
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
    return DataSet(name, title, variant.optics, camera.offset_counts, samples)


def _matching(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        msg = (
            f"no image '{folder / pattern}'; say where the published images lie with "
            "--data-folder"
        )
        raise InputError(msg)
    return found


def _lights(path: Path, size: float) -> Iterator[tuple[str, Image]]:
    """Yield every plane as light: darkest percentile 0, brightest pixel 1."""
    for series in open_images(path):
        for index in series.indices():
            plane = luminance(series.read(**index).astype(np.float32))
            if size != 1.0:
                plane = zoom(gaussian_filter(plane, _ANTI_ALIAS / size), size, order=1)
            rows, columns = (middle(side, _MOST_SIDE_PX) for side in plane.shape)
            pixels = plane[rows, columns]
            dark = np.percentile(pixels, 0.5)
            light = np.clip((pixels - dark) / (pixels.max() - dark), 0.0, 1.0)
            yield plane_name(series.name, index), np.asarray(light, dtype=np.float32)
