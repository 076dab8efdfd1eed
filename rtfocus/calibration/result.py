"""Result: what every kind of calibration hands over to the report."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rtfocus.channel import OpticalSystem
from rtfocus.drawing.panels import Panel
from rtfocus.errors import InputError

T = TypeVar("T")

LARGEST_APERTURE = 0.97
"""Largest NA tried, relative to the refractive index."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted optics, and what shows how far they can be trusted."""

    system: OpticalSystem
    """The optics as a config states them: their defocus counts from focus."""
    statement: str
    """What was found and what the data cannot tell, in words."""
    warnings: tuple[str, ...]
    """What makes the fit doubtful; empty: nothing."""
    figures: dict[str, Any]
    """Plain numbers for a report file."""
    panels: list[Panel] = field(repr=False)
    """For a picture, of equal size."""


def refusing(fit: Callable[[], T]) -> T:
    """Return what `fit` returns; what it refuses is the fault of the input."""
    try:
        return fit()
    except ValueError as error:
        msg = f"this cannot be fitted: {error}"
        raise InputError(msg) from error
