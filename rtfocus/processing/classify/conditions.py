"""Conditions: what an engine is told of a tile beside its pixels.

The PSFs of (z, W) and of (-z, -W) are the same (z defocus, W spherical aberration),
so engines are trained with W <= 0 alone. Where a channel's W is positive they see
its mirror image: the sign of every defocus is turned on the way in and back on the
way out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.frame import BACKGROUND
from rtfocus.processing.engines.card import EngineCard
from rtfocus.processing.engines.fit import parts, step_um

Image = NDArray[np.float32]


def is_mirrored(optics: OpticalSystem) -> bool:
    """Return whether engines see these optics with the sign of z turned."""
    return optics.aberrations.spherical_waves > 0


@dataclass(frozen=True, slots=True)
class ConditionTerms:
    """How `Conditions` fills its columns, for who computes them elsewhere."""

    entries: tuple[str, ...]
    """What each column holds."""
    fixed: Mapping[str, float]
    """Entries that are the same for all tiles."""
    levels_per_um: float
    """Negative where the sign of the defocus is turned."""
    farthest: int
    """Highest level."""
    signed_levels: bool
    hides_defocus: bool
    """Whether the defocus is kept back because its direction is not known."""


class Conditions:
    """Fills the condition tensor of one engine in the optics of one channel.

    Parameters
    ----------
    card
        Of the engine.
    optics
        Of the channel.
    blind
        The aberrations are not known, or are not to be told.
    signed
        Whether the defocus that tiles come with has a direction.
    """

    def __init__(
        self, card: EngineCard, optics: OpticalSystem, *, blind: bool, signed: bool
    ) -> None:
        levels, _ = parts(card)
        self._entries = () if card.condition is None else tuple(card.condition.entries)
        self._step_um = step_um(card, optics)
        self._farthest = levels.count - 1
        self._signed_levels = levels.signed
        self._turn = -1.0 if is_mirrored(optics) else 1.0
        spherical = optics.aberrations.spherical_waves
        # Without aberration both directions look alike: a distance says it all.
        self._direction_known = signed or spherical == 0
        self._fixed = {
            "sampling": optics.sampling,
            "spherical_waves": 0.0 if blind else -abs(spherical),
            "optics_known": 0.0 if blind else 1.0,
        }

    @property
    def terms(self) -> ConditionTerms:
        """Everything that `rows` computes with."""
        return ConditionTerms(
            entries=self._entries,
            fixed=self._fixed,
            levels_per_um=self._turn / self._step_um,
            farthest=self._farthest,
            signed_levels=self._signed_levels,
            hides_defocus=(
                "defocus_known" in self._entries and not self._direction_known
            ),
        )

    def unknown(self, number: int) -> Image | None:
        """Return the condition of tiles whose defocus nobody knows yet.

        Returns
        -------
        Image or None
            Axes (tile, entry); None: the engine takes no condition.
        """
        return self.rows(np.full(number, np.nan, np.float32))

    def rows(self, defocus_um: Image) -> Image | None:
        """Return the condition of tiles.

        Parameters
        ----------
        defocus_um
            Per tile; NaN: not known.

        Returns
        -------
        Image or None
            Axes (tile, entry); None: the engine takes no condition.
        """
        if not self._entries:
            return None
        columns = [self._column(entry, defocus_um) for entry in self._entries]
        return np.stack(columns, axis=1).astype(np.float32)

    def _column(self, entry: str, defocus_um: Image) -> Image:
        if entry in self._fixed:
            return np.full(defocus_um.shape, self._fixed[entry], np.float32)
        known = ~np.isnan(defocus_um)
        levels = np.where(known, defocus_um, 0) * np.float32(self._turn / self._step_um)
        if entry == "level":
            whole = np.clip(np.rint(levels), -self._farthest, self._farthest)
            return np.asarray(whole if self._signed_levels else np.abs(whole))
        if self.terms.hides_defocus:
            # The engine can do without; a distance would be taken for a direction.
            known, levels = np.zeros_like(known), np.zeros_like(levels)
        return np.asarray(known if entry == "defocus_known" else levels)


def turned(level: NDArray[np.int16], defocus: Image) -> tuple[NDArray[np.int16], Image]:
    """Turn the sign of what an engine found, see `is_mirrored`; background stays."""
    turned_level = np.where(level == BACKGROUND, level, -level)
    return turned_level.astype(np.int16), -defocus
