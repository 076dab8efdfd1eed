"""Focus fit: planes of one specimen at known z, and the optics found from them.

Gain and offset are free in each plane, so bleaching and a light sheet do no harm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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


Image = NDArray[np.float32]
Floats = NDArray[np.float64]


class PlaneModel(Protocol):
    """Planes as they were measured, and as any optics would show them."""

    @property
    def measured(self) -> Image:
        """The planes, axes (plane, y, x), cut to the pixels that are compared."""
        ...

    @property
    def z_um(self) -> Floats:
        """Their z; larger = specimen farther from the objective."""
        ...

    @property
    def sharpest_um(self) -> float:
        """Where they look sharpest; the focus is searched around it."""
        ...

    def predict(
        self, system: OpticalSystem, focus_um: float, planes: Sequence[int]
    ) -> Image:
        """Return some planes as seen by optics focused at `focus_um`.

        Their gains and offsets are arbitrary.
        """
        ...


def match_planes(predicted: Image, measured: Image) -> Image:
    """Return the predicted planes with the gain and offset of the measured ones."""
    result = np.empty_like(measured)
    for index, (first, second) in enumerate(zip(predicted, measured, strict=True)):
        centred = first - first.mean()
        gain = np.vdot(centred, second) / max(float(np.vdot(centred, centred)), 1e-30)
        result[index] = gain * centred + second.mean()
    return result


def unexplained(predicted: Image, measured: Image) -> tuple[float, float]:
    """Return the mean squared error after gain and offset, and the variance."""
    first = predicted - predicted.mean()
    second = measured - measured.mean()
    power = max(float(np.vdot(first, first)), 1e-30)
    total = float(np.vdot(second, second))
    # A negative gain would turn contrast round, which no defocus blur does here.
    shared = max(float(np.vdot(first, second)), 0.0) ** 2 / power
    return (total - shared) / measured.size, total / measured.size
