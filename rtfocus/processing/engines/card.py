"""Card: what ``engine.yaml`` says about an engine, validated and verified.

A card that is not understood in full is refused: a silently ignored key would
run a network on wrongly prepared tiles.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rtfocus.channel import OpticalSystem
from rtfocus.errors import EngineError

CARD_NAME = "engine.yaml"
BACKGROUND_LABEL = "bg"

Px = Annotated[int, Field(gt=0)]


class _Part(BaseModel):
    """A frozen part of the card; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class InputCard(_Part):
    """The network's input tensor and the grid of tiles it sees."""

    name: str
    """Tensor name."""
    channels: Px = 1
    tile_px: Px = 84
    """Side of the patch one output label speaks for."""
    stride_px: Annotated[float, Field(gt=0)] = 42
    """Distance between neighbouring patches."""
    origin_px: float
    """Coordinate of the centre of patch (0, 0), both axes, as `TileGrid.origin_px`;
    for a patch that starts at the frame's corner (tile_px - 1) / 2."""
    multiple_px: Px = 1
    """Frame sides must be multiples of it; shorter ones are padded by mirroring."""


class OutputCard(_Part):
    """The network's output tensor (tiles, labels, rows, columns)."""

    name: str
    """Tensor name."""
    labels: Annotated[list[int | str], Field(min_length=2)]
    """Defocus level or ``bg`` by channel of the output."""


class LevelsCard(_Part):
    """What a level means in the optics of reference."""

    step_um: Annotated[float, Field(gt=0)]
    """Defocus between neighbouring levels."""
    count: Px
    """Number of levels, in-focus included."""
    signed: bool = False
    """Whether the network knows the direction."""


class OpticsCard(_Part):
    """The optics an engine was trained for."""

    sampling_min: Annotated[float, Field(gt=0)]
    """Smallest pixel size in units of lambda / NA."""
    sampling_max: Annotated[float, Field(gt=0)]
    """Largest pixel size in units of lambda / NA."""
    reference: OpticalSystem
    """Optics in which `LevelsCard.step_um` holds, calibrated aberrations included."""


class EngineCard(_Part):
    """One engine: its files, tensors, labels, optics and origin."""

    name: str
    kind: Literal["classifier", "restorer", "joint"]
    implementation: Annotated[str, Field(pattern=r"^(onnx|builtin:\w+)$")]
    """``onnx``, or ``builtin:METHOD`` for a restoration written in NumPy."""
    description: str = ""
    files: dict[Literal["fp32", "fp16", "int8"], str] = {}
    """Weights per precision, relative to the card."""
    sha256: dict[Literal["fp32", "fp16", "int8"], str] = {}
    """Checksum per file."""
    input: InputCard | None = None
    output: OutputCard | None = None
    levels: LevelsCard | None = None
    normalisation: dict[str, Any] = {}
    """Name and parameters, see `rtfocus.optics.normalisation`."""
    background: dict[str, Any] = {}
    """Rule for empty tiles, see `rtfocus.optics.normalisation`."""
    optics: OpticsCard | None = None
    trained: dict[str, Any] = {}
    """Origin: data, split, command, seed; for people."""
    figures: dict[str, Any] = {}
    """Measured quality; for people."""

    @model_validator(mode="after")
    def _classifier_is_whole(self) -> "EngineCard":
        if self.kind != "classifier":
            return self
        parts = ("input", "output", "levels", "optics")
        missing = [part for part in parts if getattr(self, part) is None]
        if missing:
            msg = f"a classifier needs the sections {', '.join(missing)}"
            raise ValueError(msg)
        if self.implementation == "onnx" and "fp32" not in self.files:
            msg = "an onnx engine needs files.fp32, the reference weights"
            raise ValueError(msg)
        return self


def read_card(folder: Path) -> EngineCard:
    """Read and validate the card of an engine folder.

    Raises
    ------
    EngineError
        Names the file, the key and the rule.
    """
    path = folder / CARD_NAME
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return EngineCard.model_validate(data)
    except OSError as error:
        msg = (
            f"engine card '{path}' cannot be read: {error.strerror}; "
            "an engine is a folder with an engine.yaml"
        )
        raise EngineError(msg) from error
    except yaml.YAMLError as error:
        msg = f"engine card '{path}' is not valid YAML: {error}"
        raise EngineError(msg) from error
    except ValidationError as error:
        faults = "; ".join(
            f"'{'.'.join(str(part) for part in fault['loc'])}': {fault['msg']}"
            for fault in error.errors()
        )
        msg = f"engine card '{path}': {faults}; correct the card or export it again"
        raise EngineError(msg) from error


def verified_file(folder: Path, card: EngineCard, precision: str = "fp32") -> Path:
    """Return the weights file after comparing its checksum with the card's.

    Raises
    ------
    EngineError
        If the file is missing or is not the one the card describes.
    """
    files: dict[Any, str] = dict(card.files)
    sums: dict[Any, str] = dict(card.sha256)
    if precision not in files:
        msg = f"engine '{card.name}' has no {precision} weights; it has {list(files)}"
        raise EngineError(msg)
    path = folder / files[precision]
    if not path.is_file():
        msg = (
            f"engine '{card.name}' lacks its weights '{path}'; copy the whole folder "
            "or make them with: rtfocus export CHECKPOINT " + str(folder)
        )
        raise EngineError(msg)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sums.get(precision):
        msg = (
            f"weights '{path}' have sha256 {found}, the card says "
            f"{sums.get(precision)}; the file is damaged or the card is that of other "
            f"weights: export again with: rtfocus export CHECKPOINT {folder}"
        )
        raise EngineError(msg)
    return path


def identity(card: EngineCard) -> str:
    """Return ``name@hash``, the hash being the first 12 digits of the weights'."""
    digest = card.sha256.get("fp32", "builtin")
    return f"{card.name}@{digest[:12]}"
