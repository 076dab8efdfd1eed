"""Levels: He's scale of defocus classes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DefocusLevels:
    """Equidistant defocus levels; level 0 is in focus and never convolved.

    The scale is unsigned (He 2020): a level names a distance from focus.

    Examples
    --------
    >>> scale = DefocusLevels()
    >>> scale.count, scale.defocus_um(5)
    (11, 10.0)
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

    @property
    def values_um(self) -> tuple[float, ...]:
        """Defocus of every level in order."""
        return tuple(level * self.step_um for level in range(self.count))
