"""Curve: what the steps of a training run saw, as a CSV file that grows."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CURVE_NAME = "curve.csv"
_HEADER = ("step", "seconds", "rate", "loss", "accuracy", "within_one")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step of the optimiser saw."""

    loss: float
    """Mean cross-entropy over the tiles."""
    accuracy: float
    """Share of tiles with the right label."""
    within_one: float
    """Share of tiles with specimen at most one level off."""


def add_to_curve(
    path: Path, step: int, seconds: float, rate: float, recent: Sequence[StepResult]
) -> str:
    """Append the means of the newest steps to the file; return them as text.

    Parameters
    ----------
    path
        CSV file; made with its header where it is missing.
    step, seconds, rate
        Steps and time so far, learning rate of the newest step.
    recent
        Results of the steps since the last line; at least one.
    """
    is_new = not path.exists()
    loss, accuracy, within = (
        sum(getattr(result, name) for result in recent) / len(recent)
        for name in ("loss", "accuracy", "within_one")
    )
    row = [str(step), f"{seconds:.1f}", f"{rate:.3g}"]
    row += [f"{value:.4f}" for value in (loss, accuracy, within)]
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(_HEADER)
        writer.writerow(row)
    return f"loss {loss:.3f} accuracy {accuracy:.3f}"
