"""Signed patches: photographed patches on either side of focus, in five classes.

A protocol is what stays the same over the first test set of Wei et al. 2024 and differs
in its second one: optics, stain and light. Batch number n is a pure function of
(recipe, n).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import Section
from rtfocus.optics.formation import blur_stack
from rtfocus.optics.normalisation import CELL_PX, ContrastToNoise
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_stained
from rtfocus.training.recipe import (
    Count,
    Fraction,
    OptimiserRecipe,
    Positive,
    RecipeBase,
)
from rtfocus.training.scenes import (
    Exposure,
    Pool,
    SceneSource,
    SharpField,
    draw_exposure,
    load_fields,
)


class SignedRecipe(Section):
    """Planes through focus and what makes their sides differ.

    With spherical aberration W = 0 the PSFs of +z and -z are the same and no image
    tells them apart; (z, W) and (-z, -W) are the same too. So W is never 0 here and
    always negative.
    """

    reference: OpticalSystem
    """Optics of the planes: those of the training and of the first test."""
    colour: bool = False
    """Stained sections in three colours; false: fluorescence, one channel."""
    step_um: Positive = 0.5
    """Distance between planes; nearer to focus than half of it counts as focus."""
    inner_um: Positive = 5.5
    """Classes -1 and 1 reach up to this, itself included."""
    farthest_um: Positive = 10.0
    """Last plane on either side."""
    beyond_um: Annotated[float, Field(ge=0)] = 0.0
    """Largest defocus of one more plane behind the last, on either side; 0: none."""
    jitter_um: Annotated[float, Field(ge=0)] = 0.0
    """Largest distance of a trained plane from its place."""
    reference_share: Fraction = 0.7
    """Share of scenes with exactly the reference optics; the rest is drawn near."""
    photons: tuple[Positive, Positive] = (800.0, 10_000.0)
    """Range of photons at the brightest point."""


class PatchOptimiserRecipe(OptimiserRecipe):
    """Optimiser of a network that labels whole patches."""

    batch_patches: Count = 32
    """Patches per step."""


class SignedClassRecipe(RecipeBase):
    """A training run on signed classes."""

    signed: SignedRecipe
    optimiser: PatchOptimiserRecipe = PatchOptimiserRecipe()


Image = NDArray[np.float32]

LABELS: tuple[int, ...] = (-2, -1, 0, 1, 2)
"""Class of every output: near focus is negative, far focus positive."""
PATCH_PX = 224
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
        fields: list[SharpField],
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


_RULE = ContrastToNoise()
_CELLED_PX = PATCH_PX // CELL_PX * CELL_PX
_VISIBLE = 0.1
_DRAWS = 6
# Light of the three colours, relative to the brightest: as balanced by hand.
_BALANCE = {"same": (0.92, 1.0), "shifted": (0.6, 1.0)}
_DIMMER = 0.35


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches of one test scene."""

    patches: Image
    """Share of the camera's full scale, shape (N, channels, 224, 224)."""
    labels: NDArray[np.int64]
    """Index into `LABELS`, shape (N,)."""


class SignedPatches:
    """Training batches by number."""

    def __init__(self, recipe: SignedClassRecipe) -> None:
        self._recipe = recipe
        scenes = SignedScenes(recipe, load_fields(recipe), validation=False)
        self._pool = Pool(recipe.pool, scenes.entry)

    def batch(self, step: int, draw: int = 0) -> dict[str, NDArray[np.generic]]:
        """Make ``patches`` (N, channels, 224, 224) and their ``labels`` (N,)."""
        rng = np.random.default_rng([self._recipe.seed, 8, step, draw])
        scenes = self._pool.at(step)
        patches, labels = [], []
        for _ in range(self._recipe.optimiser.batch_patches):
            scene = scenes[int(rng.integers(len(scenes)))]
            place = int(rng.integers(len(scene.defocus_um)))
            window = _cut(scene.planes[place], rng)
            turned = np.rot90(window, int(rng.integers(4)), axes=(1, 2))
            if rng.random() < 0.5:
                turned = turned[:, ::-1]
            exposure = draw_exposure(rng, self._recipe.signed.photons)
            patches.append(_photograph(turned, exposure, "same", rng))
            labels.append(class_of(scene.defocus_um[place], self._recipe.signed))
        return {"patches": np.stack(patches), "labels": np.array(labels)}


def held_out_patches(
    recipe: SignedClassRecipe, protocol: Protocol, scenes: int
) -> Iterator[Patches]:
    """Make the patches of a number of test scenes, each at every plane.

    The shifted protocol has another objective, less light and, in colour, other
    dyes and another balance. Fluorescence patches that the background rule calls
    empty are left out: they have no defocus.
    """
    source = SignedScenes(
        recipe, load_fields(recipe), validation=True, protocol=protocol
    )
    dimming = _DIMMER if protocol == "shifted" else 1.0
    for number in range(scenes):
        rng = np.random.default_rng([recipe.seed, 9, protocol == "shifted", number])
        scene = source.entry(number)
        low, high = recipe.signed.photons
        photons = dimming * float(np.sqrt(low * high))
        patches, labels = [], []
        for plane, defocus_um in zip(scene.planes, scene.defocus_um, strict=True):
            exposure = draw_exposure(rng, (photons, photons))
            patch = _photograph(_cut(plane, rng), exposure, protocol, rng)
            if len(patch) == 1 and _is_empty(patch[0], exposure):
                continue
            patches.append(patch)
            labels.append(class_of(defocus_um, recipe.signed))
        if patches:
            yield Patches(np.stack(patches), np.array(labels))


def _cut(plane: Image, rng: np.random.Generator) -> Image:
    """Cut a patch at random; empty ones teach little and are mostly drawn again."""
    for _ in range(_DRAWS):
        top, left = (int(rng.integers(n - PATCH_PX + 1)) for n in plane.shape[1:])
        window = plane[:, top : top + PATCH_PX, left : left + PATCH_PX]
        seen = window[:, ::4, ::4]
        if float(seen.max() - seen.min()) > _VISIBLE:
            break
    return window


def _photograph(
    light: Image, exposure: Exposure, protocol: Protocol, rng: np.random.Generator
) -> Image:
    """Take a picture, in shares of the camera's full scale."""
    if len(light) > 1:
        balance = rng.uniform(*_BALANCE[protocol], (len(light), 1, 1))
        light = light * balance.astype(np.float32)
    return exposure.take(light, rng) / np.float32(exposure.full)


def _is_empty(patch: Image, exposure: Exposure) -> bool:
    counts = patch[:_CELLED_PX, :_CELLED_PX] * np.float32(exposure.full)
    found = _RULE.tiles(
        counts,
        tile_px=_CELLED_PX,
        stride_px=_CELLED_PX,
        noise=exposure.dark_noise(),
    )
    return bool(found[0, 0])
