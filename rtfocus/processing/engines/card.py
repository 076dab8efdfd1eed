"""Card: what ``engine.yaml`` says about an engine, validated and verified.

A card that is not understood in full is refused: a silently ignored key would
run a network on wrongly prepared tiles.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from rtfocus.config.text import read_yaml
from rtfocus.errors import EngineError
from rtfocus.processing.engines.card_sections import (
    BACKGROUND_LABEL,
    ConditionCard,
    InputCard,
    KernelOutputCard,
    LevelsCard,
    OpticsCard,
    OutputCard,
    Precision,
    Section,
    TensorCard,
)

CARD_NAME = "engine.yaml"


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
    trained: dict[str, Any] = Field(default_factory=dict)
    """Origin: data, split, command, seed; for people."""
    figures: dict[str, Any] = Field(default_factory=dict)
    """Measured quality; for people."""

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
_FOREIGN: Mapping[str, tuple[str, ...]] = {
    "classifier": ("restored", "kernel_output"),
    "restorer": ("restored", "background"),
    "joint": ("kernel_output",),
}


def _section_faults(card: EngineCard) -> Iterator[str]:
    """Say which sections are missing, or would be ignored."""
    if not card.is_network:
        return
    missing = [part for part in _NEEDED[card.kind] if not getattr(card, part)]
    if missing:
        yield f"a {card.kind} needs the sections {', '.join(missing)}"
    foreign = [part for part in _FOREIGN[card.kind] if getattr(card, part)]
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
        yield f"sha256 lacks the files {', '.join(unchecked)}"


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
    try:
        return EngineCard.model_validate(read_yaml(path))
    except OSError as error:
        msg = (
            f"engine card '{path}' cannot be read: {error.strerror}; "
            "an engine is a folder with an engine.yaml"
        )
        raise EngineError(msg) from error
    except ValidationError as error:
        faults = "; ".join(
            f"'{'.'.join(str(part) for part in fault['loc'])}': {fault['msg']}"
            for fault in error.errors()
        )
        msg = f"engine card '{path}': {faults}; correct the card or export it again"
        raise EngineError(msg) from error
    # After pydantic's, which is one too.
    except ValueError as error:
        msg = f"engine card '{path}' {error}"
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
            f"{', '.join(card.files) or 'none'}"
        )
        raise EngineError(msg)
    path = folder / card.files[precision]
    if not path.is_file():
        msg = (
            f"engine '{card.name}' lacks its weights '{path}'; copy the whole folder "
            "or make them with: rtfocus export CHECKPOINT " + str(folder)
        )
        raise EngineError(msg)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != card.sha256.get(precision):
        msg = (
            f"weights '{path}' have sha256 {found}, the card says "
            f"{card.sha256.get(precision)}; the file is damaged or the card is that of "
            f"other weights: export again with: rtfocus export CHECKPOINT {folder}"
        )
        raise EngineError(msg)
    return path


def identity(card: EngineCard) -> str:
    """Return ``name@hash``, the hash being the first 12 digits of the weights'."""
    digest = card.sha256.get("fp32", "builtin")
    return f"{card.name}@{digest[:12]}"
