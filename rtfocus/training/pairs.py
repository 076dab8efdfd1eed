"""Pairs: batches of blurred patches with their sharp targets, made on the fly.

A scene is one sharp picture at several signed defoci, and the optics it has: a pure
function of (recipe, side of the split, generation). Batch number n is one of (recipe,
n). In focus the target is the input itself, noise and all: what is sharp must come back
unchanged. Registered real images of one field, in focus and out of it, are mixed in.
"""

from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.optics.formation import blur_stack
from rtfocus.optics.normalisation import ContrastToNoise, PercentileRange
from rtfocus.optics.psf import compute_psf
from rtfocus.training.recipe import PairRecipe, PairsRecipe
from rtfocus.training.scenes import (
    POINT,
    DrawnCamera,
    Pair,
    Pool,
    SceneSource,
    SharpField,
    data_folder,
    draw_camera,
    lively_window,
    load_fields,
    load_real_pairs,
)

Image = NDArray[np.float32]

# Levels between the planes of an entry whose patches vary in depth.
_DENSE_STEP = 0.7
# Of the reference sampling: up to here optics count as near it.
_NEAR = 1.15
# The finest sampling, in that of the reference, that sees all of the defocus.
_FINEST_IN_FULL = 0.5
# Of spherical aberration, in waves: no wider than real objectives.
_WIDEST_SPHERICAL = 0.65
# Times larger than taken from which on a scene counts as enlarged.
_ENLARGED = 1.2


@dataclass(frozen=True, slots=True)
class PairScene:
    """One scene at several defoci."""

    sharp: Image
    """Axes (y, x)."""
    planes: Image
    """Blurred, axes (plane, y, x)."""
    levels: NDArray[np.float32]
    """Signed defocus of every plane in levels, ascending."""
    psfs: tuple[Image, ...]
    """PSF of every plane."""
    sampling: float
    """Pixel size in units of lambda / NA."""
    spherical_waves: float
    """Never positive: (z, W) and (-z, -W) make the same PSF."""
    dense: bool
    """True: planes so close that depths between them may be interpolated."""
    is_defocus: bool
    """False: blurred otherwise, its levels only say how far."""
    enlarged: bool = False
    """True: shown larger than it was taken, under optics as finely sampled."""


class PairScenes:
    """Makes the scenes of the training set or of the validation set."""

    def __init__(
        self, recipe: PairRecipe, fields: list[SharpField], *, validation: bool
    ) -> None:
        self._recipe = recipe
        self._side = 1 if validation else 0
        self._scenes = SceneSource(recipe, fields, validation=validation)

    def entry(self, generation: int) -> PairScene:
        """Draw scene, optics and defoci number `generation` and blur."""
        pairs = self._recipe.pairs
        rng = np.random.default_rng([self._recipe.seed, 5, self._side, generation])
        scene = self._scenes.draw(rng)
        light = _modality(scene.light, pairs, rng)
        enlarged = pairs.enlarged_fine and scene.zoom > _ENLARGED
        if enlarged:
            optics = _fine_optics(pairs, scene.zoom, rng)
        else:
            optics = draw_pair_optics(pairs, rng)
        dense = bool(rng.random() < pairs.varying_share)
        levels = _draw_levels(pairs, optics, dense, rng)
        gaussian = _draws(pairs.gaussian_share, rng) and is_wide(pairs, optics)
        # What one level is in these optics: the same share of the defocus unit.
        step_um = (
            pairs.level_step_um
            * optics.defocus_unit_um
            / pairs.reference.defocus_unit_um
        )
        # A photograph has been through a microscope, a drawn scene has not.
        keep_focus = not scene.ideal or bool(rng.random() < 0.5)
        in_focus = POINT if keep_focus else compute_psf(optics, 0.0)
        make_psf = _gaussian_psf if gaussian else compute_psf
        psfs = tuple(make_psf(optics, float(z)) for z in levels * step_um)
        planes = np.clip(blur_stack(light, (in_focus, *psfs)), 0, 1)
        return PairScene(
            sharp=planes[0],
            planes=planes[1:],
            levels=levels,
            psfs=psfs,
            sampling=optics.sampling,
            spherical_waves=(
                optics.aberrations.spherical_waves
                if optics.psf_model == "pupil"
                else 0.0
            ),
            dense=dense,
            is_defocus=not gaussian,
            enlarged=enlarged,
        )


def _fine_optics(
    pairs: PairsRecipe, zoom: float, rng: np.random.Generator
) -> OpticalSystem:
    """Draw optics as finely sampled as what they show is enlarged."""
    base = pairs.reference
    factor = max(pairs.sampling_factors[0], rng.uniform(0.8, 1.15) / zoom)
    return replace(
        base,
        pixel_size_um=base.pixel_size_um * factor,
        numerical_aperture=base.numerical_aperture * rng.uniform(0.9, 1.1),
        aberrations=Aberrations(spherical_waves=-_WIDEST_SPHERICAL * rng.random()),
    )


def draw_pair_optics(pairs: PairsRecipe, rng: np.random.Generator) -> OpticalSystem:
    """Draw optics: the reference, near it, or from a wide family; never W > 0."""
    base = pairs.reference
    chance = rng.random()
    if chance < pairs.reference_share:
        return base
    if chance < pairs.reference_share + pairs.near_share:
        spherical = base.aberrations.spherical_waves + rng.normal(0, 0.05)
        return replace(
            base,
            numerical_aperture=base.numerical_aperture * rng.uniform(0.95, 1.05),
            pixel_size_um=base.pixel_size_um * rng.uniform(0.94, 1.06),
            aberrations=Aberrations(
                spherical_waves=min(spherical, 0.0),
                astigmatism_waves=rng.normal(0, 0.03),
            ),
        )
    factor = float(np.exp(rng.uniform(*np.log(pairs.sampling_factors))))
    wide = replace(base, pixel_size_um=base.pixel_size_um * factor)
    if rng.random() < pairs.born_wolf_share:
        return replace(wide, psf_model="born_wolf")
    return replace(
        wide,
        numerical_aperture=base.numerical_aperture * rng.uniform(0.9, 1.1),
        aberrations=Aberrations(
            spherical_waves=-_WIDEST_SPHERICAL * rng.random(),
            astigmatism_waves=rng.normal(0, 0.06),
            coma_x_waves=rng.normal(0, 0.04),
        ),
        apodisation=float(rng.uniform(0, 0.5)),
    )


def _draws(share: float, rng: np.random.Generator) -> bool:
    """Draw whether; a share of 0 draws nothing, as before there was one."""
    return share > 0 and bool(rng.random() < share)


def is_wide(pairs: PairsRecipe, optics: OpticalSystem) -> bool:
    """Return whether optics are neither the reference nor near it."""
    nearness = optics.sampling / pairs.reference.sampling
    return not 1 / _NEAR < nearness < _NEAR


def _gaussian_psf(optics: OpticalSystem, defocus_um: float) -> Image:
    """Return a Gaussian of the width that the disc of a defocus has."""
    # A disc of radius R has the deviation R / 2 along each axis.
    radius_px = abs(defocus_um) * optics.numerical_aperture / optics.pixel_size_um
    sigma = max(0.5 * radius_px / optics.refractive_index, 0.05)
    place = np.arange(-ceil(3.5 * sigma), ceil(3.5 * sigma) + 1)
    profile = np.exp(-0.5 * (place / sigma) ** 2)
    psf = profile[:, None] * profile
    return np.asarray(psf / psf.sum(), dtype=np.float32)


def _draw_levels(
    pairs: PairsRecipe, optics: OpticalSystem, dense: bool, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw the defocus of every plane, ascending."""
    farthest, count = pairs.farthest_level, pairs.planes
    finer = optics.sampling / (pairs.reference.sampling * _FINEST_IN_FULL)
    if finer < 1:
        farthest = max(farthest * finer, 1.01 * _DENSE_STEP * count / 2)
    if dense:
        reach = _DENSE_STEP * count
        first = rng.uniform(-farthest, farthest - reach)
        levels = first + _DENSE_STEP * np.arange(count)
    else:
        edges = np.linspace(-farthest, farthest, count + 1)
        levels = rng.uniform(edges[:-1], edges[1:])
    return levels.astype(np.float32)


def _modality(light: Image, pairs: PairsRecipe, rng: np.random.Generator) -> Image:
    """Show some scenes as brightfield does: absorbing, or as relief."""
    chance = rng.random()
    if chance < pairs.absorbing_share:
        return np.asarray(1 - rng.uniform(0.3, 0.95) * light, dtype=np.float32)
    if chance < pairs.absorbing_share + pairs.relief_share:
        ground = ndimage.gaussian_filter(light, rng.uniform(1.0, 4.0))
        edges = light - ground
        contrast = rng.uniform(0.2, 0.5) / max(float(np.abs(edges).max()), 1e-6)
        return np.asarray(np.clip(0.5 + contrast * edges, 0, 1), dtype=np.float32)
    return light


CELL_PX = 16
"""Side of the cells that a batch gives the defocus of."""
TILE_PX = 96
TILE_STRIDE_PX = 48
"""Tiles that a network labels, and the distance between them."""

_BACKGROUND_RULE = ContrastToNoise()
_RANGE = PercentileRange()
# Defocus, in levels, up to which a patch counts as sharp, and from which on the
# target is the sharp scene; between them the target changes over.
_SHARP_LEVELS = (0.3, 0.8)
# Range of a window from which on it surely holds a specimen.
_VISIBLE = 0.08
# How a whole frame's percentiles differ from those of a window of it.
_SCALE_JITTER = 0.2
_OFFSET_JITTER = 0.03


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
        for pairs in recipe.pairs.real:
            folder = data_folder(recipe)
            self._real += load_real_pairs(pairs, folder, validation=validation)
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
        window = lively_window(scene.sharp, side, rng, contrast=_VISIBLE, step=3)
        sharp = scene.sharp[window]
        places = _places(scene, side, rng)
        levels = np.interp(places, np.arange(len(scene.levels)), scene.levels)
        light, near = _interpolate(scene.planes, places, window), scene.planes
        share = pairs.enlarged_sharp_share if scene.enlarged else pairs.sharp_share
        if rng.random() < share:
            levels, light, near = np.zeros_like(levels), sharp, scene.sharp[None]
        camera = self._draw_camera(rng)
        blurred = camera.take(light, rng)
        target = camera.counts(sharp)
        # A camera that saturates hides the truth: neither side may exceed it.
        np.clip(target, 0, camera.full - 1, out=target)
        share = np.clip(
            (np.abs(levels) - _SHARP_LEVELS[0]) / np.ptp(_SHARP_LEVELS), 0, 1
        )
        target = blurred + share.astype(np.float32) * (target - blurred)
        middle = round(float(places.mean()))
        frame = camera.counts(near[min(middle, len(near) - 1)])
        low, scale = _jittered_range(frame, camera.dark_noise(), rng)
        turn = int(rng.integers(4))
        known = scene.is_defocus or not share.any()
        levels_told = levels if known else np.full_like(levels, np.nan)
        sample: dict[str, NDArray[np.generic]] = {
            "blurred": np.rot90((blurred - low) / scale, turn)[None],
            "sharp": np.rot90((target - low) / scale, turn)[None],
            "levels": np.rot90(_cells(levels_told), turn),
            "empty": np.rot90(
                _BACKGROUND_RULE.tiles(
                    blurred,
                    tile_px=TILE_PX,
                    stride_px=TILE_STRIDE_PX,
                    noise=camera.dark_noise(),
                ),
                turn,
            ),
            "optics": np.array([scene.sampling, scene.spherical_waves], np.float32),
            "real": np.array(False),
        }
        if pairs.psf_px:
            psf = scene.psfs[middle] if share.any() else POINT
            sample["psf"] = np.rot90(_fit_psf(psf, pairs.psf_px), turn)[None]
        return {k: _as_float32(v) for k, v in sample.items()}

    def _draw_camera(self, rng: np.random.Generator) -> DrawnCamera:
        pairs = self._recipe.pairs
        camera = draw_camera(rng, pairs.photons)
        return camera.counting() if _draws(pairs.counting_share, rng) else camera

    def _real_patch(self, rng: np.random.Generator) -> dict[str, NDArray[np.generic]]:
        pairs = self._recipe.pairs
        blurred, sharp = self._real[int(rng.integers(len(self._real)))]
        side = pairs.patch_px
        window = lively_window(blurred, side, rng, contrast=_VISIBLE, step=3)
        turn, flip = int(rng.integers(4)), bool(rng.random() < 0.5)
        scale = float(np.exp(rng.normal(0, _SCALE_JITTER)))
        shift = float(rng.normal(0, _OFFSET_JITTER))
        patches = []
        for image in (blurred, sharp):
            patch = np.rot90(image[window], turn)
            patches.append(((patch[::-1] if flip else patch) / scale - shift)[None])
        cells, tiles = side // CELL_PX, side // TILE_STRIDE_PX - 1
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
            sample["psf"] = _fit_psf(POINT, pairs.psf_px)[None]
        return {k: _as_float32(v) for k, v in sample.items()}


def _jittered_range(
    light: Image, noise: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Return offset and scale that normalise a patch, off by chance.

    Parameters
    ----------
    light
        Counts of a noiseless frame around the patch.
    noise
        Deviation in the dark, in counts.
    """
    low, scale = _RANGE.fit(light)
    # The percentiles of a noisy frame lie farther out than those of its light.
    low, scale = low - 2.3 * noise, scale + 3.3 * noise
    scale *= float(np.exp(rng.normal(0, _SCALE_JITTER)))
    low += scale * float(rng.normal(0, _OFFSET_JITTER))
    return low, scale


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


def tile_levels(cells: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the mean defocus of every tile from that of its cells."""
    size, stride = TILE_PX // CELL_PX, TILE_STRIDE_PX // CELL_PX
    windows = np.lib.stride_tricks.sliding_window_view(cells, (size, size), (1, 2))
    tiles = windows[:, ::stride, ::stride].mean(axis=(3, 4))
    return np.asarray(tiles, dtype=np.float32)


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
