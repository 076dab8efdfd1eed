"""Recipe: everything a training run depends on.

`RecipeBase` is what all networks share; each network adds its own sections
(`rtfocus.training.networks`), chosen by the key ``network``: that module alone is
imported.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from rtfocus.channel import OpticalSystem
from rtfocus.config.loading import fault_in_words, read_yaml
from rtfocus.config.sections import Section
from rtfocus.engines.card import Precision
from rtfocus.errors import ConfigError
from rtfocus.specimens import SPECIMEN_KINDS, SpecimenKind

DATA_VARIABLE = "RTFOCUS_DATA"
"""Environment variable: the folder of published images."""

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
    """Patterns of file names that are kept out of training, whole fields; with a
    leading ``/`` of paths inside the data folder."""
    zoom: tuple[Positive, Positive] = (0.5, 1.0)
    """Range of sizes: reduced, finely sampled images become as sharp as coarse ones."""
    native_share: Fraction = 0.0
    """Share of draws that are not resized at all."""
    softness_px: Annotated[float, Field(ge=0)] = 0.0
    """Largest deviation of a Gaussian laid over the sharp scene."""
    denoised_share: Fraction = 0.0
    """Share of draws whose noise is taken off first: enlarged, it would tell that
    they are in focus."""
    share: Positive = 1.0
    """How often this source is drawn, relative to the others."""


class SpecimenRecipe(Section):
    """Procedural specimens, drawn anew for every pool entry."""

    kinds: tuple[SpecimenKind | Literal["stained"], ...] = SPECIMEN_KINDS
    """Which kinds are drawn; ``stained``: an H&E-like section, in grey."""
    scale: tuple[Positive, Positive] = (0.7, 1.6)
    """Range of the objects' size."""
    share: Positive = 1.0
    """How often a specimen is drawn, relative to the sources."""


class PoolRecipe(Section):
    """Blurred images held in memory; the oldest is replaced while training."""

    entries: Count = 96
    """Images held at once, each at several defoci."""
    side_px: Count = 448
    """Largest side of an entry."""
    refresh_steps: Count = 8
    """Steps after which one entry is replaced."""
    shards: Count = 1
    """Parts of the pool that steps see in turn. Up to as many workers share the work
    of making entries; with more, or with 1, each makes all of its own."""

    @model_validator(mode="after")
    def _equal_shards(self) -> Self:
        if self.entries % self.shards:
            msg = (
                f"entries={self.entries} do not go into shards={self.shards} evenly; "
                "choose a multiple"
            )
            raise ValueError(msg)
        return self


class OptimiserRecipe(Section):
    """AdamW with a warm-up and a decay to zero."""

    steps: Count = 10_000
    """Length of the training."""
    stop_step: Count | None = None
    """Step at which the run ends early, its rate still up: a shorter recipe that
    starts from it brings the rate down. None: not before `steps`."""
    rate: Positive = 1.5e-3
    """Highest learning rate."""
    warmup_steps: Count = 300
    """Steps of linear rise."""
    decay: Literal["cosine", "linear"] = "cosine"
    """``cosine``: half a period after the rise. ``linear``: the full rate up to the
    middle of the training, from there straight down (Zhang 2022)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Memories of Adam's first and second moment."""
    average_decay: Fraction = 0.998
    """Exponential average of the weights that is evaluated and exported."""

    @property
    def last_step(self) -> int:
        """Number of steps that are taken."""
        return min(self.steps, self.stop_step or self.steps)


class RecipeBase(Section):
    """What every training run has."""

    name: str
    """Name of the run and of the folder of its checkpoints."""
    network: str
    """Which network is trained, see `network_names`."""
    seed: int = 1
    """Same seed, same machine: same weights."""
    data_folder: Path | None = None
    """Folder of sharp images; None: environment variable RTFOCUS_DATA, else
    ``../shared/data`` beside the checkout."""
    checkpoints: Path = Path("checkpoints")
    """Folder for checkpoints and curves, relative to where one works."""
    start_from: Path | None = None
    """Checkpoint whose averaged weights the run starts from, or folder of an engine:
    ``engines/delpnet``; None: from nothing."""
    checkpoint_steps: Count = 500
    """Steps between two checkpoints."""
    threads: Count = 1
    """CPU threads of each part of a step."""
    parts: Count = 2
    """Parts of a batch whose gradients are taken each on its own, by one worker each
    where there are several; their mean is the step's. The weights depend on it, not on
    the number of workers: BatchNorm sees a part at a time. On a GPU a batch is whole,
    and so it is for networks with several losses."""
    sources: tuple[SourceRecipe, ...] = ()
    """Sharp images; none: only specimens are drawn."""
    specimens: SpecimenRecipe | None = SpecimenRecipe()
    """Procedural specimens; null: none."""
    mixed_share: Fraction = 0.0
    """Share of scenes that are two in one, laid over each other, the contrast of both
    bent: there are more kinds of images than have been photographed."""
    pool: PoolRecipe = PoolRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()


class RealPairsRecipe(Section):
    """Registered real images of one field, in focus and out of it."""

    sharp: str
    """Glob pattern of the sharp images inside the data folder."""
    blurred: str
    """Folder of the blurred ones, under the same file names."""
    validation: tuple[str, ...] = ()
    """Patterns of file names that are kept out of training, whole fields."""


class PairsRecipe(Section):
    """How blurred patches are made. Defocus in levels is signed."""

    reference: OpticalSystem
    """Optics the defocus levels belong to, as fitted to real pairs."""
    level_step_um: Positive = 2.2
    """Distance between neighbouring levels under the reference optics."""
    farthest_level: Positive = 10.5
    """Largest defocus on either side, in levels."""
    patch_px: Count = 144
    """Side of a patch; a multiple of 48."""
    batch_patches: Count = 12
    """Patches per step."""
    planes: Count = 8
    """Defoci per pool entry."""
    reference_share: Fraction = 0.35
    """Share of entries blurred with exactly the reference optics."""
    near_share: Fraction = 0.25
    """Share blurred with optics near the reference; the rest is drawn widely."""
    born_wolf_share: Fraction = 0.1
    """Share of the widely drawn ones that follow Born and Wolf, even in z."""
    gaussian_share: Fraction = 0.0
    """Share of the widely drawn ones blurred by Gaussians as wide as their defocus;
    which level that is stays unknown."""
    sampling_factors: tuple[Positive, Positive] = (0.6, 1.6)
    """Range of the widely drawn pixel sizes, in those of the reference. Finer pixels
    than those see less defocus, so that the blur spans no more of them."""
    varying_share: Fraction = 0.25
    """Share of entries whose patches are tilted or stepped in depth."""
    sharp_share: Fraction = 0.08
    """Share of patches in focus; there the target is the input itself."""
    enlarged_fine: bool = False
    """Whether scenes shown larger than taken have optics as finely sampled: fine and
    smooth is not blurred."""
    enlarged_sharp_share: Fraction = 0.3
    """The share in focus of those."""
    photons: tuple[Positive, Positive] = (150.0, 20_000.0)
    """Range of photons at the brightest point."""
    counting_share: Fraction = 0.0
    """Share of pictures by a detector that counts photons, as in a confocal
    microscope: hardly a background, no read noise."""
    absorbing_share: Fraction = 0.12
    """Share of entries seen dark on bright, as in brightfield."""
    relief_share: Fraction = 0.06
    """Share of entries with edges brighter and darker than their ground."""
    real: tuple[RealPairsRecipe, ...] = ()
    """Real pairs mixed in."""
    real_share: Fraction = 0.12
    """Share of patches from real pairs."""
    psf_px: Annotated[int, Field(ge=0)] = 0
    """Side of the PSF handed out with each patch, odd; 0: none."""


class PairRecipe(RecipeBase):
    """A training run on pairs."""

    pairs: PairsRecipe


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


PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def file_name(precision: Precision) -> str:
    """Return the name of a precision's file in an engine folder."""
    return f"model.{precision}.onnx"


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """Read a list such as ``fp32,fp16,int8``; fp32 is always part of it.

    Raises
    ------
    ConfigError
        Names the word that is no precision.

    Examples
    --------
    >>> parse_precisions("int8")
    ('fp32', 'int8')
    """
    words = {word.strip() for word in text.split(",")} | {"fp32"}
    unknown = sorted(words - set(PRECISIONS))
    if unknown:
        msg = f"precision '{unknown[0]}' is unknown; choose of {', '.join(PRECISIONS)}"
        raise ConfigError(msg)
    return tuple(name for name in PRECISIONS if name in words)


# Name of a network: module in `rtfocus.training.networks` whose `NETWORKS` hold its
# recipe and its task.
_MODULES = {
    "comi": "comi",
    "delpnet": "delpnet",
    "learned_wiener": "learned_wiener",
    "multiscale": "blind_restorers",
    "mobilenet_v2": "delpnet",
    "resnet18": "delpnet",
    "rrdb": "blind_restorers",
    "rtfocus_1": "rtfocus",
    "rtfocus_2": "rtfocus",
    "wei_classifier": "wei_classifier",
    "wei_unet": "wei_unet",
}


def network_names() -> tuple[str, ...]:
    """Return the names a recipe may give."""
    return tuple(_MODULES)


def network_classes(network: str) -> tuple[type[RecipeBase], type[Any]]:
    """Return recipe and task of a network; ConfigError for an unknown name."""
    if network not in _MODULES:
        known = ", ".join(network_names())
        msg = f"network '{network}' is unknown; choose one of {known}"
        raise ConfigError(msg)
    module = import_module(f"rtfocus.training.networks.{_MODULES[network]}")
    classes: tuple[type[RecipeBase], type[Any]] = module.NETWORKS[network]
    return classes


def load_recipe(path: Path) -> RecipeBase:
    """Read a recipe; its class is that of its network.

    The key ``base`` names another recipe beside this one, of which this one changes
    some values.

    Raises
    ------
    ConfigError
        Names the file and every key that does not fit, with the rule.
    """
    data = _read(path)
    if not isinstance(data, dict) or "network" not in data:
        msg = f"'{path}' is no recipe: it names no network; rtfocus configs lists some"
        raise ConfigError(msg)
    return validate_recipe(data, f"recipe '{path}'")


def _read(path: Path, above: tuple[Path, ...] = ()) -> object:
    """Read the plain values of a recipe, those of its base included.

    `above` are the recipes that it is a base of.
    """
    data = read_yaml(path, "recipe", "give a YAML file")
    if not isinstance(data, dict) or "base" not in data:
        return data
    base = path.parent / str(data.pop("base"))
    if base in (path, *above):
        msg = f"recipe '{base}' is its own base; name another one"
        raise ConfigError(msg)
    return _merge(_read(base, (path, *above)), data)


def _merge(base: object, changes: object) -> object:
    """Return `base` with the values that `changes` names, section by section."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    merged = {key: _merge(base.get(key), value) for key, value in changes.items()}
    return {**base, **merged}


def validate_recipe(data: object, place: str = "recipe") -> RecipeBase:
    """Make a recipe of plain values, of the class its network asks for.

    Raises
    ------
    ConfigError
        If the network is unknown, or keys or values do not fit; names `place`, where
        they stand.
    """
    name = data.get("network") if isinstance(data, dict) else None
    try:
        return network_classes(str(name))[0].model_validate(data)
    except ValidationError as error:
        faults = "; ".join(map(fault_in_words, error.errors()))
        msg = f"{place}: {faults}; see configs/train_delpnet.yaml"
        raise ConfigError(msg) from error
