"""Labels: from a network's logits to level, defocus, confidence and uncertainty."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfocus.frame import BACKGROUND
from rtfocus.processing.engines.card_sections import BACKGROUND_LABEL, OutputCard

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
