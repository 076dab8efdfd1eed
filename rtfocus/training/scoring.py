"""Scoring: how often labels are right, counted per level and per kind."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


@dataclass
class Score:
    """Confusion of one set of tiles; background is the last label."""

    labels: int = 12
    """Number of labels, background included."""
    confusion: Labels = field(init=False)
    """Tiles by true label (row) and found label (column)."""

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.labels, self.labels), dtype=np.int64)

    def add(self, true: Labels, found: Labels) -> None:
        """Count tiles; arrays of one shape."""
        np.add.at(self.confusion, (true.ravel(), found.ravel()), 1)

    def merge(self, other: "Score") -> None:
        """Count the tiles of another score too."""
        self.confusion += other.confusion

    @property
    def tiles(self) -> int:
        """Tiles that hold a specimen."""
        return int(self.confusion[:-1].sum())

    def accuracy(self, level: int | None = None) -> float:
        """Share of tiles with specimen and the right level; NaN where there is none."""
        return self._share(0, level)

    def within_one(self, level: int | None = None) -> float:
        """Share of tiles with specimen at most one level off."""
        return self._share(1, level)

    def accuracy_with_background(self) -> float:
        """Share of all tiles with the right one of all labels (He 2020, table 1)."""
        total = int(self.confusion.sum())
        return float(np.trace(self.confusion)) / total if total else float("nan")

    def share_between(self, lowest: int, highest: int) -> float:
        """Share of tiles with specimen that were given a level in a range."""
        found = self.confusion[:-1].sum(axis=0)
        return float(found[lowest : highest + 1].sum() / max(found.sum(), 1))

    def summary(self) -> dict[str, Any]:
        """Return the shares as plain numbers."""
        levels = range(self.labels - 1)
        return {
            "tiles": self.tiles,
            "accuracy": _rounded(self.accuracy()),
            "within_one": _rounded(self.within_one()),
            "accuracy_with_bg": _rounded(self.accuracy_with_background()),
            "accuracy_per_level": [_rounded(self.accuracy(k)) for k in levels],
            "within_one_per_level": [_rounded(self.within_one(k)) for k in levels],
        }

    def _share(self, tolerance: int, level: int | None) -> float:
        last = self.labels - 1
        true, found = np.indices((last, self.labels))
        right = (np.abs(true - found) <= tolerance) & (found < last)
        rows = slice(None) if level is None else slice(level, level + 1)
        counted = self.confusion[:-1][rows]
        total = int(counted.sum())
        return float(counted[right[rows]].sum()) / total if total else float("nan")


def _rounded(share: float) -> float | None:
    return None if np.isnan(share) else round(share, 4)
