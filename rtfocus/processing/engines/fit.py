"""Fit: does an engine suit the configured optics, and what do its levels mean there."""

from rtfocus.channel import OpticalSystem
from rtfocus.errors import EngineError
from rtfocus.processing.engines.card import EngineCard, LevelsCard, OpticsCard


def why_unfit(card: EngineCard, optics: OpticalSystem) -> str | None:
    """Return why an engine was not trained for these optics; None: it was."""
    if card.optics is None:
        return None
    lowest, highest = card.optics.sampling_min, card.optics.sampling_max
    if lowest <= optics.sampling <= highest:
        return None
    return (
        f"engine '{card.name}' was trained for pixels of {lowest:g} to {highest:g} "
        f"lambda/NA, but {optics.pixel_size_um:g} um at NA "
        f"{optics.numerical_aperture:g} and {optics.wavelength_nm:g} nm are "
        f"{optics.sampling:.3g}"
    )


def check_fit(card: EngineCard, optics: OpticalSystem, *, ignore: bool) -> None:
    """Refuse an engine outside the optics it was trained for.

    Raises
    ------
    EngineError
        Names both ranges and the remedies, unless `ignore`.
    """
    why = why_unfit(card, optics)
    if why is not None and not ignore:
        msg = (
            f"{why}; train one for these optics (rtfocus train RECIPE --optics OPTICS "
            "--images FOLDER) or run it anyway with processing.ignore_optics: true"
        )
        raise EngineError(msg)


def step_um(card: EngineCard, optics: OpticalSystem) -> float:
    """Return the defocus between two levels in the configured optics.

    A network sees defocus in units of n lambda / NA^2: the same blur stands for
    more micrometres at a smaller aperture.
    """
    levels, reference = parts(card)
    return levels.step_um * optics.defocus_unit_um / reference.reference.defocus_unit_um


def parts(card: EngineCard) -> tuple[LevelsCard, OpticsCard]:
    """Return the sections every classifier has; EngineError for other kinds."""
    if card.levels is None or card.optics is None:
        msg = f"engine '{card.name}' is a {card.kind}: it has no defocus levels"
        raise EngineError(msg)
    return card.levels, card.optics
