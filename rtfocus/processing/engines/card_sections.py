"""Card sections: the parts an ``engine.yaml`` is made of, each checked by itself."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rtfocus.channel import OpticalSystem

BACKGROUND_LABEL = "bg"
"""Label of tiles without a specimen."""

Px = Annotated[int, Field(gt=0)]
Precision = Literal["fp32", "fp16", "int8"]
"""Weights files there may be; the file decides what a network computes in."""
ConditionEntry = Literal[
    "sampling",
    "spherical_waves",
    "optics_known",
    "defocus_levels",
    "defocus_known",
    "level",
]
"""What processing can tell a network about a tile, see `ConditionCard`."""


class Section(BaseModel):
    """A frozen part of the card; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )


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
    stride_px: Annotated[float, Field(gt=0)] = 42
    """Distance between neighbouring patches; restorers have none: their tiles join
    where their halos end."""
    origin_px: float
    """Coordinate of the centre of patch (0, 0), both axes, as `TileGrid.origin_px`;
    not given: the patch starts at the frame's corner, (tile_px - 1) / 2."""
    halo_px: Annotated[int, Field(ge=0)] = 0
    """Context on each side of a restorer's tile, which its result leaves out."""
    multiple_px: Px = 1
    """Sides of frames or tiles must be multiples of it; shorter frames are padded
    by mirroring."""

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
    """What each column holds, see `rtfocus.processing.conditions`."""

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
    labels: list[int | str] = []
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

    step_um: Annotated[float, Field(gt=0)]
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
