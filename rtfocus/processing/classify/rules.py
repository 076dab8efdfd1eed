"""Rules: how an engine's card wants frames normalised and empty tiles found.

The rules themselves lie in `rtfocus.optics.normalisation`, which training uses
too: a network sees in the loop exactly what it was trained on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import EngineError
from rtfocus.optics.normalisation import (
    ContrastToNoise,
    LocalStandardisation,
    PercentileRange,
)
from rtfocus.processing.engines.card import EngineCard

Image = NDArray[np.float32]

Normalisation = LocalStandardisation | PercentileRange
NORMALISATIONS: Mapping[str, Callable[..., Normalisation]] = {
    "local_standardisation": LocalStandardisation,
    "percentile_range": PercentileRange,
}
BACKGROUNDS: Mapping[str, Callable[..., ContrastToNoise]] = {
    "contrast_to_noise": ContrastToNoise
}


def normalisation_of(card: EngineCard) -> Normalisation:
    """Return the normalisation that a card names."""
    rule: Normalisation = _build(card, "normalisation", NORMALISATIONS)
    return rule


def background_of(card: EngineCard) -> ContrastToNoise | None:
    """Return the background rule that a card names; None: it leaves it out."""
    if not card.background:
        return None
    rule: ContrastToNoise = _build(card, "background", BACKGROUNDS)
    return rule


def invertible_normalisation(card: EngineCard) -> PercentileRange:
    """Return the normalisation of an engine whose images go back to counts.

    Raises
    ------
    EngineError
        If the card names another one, which has no inverse.
    """
    rule = _build(card, "normalisation", NORMALISATIONS)
    if not isinstance(rule, PercentileRange):
        msg = (
            f"engine '{card.name}' restores images normalised by "
            f"'{card.normalisation['name']}', which has no way back to counts; "
            "export it with percentile_range"
        )
        raise EngineError(msg)
    return rule


def _build(card: EngineCard, section: str, rules: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Make the rule that a section of the card names."""
    given = dict(getattr(card, section))
    name = given.pop("name", None)
    if name not in rules:
        msg = (
            f"engine '{card.name}': {section}.name is '{name}', known are "
            f"{', '.join(rules)}; use a newer rtfocus or export the engine again"
        )
        raise EngineError(msg)
    try:
        return rules[name](**given)
    except (TypeError, ValueError) as error:
        msg = f"engine '{card.name}': {section} '{name}': {error}"
        raise EngineError(msg) from error
