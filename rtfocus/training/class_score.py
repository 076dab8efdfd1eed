"""Class score: precision, recall, calibration and confusion of labelled patches."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BINS = 10


@dataclass
class ClassScore:
    """What a classifier said of patches whose class is known.

    Parameters
    ----------
    labels
        Label of every class, in the order of the probabilities.
    """

    labels: tuple[int, ...]
    confusion: NDArray[np.int64] = field(init=False)
    """Patches by true class (row) and found class (column)."""

    def __post_init__(self) -> None:
        count = len(self.labels)
        self.confusion = np.zeros((count, count), dtype=np.int64)
        # By confidence: patches, of these right, sum of the confidences.
        self._bins = np.zeros((3, _BINS))

    def add(
        self, true: NDArray[np.integer], probabilities: NDArray[np.floating]
    ) -> None:
        """Count patches: classes (N,) and probabilities (N, classes)."""
        found = probabilities.argmax(axis=1)
        np.add.at(self.confusion, (true, found), 1)
        confidence = probabilities.max(axis=1)
        place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
        for row, values in enumerate((np.ones(len(true)), found == true, confidence)):
            np.add.at(self._bins[row], place, values)

    @property
    def accuracy(self) -> float:
        """Share of right classes."""
        return _share(np.trace(self.confusion), self.confusion.sum())

    @property
    def precision(self) -> list[float]:
        """Per class: share of the patches found to be of it that are."""
        found = self.confusion.sum(axis=0)
        return [
            _share(n, total)
            for n, total in zip(np.diag(self.confusion), found, strict=True)
        ]

    @property
    def recall(self) -> list[float]:
        """Per class: share of its patches that were found."""
        true = self.confusion.sum(axis=1)
        return [
            _share(n, total)
            for n, total in zip(np.diag(self.confusion), true, strict=True)
        ]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean gap of confidence and accuracy, 10 bins."""
        patches, right, confidence = self._bins
        return _share(np.abs(right - confidence).sum(), patches.sum())

    @property
    def sign_right(self) -> float:
        """Of patches off focus that were not called focus, those on their side."""
        signs = np.sign(self.labels)
        off = self.confusion[np.ix_(signs != 0, signs != 0)]
        same = np.equal.outer(signs[signs != 0], signs[signs != 0])
        return _share(off[same].sum(), off.sum())

    def summary(self) -> dict[str, Any]:
        """Return everything as plain numbers."""
        pairs = zip(self.precision, self.recall, strict=True)
        f1 = [2 * p * r / max(p + r, 1e-12) for p, r in pairs]
        return {
            "patches": int(self.confusion.sum()),
            "accuracy": round(self.accuracy, 4),
            "sign_right": round(self.sign_right, 4),
            "calibration_error": round(self.calibration_error, 4),
            "precision": [round(p, 4) for p in self.precision],
            "recall": [round(r, 4) for r in self.recall],
            "f1": [round(f, 4) for f in f1],
            "confusion": self.confusion.tolist(),
        }


def _share(part: float, total: float) -> float:
    return float(part / total) if total else float("nan")
