"""Channel: what is known about the light that made a frame.

The one definition of a microscope's optics. A YAML config is validated into it,
the wire protocol carries it and `rtfocus.optics` computes PSFs from it, so that
no two parts can disagree on a unit or a sign.

Sign convention, stated once for the whole project: **positive** ``defocus_um``
= the specimen plane is too far from the objective, negative = too near.
"""

import operator
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from rtfocus.errors import OpticsError

# Bounds are wide: they keep out what no microscope has and no computer can compute.
Waves = Annotated[float, Field(ge=-100, le=100)]
Micrometres = Annotated[float, Field(ge=-1e5, le=1e5)]

PIXEL_SIZE_TOLERANCE = 0.01
"""Relative difference of two pixel sizes that is rounding and no contradiction:
optics, core and files may state one size with different numbers of digits."""

FOCUS_LOST_UNITS = 3.0
"""Depths of field (`OpticalSystem.defocus_unit_um`) beyond which focus is lost."""

_SAID = {"gt": "above", "ge": "at least", "le": "at most"}


@dataclass(frozen=True, slots=True)
class Aberrations:
    """Zernike aberrations of the pupil; coefficients in waves, Noll-free names."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    spherical_waves: Waves = 0.0
    """Primary spherical, 6 r^4 - 6 r^2 + 1; non-zero makes the PSF uneven in z."""
    astigmatism_waves: Waves = 0.0
    """Vertical astigmatism, r^2 cos(2 t)."""
    astigmatism_oblique_waves: Waves = 0.0
    """Oblique astigmatism, r^2 sin(2 t)."""
    coma_x_waves: Waves = 0.0
    """Coma along x, (3 r^3 - 2 r) cos(t)."""
    coma_y_waves: Waves = 0.0
    """Coma along y, (3 r^3 - 2 r) sin(t)."""

    def __post_init__(self) -> None:
        """Refuse coefficients that no pupil has."""
        _refuse_impossible(self)


@dataclass(frozen=True, slots=True)
class OpticalSystem:
    """Objective, emission light and sampling of one channel.

    Raises
    ------
    OpticsError
        If a value is no number, or none that a microscope has.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    numerical_aperture: Annotated[float, Field(gt=0, le=2)]
    """NA of the objective; must stay below the refractive index."""
    wavelength_nm: Annotated[float, Field(ge=10, le=1e6)]
    """Emission (fluorescence) or illumination (brightfield) wavelength in vacuum."""
    pixel_size_um: Annotated[float, Field(ge=1e-3, le=1e3)]
    """Pixel size in the specimen plane, binning included."""
    refractive_index: Annotated[float, Field(gt=0, le=5)] = 1.0
    """Of the immersion: 1.0 air, 1.33 water, 1.518 oil."""
    psf_model: Literal["pupil", "born_wolf"] = "pupil"
    """``born_wolf``: He 2020 eq. 2, even in z. ``pupil``: exact phase, aberrations."""
    aberrations: Aberrations = field(default_factory=Aberrations)
    """Only the pupil model uses them."""
    apodisation: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Gaussian pupil: amplitude exp(-apodisation * r^2); 0 = uniform pupil."""
    defocus_offset_um: Micrometres = 0.0
    """Added to every nominal defocus before a PSF is computed (calibration)."""

    def __post_init__(self) -> None:
        """Refuse values that no microscope has, each and together."""
        _refuse_impossible(self)
        if self.psf_model not in (models := ("pupil", "born_wolf")):
            msg = f"psf_model={self.psf_model!r:.60} is none of {', '.join(models)}"
            raise OpticsError(msg)
        given: object = self.aberrations
        if not isinstance(given, Aberrations):
            kind = type(given).__name__
            msg = f"aberrations are of type {kind}; give rtfocus.channel.Aberrations"
            raise OpticsError(msg)
        if self.numerical_aperture >= self.refractive_index:
            msg = (
                f"numerical_aperture={self.numerical_aperture} is not below "
                f"refractive_index={self.refractive_index}; set the refractive "
                "index of the immersion medium (water 1.33, oil 1.518)"
            )
            raise OpticsError(msg)

    @property
    def defocus_unit_um(self) -> float:
        """Defocus in um that makes one wave of paraxial defocus: n lambda / NA^2."""
        return (
            self.refractive_index
            * self.wavelength_nm
            * 1e-3
            / self.numerical_aperture**2
        )

    def with_pupil(
        self,
        numerical_aperture: float,
        spherical_waves: float,
        astigmatism: tuple[float, float] = (0.0, 0.0),
    ) -> "OpticalSystem":
        """Return the same optics with another NA and other aberrations, in waves."""
        aberrations = replace(
            self.aberrations,
            spherical_waves=spherical_waves,
            astigmatism_waves=astigmatism[0],
            astigmatism_oblique_waves=astigmatism[1],
        )
        return replace(
            self, numerical_aperture=numerical_aperture, aberrations=aberrations
        )

    def has_pixels_of(self, size_um: float) -> bool:
        """Tell whether a stated pixel size is, up to rounding, that of these optics."""
        return abs(self.pixel_size_um / size_um - 1.0) <= PIXEL_SIZE_TOLERANCE

    @property
    def sampling(self) -> float:
        """Pixel size in units of lambda / NA; 0.25 is Nyquist for intensity."""
        return (
            self.pixel_size_um * self.numerical_aperture / (self.wavelength_nm * 1e-3)
        )


@dataclass(frozen=True, slots=True)
class Channel:
    """One fluorescence or brightfield channel by its Micro-Manager preset name."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    """Preset name, e.g. ``DAPI``; ``default`` where there is only one."""
    optics: OpticalSystem | None = None
    """null: unknown; frames are recorded but not restored."""


def _refuse_impossible(given: Aberrations | OpticalSystem) -> None:
    """Hold the bounds that the annotations state; keep plain numbers."""
    for part in fields(given):
        if (stated := getattr(part.type, "__metadata__", None)) is None:
            continue
        value = getattr(given, part.name)
        if isinstance(value, bool) or not isinstance(value, Real):
            kind = type(value).__name__
            msg = f"{part.name}={value!r:.60} is of type {kind}; give a number"
            raise OpticsError(msg)
        for bound in stated[0].metadata:
            ((word, limit),) = asdict(bound).items()
            if not getattr(operator, word)(value, limit):
                msg = f"{part.name}={value} must be {_SAID[word]} {limit:g}"
                raise OpticsError(msg)
        object.__setattr__(given, part.name, float(value))
