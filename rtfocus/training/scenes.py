"""Scenes: sharp pictures to blur, cut from real fields or drawn, and the camera.

The split is by field: no image, plane or channel of one file stands on both
sides, so that nothing is learnt by heart and then called accuracy. Cameras are drawn
at random, from very dim to bright, 8 to 16 bits. Blurred scenes are held in a pool,
renewed one by one while training goes on.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.specimens import draw_specimen, draw_stained
from rtfocus.training.recipe import (
    DATA_VARIABLE,
    PoolRecipe,
    RealPairsRecipe,
    RecipeBase,
    SourceRecipe,
    SpecimenRecipe,
)

Image = NDArray[np.float32]

# Recommendation ITU-R BT.601. The loop takes BT.709 for what it sees; as scenes to
# learn from both are fine, and a change would draw other batches from the same seed.
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class SharpField:
    """One sharp plane."""

    name: str
    """File and plane it came from."""
    source: SourceRecipe
    """The part of the recipe it belongs to."""
    validation: bool
    """True: never trained on."""
    image: Image
    """Axes (y, x); dark near 0, brightest pixel 1."""


def data_folder(recipe: RecipeBase) -> Path:
    """Return the folder of sharp images.

    Raises
    ------
    ConfigError
        If there is no such folder; names the places and the remedy.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    named = os.environ.get(DATA_VARIABLE)
    folder = recipe.data_folder or (Path(named) if named else beside)
    if not folder.is_dir():
        msg = (
            f"no sharp images at '{folder}'; set data_folder in the recipe or the "
            f"environment variable {DATA_VARIABLE}"
        )
        raise ConfigError(msg)
    return folder


def load_fields(recipe: RecipeBase) -> list[SharpField]:
    """Read every sharp plane of a recipe, in the order of its sources.

    Raises
    ------
    ConfigError
        If a pattern matches no file, or no field is left to train on.
    """
    fields: list[SharpField] = []
    if recipe.sources:
        folder = data_folder(recipe)
        for source in recipe.sources:
            fields += _load_source(source, folder)
    if recipe.specimens is None and all(field.validation for field in fields):
        msg = (
            "the recipe leaves nothing to train on; give sources with fields outside "
            "their validation patterns, or specimens"
        )
        raise ConfigError(msg)
    return fields


def _load_source(source: SourceRecipe, folder: Path) -> list[SharpField]:
    fields: list[SharpField] = []
    for pattern in source.files:
        for path in _matching(folder, pattern, f"source '{source.kind}'"):
            fields += _load_file(path, source, _is_held_out(path, folder, source))
    return fields


def _matching(folder: Path, pattern: str, whose: str) -> list[Path]:
    """Return the files that a pattern of the recipe means; ConfigError: none."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        msg = f"{whose}: no file matches '{folder / pattern}'; correct the recipe"
        raise ConfigError(msg)
    return paths


def _is_held_out(path: Path, folder: Path, source: SourceRecipe) -> bool:
    inside = f"/{path.relative_to(folder).as_posix()}"
    return any(
        fnmatch(inside if pattern.startswith("/") else path.name, pattern)
        for pattern in source.validation
    )


def _load_file(path: Path, source: SourceRecipe, held_out: bool) -> list[SharpField]:
    return [
        SharpField(
            name=f"{path.stem}:{'.'.join(str(place) for place in index.values())}",
            source=source,
            validation=held_out,
            image=_scale(series.read(**index)),
        )
        for series in open_images(path)
        for index in series.indices()
    ]


def _scale(plane: NDArray[np.generic]) -> Image:
    """Map counts to [0, 1]: dark percentile to 0, maximum to 1; colours to grey."""
    pixels = plane.astype(np.float32)
    if pixels.ndim == 3:
        pixels = pixels @ _LUMINANCE
    dark = np.percentile(pixels, 0.5)
    light = max(float(pixels.max() - dark), 1e-6)
    scaled = np.clip((pixels - dark) / np.float32(light), 0, 1)
    return np.asarray(scaled, dtype=np.float32)


Pair = tuple[Image, Image]
"""Blurred and sharp image, both on the scale of the blurred one's percentiles."""


def load_real_pairs(
    recipe: RealPairsRecipe, folder: Path, *, validation: bool
) -> list[Pair]:
    """Read the pairs of one side of the split, normalised.

    Raises
    ------
    ConfigError
        If there is no such file, or a field has no partner of the same shape.
    """
    pairs = []
    for path in _matching(folder, recipe.sharp, "real pairs"):
        held_out = any(fnmatch(path.name, pattern) for pattern in recipe.validation)
        if held_out == validation:
            pairs.append(_load_pair(path, folder / recipe.blurred / path.name))
    return pairs


def _load_pair(sharp_path: Path, blurred_path: Path) -> Pair:
    if not blurred_path.is_file():
        msg = f"real pairs: '{sharp_path}' has no partner '{blurred_path}'; add it"
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


_LEAST_SIDE_PX = 216
_LARGEST_DRAWN_PX = 320


@dataclass(frozen=True, slots=True)
class SharpScene:
    """One sharp picture."""

    light: Image
    """Axes (y, x), in [0, 1]."""
    ideal: bool
    """True: drawn, has never been through a microscope."""
    zoom: float = 1.0
    """How many times larger than its field was taken."""


class SceneSource:
    """Draws scenes from one side of the split, each source by its share."""

    def __init__(
        self, recipe: RecipeBase, fields: list[SharpField], *, validation: bool
    ) -> None:
        self.fields = [field for field in fields if field.validation == validation]
        self._side_px = recipe.pool.side_px
        self._specimens = recipe.specimens
        self._mixed_share = recipe.mixed_share
        counts = Counter(id(field.source) for field in self.fields)
        shares = [f.source.share / counts[id(f.source)] for f in self.fields]
        if recipe.specimens is not None:
            shares.append(recipe.specimens.share)
        self._shares = np.array(shares) / sum(shares)

    def draw(self, rng: np.random.Generator) -> SharpScene:
        """Draw the next scene."""
        scene = self._draw_one(rng)
        # A share of 0 draws nothing, so that the same seed draws as before.
        if self._mixed_share and rng.random() < self._mixed_share:
            return mixed(scene, self._draw_one(rng), rng)
        return scene

    def _draw_one(self, rng: np.random.Generator) -> SharpScene:
        place = int(rng.choice(len(self._shares), p=self._shares))
        if place == len(self.fields) and self._specimens is not None:
            return self._draw_specimen(self._specimens, rng)
        return self._cut_field(self.fields[place], rng)

    def _draw_specimen(
        self, specimens: SpecimenRecipe, rng: np.random.Generator
    ) -> SharpScene:
        kind = specimens.kinds[int(rng.integers(len(specimens.kinds)))]
        side = min(_LARGEST_DRAWN_PX, self._side_px)
        scale = float(rng.uniform(*specimens.scale))
        if kind == "stained":
            light = draw_stained((side, side), rng, scale=scale) @ _LUMINANCE
        else:
            light = draw_specimen(kind, (side, side), rng, scale=scale)
        return SharpScene(light, ideal=True)

    def _cut_field(self, field: SharpField, rng: np.random.Generator) -> SharpScene:
        """Cut a window of a field, resized by a random factor."""
        low, high = field.source.zoom
        zoom = float(rng.uniform(low, high))
        if rng.random() < field.source.native_share:
            zoom = 1.0
        zoom = max(zoom, _LEAST_SIDE_PX / min(field.image.shape))
        side_px = int(self._side_px / zoom)
        window = []
        for side in field.image.shape:
            start = int(rng.integers(max(side - side_px, 0) + 1))
            window.append(slice(start, start + side_px))
        image = field.image[tuple(window)]
        share = field.source.denoised_share
        if share and rng.random() < share:
            image = denoised(image)
        scene = _resize(image, zoom)
        # Fields in focus are not equally sharp: neither are those to come.
        softness = rng.uniform(0, field.source.softness_px)
        light = np.asarray(ndimage.gaussian_filter(scene, softness), dtype=np.float32)
        return SharpScene(light, ideal=False, zoom=zoom)


# Contrasts are bent by powers in this range.
_BENDS = (0.6, 1.8)


def mixed(first: SharpScene, other: SharpScene, rng: np.random.Generator) -> SharpScene:
    """Return a scene with another laid over it, at most as bright, both bent.

    Parameters
    ----------
    first, other
        Of any shapes; what the smaller one covers remains.
    rng
        Draws powers and weights.
    """
    rows, columns = np.minimum(first.light.shape, other.light.shape)
    over = rng.uniform(0, 0.5)
    light = np.zeros((rows, columns), dtype=np.float32)
    for scene, weight in ((first, 1 - over), (other, over)):
        bend = np.exp(rng.uniform(*np.log(_BENDS)))
        light += np.float32(weight) * scene.light[:rows, :columns] ** np.float32(bend)
    light /= max(float(light.max()), 1e-6)
    zoom = min(first.zoom, other.zoom)
    return SharpScene(light, first.ideal and other.ideal, zoom)


# Sees noise and hardly an image (Immerkaer 1996, Fast noise variance estimation).
_NOISE_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32) / 6


def denoised(image: Image) -> Image:
    """Take the noise off a photograph by non-local means (Buades 2005)."""
    # Takes a second, and only recipes that ask for it need it.
    from skimage.restoration import denoise_nl_means

    # The root of what counts photons is equally noisy, bright or dark.
    root = np.sqrt(image)
    noise = float(np.median(np.abs(ndimage.convolve(root, _NOISE_MASK)))) / 0.6745
    clean = denoise_nl_means(
        root, patch_size=5, patch_distance=7, h=0.8 * noise, sigma=noise
    )
    return np.asarray(clean**2, dtype=np.float32)


def _resize(image: Image, zoom: float) -> Image:
    """Resize an image; a reduction does not alias."""
    if zoom == 1:
        return image
    # Half a new pixel wide: keeps most of the sharpness that reduction gains.
    smooth = ndimage.gaussian_filter(image, 0.35 / zoom) if zoom < 1 else image
    resized = ndimage.zoom(smooth, zoom, order=1 if zoom < 1 else 3)
    return np.asarray(np.clip(resized, 0, 1), dtype=np.float32)


# Of a camera's light is what a scanning microscope collects of a point.
_COUNTED = 0.15


@dataclass(frozen=True, slots=True)
class DrawnCamera:
    """Camera and light of one picture.

    The noise is Gaussian with the variance of Poisson plus read noise (models of
    one draw per pixel train ten times faster), rounded and clipped like a camera's.
    """

    photons: float
    """At the brightest point of the scene."""
    glow: float
    """Background, in photons."""
    read_noise_e: float
    gain: float
    """Counts per electron."""
    full: float
    """First count that the camera cannot tell: 2^bits."""

    def counts(self, light: Image) -> Image:
        """Return what a noiseless camera would read of `light` (1 = brightest)."""
        electrons = light * np.float32(self.photons) + np.float32(self.glow)
        return np.asarray(electrons * np.float32(self.gain))

    def take(self, light: Image, rng: np.random.Generator) -> Image:
        """Take a picture of `light`, in counts."""
        electrons = light * np.float32(self.photons) + np.float32(self.glow)
        spread = np.sqrt(np.maximum(electrons, 0) + self.read_noise_e**2)
        electrons += spread * rng.standard_normal(light.shape, dtype=np.float32)
        counts = np.rint(electrons * np.float32(self.gain))
        return np.asarray(np.clip(counts, 0, self.full - 1, out=counts))

    def counting(self) -> "DrawnCamera":
        """Return the same picture by a detector that counts photons."""
        photons = self.photons * _COUNTED
        gain = self.gain * (self.photons + self.glow) / photons
        return replace(self, photons=photons, glow=0.0, read_noise_e=0.0, gain=gain)

    def dark_noise(self, scene_noise: float = 0.0) -> float:
        """Return the deviation in the dark, in counts.

        `scene_noise` is the noise that the scene itself holds, as a share of 1.
        """
        electrons = self.glow + self.read_noise_e**2 + (scene_noise * self.photons) ** 2
        return float(np.sqrt(self.gain**2 * electrons + 1 / 12))


def draw_camera(
    rng: np.random.Generator, photons: tuple[float, float] = (400, 10_000)
) -> DrawnCamera:
    """Draw a camera; `photons` is the range at the brightest point."""
    light = float(np.exp(rng.uniform(*np.log(photons))))
    glow = float(np.exp(rng.uniform(np.log(0.003), np.log(0.25)))) * light
    read_noise = float(rng.uniform(0.8, 4.0))
    # Counts at the brightest point: from a poorly filled 8-bit range to 16 bits.
    full = float(2 ** rng.choice([8, 12, 16], p=[0.4, 0.35, 0.25]))
    fill = float(rng.uniform(0.3, 1.1) if full == 256 else rng.uniform(0.1, 1.1))
    return DrawnCamera(light, glow, read_noise, fill * full / (light + glow), full)


POINT: Image = np.ones((1, 1), dtype=np.float32)
"""PSF that blurs nothing."""


def lively_window(
    image: NDArray[np.generic],
    side_px: int,
    rng: np.random.Generator,
    *,
    contrast: float,
    step: int = 1,
    draws: int = 4,
) -> tuple[slice, slice]:
    """Choose a square; empty ones teach little and are mostly drawn again.

    Parameters
    ----------
    image
        Axes (..., y, x).
    side_px
        Of the square.
    rng
        Draws its place.
    contrast
        Range of values from which on a square surely holds a specimen.
    step
        Every how many pixels is looked at.
    draws
        At most; the last is taken as it is.
    """
    for _ in range(draws):
        top, left = (int(rng.integers(n - side_px + 1)) for n in image.shape[-2:])
        window = slice(top, top + side_px), slice(left, left + side_px)
        if float(np.ptp(image[..., *window][..., ::step, ::step])) > contrast:
            break
    return window


Entry = TypeVar("Entry")


class Pool(Generic[Entry]):
    """The newest scenes.

    Parameters
    ----------
    recipe
        How many there are, how soon the oldest is replaced, in how many shards.
    make
        Makes the scene of a number; called once for each that is needed.
    """

    def __init__(self, recipe: PoolRecipe, make: Callable[[int], Entry]) -> None:
        self._recipe = recipe
        self._make = make
        self._held: dict[int, Entry] = {}

    def at(self, step: int) -> list[Entry]:
        """Return the scenes that a step may draw from, oldest first."""
        first = step // self._recipe.refresh_steps
        newest = range(first, first + self._recipe.entries)
        shards = self._recipe.shards
        numbers = [n for n in newest if n % shards == step % shards]
        self._held = {n: one for n, one in self._held.items() if n in newest}
        for number in numbers:
            if number not in self._held:
                self._held[number] = self._make(number)
        return [self._held[number] for number in numbers]
