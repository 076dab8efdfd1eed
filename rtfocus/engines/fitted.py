"""Fitted: what a card says of its engine by small functions, fitted to known truth.

*Evidence*: how far corrections are trusted. *Deviation*: how far off a defocus may be,
as it is stated to people. The spread of a network's label probabilities is not that: a
defocus between two levels has a spread though it is known well, and what is far out of
focus, or seen by unknown optics, errs by more than the labels say. The weighing of
corrections and autofocus have calibrations of their own and take the spread as it is.
"""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rtfocus.frame import DefocusMap

Share = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A frozen part of the card; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerCard(Section):
    """One layer of a small fitted function; between layers negative values are 0."""

    weights: list[list[float]]
    """One row per output."""
    bias: list[float]
    """One per output."""


class EvidenceCard(Section):
    """How far corrections of a joint engine are trusted where nobody told the optics.

    See `rtfocus.processing.evidence`.
    """

    middle: list[float]
    """Mean of every measure where the function was fitted."""
    spread: list[Annotated[float, Field(gt=0)]]
    """Its deviation there."""
    layers: Annotated[list[LayerCard], Field(min_length=1)]
    """From the measures to one number, the log-odds of the share applied."""

    @model_validator(mode="after")
    def _fits_together(self) -> "EvidenceCard":
        width = len(self.middle)
        sound = len(self.spread) == width
        for layer in self.layers:
            sound &= all(len(row) == width for row in layer.weights)
            width = len(layer.weights)
            sound &= len(layer.bias) == width
        if not sound or width != 1:
            msg = "its layers do not lead from the measures to one number"
            raise ValueError(msg)
        return self


class DeviationCard(Section):
    """Variance of the defocus, in squared levels: a sum of three parts."""

    spread: Share
    """Factor of the labels' variance beyond that of a place between two levels."""
    floor: Share
    """What is added everywhere."""
    distance: Share
    """Factor of the squared distance from focus, in levels."""


def stated_um(
    found: DefocusMap, fit: DeviationCard | None, step_um: float
) -> NDArray[np.float32] | None:
    """Return the standard deviation to state beside each tile's defocus.

    Parameters
    ----------
    found
        What the engine says, axes (tile_y, tile_x).
    fit
        Of its card; None: the spread of its labels is all there is.
    step_um
        Defocus between two of its levels.

    Returns
    -------
    NDArray
        In um, same axes, NaN = background; None: the engine gives no spread.
    """
    if fit is None or found.uncertainty_um is None:
        return found.uncertainty_um
    step = np.float32(step_um)
    stated = stated_variance(fit, found.defocus_um / step, found.uncertainty_um / step)
    return np.asarray(np.sqrt(stated) * step_um, dtype=np.float32)


def stated_variance(
    fit: DeviationCard, level: NDArray[Any], spread: NDArray[Any]
) -> NDArray[Any]:
    """Return the variance to state, in squared levels.

    Parameters
    ----------
    fit
        Of the engine's card.
    level
        Defocus found, in levels; any shape.
    spread
        Standard deviation of its labels, in levels; same shape.
    """
    between = level - np.floor(level)
    beyond = np.maximum(np.square(spread) - between * (1 - between), 0)
    return np.asarray(fit.spread * beyond + fit.floor + fit.distance * np.square(level))
