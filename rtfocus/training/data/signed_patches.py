"""Signed patches: batches of photographed patches with their class.

Batch number n is a pure function of (recipe, n).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.optics.normalisation import CELL_PX, ContrastToNoise
from rtfocus.training.data.exposure import Exposure, draw_exposure
from rtfocus.training.data.fields import load_fields
from rtfocus.training.data.signed_recipe import SignedClassRecipe
from rtfocus.training.data.signed_scenes import (
    Protocol,
    SignedScene,
    SignedScenes,
    class_of,
)
from rtfocus.training.networks.wei_classifier import PATCH_PX

Image = NDArray[np.float32]

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
    """Index into `wei_classifier.LABELS`, shape (N,)."""


class SignedPatches:
    """Training batches by number."""

    def __init__(self, recipe: SignedClassRecipe) -> None:
        self._recipe = recipe
        self._scenes = SignedScenes(recipe, load_fields(recipe), validation=False)
        self._pool: deque[SignedScene] = deque(maxlen=recipe.pool.entries)
        self._generation = 0

    def batch(self, step: int, draw: int = 0) -> dict[str, NDArray[np.generic]]:
        """Make ``patches`` (N, channels, 224, 224) and their ``labels`` (N,)."""
        rng = np.random.default_rng([self._recipe.seed, 8, step, draw])
        self._fill_pool(step)
        patches, labels = [], []
        for _ in range(self._recipe.optimiser.batch_patches):
            scene = self._pool[int(rng.integers(len(self._pool)))]
            place = int(rng.integers(len(scene.defocus_um)))
            window = _cut(scene.planes[place], rng)
            turned = np.rot90(window, int(rng.integers(4)), axes=(1, 2))
            if rng.random() < 0.5:
                turned = turned[:, ::-1]
            exposure = draw_exposure(rng, self._recipe.signed.photons)
            patches.append(_photograph(turned, exposure, "same", rng))
            labels.append(class_of(scene.defocus_um[place], self._recipe.signed))
        return {"patches": np.stack(patches), "labels": np.array(labels)}

    def _fill_pool(self, step: int) -> None:
        pool = self._recipe.pool
        wanted = pool.entries + step // pool.refresh_steps
        first = wanted - pool.entries
        if not first <= self._generation <= wanted:
            self._pool.clear()
            self._generation = first
        while self._generation < wanted:
            self._pool.append(self._scenes.entry(self._generation))
            self._generation += 1


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
