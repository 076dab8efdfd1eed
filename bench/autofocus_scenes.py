"""Autofocus scenes: what a microscope of the benchmark shows, and how its stage is.

The image formation of the virtual microscope (`rtfocus.specimens`, `rtfocus.optics`)
run in process: one specimen, true optics that differ from those that are told, noise,
and a stage that may misbehave.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.appearance import amplitude_spectrum, sharpness
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import ZStageConfig
from rtfocus.microscope.virtual_devices import ZDrive
from rtfocus.optics.formation import BlurredPlanes, CameraModel

Image = NDArray[np.float32]
DARK = 100.0


@dataclass
class Scene:
    """One field of view under true optics."""

    sharp: Image
    optics: OpticalSystem
    camera: CameraModel
    rng: np.random.Generator
    focus_um: float = 0.0
    direction: int = 1
    bleach: float = 1.0
    """Share of the light that is left after each image."""
    dust: Image | None = None
    """Sharp at every z; shadows on the chip."""
    keep_focus: bool = False
    """In focus the drawing itself is seen, unblurred: a spike no microscope has."""
    images: int = 0
    _planes: BlurredPlanes | None = None

    def sharpest(self) -> float:
        """Return the defocus, in um, at which the true image is sharpest, noise-free.

        With spherical aberration it lies beside the paraxial focus, differently so by
        specimen: fine detail and coarse detail have planes of their own.
        """
        unit = self.optics.defocus_unit_um
        defocus = np.arange(-24, 25) * unit / 8
        spectra = [amplitude_spectrum(self.planes().at(float(z)))[0] for z in defocus]
        return float(defocus[int(np.argmax([sharpness(one) for one in spectra]))])

    def planes(self) -> BlurredPlanes:
        """Return the field at every defocus, without noise."""
        if self._planes is None:
            self._planes = BlurredPlanes(
                self.sharp,
                self.optics,
                step_um=self.optics.defocus_unit_um / 8,
                keep_focus=self.keep_focus,
                capacity=16,
            )
        return self._planes

    def expose(self, z_um: float) -> NDArray[np.generic]:
        """Photograph the field from a stage z."""
        defocus = self.direction * (self.focus_um - z_um)
        light = self.planes().at(np.full(self.sharp.shape, defocus, np.float32))
        light = light * np.float32(self.bleach**self.images)
        if self.dust is not None:
            light = light * self.dust
        self.images += 1
        return self.camera.expose(np.clip(light, 0, None), self.rng)


@dataclass
class Stage:
    """A z-stage; `fault` turns a command into what it does."""

    z_um: float
    fault: str = "none"
    """``none``, ``stuck``, ``reversed`` or ``late``: arrives at the next command."""
    backlash_um: float = 0.0
    commands: list[float] | None = None
    _told: float = 0.0
    _waiting: float | None = None
    _drive: ZDrive | None = None

    def __post_init__(self) -> None:
        """Begin where it stands."""
        self._told = self._began = self.z_um
        self.commands = []

    def position_um(self) -> float:
        """Return what the stage says."""
        return self._told

    def go_to(self, z_um: float) -> None:
        """Move, more or less."""
        assert self.commands is not None
        self.commands.append(z_um)
        self._told = z_um
        if self.fault == "stuck":
            return
        if self.fault == "late":
            self._waiting = z_um
            return
        if self._drive is None:
            faults = ZStageConfig(
                backlash_um=self.backlash_um, reversed=self.fault == "reversed"
            )
            self._drive = ZDrive(faults)
        self._drive.go_to(z_um - self._began)
        self.z_um = self._began + self._drive.objective_um

    def seen_um(self) -> float:
        """Return where it truly stands for the next image."""
        found = self.z_um
        if self._waiting is not None:
            # The image is taken on the way; afterwards it has arrived.
            self.z_um, self._waiting = self._waiting, None
        return found


def camera(photons: float = 2000.0) -> CameraModel:
    """Return an sCMOS camera of 16 bits."""
    return CameraModel(
        photons=photons,
        gain_e_per_count=0.6,
        offset_counts=DARK,
        read_noise_e=1.6,
        bit_depth=16,
    )


REFERENCE = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)


def drawn_optics(rng: np.random.Generator, *, even: bool) -> OpticalSystem:
    """Draw the optics that are told: inside and a little outside of the training's."""
    aperture = float(rng.uniform(0.30, 0.60))
    wavelength = float(rng.uniform(430.0, 680.0))
    sampling = float(rng.uniform(0.38, 0.76))
    told = OpticalSystem(
        round(aperture, 3),
        round(wavelength),
        round(sampling * wavelength * 1e-3 / aperture, 3),
    )
    if even:
        return replace(told, psf_model="born_wolf")
    waves = float(rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 0.5))
    return replace(told, aberrations=Aberrations(spherical_waves=round(waves, 2)))


def true_optics(told: OpticalSystem, rng: np.random.Generator) -> OpticalSystem:
    """Return what the microscope truly has: NA within 5 %, aberrations a little off."""
    aperture = told.numerical_aperture * float(rng.uniform(0.95, 1.05))
    if told.psf_model == "born_wolf":
        return replace(told, numerical_aperture=aperture)
    spherical = told.aberrations.spherical_waves + float(rng.uniform(-0.1, 0.1))
    given = Aberrations(
        spherical_waves=spherical,
        astigmatism_waves=float(rng.uniform(-0.05, 0.05)),
        coma_x_waves=float(rng.uniform(-0.05, 0.05)),
    )
    return replace(told, numerical_aperture=aperture, aberrations=given)


Look = Callable[[float], NDArray[np.generic]]
