"""Pairs: batches of blurred patches with their sharp targets, made on the fly.

Batch number n is a pure function of (recipe, n). In focus the target is the input
itself, noise and all: what is sharp must come back unchanged. Registered real images
of one field, in focus and out of it, are mixed in.
"""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import ContrastToNoise, PercentileRange
from rtfocus.training.data.pair_scenes import (
    PairRecipe,
    PairScene,
    PairScenes,
    RealPairsRecipe,
)
from rtfocus.training.data.scenes import Pool, data_folder, draw_exposure, load_fields

Image = NDArray[np.float32]
Pair = tuple[Image, Image]
"""Blurred and sharp image, both on the scale of the blurred one's percentiles."""


def load_real_pairs(
    wanted: RealPairsRecipe, folder: Path, *, validation: bool
) -> list[Pair]:
    """Read the pairs of one side of the split, normalised.

    Raises
    ------
    ConfigError
        If there is no such file, or a field has no partner of the same shape.
    """
    paths = sorted(folder.glob(wanted.sharp))
    if not paths:
        msg = f"real pairs: no file matches '{folder / wanted.sharp}'"
        raise ConfigError(msg)
    pairs = []
    for path in paths:
        held_out = any(fnmatch(path.name, pattern) for pattern in wanted.validation)
        if held_out == validation:
            pairs.append(_load(path, folder / wanted.blurred / path.name))
    return pairs


def _load(sharp_path: Path, blurred_path: Path) -> Pair:
    if not blurred_path.is_file():
        msg = f"real pairs: '{sharp_path}' has no partner '{blurred_path}'"
        raise ConfigError(msg)
    sharp, blurred = (
        open_images(path)[0].read().astype(np.float32)
        for path in (sharp_path, blurred_path)
    )
    if sharp.shape != blurred.shape:
        msg = (
            f"real pairs: '{sharp_path}' is {sharp.shape}, '{blurred_path}' is "
            f"{blurred.shape}; register and cut them to one field"
        )
        raise ConfigError(msg)
    offset, scale = (np.float32(v) for v in PercentileRange().fit(blurred))
    return (blurred - offset) / scale, (sharp - offset) / scale


CELL_PX = 16
"""Side of the cells that a batch gives the defocus of."""
TILE_PX = 96
TILE_STRIDE_PX = 48

_BACKGROUND_RULE = ContrastToNoise()
_RANGE = PercentileRange()
# Defocus, in levels, up to which a patch counts as sharp, and from which on the
# target is the sharp scene; between them the target changes over.
_SHARP_LEVELS = (0.3, 0.8)
# Range of a window from which on it surely holds a specimen.
_VISIBLE = 0.08
_DRAWS = 4
# How a whole frame's percentiles differ from those of a window of it.
_SCALE_JITTER = 0.2
_OFFSET_JITTER = 0.03
_POINT = np.ones((1, 1), dtype=np.float32)


class PairBatches:
    """Training or validation batches by number.

    A batch is a dict of arrays: ``blurred``, ``sharp`` (N, 1, y, x) on the scale
    of the blurred frame's percentiles; ``levels`` (N, row, column), signed defocus
    per cell of 16 px, NaN where it is not known (real pairs); ``empty`` (N, row,
    column), background by the frame's own noise, per tile of 96 px every 48;
    ``optics`` (N, 2), sampling and spherical aberration in waves; ``real`` (N,);
    and ``psf`` (N, 1, side, side) where the recipe asks for it: that of the patch's
    middle, a point where the target is the input itself.
    """

    def __init__(self, recipe: PairRecipe, *, validation: bool = False) -> None:
        self._recipe = recipe
        self._side = 1 if validation else 0
        self._scenes = PairScenes(recipe, load_fields(recipe), validation=validation)
        self._real: list[Pair] = []
        for wanted in recipe.pairs.real:
            folder = data_folder(recipe)
            self._real += load_real_pairs(wanted, folder, validation=validation)
        self._pool = Pool(recipe.pool, self._scenes.entry)

    def batch(self, step: int, draw: int = 0) -> dict[str, NDArray[np.generic]]:
        """Make batch number `step`; other draws are other patches of the same pool."""
        rng = np.random.default_rng([self._recipe.seed, 6, self._side, step, draw])
        pairs = self._recipe.pairs
        scenes = self._pool.at(step)
        samples = []
        for _ in range(pairs.batch_patches):
            if self._real and rng.random() < pairs.real_share:
                samples.append(self._real_patch(rng))
            else:
                scene = scenes[int(rng.integers(len(scenes)))]
                samples.append(self._patch(scene, rng))
        return {
            name: np.stack([np.ascontiguousarray(s[name]) for s in samples])
            for name in samples[0]
        }

    def _patch(
        self, scene: PairScene, rng: np.random.Generator
    ) -> dict[str, NDArray[np.generic]]:
        pairs = self._recipe.pairs
        side = pairs.patch_px
        window = _window(scene.sharp, side, rng)
        sharp = scene.sharp[window]
        places = _places(scene, side, rng)
        levels = np.interp(places, np.arange(len(scene.levels)), scene.levels)
        light, near = _interpolate(scene.planes, places, window), scene.planes
        if rng.random() < pairs.sharp_share:
            levels, light, near = np.zeros_like(levels), sharp, scene.sharp[None]
        exposure = draw_exposure(rng, pairs.photons)
        if pairs.counting_share and rng.random() < pairs.counting_share:
            exposure = exposure.counting()
        blurred = exposure.take(light, rng)
        target = exposure.counts(sharp)
        # A camera that saturates hides the truth: neither side may exceed it.
        np.clip(target, 0, exposure.full - 1, out=target)
        share = np.clip(
            (np.abs(levels) - _SHARP_LEVELS[0]) / np.ptp(_SHARP_LEVELS), 0, 1
        )
        target = blurred + share.astype(np.float32) * (target - blurred)
        noise = exposure.dark_noise()
        middle = round(float(places.mean()))
        low, scale = _RANGE.fit(exposure.counts(near[min(middle, len(near) - 1)]))
        # The percentiles of a noisy frame lie farther out than those of its light.
        low, scale = low - 2.3 * noise, scale + 3.3 * noise
        scale *= float(np.exp(rng.normal(0, _SCALE_JITTER)))
        low += scale * float(rng.normal(0, _OFFSET_JITTER))
        turn = int(rng.integers(4))
        known = scene.is_defocus or not share.any()
        told = levels if known else np.full_like(levels, np.nan)
        sample: dict[str, NDArray[np.generic]] = {
            "blurred": np.rot90((blurred - low) / scale, turn)[None],
            "sharp": np.rot90((target - low) / scale, turn)[None],
            "levels": np.rot90(_cells(told), turn),
            "empty": np.rot90(
                _BACKGROUND_RULE.tiles(
                    blurred, tile_px=TILE_PX, stride_px=TILE_STRIDE_PX, noise=noise
                ),
                turn,
            ),
            "optics": np.array([scene.sampling, scene.spherical_waves], np.float32),
            "real": np.array(False),
        }
        if pairs.psf_px:
            psf = scene.psfs[middle] if share.any() else _POINT
            sample["psf"] = np.rot90(_fit_psf(psf, pairs.psf_px), turn)[None]
        return {k: _as_float32(v) for k, v in sample.items()}

    def _real_patch(self, rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
        pairs = self._recipe.pairs
        blurred, sharp = self._real[int(rng.integers(len(self._real)))]
        window = _window(blurred, pairs.patch_px, rng)
        turn, flip = int(rng.integers(4)), bool(rng.random() < 0.5)
        scale = float(np.exp(rng.normal(0, _SCALE_JITTER)))
        shift = float(rng.normal(0, _OFFSET_JITTER))
        patches = []
        for image in (blurred, sharp):
            patch = np.rot90(image[window], turn)
            patches.append(((patch[::-1] if flip else patch) / scale - shift)[None])
        cells, tiles = pairs.patch_px // CELL_PX, pairs.patch_px // TILE_STRIDE_PX - 1
        reference = pairs.reference
        sample: dict[str, NDArray[np.generic]] = {
            "blurred": patches[0],
            "sharp": patches[1],
            "levels": np.full((cells, cells), np.nan),
            "empty": np.zeros((tiles, tiles), dtype=np.bool_),
            "optics": np.array(
                [reference.sampling, reference.aberrations.spherical_waves]
            ),
            "real": np.array(True),
        }
        if pairs.psf_px:
            # Not known; a point changes nothing where it is used by mistake.
            sample["psf"] = _fit_psf(_POINT, pairs.psf_px)[None]
        return {k: _as_float32(v) for k, v in sample.items()}


def _window(image: Image, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Choose a square; empty ones teach little and are mostly drawn again."""
    for _ in range(_DRAWS):
        top, left = (int(rng.integers(n - side + 1)) for n in image.shape)
        window = slice(top, top + side), slice(left, left + side)
        seen = image[window][::3, ::3]
        if float(seen.max() - seen.min()) > _VISIBLE:
            break
    return window


def _places(scene: PairScene, side: int, rng: np.random.Generator) -> Image:
    """Choose the plane of every pixel: one, or a tilt or step between planes."""
    count = len(scene.levels)
    if not scene.dense:
        return np.full((side, side), rng.integers(count), np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    down, across = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    along = down * np.sin(angle) + across * np.cos(angle)
    middle = rng.uniform(1, count - 2)
    if rng.random() < 0.3:
        along = np.sign(along - rng.uniform(-0.5, 0.5))
    places = middle + along * rng.uniform(0.2, 2.0)
    return np.asarray(np.clip(places, 0, count - 1), dtype=np.float32)


def _interpolate(planes: Image, places: Image, window: tuple[slice, slice]) -> Image:
    """Mix neighbouring planes linearly, pixel by pixel."""
    first = int(places.flat[0])
    if (places == first).all():
        return np.asarray(planes[first][window])
    light = np.zeros(places.shape, dtype=np.float32)
    for index in range(int(places.min()), int(np.ceil(places.max())) + 1):
        light += np.maximum(1 - np.abs(places - index), 0) * planes[index][window]
    return light


def _cells(levels: NDArray[np.floating]) -> NDArray[np.floating]:
    rows, columns = (side // CELL_PX for side in levels.shape)
    blocks = levels.reshape(rows, CELL_PX, columns, CELL_PX)
    return np.asarray(blocks.mean(axis=(1, 3)))


def _fit_psf(psf: Image, side: int) -> Image:
    """Cut or pad a PSF about its centre, and let it sum to 1 again."""
    fitted = np.zeros((side, side), dtype=np.float32)
    half = min(side, psf.shape[0]) // 2
    here, there = side // 2, psf.shape[0] // 2
    part = psf[there - half : there + half + 1, there - half : there + half + 1]
    fitted[here - half : here + half + 1, here - half : here + half + 1] = part
    return np.asarray(fitted / fitted.sum())


def _as_float32(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values.astype(np.float32) if values.dtype == np.float64 else values
