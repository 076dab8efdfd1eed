"""Level tiles: sharp scenes blurred at every defocus level, as crops with labels.

Batch number n is a pure function of (recipe, n): a pool of blurred scenes whose
oldest entry is replaced at fixed steps, crops of it, a camera drawn per crop. So a
training run that was killed finds exactly the images again that it had.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import Section
from rtfocus.optics.formation import blur_stack
from rtfocus.optics.normalisation import CELL_PX, ContrastToNoise, LocalStandardisation
from rtfocus.optics.psf import compute_psf
from rtfocus.training.recipe import (
    Count,
    Fraction,
    OptimiserRecipe,
    Positive,
    RecipeBase,
)
from rtfocus.training.scenes import (
    POINT,
    Pool,
    SceneSource,
    SharpField,
    draw_camera,
    lively_window,
)

# Cells of 24 px, at least one tile, at most what every scene holds.
Side = Annotated[int, Field(ge=96, le=216, multiple_of=24)]


class BlurRecipe(Section):
    """The family of PSFs that sharp images are blurred with."""

    reference: OpticalSystem
    """Optics the defocus levels belong to, as fitted to real pairs."""
    level_step_um: Positive = 2.0
    """Distance between neighbouring levels under the reference optics."""
    farthest_um: Positive = 36.0
    """The last level stands for everything from its own defocus up to this."""
    jitter_um: Annotated[float, Field(ge=0)] = 0.4
    """Largest distance of a trained plane from its level's defocus."""
    reference_share: Fraction = 0.45
    """Share of entries blurred with exactly the reference optics."""
    near_share: Fraction = 0.30
    """Share blurred with optics near the reference; the rest is drawn widely."""
    negative_share: Fraction = 0.15
    """Share of entries on the other side of focus."""
    kept_focus_share: Fraction = 0.5
    """Share of drawn scenes whose level 0 is not blurred, as with photographs."""


class TileOptimiserRecipe(OptimiserRecipe):
    """Optimiser of a network that labels tiles."""

    batch_tiles: Count = 128
    """Tiles per step; crops of 96, 144 and 192 px hold 1, 4 and 9."""
    crop_sides_px: tuple[Side, ...] = (96, 144, 192)
    """Sides of the crops, one drawn per step."""
    ordinal_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the error of the mean level beside the cross-entropy."""


class LevelRecipe(RecipeBase):
    """A training run on images blurred at every level."""

    blur: BlurRecipe
    optimiser: TileOptimiserRecipe = TileOptimiserRecipe()


Image = NDArray[np.float32]
Planes = NDArray[np.uint16]

FULL_SCALE = 65535
_NOISE = ContrastToNoise(quantum=0.0)


@dataclass(frozen=True, slots=True)
class LevelStack:
    """One scene at every defocus level."""

    planes: Planes
    """Axes (plane, y, x); full scale = brightest point of the sharp scene."""
    levels: tuple[int, ...]
    """Defocus level of every plane; the last level has two planes."""
    noise: tuple[float, ...]
    """Noise that every plane already holds, as a share of full scale."""


class Blurring:
    """Makes entries of the training set or of the validation set."""

    def __init__(
        self, recipe: LevelRecipe, fields: list[SharpField], *, validation: bool
    ) -> None:
        """Choose the fields of one side of the split."""
        self._recipe = recipe
        self._validation = validation
        self._scenes = SceneSource(recipe, fields, validation=validation)
        self.fields = self._scenes.fields

    def entry(self, generation: int) -> LevelStack:
        """Draw scene and optics number `generation` and blur it at every level."""
        side = 1 if self._validation else 0
        rng = np.random.default_rng([self._recipe.seed, side, generation])
        scene = self._scenes.draw(rng)
        optics = draw_optics(self._recipe.blur, rng)
        blur = self._recipe.blur
        # A photograph has been through a microscope, a drawn scene has not.
        keep_focus = not scene.ideal or bool(rng.random() < blur.kept_focus_share)
        return self._blur(scene.light, optics, rng, keep_focus)

    def _blur(
        self,
        scene: Image,
        optics: OpticalSystem,
        rng: np.random.Generator,
        keep_focus: bool,
    ) -> LevelStack:
        blur = self._recipe.blur
        levels = [*range(LEVEL_COUNT), LEVEL_COUNT - 1]
        side = 1 if rng.random() >= blur.negative_share else -1
        psfs = []
        for place, level in enumerate(levels):
            jitter = rng.uniform(-blur.jitter_um, blur.jitter_um)
            defocus_um = side * (level * blur.level_step_um + jitter)
            if place == LEVEL_COUNT:
                farther = rng.uniform(level * blur.level_step_um, blur.farthest_um)
                # The far end is blur beyond recognition on either side of focus.
                defocus_um = float(farther * rng.choice([-1, 1]))
            unit = optics.defocus_unit_um / blur.reference.defocus_unit_um
            is_sharp = level == 0 and keep_focus
            psfs.append(POINT if is_sharp else compute_psf(optics, defocus_um * unit))
        planes = np.clip(blur_stack(scene, psfs), 0, 1)
        height, width = (n // CELL_PX * CELL_PX for n in scene.shape)
        noise = tuple(_NOISE.noise(plane[:height, :width]) for plane in planes)
        stored = np.rint(planes * FULL_SCALE).astype(np.uint16)
        return LevelStack(stored, tuple(levels), noise)


def draw_optics(blur: BlurRecipe, rng: np.random.Generator) -> OpticalSystem:
    """Draw the optics of one entry: reference, near it, or from a wide blur."""
    base = blur.reference
    chance = rng.random()
    if chance < blur.reference_share:
        return base
    spherical = base.aberrations.spherical_waves
    if chance < blur.reference_share + blur.near_share:
        return replace(
            base,
            numerical_aperture=base.numerical_aperture * rng.uniform(0.95, 1.05),
            pixel_size_um=base.pixel_size_um * rng.uniform(0.94, 1.06),
            aberrations=Aberrations(
                spherical_waves=spherical + rng.normal(0, 0.05),
                astigmatism_waves=rng.normal(0, 0.03),
            ),
        )
    if rng.random() < 0.3:
        return replace(base, psf_model="born_wolf")
    # Written out: `uniform` takes no bounds in falling order, as of a positive one.
    most, turned = 1.4 * spherical, -0.6 * spherical
    return replace(
        base,
        numerical_aperture=base.numerical_aperture * rng.uniform(0.85, 1.2),
        pixel_size_um=base.pixel_size_um * rng.uniform(0.85, 1.15),
        aberrations=Aberrations(
            spherical_waves=most + (turned - most) * rng.random(),
            astigmatism_waves=rng.normal(0, 0.08),
            coma_x_waves=rng.normal(0, 0.05),
        ),
        apodisation=float(rng.uniform(0, 0.5)),
    )


LABELS: tuple[int | str, ...] = (*range(11), "bg")
"""Label of every output: defocus levels 0 to 10, then background."""

LEVEL_COUNT = 11
"""Labels that are levels; a further one is background."""
BACKGROUND = LABELS.index("bg")
NORMALISATION = LocalStandardisation()

_BACKGROUND_RULE = ContrastToNoise()
_EMPTY_SHARE = 0.02
# Range of a window, of full scale, from which on it surely holds a specimen.
_VISIBLE = round(0.1 * FULL_SCALE)
_SHIFT = 0.15


@dataclass(frozen=True, slots=True)
class TileGeometry:
    """Where the tiles of the network lie in its input, along both axes."""

    cell_px: int
    """Pixels per cell of the last feature map: product of the strides."""
    tile_cells: int
    """Cells under one max pool: those that a patch of 84 px makes."""
    stride_cells: int
    """Cells between neighbouring tiles."""

    @property
    def tile_px(self) -> int:
        """Pixels that the cells of one tile stand for."""
        return self.tile_cells * self.cell_px

    @property
    def stride_px(self) -> int:
        """Pixels between the centres of neighbouring tiles."""
        return self.stride_cells * self.cell_px

    @property
    def centre_px(self) -> int:
        """Centre of tile 0: cell i looks at pixel i * cell_px, not half a cell on."""
        return (self.tile_cells - 1) * self.cell_px // 2

    def count(self, length_px: int) -> int:
        """Return how many tiles an axis of this length has."""
        cells = -(-length_px // self.cell_px)
        return (cells - self.tile_cells) // self.stride_cells + 1


GEOMETRY = TileGeometry(cell_px=24, tile_cells=4, stride_cells=2)


class Batches:
    """Training batches by number.

    A batch is a dict of arrays: ``crops`` (N, 1, H, W), normalised, of one size; and
    ``labels`` (N, row, column), the index into `LABELS` of every tile.

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
        self._pool = Pool(recipe.pool, blurring.entry)

    def batch(self, step: int, draw: int = 0) -> dict[str, NDArray[np.generic]]:
        """Make batch number `step`; other draws are other crops of the same pool."""
        rng = np.random.default_rng([self._recipe.seed, 3, step, draw])
        entries = self._pool.at(step)
        sides = self._recipe.optimiser.crop_sides_px
        side = sides[int(rng.integers(len(sides)))]
        tiles = GEOMETRY.count(side) ** 2
        number = max(self._recipe.optimiser.batch_tiles // tiles, 2)
        pairs = [self._crop(entries, side, rng) for _ in range(number)]
        return {
            "crops": np.stack([crop for crop, _ in pairs])[:, None],
            "labels": np.stack([labels for _, labels in pairs]),
        }

    def _crop(
        self, entries: list[LevelStack], side: int, rng: np.random.Generator
    ) -> tuple[Image, NDArray[np.int64]]:
        entry = entries[int(rng.integers(len(entries)))]
        level = int(rng.integers(BACKGROUND))
        # The last level has two planes: its own defocus and one farther away.
        beyond = level == BACKGROUND - 1 and rng.random() < 0.4
        place = level + int(beyond)
        plane = entry.planes[place]
        cut = lively_window(plane, side, rng, contrast=_VISIBLE)
        window = np.rot90(plane[cut], int(rng.integers(4)))
        if rng.random() < 0.5:
            window = window[::-1]
        light = window.astype(np.float32) / np.float32(FULL_SCALE)
        if rng.random() < _EMPTY_SHARE:
            light *= 0
        camera = draw_camera(rng)
        noise = camera.dark_noise(entry.noise[place])
        crop, labels = label_crop(camera.take(light, rng), noise, level)
        if not self._background:
            labels[:] = level
        # The median of a whole frame is another one than that of a crop.
        crop += np.float32(rng.normal(0, _SHIFT))
        return crop, labels


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


def loss_of(logits: Tensor, labels: Tensor, ordinal_weight: float) -> Tensor:
    """Return cross-entropy, plus a weight times the error of the mean level.

    Parameters
    ----------
    logits
        Shape (N, label, row, column), eleven levels, then background if there is one.
    labels
        Shape (N, row, column).
    ordinal_weight
        Weight of the smooth absolute error between the true level and the mean of
        the levels by their probabilities, over tiles with specimen. Cross-entropy
        alone (He 2020) does not know that level 4 is nearer to 5 than 9 is; 0
        leaves it at that.
    """
    entropy = functional.cross_entropy(logits, labels)
    specimen = labels < LEVEL_COUNT
    if ordinal_weight == 0 or not specimen.any():
        return entropy
    levels = torch.arange(LEVEL_COUNT, dtype=logits.dtype, device=logits.device)
    shares = logits[:, :LEVEL_COUNT].softmax(dim=1)
    mean = torch.einsum("nlyx,l->nyx", shares, levels)
    error = functional.smooth_l1_loss(mean[specimen], labels[specimen].to(mean.dtype))
    return entropy + ordinal_weight * error


@torch.no_grad()
def accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the share of right labels, and of levels at most one off."""
    predicted = logits.argmax(dim=1)
    specimen = labels < LEVEL_COUNT
    close = ((predicted - labels).abs() <= 1) & (predicted < LEVEL_COUNT)
    within = close[specimen].float().mean() if specimen.any() else torch.tensor(1.0)
    return {"accuracy": (predicted == labels).float().mean(), "within_one": within}
