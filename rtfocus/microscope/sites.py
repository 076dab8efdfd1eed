"""Sites: stage positions, grid tiles and wells as one axis p."""

import re
from collections import Counter
from dataclasses import dataclass, field

import msgspec
import useq

from rtfocus.frame import Position


@dataclass(frozen=True, slots=True)
class Well:
    """Place on a plate."""

    row: str
    """Letter, e.g. ``B``."""
    column: str
    """Two digits from 1, e.g. ``03``."""


@dataclass
class Sites:
    """Numbers the sites of a plan in the order of their first visit."""

    wells: list[Well | None] = field(default_factory=list)
    """By useq position; None, or absent, outside plates."""
    _numbers: dict[tuple[int, int | None], int] = field(default_factory=dict)
    _positions: list[Position] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _fields: Counter[Well] = field(default_factory=Counter)

    @classmethod
    def of(cls, sequence: useq.MDASequence) -> "Sites":
        """Take the wells of a plan: of its plate, or as its positions name them."""
        positions = sequence.stage_positions
        if not isinstance(positions, useq.WellPlatePlan):
            return cls(wells=[_well_of(position) for position in positions])
        wells = [_named(str(name)) for name in positions.selected_well_names]
        sites = range(positions.num_points_per_well)
        return cls(wells=[well for well in wells for _ in sites])

    def number(self, event: useq.MDAEvent) -> int:
        """Return the index p of an event's site."""
        key = (event.index.get("p", 0), event.index.get("g"))
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._positions.append(self._describe(event, *key))
        return self._numbers[key]

    def positions(self) -> list[Position]:
        """Return all sites met so far, by index p."""
        return list(self._positions)

    def _describe(self, event: useq.MDAEvent, p: int, tile: int | None) -> Position:
        name = event.pos_name or f"p{p}"
        if tile is not None:
            name = f"{name}_g{tile}"
        number = len(self._positions)
        while name in self._names:
            name, number = f"{name}_{number}", number + 1
        self._names.add(name)
        position = Position(name=name, x_um=event.x_pos, y_um=event.y_pos)
        well = self.wells[p] if p < len(self.wells) else None
        if well is None:
            return position
        # Points of a well, tiles of its grid and positions in it alike.
        number = self._fields[well]
        self._fields[well] += 1
        return msgspec.structs.replace(
            position, plate_row=well.row, plate_column=well.column, field=number
        )


def _named(well: str) -> Well:
    """Split a well's name: ``B3`` is row ``B``, column ``03``."""
    found = re.fullmatch(r"([A-Za-z]+)(\d+)", well)
    if found is None:
        return Well(well, "01")
    return Well(found[1], f"{int(found[2]):02d}")


def _well_of(position: useq.Position) -> Well | None:
    """Name the well at a position's row and column, which count from 0."""
    row, column = position.plate_row, position.plate_col
    if row is None or column is None:
        return None
    letters = ""
    while row >= 0:
        row, letter = divmod(row, 26)
        letters = chr(ord("A") + letter) + letters
        row -= 1
    return Well(letters, f"{column + 1:02d}")
