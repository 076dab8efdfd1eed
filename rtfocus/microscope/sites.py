"""Sites: stage positions, grid tiles and wells as one axis p."""

import re
from dataclasses import dataclass, field

import useq

from rtfocus.frame import Position


@dataclass(frozen=True, slots=True)
class Well:
    """Place on a plate."""

    row: str
    column: str
    field: int
    """Index of the field of view within the well."""


@dataclass
class Sites:
    """Numbers the sites of a plan in the order of their first visit."""

    wells: list[Well] = field(default_factory=list)
    """By useq position; empty outside plates."""
    _numbers: dict[tuple[int, int | None], int] = field(default_factory=dict)
    _positions: list[Position] = field(default_factory=list)

    @classmethod
    def of(cls, sequence: useq.MDASequence) -> "Sites":
        """Take the wells of a plan."""
        plate = sequence.stage_positions
        if not isinstance(plate, useq.WellPlatePlan):
            return cls()
        names = [_split(str(name)) for name in plate.selected_well_names]
        return cls(
            wells=[
                Well(row, column, site)
                for row, column in names
                for site in range(plate.num_points_per_well)
            ]
        )

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
        if any(name == other.name for other in self._positions):
            name = f"{name}_{len(self._positions)}"
        well = self.wells[p] if p < len(self.wells) else None
        return Position(
            name=name,
            x_um=event.x_pos,
            y_um=event.y_pos,
            plate_row=well.row if well else None,
            plate_column=well.column if well else None,
            field=well.field if well else 0,
        )


def _split(well: str) -> tuple[str, str]:
    """Split a well's name: ``B3`` is row ``B``, column ``03``."""
    found = re.fullmatch(r"([A-Za-z]+)(\d+)", well)
    if found is None:
        return well, "01"
    return found[1], f"{int(found[2]):02d}"
