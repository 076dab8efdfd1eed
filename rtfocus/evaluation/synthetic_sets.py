"""Synthetic sets: sharp validation images blurred at every level, then photographed.

The defocus is known exactly and so is the PSF: what a method leaves is its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.evaluation.samples import BBBC006, DataSet, Sample
from rtfocus.images import open_images
from rtfocus.optics.blur import blur
from rtfocus.optics.camera import CameraModel
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]

STEP_UM = 2.2
"""Between levels, in the optics fitted to BBBC006; scaled for others."""
LEVELS = 11

# Never trained on: three fields of nuclei, one of actin.
_FIELDS = (
    "bbbc006_pairs/sharp/a19_s1_w1.tif",
    "bbbc006_pairs/sharp/a22_s1_w1.tif",
    "bbbc006_pairs/sharp/a24_s1_w1.tif",
    "bbbc006_factin/A_sharp.tif",
)
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


VARIANTS = {
    "synthetic": Variant("the optics fitted to BBBC006"),
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


def synthetic(name: str, folder: Path, *, fields: Sequence[str] = _FIELDS) -> DataSet:
    """Return one of `VARIANTS`.

    Parameters
    ----------
    name
        Key of `VARIANTS`.
    folder
        Of the published images.
    fields
        Sharp images below it.
    """
    variant = VARIANTS[name]
    camera = CameraModel(photons=variant.photons, gain_e_per_count=1.0, bit_depth=16)
    unit = variant.optics.defocus_unit_um / BBBC006.defocus_unit_um
    lowest = 1 - LEVELS if variant.signed else 0
    levels = range(lowest, LEVELS)

    def samples() -> Iterator[Sample]:
        for number, field in enumerate(fields):
            light = _light(folder / field)
            truth = camera.offset_counts + light * np.float32(variant.photons)
            for level in levels:
                z_um = level * STEP_UM * unit
                rng = np.random.default_rng([_SEED, number, level - lowest])
                blurred = light
                if level:
                    # A photograph went through focus already.
                    blurred = blur(light, compute_psf(variant.optics, z_um))
                yield Sample(
                    name=f"{Path(field).stem} {level:+d}",
                    pixels=camera.expose(blurred, rng),
                    sharp=truth,
                    defocus_um=(z_um, z_um),
                    group=str(level),
                    data_range=variant.photons,
                    sided=variant.signed and level != 0,
                )

    title = (
        f"{len(fields)} sharp fields blurred with {variant.title}; "
        f"{variant.photons:g} photons at most, seed {_SEED}, range {variant.photons:g}"
    )
    return DataSet(name, title, variant.optics, camera.offset_counts, samples)


def _light(path: Path) -> Image:
    """Read a field as light: darkest percentile 0, brightest pixel 1."""
    pixels = open_images(path)[0].read().astype(np.float32)
    dark = np.percentile(pixels, 0.5)
    return np.asarray(np.clip((pixels - dark) / (pixels.max() - dark), 0.0, 1.0))
