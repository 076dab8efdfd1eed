"""Recipe: everything a training run depends on, read from one YAML file."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from rtfocus.channel import OpticalSystem
from rtfocus.config.section import Section
from rtfocus.errors import ConfigError
from rtfocus.optics.specimens import SPECIMEN_KINDS, SpecimenKind

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class SourceRecipe(Section):
    """Sharp images of one kind."""

    kind: str
    """Name under which results are reported."""
    files: list[str]
    """Glob patterns inside the data folder."""
    validation: tuple[str, ...] = ()
    """Patterns of file names that are kept out of training, whole fields."""
    zoom: tuple[Positive, Positive] = (0.5, 1.0)
    """Range of sizes: reduced, finely sampled images become as sharp as coarse ones."""
    native_share: Fraction = 0.0
    """Share of draws that are not resized at all."""
    softness_px: Annotated[float, Field(ge=0)] = 0.0
    """Largest deviation of a Gaussian laid over the sharp scene."""
    share: Positive = 1.0
    """How often this source is drawn, relative to the others."""


class SpecimenRecipe(Section):
    """Procedural specimens, drawn anew for every pool entry."""

    kinds: tuple[SpecimenKind, ...] = SPECIMEN_KINDS
    """Which kinds are drawn."""
    scale: tuple[Positive, Positive] = (0.7, 1.6)
    """Range of the objects' size."""
    share: Positive = 1.0
    """How often a specimen is drawn, relative to the sources."""


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


class PoolRecipe(Section):
    """Blurred images held in memory; the oldest is replaced while training."""

    entries: Count = 96
    """Images held at once, each at every level."""
    side_px: Count = 448
    """Largest side of an entry."""
    refresh_steps: Count = 8
    """Steps after which one entry is replaced."""


class NetworkRecipe(Section):
    """Switches of DelpNet."""

    dropout: Fraction = 0.02
    """Probability of dropping a value after each inner layer."""
    batch_norm_momentum: Fraction = 0.40
    """PyTorch's sense: 0.40 is the paper's 0.60."""


class OptimiserRecipe(Section):
    """AdamW with a warm-up and a cosine decay to zero."""

    steps: Count = 10_000
    """Length of the training."""
    rate: Positive = 1.5e-3
    """Highest learning rate."""
    warmup_steps: Count = 300
    """Steps of linear rise."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled decay."""
    batch_tiles: Count = 128
    """Tiles per step; crops of 96, 144 and 192 px hold 1, 4 and 9."""
    ordinal_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the error of the mean level beside the cross-entropy."""
    average_decay: Fraction = 0.998
    """Exponential average of the weights that is evaluated and exported."""


class Recipe(Section):
    """One training run."""

    name: str = "delpnet"
    """Name of the engine and of the folder of its checkpoints."""
    network: Literal["delpnet"] = "delpnet"
    """Which network is trained."""
    seed: int = 1
    """Same seed, same machine: same weights."""
    data_folder: Path | None = None
    """Folder of sharp images; None: environment variable RTFOCUS_DATA, else
    ``../shared/data`` beside the checkout."""
    checkpoints: Path = Path("checkpoints")
    """Folder for checkpoints and curves, relative to where one works."""
    start_from: Path | None = None
    """Checkpoint whose averaged weights the run starts from; None: from nothing."""
    checkpoint_steps: Count = 500
    """Steps between two checkpoints."""
    threads: Count = 1
    """CPU threads of the network."""
    sources: tuple[SourceRecipe, ...] = ()
    """Sharp images; none: only specimens are drawn."""
    specimens: SpecimenRecipe | None = SpecimenRecipe()
    """Procedural specimens; null: none."""
    blur: BlurRecipe
    pool: PoolRecipe = PoolRecipe()
    delpnet: NetworkRecipe = NetworkRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises
    ------
    ConfigError
        Names the file and every key that does not fit, with the rule.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"recipe '{path}' cannot be read: {error.strerror}; give a YAML file"
        raise ConfigError(msg) from error
    except yaml.YAMLError as error:
        msg = f"recipe '{path}' is not valid YAML: {error}"
        raise ConfigError(msg) from error
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(
            f"'{'.'.join(str(part) for part in fault['loc'])}': {fault['msg']}"
            for fault in error.errors()
        )
        msg = f"recipe '{path}': {faults}; see configs/train_delpnet.yaml"
        raise ConfigError(msg) from error
