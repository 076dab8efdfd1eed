"""Own optics: a recipe turned to the user's objective and sharp images.

Engines are trained for the optics of their recipe. Here those are replaced, with
all lengths along the axis kept in units of the defocus that the optics resolve, and
the recipe's images give way to a folder of the user's.
"""

from glob import escape
from pathlib import Path

from pydantic import TypeAdapter

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.training.recipe import RecipeBase, SourceRecipe
from rtfocus.training.registry import validate_recipe

_SUFFIXES = (".tif", ".tiff", ".png")
_HELD_OUT = 5
_SECTIONS = ("blur", "pairs", "signed")


def own_recipe(
    recipe: RecipeBase, optics: OpticalSystem, images: Path, *, name: str
) -> RecipeBase:
    """Turn a recipe to other optics and images.

    Parameters
    ----------
    recipe
        Of any network that learns from blurred images.
    optics
        The user's, calibrated if possible (`rtfocus psf fit`).
    images
        Folder of sharp images, with those in its subfolders. Every fifth file, by
        name, is held out.
    name
        Of the run.

    Raises
    ------
    ConfigError
        If the recipe has no optics or the folder no images.
    """
    data = recipe.model_dump(mode="json")
    section = next((s for s in _SECTIONS if "reference" in (data.get(s) or {})), None)
    if section is None:
        msg = (
            f"recipe '{recipe.name}' has no reference optics to replace; use one of "
            "train_delpnet_own, train_rtfocus_1, train_wei_classifier"
        )
        raise ConfigError(msg)
    earlier: OpticalSystem = getattr(recipe, section).reference
    factor = optics.defocus_unit_um / earlier.defocus_unit_um
    changed = {
        key: value * factor if key.endswith("_um") else value
        for key, value in data[section].items()
    }
    changed["reference"] = TypeAdapter(OpticalSystem).dump_python(optics, mode="json")
    if "real" in changed:
        # Real pairs belong to the microscope they were taken with.
        changed["real"] = []
    data[section] = changed
    data["name"] = name
    data["data_folder"] = str(images.resolve())
    data["sources"] = [_own_source(images).model_dump(mode="json")]
    return validate_recipe(data)


def _own_source(images: Path) -> SourceRecipe:
    found = sorted(
        path.relative_to(images)
        for path in images.rglob("*")
        if path.suffix.lower() in _SUFFIXES
    )
    if not found:
        msg = f"no images in '{images}'; give a folder with {', '.join(_SUFFIXES)}"
        raise ConfigError(msg)
    # Names are the user's: they may hold what a pattern takes for its own, and two
    # folders may hold the same.
    files = [escape(path.as_posix()) for path in found]
    return SourceRecipe(
        kind="own images",
        files=files,
        validation=tuple(f"/{file}" for file in files[_HELD_OUT - 1 :: _HELD_OUT]),
        zoom=(0.85, 1.15),
        native_share=0.7,
        softness_px=0.35,
        share=4.0,
    )
