"""Signed scenes: one sharp picture through focus, with the optics of a protocol.

A protocol is what stays the same over the paper's first test set and differs in
its second one: optics, stain and light. Every entry is a pure function of (recipe,
side of the split, protocol, generation).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.optics.blur import blur_stack
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens.stained import draw_stained
from rtfocus.training.data.fields import Field
from rtfocus.training.data.scenes import SceneSource
from rtfocus.training.data.signed_recipe import SignedClassRecipe, SignedRecipe
from rtfocus.training.networks.wei_classifier import LABELS, PATCH_PX

Image = NDArray[np.float32]
Protocol = Literal["same", "shifted"]

_NO_BLUR = np.ones((1, 1), dtype=np.float32)
_STAINED_SCALE = (1.1, 1.9)
_LEAST_SPHERICAL = -0.1
# Another laboratory's dyes: shares of the absorbance that go to other colours.
_OTHER_STAIN = np.array([[0.7, 0.1, 0.2], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
_DARKEST = 1e-3


@dataclass(frozen=True, slots=True)
class SignedScene:
    """One scene at several signed defoci."""

    planes: Image
    """Axes (plane, colour, y, x)."""
    defocus_um: tuple[float, ...]
    """Nominal defocus of every plane in the optics of reference."""


class SignedScenes:
    """Makes the scenes of one side of the split under one protocol."""

    def __init__(
        self,
        recipe: SignedClassRecipe,
        fields: list[Field],
        *,
        validation: bool,
        protocol: Protocol = "same",
    ) -> None:
        self._recipe = recipe
        self._protocol = protocol
        self._key = [1 if validation else 0, 1 if protocol == "shifted" else 0]
        self._exact = validation
        self._fields = SceneSource(recipe, fields, validation=validation)

    def entry(self, generation: int) -> SignedScene:
        """Draw scene and optics number `generation` and blur it.

        Training draws two planes per class and one in focus; validation takes every
        plane, with exactly the optics of the protocol.
        """
        signed = self._recipe.signed
        rng = np.random.default_rng([self._recipe.seed, 7, *self._key, generation])
        light, ideal = self._draw_scene(rng)
        light = _at_least(light, PATCH_PX)
        optics = self._draw_optics(rng)
        nominal = plane_places_um(signed) if self._exact else _draw_places(signed, rng)
        unit = optics.defocus_unit_um / signed.reference.defocus_unit_um
        psfs = []
        for place in nominal:
            jitter = 0.0 if self._exact else rng.uniform(-1, 1) * signed.jitter_um
            sharp = place == 0 and not ideal
            psfs.append(_NO_BLUR if sharp else _psf(optics, (place + jitter) * unit))
        blurred = np.clip(blur_stack(light, psfs), 0, 1)
        planes = blurred[:, None] if blurred.ndim == 3 else np.moveaxis(blurred, 3, 1)
        return SignedScene(np.ascontiguousarray(planes), tuple(nominal))

    def _draw_scene(self, rng: np.random.Generator) -> tuple[Image, bool]:
        """Return light, (y, x) or (y, x, colour), and whether it is ideally sharp."""
        if not self._recipe.signed.colour:
            scene = self._fields.draw(rng)
            # A drawn scene passes for a photograph half of the time.
            return scene.light, scene.ideal and bool(rng.random() < 0.5)
        side = self._recipe.pool.side_px
        scale = float(rng.uniform(*_STAINED_SCALE))
        light = draw_stained((side, side), rng, scale=scale)
        if self._protocol == "shifted":
            light = stain_otherwise(light)
        return light, True

    def _draw_optics(self, rng: np.random.Generator) -> OpticalSystem:
        signed = self._recipe.signed
        base = signed.reference
        if self._protocol == "shifted":
            return shifted_optics(base)
        if self._exact or rng.random() < signed.reference_share:
            return base
        spherical = base.aberrations.spherical_waves + rng.normal(0, 0.05)
        return replace(
            base,
            numerical_aperture=base.numerical_aperture * rng.uniform(0.95, 1.05),
            pixel_size_um=base.pixel_size_um * rng.uniform(0.95, 1.05),
            aberrations=Aberrations(
                spherical_waves=min(spherical, _LEAST_SPHERICAL),
                astigmatism_waves=rng.normal(0, 0.03),
            ),
        )


def shifted_optics(reference: OpticalSystem) -> OpticalSystem:
    """Return the optics of the second test: another objective of the same kind."""
    spherical = reference.aberrations.spherical_waves
    return replace(
        reference,
        numerical_aperture=reference.numerical_aperture * 0.93,
        pixel_size_um=reference.pixel_size_um * 1.08,
        aberrations=Aberrations(
            spherical_waves=0.75 * spherical,
            astigmatism_waves=0.05,
            coma_x_waves=0.04,
        ),
    )


def stain_otherwise(light: Image) -> Image:
    """Return a section as other dyes would show it; axes (y, x, colour)."""
    absorbance = -np.log(np.maximum(light, _DARKEST))
    return np.asarray(np.exp(-0.75 * absorbance @ _OTHER_STAIN), dtype=np.float32)


def class_of(defocus_um: float, signed: SignedRecipe) -> int:
    """Return the index into `LABELS` of a defocus in the optics of reference.

    Examples
    --------
    >>> signed = SignedRecipe(reference=OpticalSystem(0.75, 550.0, 0.1725))
    >>> [LABELS[class_of(z, signed)] for z in (-11, -5.6, -5.5, -0.3, 0.2, 5.5, 6)]
    [-2, -2, -1, -1, 0, 1, 2]
    """
    distance = abs(defocus_um)
    if distance < signed.step_um / 2:
        return LABELS.index(0)
    # The tolerance forgives the rounding of multiples of a step.
    far = distance > signed.inner_um + 1e-6 * signed.step_um
    return LABELS.index(int(np.sign(defocus_um)) * (2 if far else 1))


def plane_places_um(signed: SignedRecipe) -> list[float]:
    """Return the planes of a stack through focus, ascending."""
    count = round(signed.farthest_um / signed.step_um)
    return [place * signed.step_um for place in range(-count, count + 1)]


def _at_least(light: Image, side_px: int) -> Image:
    """Mirror a picture behind its edges where a side is too short."""
    short = [max(side_px - side, 0) for side in light.shape[:2]]
    pads = [(0, pixels) for pixels in short] + [(0, 0)] * (light.ndim - 2)
    return np.pad(light, pads, mode="symmetric") if any(short) else light


def _draw_places(signed: SignedRecipe, rng: np.random.Generator) -> list[float]:
    """Draw one plane in focus, two of every other class, and those beyond."""
    places = plane_places_um(signed)
    chosen = [0.0]
    for label in range(len(LABELS)):
        if label != LABELS.index(0):
            own = [z for z in places if class_of(z, signed) == label]
            chosen += _choose(own, 2, rng)
    if signed.beyond_um > signed.farthest_um:
        side = float(rng.choice([-1, 1]))
        chosen.append(side * float(rng.uniform(signed.farthest_um, signed.beyond_um)))
    return chosen


def _choose(
    places: Sequence[float], number: int, rng: np.random.Generator
) -> list[float]:
    picked = rng.choice(len(places), size=min(number, len(places)), replace=False)
    return [places[int(k)] for k in np.sort(picked)]


@lru_cache(maxsize=128)
def _psf(optics: OpticalSystem, defocus_um: float) -> Image:
    """Compute a PSF once per place: most scenes share optics and planes."""
    return compute_psf(optics, defocus_um)
