"""Focus fit: optics found from planes at known z, and what the planes leave open."""

from dataclasses import dataclass, replace

import numpy as np

from rtfocus.channel import OpticalSystem

TOLERANCE_DB = 0.1
"""Sets of parameters that are worse by at most this count as equally good."""


@dataclass(frozen=True, slots=True)
class FocusTrial:
    """One set of parameters and how well it predicts the planes."""

    psnr_db: float
    """Of predicted against measured planes."""
    numerical_aperture: float
    """NA of the PSF."""
    spherical_waves: float
    """Zernike spherical W in waves."""
    focus_um: float
    """z of the stack at which the defocus is 0."""
    astigmatism_waves: float = 0.0
    """Vertical astigmatism in waves."""
    astigmatism_oblique_waves: float = 0.0
    """Oblique astigmatism in waves."""

    def optics(self, start: OpticalSystem) -> OpticalSystem:
        """Return `start` with the parameters of this trial."""
        aberrations = replace(
            start.aberrations,
            spherical_waves=self.spherical_waves,
            astigmatism_waves=self.astigmatism_waves,
            astigmatism_oblique_waves=self.astigmatism_oblique_waves,
        )
        return replace(
            start,
            numerical_aperture=self.numerical_aperture,
            aberrations=aberrations,
            psf_model="pupil",
            defocus_offset_um=0.0,
        )


@dataclass(frozen=True, slots=True)
class FocusFit:
    """The best PSF of a stack, and how far others are from being as good."""

    system: OpticalSystem
    """The fitted optics; their defocus is ``z - best.focus_um``."""
    best: FocusTrial
    """Parameters of the best fit."""
    explained: float
    """Share of the planes' variance that the fit predicts, 0 to 1."""
    profile: tuple[FocusTrial, ...]
    """The best fit of every NA tried, by NA."""
    sign_margin_db: float
    """PSNR that the best round fit with the other sign of W loses."""
    near: tuple[FocusTrial, ...]
    """All trials over all planes within `TOLERANCE_DB` of the best."""

    def spread(self, name: str) -> tuple[float, float]:
        """Return the smallest and largest value of a parameter among `near`."""
        values = [getattr(trial, name) for trial in self.near]
        return min(values), max(values)

    def statement(self) -> str:
        """Say in one paragraph what was found and what the stack cannot tell."""
        best = self.best
        ranges = ", ".join(
            "{} {:.3g} to {:.3g}".format(label, *self.spread(name))
            for label, name in (
                ("NA", "numerical_aperture"),
                ("W", "spherical_waves"),
                ("focus", "focus_um"),
            )
        )
        astigmatism = np.hypot(best.astigmatism_waves, best.astigmatism_oblique_waves)
        extra = f", astigmatism {astigmatism:.3f} waves" if astigmatism else ""
        sign = (
            f"The other sign of W is {self.sign_margin_db:.2f} dB worse"
            if self.sign_margin_db > TOLERANCE_DB
            else "The sign of W cannot be told"
        )
        return (
            f"focus at z {best.focus_um:.2f} um, NA {best.numerical_aperture:.3f}, "
            f"W {best.spherical_waves:.3f} waves{extra}; the fit predicts "
            f"{100 * self.explained:.1f} % of the variance (PSNR {best.psnr_db:.2f} "
            f"dB). Equally good within {TOLERANCE_DB:g} dB: {ranges}. {sign}; a stage "
            "whose z runs the other way turns W into -W."
        )
