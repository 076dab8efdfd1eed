"""Card: what ``engine.yaml`` says about an engine, validated and verified.

A card that is not understood in full is refused: a silently ignored key would
run a network on wrongly prepared tiles.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from rtfocus.channel import OpticalSystem
from rtfocus.config.loading import fault_in_words, read_yaml
from rtfocus.config.sections import Section
from rtfocus.engines.fitted import DeviationCard, ErrorCard, EvidenceCard
from rtfocus.engines.spec_steps import StepsCard
from rtfocus.errors import EngineError

BACKGROUND_LABEL = "bg"
"""Label of tiles without a specimen."""

Px = Annotated[int, Field(gt=0)]
Precision = Literal["fp32", "fp16", "int8"]
"""Weights files there may be; the file decides what a network computes in."""
ConditionEntry = Literal[
    "sampling",
    "sampling_known",
    "spherical_waves",
    "optics_known",
    "defocus_levels",
    "defocus_known",
    "level",
]
"""What processing can tell a network about a tile, see `ConditionCard`."""


class InputCard(Section):
    """The network's input tensor and the tiles it sees.

    Classifiers and joint engines see whole frames, whose labels lie on a grid of
    overlapping patches; restorers see tiles with a halo, one result per tile.
    """

    name: str
    """Tensor name."""
    channels: Literal[1, 3] = 1
    """1: the grey frame or one colour at a time; 3: RGB, grey frames three times."""
    tile_px: Px = 84
    """Side of the patch one label speaks for; of a restorer's tile, halo included."""
    stride_px: Annotated[float, Field(gt=0, le=1e6)] = 42
    """Distance between neighbouring patches; restorers have none: their tiles join
    where their halos end."""
    origin_px: Annotated[float, Field(ge=-1e6, le=1e6)]
    """Coordinate of the centre of patch (0, 0), both axes, as `TileGrid.origin_px`;
    not given: the patch starts at the frame's corner, (tile_px - 1) / 2."""
    halo_px: Annotated[int, Field(ge=0)] = 0
    """Context on each side of a restorer's tile, which its result leaves out."""
    multiple_px: Px = 1
    """Sides of frames or tiles must be multiples of it; shorter frames are padded
    by mirroring."""
    any_size: bool = False
    """Whether a restorer gives a pixel the same in a tile of any size, so that a GPU
    may take a frame as one: nothing beyond the halo counts."""

    @model_validator(mode="before")
    @classmethod
    def _from_the_corner(cls, given: object) -> object:
        if isinstance(given, dict) and "origin_px" not in given:
            tile_px = given.get("tile_px", cls.model_fields["tile_px"].default)
            if isinstance(tile_px, int):
                return {**given, "origin_px": (tile_px - 1) / 2}
        return given


class ConditionCard(Section):
    """The second input tensor (tiles, entries): what is known beside the pixels.

    An entry that is not known is 0, and so is its ``_known`` flag.
    """

    name: str
    """Tensor name."""
    entries: Annotated[list[ConditionEntry], Field(min_length=1)]
    """What each column holds, see `rtfocus.processing.classify`."""

    @model_validator(mode="after")
    def _named_once(self) -> "ConditionCard":
        if len(set(self.entries)) < len(self.entries):
            msg = f"entries {self.entries} name one twice; each is a column of its own"
            raise ValueError(msg)
        return self


class OutputCard(Section):
    """The network's first output tensor.

    Of classifiers and joint engines (tiles, labels, rows, columns); of restorers
    (tiles, channels, y, x); of the learned Wiener filter (tiles, bands).
    """

    name: str
    """Tensor name."""
    labels: list[int | str] = Field(default_factory=list)
    """Defocus level or ``bg`` by channel of the output; restorers have none."""


class TensorCard(Section):
    """A further output tensor."""

    name: str
    """Tensor name."""


class KernelOutputCard(Section):
    """The output tensor (tiles, side, side) of networks that extract a kernel."""

    name: str
    """Tensor name."""
    size_px: Px
    """Side of the kernel; odd, so that it has a centre."""

    @model_validator(mode="after")
    def _has_a_centre(self) -> "KernelOutputCard":
        if self.size_px % 2 == 0:
            msg = f"size_px={self.size_px} is even: no pixel is the kernel's centre"
            raise ValueError(msg)
        return self


class LevelsCard(Section):
    """What a level means in the optics of reference."""

    step_um: Annotated[float, Field(gt=0, le=1e5)]
    """Defocus between neighbouring levels."""
    count: Px
    """Number of levels, in-focus included."""
    signed: bool = False
    """Whether the network knows the direction."""


class OpticsCard(Section):
    """The optics an engine was trained for."""

    sampling_min: Annotated[float, Field(gt=0)]
    """Smallest pixel size in units of lambda / NA."""
    sampling_max: Annotated[float, Field(gt=0)]
    """Largest pixel size in units of lambda / NA."""
    reference: OpticalSystem
    """Optics in which `LevelsCard.step_um` holds, calibrated aberrations included."""


CARD_NAME = "engine.yaml"


class Int8Card(Section):
    """How far the int8 weights are from fp32, measured when they were made."""

    restored_db: float | None = None
    """Mean change of a restored image's PSNR; None: it restores nothing."""
    labels_alike: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of tiles that get the same label; None: it gives none."""
    command: str
    """That measured it."""


class EngineCard(Section):
    """One engine: its files, tensors, labels, optics and origin."""

    name: str
    kind: Literal["classifier", "restorer", "joint"]
    implementation: Annotated[str, Field(pattern=r"^(onnx|builtin:\w+)$")]
    """``onnx``, or ``builtin:METHOD`` for a restoration written in NumPy, which may
    have a network (``builtin:learned_wiener``)."""
    description: str = ""
    files: dict[Precision, str] = Field(default_factory=dict)
    """Weights per precision, relative to the card."""
    sha256: dict[Precision, str] = Field(default_factory=dict)
    """Checksum per file."""
    int8: Int8Card | None = None
    """None: not measured, and ``precision: auto`` leaves the int8 weights alone."""
    input: InputCard | None = None
    condition: ConditionCard | None = None
    """None: the network sees pixels only."""
    output: OutputCard | None = None
    restored: TensorCard | None = None
    """Restored frame (1, channels, y, x) of a joint engine."""
    kernel_output: KernelOutputCard | None = None
    """Blur kernel per tile; only networks that extract one."""
    levels: LevelsCard | None = None
    normalisation: dict[str, Any] = Field(default_factory=dict)
    """Name and parameters, see `rtfocus.optics.normalisation`."""
    background: dict[str, Any] = Field(default_factory=dict)
    """Rule for empty tiles, see `rtfocus.optics.normalisation`."""
    optics: OpticsCard | None = None
    steps: StepsCard | None = None
    """Of a model of bioimage.io; None: it is none."""
    deviation: dict[Literal["told", "blind"], DeviationCard] = Field(
        default_factory=dict
    )
    """How far off its defocus is, optics given or not; empty: the labels' spread."""
    evidence: EvidenceCard | None = None
    """What weighs the corrections where an engine runs blind; None: nothing does."""
    expected_error: ErrorCard | None = None
    """Of what is left by a correction that was weighed; None: not known."""
    second_look: bool = False
    """Whether an engine that runs blind restores in a second pass, told the defocus
    that it found in the first."""
    trained: dict[str, Any] = Field(default_factory=dict)
    """Origin: data, split, command, seed; for people."""
    figures: dict[str, Any] = Field(default_factory=dict)
    """Measured quality; for people."""

    @property
    def needs_no_optics(self) -> bool:
        """Whether all of its condition may be unknown, the sampling too."""
        entries = () if self.condition is None else self.condition.entries
        return "sampling_known" in entries

    @property
    def sees_image_alone(self) -> bool:
        """Whether it knows neither levels nor optics: it restores an image as it is."""
        return self.steps is not None

    @property
    def is_network(self) -> bool:
        """Whether the engine has weights: a classical method has none."""
        return self.implementation == "onnx" or bool(self.files)

    @model_validator(mode="after")
    def _is_whole(self) -> "EngineCard":
        faults = [*_section_faults(self), *_file_faults(self)]
        if not faults:
            faults = [*_label_faults(self), *_tile_faults(self)]
        if faults:
            raise ValueError("; ".join(faults))
        return self


_NEEDED: Mapping[str, tuple[str, ...]] = {
    "classifier": ("input", "output", "levels", "normalisation", "optics"),
    "restorer": ("input", "output", "levels", "normalisation", "optics"),
    "joint": ("input", "output", "restored", "levels", "normalisation", "optics"),
}
_BLIND = ("evidence", "expected_error", "second_look")
_FOREIGN: Mapping[str, tuple[str, ...]] = {
    "classifier": ("restored", "kernel_output", *_BLIND, "steps"),
    "restorer": ("restored", "background", *_BLIND),
    "joint": ("kernel_output", "steps"),
}
_WITH_STEPS = ("levels", "normalisation", "optics", "condition", "kernel_output")
"""What a restorer has either these for or its steps."""


def _section_faults(card: EngineCard) -> Iterator[str]:
    """Say which sections are missing, or would be ignored."""
    if not card.is_network:
        return
    needed, unknown = _NEEDED[card.kind], _FOREIGN[card.kind]
    if card.kind == "restorer" and card.steps is not None:
        needed, unknown = ("input", "output"), (*unknown, *_WITH_STEPS)
        if card.implementation != "onnx":
            yield f"{card.implementation} has no steps: they are of a network alone"
    missing = [part for part in needed if not getattr(card, part)]
    if missing:
        yield f"a {card.kind} needs the sections {', '.join(missing)}"
    if card.expected_error and not card.evidence:
        yield "expected_error is of corrections that evidence weighs: add evidence"
    foreign = [part for part in unknown if getattr(card, part)]
    if foreign:
        yield f"a {card.kind} cannot have the sections {', '.join(foreign)}"


def _file_faults(card: EngineCard) -> Iterator[str]:
    if not card.is_network:
        return
    if "fp32" not in card.files:
        yield f"an {card.implementation} engine needs files.fp32, the reference weights"
    outside = [name for name in card.files.values() if not _is_plain(name)]
    if outside:
        yield (
            f"files {outside} are no plain names: weights lie beside the card, in the "
            "engine's own folder"
        )
    unchecked = [name for name in card.files if name not in card.sha256]
    if unchecked:
        names = ", ".join(unchecked)
        yield f"sha256 lacks the files {names}; `sha256sum FILE` tells"


def _is_plain(name: str) -> bool:
    """Whether it names a file of the folder itself, on every system."""
    return name not in ("", ".", "..") and PureWindowsPath(name).name == name


def _label_faults(card: EngineCard) -> Iterator[str]:
    """Compare the labels with the scale of levels."""
    if card.output is None or card.levels is None:
        return
    labels = card.output.labels
    if card.kind == "restorer":
        if labels:
            yield "a restorer's output has no labels"
        return
    if len(labels) < 2:
        yield f"output.labels {labels} are fewer than two"
    if len(set(labels)) < len(labels):
        yield f"output.labels {labels} name a level twice"
    farthest = card.levels.count - 1
    lowest = -farthest if card.levels.signed else 0
    entries = () if card.condition is None else card.condition.entries
    if card.second_look and not {"defocus_levels", "defocus_known"} <= {*entries}:
        yield (
            f"second_look is for engines told defocus_levels and defocus_known; "
            f"condition.entries are {[*entries]}"
        )
    odd = [label for label in labels if not _is_label(label, lowest, farthest)]
    if odd:
        yield (
            f"output.labels {odd} are no levels from {lowest} to {farthest} "
            f"and not '{BACKGROUND_LABEL}'"
        )


def _is_label(label: int | str, lowest: int, farthest: int) -> bool:
    if isinstance(label, str):
        return label == BACKGROUND_LABEL
    return lowest <= label <= farthest


def _tile_faults(card: EngineCard) -> Iterator[str]:
    """Check that a restorer's tiles can be cut."""
    tiles = card.input
    if tiles is None or card.kind != "restorer":
        return
    if tiles.any_size and (card.condition is not None or card.sees_image_alone):
        yield "input.any_size is for networks that are told nothing of their tile"
    if 2 * tiles.halo_px >= tiles.tile_px:
        yield (
            f"input.halo_px={tiles.halo_px} on both sides leaves nothing of "
            f"tile_px={tiles.tile_px}"
        )
    if tiles.tile_px % tiles.multiple_px:
        yield (
            f"input.tile_px={tiles.tile_px} is no multiple of "
            f"multiple_px={tiles.multiple_px}"
        )
    if "stride_px" in tiles.model_fields_set:
        yield "a restorer has no input.stride_px: its tiles join at their halos"


def read_card(folder: Path) -> EngineCard:
    """Read and validate the card of an engine folder.

    Raises
    ------
    EngineError
        Names the file, the key and the rule.
    """
    path = folder / CARD_NAME
    remedy = "an engine is a folder with an engine.yaml"
    given = read_yaml(path, "engine card", remedy, EngineError)
    return parse_card(given, f"'{path}'")


def parse_card(given: object, where: str) -> EngineCard:
    """Validate what a card says; `where` it stands is for the message.

    Raises
    ------
    EngineError
        Names the place, the key and the rule.
    """
    try:
        return EngineCard.model_validate(given)
    except ValidationError as error:
        faults = "; ".join(map(fault_in_words, error.errors()))
        msg = f"engine card {where}: {faults}; correct the card or export it again"
        raise EngineError(msg) from error


def verified_file(
    folder: Path, card: EngineCard, precision: Precision = "fp32"
) -> Path:
    """Return the weights file after comparing its checksum with the card's.

    Raises
    ------
    EngineError
        If the file is missing or is not the one the card describes.
    """
    if precision not in card.files:
        msg = (
            f"engine '{card.name}' has no {precision} weights; it has "
            f"{', '.join(card.files) or 'none'}: choose of those"
        )
        raise EngineError(msg)
    path = folder / card.files[precision]
    if not path.is_file():
        msg = (
            f"engine '{card.name}' lacks its weights '{path}'; copy the whole folder, "
            f"or make them of its checkpoint: rtfocus export CHECKPOINT -o {folder}"
        )
        raise EngineError(msg)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != card.sha256.get(precision):
        msg = (
            f"weights '{path}' have sha256 {digest}, the card says "
            f"{card.sha256.get(precision)}; the file is damaged or the card of other "
            f"weights: copy both again; of your own network write that sum on the card"
        )
        raise EngineError(msg)
    return path


def identity(card: EngineCard) -> str:
    """Return ``name@hash``, the hash being the first 12 digits of the weights'."""
    digest = card.sha256.get("fp32", "builtin")
    return f"{card.name}@{digest[:12]}"


def input_of(card: EngineCard) -> InputCard:
    """Return the input every network has; EngineError for classical methods."""
    if card.input is None:
        msg = (
            f"engine '{card.name}' is {card.implementation}: it has no network to open"
        )
        raise EngineError(msg)
    return card.input


def restored_levels(card: EngineCard) -> LevelsCard:
    """Return the levels that restoration goes by; EngineError if all are in focus."""
    if card.levels is None or card.levels.count == 1:
        msg = (
            f"engine '{card.name}' has no level out of focus, so nothing would be "
            "restored by it; set processing.restoration.method: none, or choose "
            "another processing.classifier"
        )
        raise EngineError(msg)
    return card.levels


def output_of(card: EngineCard) -> OutputCard:
    """Return the output every network has; EngineError for classical methods."""
    if card.output is None:
        msg = f"engine '{card.name}' is {card.implementation}: it has no output"
        raise EngineError(msg)
    return card.output
