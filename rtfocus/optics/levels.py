"""Levels: He's scale of defocus classes and the units a defocus is counted in."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rtfocus.channel import OpticalSystem


@dataclass(frozen=True, slots=True)
class DefocusLevels:
    """Equidistant defocus levels; level 0 is in focus and never convolved.

    The scale is unsigned (He 2020): a level names a distance from focus.

    Examples
    --------
    >>> scale = DefocusLevels()
    >>> scale.defocus_um(5), scale.level(-9.2)
    (10.0, 5)
    """

    step_um: float = 2.0
    """Distance between neighbouring levels in um."""
    count: int = 11
    """Number of levels, in-focus included."""

    def __post_init__(self) -> None:
        if self.step_um <= 0 or self.count < 2:
            msg = (
                f"step_um={self.step_um}, count={self.count} is no scale; "
                "need step_um > 0 and count >= 2"
            )
            raise ValueError(msg)

    def defocus_um(self, level: int) -> float:
        """Return the distance from focus that a level stands for.

        Raises
        ------
        ValueError
            If the level is not on the scale.
        """
        if not 0 <= level < self.count:
            msg = f"level={level} is not on the scale 0..{self.count - 1}"
            raise ValueError(msg)
        return level * self.step_um

    def level(self, defocus_um: float) -> int:
        """Return the nearest level; beyond the scale's end, the last one."""
        return int(self.levels([defocus_um])[0])

    def levels(self, defocus_um: ArrayLike) -> NDArray[np.int64]:
        """Return the nearest level of each defocus; shape of the input."""
        distance = np.abs(np.asarray(defocus_um, dtype=np.float64)) / self.step_um
        # Halves go up, so that a step's centre belongs to the farther level.
        nearest = np.floor(distance + 0.5)
        return np.minimum(nearest, self.count - 1).astype(np.int64)

    @property
    def values_um(self) -> tuple[float, ...]:
        """Defocus of every level in order."""
        return tuple(level * self.step_um for level in range(self.count))


def to_defocus_waves(system: OpticalSystem, defocus_um: float) -> float:
    """Convert um to the optics' own unit, z NA^2 / (n lambda); sign kept."""
    return defocus_um / system.defocus_unit_um


def from_defocus_waves(system: OpticalSystem, defocus_waves: float) -> float:
    """Convert z NA^2 / (n lambda) to um; sign kept."""
    return defocus_waves * system.defocus_unit_um
