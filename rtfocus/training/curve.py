"""Curve: what the steps of a training run saw, as a CSV file that grows."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

CURVE_NAME = "curve.csv"


def add_to_curve(
    path: Path,
    step: int,
    seconds: float,
    rate: float,
    recent: Sequence[Mapping[str, float]],
) -> str:
    """Append the means of the newest steps to the file; return them as text.

    Parameters
    ----------
    path
        CSV file; made with its header where it is missing.
    step, seconds, rate
        Steps and time so far, learning rate of the newest step.
    recent
        What the steps since the last line measured, by name; at least one.
    """
    means = {
        name: sum(step[name] for step in recent) / len(recent) for name in recent[0]
    }
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(("step", "seconds", "rate", *means))
        numbers = [f"{value:.5f}" for value in means.values()]
        writer.writerow((step, f"{seconds:.1f}", f"{rate:.3g}", *numbers))
    return " ".join(f"{name} {value:.4f}" for name, value in means.items())
