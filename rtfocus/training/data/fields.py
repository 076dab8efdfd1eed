"""Fields: the sharp images of a recipe, split between training and validation.

The split is by field: no image, plane or channel of one file stands on both
sides, so that nothing is learnt by heart and then called accuracy.
"""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import ConfigError
from rtfocus.images.reading import open_images
from rtfocus.training.recipe import RecipeBase, SourceRecipe

Image = NDArray[np.float32]

DATA_VARIABLE = "RTFOCUS_DATA"
# Recommendation ITU-R BT.601. The loop takes BT.709 for what it sees; as scenes to
# learn from both are fine, and a change would draw other batches from the same seed.
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Field:
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
    beside = Path(__file__).resolve().parents[4] / "shared" / "data"
    named = os.environ.get(DATA_VARIABLE)
    folder = recipe.data_folder or (Path(named) if named else beside)
    if not folder.is_dir():
        msg = (
            f"no sharp images at '{folder}'; set data_folder in the recipe or the "
            f"environment variable {DATA_VARIABLE}"
        )
        raise ConfigError(msg)
    return folder


def load_fields(recipe: RecipeBase) -> list[Field]:
    """Read every sharp plane of a recipe, in the order of its sources.

    Raises
    ------
    ConfigError
        If a pattern matches no file, or no field is left to train on.
    """
    fields: list[Field] = []
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


def _load_source(source: SourceRecipe, folder: Path) -> list[Field]:
    found: list[Field] = []
    for pattern in source.files:
        paths = sorted(folder.glob(pattern))
        if not paths:
            msg = f"source '{source.kind}': no file matches '{folder / pattern}'"
            raise ConfigError(msg)
        for path in paths:
            found += _load_file(path, source, _is_held_out(path, folder, source))
    return found


def _is_held_out(path: Path, folder: Path, source: SourceRecipe) -> bool:
    inside = f"/{path.relative_to(folder).as_posix()}"
    return any(
        fnmatch(inside if wanted.startswith("/") else path.name, wanted)
        for wanted in source.validation
    )


def _load_file(path: Path, source: SourceRecipe, held_out: bool) -> list[Field]:
    return [
        Field(
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
