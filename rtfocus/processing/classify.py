"""Classify: what engines get of a tile, and what their answer means.

**Rules** of the card say how frames are normalised and which tiles are empty. They lie
in `rtfocus.optics.normalisation`, which training uses too: a network sees in the loop
exactly what it was trained on.

**Conditions** are given beside the pixels. The PSFs of (z, W) and of (-z, -W) are the
same (z defocus, W spherical aberration), so engines are trained with W <= 0 alone.
Where a channel's W is positive they see its mirror image: the sign of every defocus is
turned on the way in and back on the way out.

**Labels**: from logits to level, defocus, confidence and uncertainty. All channels of a
series share one grid of tiles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.engines.card import (
    BACKGROUND_LABEL,
    EngineCard,
    InputCard,
    OutputCard,
    input_of,
    output_of,
)
from rtfocus.engines.registry import FrameFit, parts, step_um
from rtfocus.errors import EngineError
from rtfocus.frame import BACKGROUND, DefocusMap, Estimate, FrameHeader, TileGrid
from rtfocus.machine import RUN_CLOCK
from rtfocus.optics.normalisation import (
    CELL_PX,
    ContrastToNoise,
    LocalStandardisation,
    PercentileRange,
)

Image = NDArray[np.float32]

Rule = TypeVar("Rule")
Normalisation = LocalStandardisation | PercentileRange
NORMALISATIONS: Mapping[str, Callable[..., Normalisation]] = {
    "local_standardisation": LocalStandardisation,
    "percentile_range": PercentileRange,
}
BACKGROUNDS: Mapping[str, Callable[..., ContrastToNoise]] = {
    "contrast_to_noise": ContrastToNoise
}


def normalisation_of(card: EngineCard) -> Normalisation:
    """Return the normalisation that a card names; EngineError: there is none."""
    rule = _build(card, "normalisation", NORMALISATIONS)
    by_cells = card.kind != "restorer" and isinstance(rule, LocalStandardisation)
    # Whole frames are padded to that multiple.
    if by_cells and (multiple_px := input_of(card).multiple_px) % CELL_PX:
        msg = (
            f"engine '{card.name}': input.multiple_px is {multiple_px}, but local_"
            f"standardisation works on cells of {CELL_PX} px; give a multiple of them"
        )
        raise EngineError(msg)
    return rule


def background_of(card: EngineCard) -> ContrastToNoise | None:
    """Return the background rule that a card names; None: it leaves it out."""
    if not card.background:
        return None
    return _build(card, "background", BACKGROUNDS)


def invertible_normalisation(card: EngineCard) -> PercentileRange:
    """Return the normalisation of an engine whose images go back to counts.

    Raises
    ------
    EngineError
        If the card names another one, which has no inverse.
    """
    rule = normalisation_of(card)
    if not isinstance(rule, PercentileRange):
        msg = (
            f"engine '{card.name}' restores images normalised by "
            f"'{card.normalisation['name']}', which has no way back to counts; "
            "export it with percentile_range"
        )
        raise EngineError(msg)
    return rule


def _build(
    card: EngineCard, section: str, rules: Mapping[str, Callable[..., Rule]]
) -> Rule:
    """Make the rule that a section of the card names."""
    options = dict(getattr(card, section))
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in rules:
        msg = (
            f"engine '{card.name}': {section}.name is '{name}', known are "
            f"{', '.join(rules)}; name one of those, or use a newer rtfocus"
        )
        raise EngineError(msg)
    try:
        return rules[name](**options)
    except (TypeError, ValueError) as error:
        msg = f"engine '{card.name}': {section} '{name}': {error}"
        raise EngineError(msg) from error


def is_mirrored(optics: OpticalSystem) -> bool:
    """Return whether engines see these optics with the sign of z turned."""
    return optics.aberrations.spherical_waves > 0


class Conditions:
    """Fills the condition tensor of one engine in the optics of one channel.

    Parameters
    ----------
    blind
        The optics are not known, or are kept back: the aberrations, and the
        sampling to engines that can do without.
    signed
        Whether the defocus that tiles come with has a direction.
    """

    def __init__(
        self, card: EngineCard, optics: OpticalSystem, *, blind: bool, signed: bool
    ) -> None:
        levels, _ = parts(card)
        spherical = optics.aberrations.spherical_waves
        self.entries = () if card.condition is None else tuple(card.condition.entries)
        """What each column holds."""
        turn = -1.0 if is_mirrored(optics) else 1.0
        self.levels_per_um = turn / step_um(card, optics, blind=blind)
        """Negative where the sign of the defocus is turned."""
        self.farthest = levels.count - 1
        """Highest level."""
        self.signed_levels = levels.signed
        # Without aberration both directions look alike: a distance says it all.
        one_sided = not signed and spherical != 0
        self.hides_defocus = "defocus_known" in self.entries and one_sided
        """Whether the defocus is kept back because its direction is not known."""
        hidden = blind and card.needs_no_optics
        self.fixed: Mapping[str, float] = {
            "sampling": 0.0 if hidden else optics.sampling,
            "sampling_known": 0.0 if hidden else 1.0,
            "spherical_waves": 0.0 if blind else -abs(spherical),
            "optics_known": 0.0 if blind else 1.0,
        }
        """Entries that are the same for all tiles."""

    def unknown(self, number: int) -> Image | None:
        """Return the `rows` of so many tiles whose defocus is not known yet."""
        return self.rows(np.full(number, np.nan, np.float32))

    def rows(self, defocus_um: Image) -> Image | None:
        """Return the condition of tiles; None: the engine takes none.

        Axes (tile, entry), of the defocus per tile; NaN: not known.
        """
        if not self.entries:
            return None
        columns = [self._column(entry, defocus_um) for entry in self.entries]
        return np.stack(columns, axis=1).astype(np.float32)

    def told(self, level: float, number: int) -> Image | None:
        """Return the `rows` of so many tiles in which the engine itself found a level.

        As it counts, see `LabelDecoder.level_of_frame`; NaN: none.
        """
        rows = self.unknown(number)
        if rows is not None and not np.isnan(level):
            rows[:, self.entries.index("defocus_levels")] = level
            rows[:, self.entries.index("defocus_known")] = 1
        return rows

    def _column(self, entry: str, defocus_um: Image) -> Image:
        if entry in self.fixed:
            return np.full(defocus_um.shape, self.fixed[entry], np.float32)
        known = ~np.isnan(defocus_um)
        levels = np.where(known, defocus_um, 0) * np.float32(self.levels_per_um)
        if entry == "level":
            whole = np.clip(np.rint(levels), -self.farthest, self.farthest)
            return np.asarray(whole if self.signed_levels else np.abs(whole))
        if self.hides_defocus:
            # The engine can do without; a distance would be taken for a direction.
            known, levels = np.zeros_like(known), np.zeros_like(levels)
        return np.asarray(known if entry == "defocus_known" else levels)


def turned(level: NDArray[np.int16], defocus: Image) -> tuple[NDArray[np.int16], Image]:
    """Turn the sign of what an engine found, see `is_mirrored`; background stays."""
    turned_level = np.where(level == BACKGROUND, level, -level)
    return turned_level.astype(np.int16), -defocus


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the logits say of every tile; all axes (tile_y, tile_x)."""

    level: NDArray[np.int16]
    confidence: Image
    """Probability of the chosen label."""
    defocus: Image
    """In levels; meaningless where the level is background."""
    uncertainty: Image
    """Standard deviation of the levels about `defocus`, in levels."""


class LabelDecoder:
    """Turns logits into labels by the card's list."""

    def __init__(self, output: OutputCard) -> None:
        self.labels = output.labels
        self.levels = np.array(
            [
                BACKGROUND if label == BACKGROUND_LABEL else int(label)
                for label in output.labels
            ],
            dtype=np.int16,
        )
        self._values = self.levels[:, None, None].astype(np.float32)
        self._is_level = self._values != BACKGROUND
        self._is_idle = ~self._is_level | (self._values == 0)

    def decode(self, logits: Image) -> Decoded:
        """Decode logits, axes (label, tile_y, tile_x).

        Whether there is anything to correct comes first, by the sum of the
        probabilities: many levels that share theirs outvote one focus label. Then
        the likeliest label of that side is chosen. The defocus is the mean over the
        chosen level and its two neighbours by their probabilities: finer than a
        level, blind to a far second opinion, which the uncertainty counts in full.
        """
        probability = probabilities(logits)
        idle = np.where(self._is_idle, probability, 0).sum(axis=0) >= 0.5
        chosen = np.where(self._is_idle == idle, probability, -1).argmax(axis=0)
        level = self.levels[chosen]
        confidence = np.take_along_axis(probability, chosen[None], axis=0)[0]
        distance = np.abs(self._values - level)
        near = (distance <= 1) & self._is_level
        defocus = _mean(self._values, np.where(near, probability, 0))
        of_levels = np.where(self._is_level, probability, 0)
        variance = _mean(np.square(self._values - defocus), of_levels)
        return Decoded(level, confidence, defocus, np.sqrt(variance))

    def level_of_frame(self, logits: Image) -> float:
        """Return one signed level for a frame, from its tiles that show something.

        The mean distance from focus by the labels' probabilities, on the side that
        they lean to: where the direction is open, a distance remains. NaN: every tile
        is likelier background. Logits have axes (label, tile_y, tile_x).
        """
        probability = probabilities(logits)
        of_levels = self.levels != BACKGROUND
        shares = probability[of_levels].reshape(of_levels.sum(), -1)
        shares = shares[:, shares.sum(axis=0) > 0.5].sum(axis=1)
        if not shares.any():
            return float("nan")
        levels = self.levels[of_levels].astype(np.float32)
        distance = float(shares @ np.abs(levels) / shares.sum())
        return distance if shares @ levels >= 0 else -distance


def tile_grid(
    card: InputCard, fit: FrameFit, rows: int, columns: int, *, signed: bool
) -> TileGrid:
    """Grid of the tiles whose centre lies in the frame; at least one per axis."""
    counts = [
        min(tiles, max(1, ceil((side - card.origin_px) / card.stride_px)))
        for tiles, side in zip((rows, columns), fit.shape, strict=True)
    ]
    return TileGrid(
        rows=counts[0],
        columns=counts[1],
        tile_px=card.tile_px,
        stride_px=card.stride_px,
        origin_px=card.origin_px,
        signed=signed,
    )


def tiles_in_cells(grid: TileGrid) -> tuple[int, int, int]:
    """Return side, distance and first edge of tiles in whole cells of the statistics.

    What background rules look at: tiles of a network need not be made of cells.
    """
    start_px = grid.origin_px - (grid.tile_px - 1) / 2
    tile, stride, start = (
        round(px / CELL_PX) for px in (grid.tile_px, grid.stride_px, start_px)
    )
    return tile, stride, start


def common_grid(grids: Mapping[str, TileGrid | None]) -> TileGrid | None:
    """Return the grid of all classified channels; None: none is classified.

    Parameters
    ----------
    grids
        By channel; None: not classified.

    Raises
    ------
    EngineError
        If two channels have different grids: one map cannot hold both.
    """
    classified = {name: grid for name, grid in grids.items() if grid is not None}
    if len(set(classified.values())) > 1:
        msg = (
            f"classifiers of channels {', '.join(classified)} divide a frame into "
            "different tiles; use engines with the same tile_px and stride_px"
        )
        raise EngineError(msg)
    return next(iter(classified.values()), None)


def check_labels(card: EngineCard, logits: tuple[int, ...]) -> None:
    """Refuse logits whose shape is not what the card says."""
    labels = len(output_of(card).labels)
    if len(logits) != 4 or logits[1] != labels:
        msg = (
            f"engine '{card.name}': its output is {logits}, but the card lists "
            f"{labels} labels; expected (N, {labels}, rows, columns)"
        )
        raise EngineError(msg)


def probabilities(logits: Image) -> Image:
    """Return how likely every label is; axes as the logits', the label first."""
    shifted = np.exp(logits - logits.max(axis=0))
    return np.asarray(shifted / shifted.sum(axis=0), dtype=np.float32)


def _mean(values: Image, weights: Image) -> Image:
    """Return the weighted mean over the labels; 0 where nothing has a weight."""
    total = np.maximum(weights.sum(axis=0), np.finfo(np.float32).tiny)
    return np.asarray((weights * values).sum(axis=0) / total, dtype=np.float32)


def estimate_frame(header: FrameHeader, defocus: DefocusMap) -> Estimate:
    """Combine the tiles of a frame, each with the weight of its confidence.

    ``level`` is the one that gathers most confidence, ``defocus_um`` the weighted
    mean; both None where every tile is background.
    """
    foreground = defocus.level != BACKGROUND
    weights = defocus.confidence[foreground].astype(np.float64)
    level: int | None = None
    defocus_um: float | None = None
    confidence = 0.0
    if (total := weights.sum()) > 0:
        levels = defocus.level[foreground] - (lowest := defocus.level[foreground].min())
        level = int(lowest + np.bincount(levels, weights=weights).argmax())
        defocus_um = float((defocus.defocus_um[foreground] * weights).sum() / total)
        confidence = float(weights.mean())
    return Estimate(
        series_uid=header.series_uid,
        sequence=header.sequence,
        level=level,
        defocus_um=defocus_um,
        signed=defocus.grid.signed,
        confidence=confidence,
        foreground=float(foreground.mean()),
        z_um=header.z_um,
        z_offset_um=header.z_offset_um,
        index=header.index,
        captured_ns=header.captured_ns,
        estimated_ns=RUN_CLOCK.now_ns(),
    )
