"""Dataset: batches of noisy crops with a label per tile, made on the fly.

Batch number n is a pure function of (recipe, n): a pool of blurred scenes whose
oldest entry is replaced at fixed steps, crops of it, a camera drawn per crop.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.optics.normalisation import ContrastToNoise, LocalStandardisation
from rtfocus.training.data.exposure import draw_exposure
from rtfocus.training.data.level_recipe import LevelRecipe
from rtfocus.training.data.level_scenes import FULL_SCALE, Blurring, Entry
from rtfocus.training.networks.delpnet import GEOMETRY, LABELS

Image = NDArray[np.float32]
Crop = NDArray[np.uint16]

BACKGROUND = LABELS.index("bg")
NORMALISATION = LocalStandardisation()

_BACKGROUND_RULE = ContrastToNoise()
_EMPTY_SHARE = 0.02
# Range of a window, of full scale, from which on it surely holds a specimen.
_VISIBLE = round(0.1 * FULL_SCALE)
_DRAWS = 4
_SHIFT = 0.15


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of one size, as the network sees them."""

    crops: Image
    """Normalised, shape (N, 1, H, W)."""
    labels: NDArray[np.int64]
    """Index into `LABELS` per tile, shape (N, row, column)."""


class Pool:
    """The newest `entries` blurred scenes; the next replaces the oldest."""

    def __init__(self, blurring: Blurring, entries: int, refresh_steps: int) -> None:
        self._blurring = blurring
        self._size = entries
        self._refresh_steps = refresh_steps
        self._entries: deque[Entry] = deque(maxlen=entries)
        self._generation = 0

    def at(self, step: int) -> deque[Entry]:
        """Return the entries of a step, making those that are not held yet."""
        wanted = self._size + step // self._refresh_steps
        if wanted < self._generation:
            self._entries.clear()
        self._generation = max(self._generation, wanted - self._size)
        if not self._entries:
            self._generation = wanted - self._size
        while self._generation < wanted:
            self._entries.append(self._blurring.entry(self._generation))
            self._generation += 1
        return self._entries


class Batches:
    """Training batches by number.

    Parameters
    ----------
    recipe
        Sizes and seed.
    blurring
        Where the scenes come from.
    background
        Label empty tiles as background; false: as the level of their crop (He 2020,
        table 1).
    """

    def __init__(
        self, recipe: LevelRecipe, blurring: Blurring, *, background: bool = True
    ) -> None:
        self._recipe = recipe
        self._background = background
        pool = recipe.pool
        self._pool = Pool(blurring, pool.entries, pool.refresh_steps)

    def batch(self, step: int, draw: int = 0) -> Batch:
        """Make batch number `step`; other draws are other crops of the same pool."""
        rng = np.random.default_rng([self._recipe.seed, 3, step, draw])
        entries = self._pool.at(step)
        sides = self._recipe.optimiser.crop_sides_px
        side = sides[int(rng.integers(len(sides)))]
        tiles = GEOMETRY.count(side) ** 2
        number = max(self._recipe.optimiser.batch_tiles // tiles, 2)
        pairs = [self._crop(entries, side, rng) for _ in range(number)]
        return Batch(
            np.stack([crop for crop, _ in pairs])[:, None],
            np.stack([labels for _, labels in pairs]),
        )

    def _crop(
        self, entries: deque[Entry], side: int, rng: np.random.Generator
    ) -> tuple[Image, NDArray[np.int64]]:
        entry = entries[int(rng.integers(len(entries)))]
        level = int(rng.integers(BACKGROUND))
        # The last level has two planes: its own defocus and one farther away.
        beyond = level == BACKGROUND - 1 and rng.random() < 0.4
        place = level + int(beyond)
        window = _cut(entry.planes[place], side, rng)
        window = np.rot90(window, int(rng.integers(4)))
        if rng.random() < 0.5:
            window = window[::-1]
        light = window.astype(np.float32) / np.float32(FULL_SCALE)
        if rng.random() < _EMPTY_SHARE:
            light *= 0
        exposure = draw_exposure(rng)
        noise = exposure.dark_noise(entry.noise[place])
        crop, labels = label_crop(exposure.take(light, rng), noise, level)
        if not self._background:
            labels[:] = level
        # The median of a whole frame is another one than that of a crop.
        crop += np.float32(rng.normal(0, _SHIFT))
        return crop, labels


def _cut(plane: Crop, side: int, rng: np.random.Generator) -> Crop:
    """Cut a square at random; empty ones teach little and are mostly drawn again."""
    for _ in range(_DRAWS):
        top, left = (int(rng.integers(n - side + 1)) for n in plane.shape)
        window = plane[top : top + side, left : left + side]
        if int(window.max()) - int(window.min()) > _VISIBLE:
            break
    return window


def label_crop(
    counts: Image, noise: float, level: int
) -> tuple[Image, NDArray[np.int64]]:
    """Normalise a crop and label its tiles: their level, or background."""
    empty = _BACKGROUND_RULE.tiles(
        counts,
        tile_px=GEOMETRY.tile_px,
        stride_px=GEOMETRY.cell_px,
        start_px=GEOMETRY.centre_px - GEOMETRY.tile_px // 2,
        noise=noise,
    )
    labels = np.where(empty, BACKGROUND, level).astype(np.int64)
    return NORMALISATION.apply(counts), labels
