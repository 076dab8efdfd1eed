"""Labels: from a network's logits to level, defocus, confidence and uncertainty."""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND, DefocusMap, Estimate, FrameHeader
from rtfocus.processing.engines.card import BACKGROUND_LABEL, OutputCard

Image = NDArray[np.float32]


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
        shifted = np.exp(logits - logits.max(axis=0))
        probability = shifted / shifted.sum(axis=0)
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


def _mean(values: Image, weights: Image) -> Image:
    """Return the weighted mean over the labels; 0 where nothing has a weight."""
    total = np.maximum(weights.sum(axis=0), np.finfo(np.float32).tiny)
    return np.asarray((weights * values).sum(axis=0) / total, dtype=np.float32)


def estimate_frame(header: FrameHeader, found: DefocusMap) -> Estimate:
    """Combine the tiles of a frame, each with the weight of its confidence.

    Parameters
    ----------
    header
        Of the frame; its index, z and times are copied.
    found
        Defocus of its tiles.

    Returns
    -------
    Estimate
        ``level`` is the one that gathers most confidence, ``defocus_um`` the
        weighted mean; both None where every tile is background.
    """
    foreground = found.level != BACKGROUND
    weights = found.confidence[foreground].astype(np.float64)
    level: int | None = None
    defocus_um: float | None = None
    confidence = 0.0
    if weights.sum() > 0:
        levels, place = np.unique(found.level[foreground], return_inverse=True)
        level = int(levels[np.bincount(place, weights=weights).argmax()])
        defocus_um = float(np.average(found.defocus_um[foreground], weights=weights))
        confidence = float(weights.mean())
    return Estimate(
        series_uid=header.series_uid,
        sequence=header.sequence,
        level=level,
        defocus_um=defocus_um,
        signed=found.grid.signed,
        confidence=confidence,
        foreground=float(foreground.mean()),
        z_um=header.z_um,
        z_offset_um=header.z_offset_um,
        index=header.index,
        captured_ns=header.captured_ns,
        estimated_ns=time.time_ns(),
    )
