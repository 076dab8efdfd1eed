"""Autofocus scenes: what a microscope of the benchmark shows, and how its stage is.

The image formation of the virtual microscope (`rtfocus.specimens`, `rtfocus.optics`)
run in process: one specimen, true optics that differ from those that are told, noise,
and a stage that may misbehave.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.appearance import amplitude_spectrum, sharpness
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import ZStageConfig
from rtfocus.microscope.virtual_devices import ZDrive
from rtfocus.optics.formation import BlurredPlanes, CameraModel
from rtfocus.specimens import draw_specimen

Image = NDArray[np.float32]
DARK, GAIN_E = 100.0, 0.6
FULL_WELL_E = (65_535 - DARK) * GAIN_E


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
    drift_um: float = 0.0
    """How far focus has gone from one image to the next."""
    flicker: float = 0.0
    """Light of an image is off by up to this share."""
    glides_px: int = 0
    """How far the specimen has gone sideways from one image to the next."""
    tilt_um: float = 0.0
    """Rise of the field from its left to its right edge; its middle stays."""
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
        if self.images:
            self.focus_um += self.drift_um
        defocus = self.direction * (self.focus_um - z_um)
        rise = np.linspace(-self.tilt_um / 2, self.tilt_um / 2, self.sharp.shape[1])
        light = self.planes().at(
            np.broadcast_to(np.float32(defocus) + rise, self.sharp.shape)
        )
        if self.glides_px:
            # Half of a field that is twice as wide is seen.
            light = np.roll(light, -self.glides_px * self.images, axis=1)
            light = light[:, : light.shape[1] // 2]
        light = light * np.float32(self.bleach**self.images)
        light = light * np.float32(1 + self.rng.uniform(-1, 1) * self.flicker)
        if self.dust is not None:
            light = light * self.dust
        self.images += 1
        return self.camera.expose(np.clip(light, 0, None), self.rng)


@dataclass
class Stage:
    """A z-stage; `fault` turns a command into what it does."""

    z_um: float
    fault: str = "none"
    """``none``, or one of `STAGE_FAULTS`."""
    amount: float = 0.0
    """Of the fault, see `STAGE_FAULTS`."""
    rng: np.random.Generator | None = None
    commands: list[float] = field(default_factory=list)
    rests_um: float = field(init=False)
    """Where it truly comes to stand when nothing moves it any more."""

    def __post_init__(self) -> None:
        """Begin where it stands."""
        self._told = self._began = self.rests_um = self.z_um
        self._waits = 0.0
        play_um = self.amount if self.fault == "backlash" else 0.0
        faults = ZStageConfig(backlash_um=play_um, reversed=self.fault == "reversed")
        self._drive = ZDrive(faults)

    def position_um(self) -> float:
        """Return what the stage says."""
        return self._told

    def go_to(self, z_um: float) -> None:
        """Move, more or less; one that arrived late before is there by now."""
        self.commands.append(z_um)
        if self.fault not in ("delayed", "settles"):
            self.z_um = self.rests_um
        before, self._told = self.z_um, z_um
        self._drive.go_to(z_um - self._began)
        self.rests_um = self._began + self._drive.objective_um
        if self.fault == "stuck" or (
            self.fault == "sticks" and len(self.commands) > self.amount
        ):
            self.rests_um = before
        elif self.fault == "noisy":
            assert self.rng is not None
            self.rests_um += float(self.rng.normal(0, self.amount))
        way = self.rests_um - before
        left = {"late": 1.0, "delayed": 1.0, "settles": 1.0, "slow": self.amount}
        is_far = self.fault == "late_afar" and abs(way) > self.amount
        self.z_um = self.rests_um - left.get(self.fault, float(is_far)) * way
        self._waits = self.amount if self.fault in ("late", "delayed") else 1.0
        if self.fault == "creeps":
            self.rests_um -= min(max(way, -self.amount), self.amount)

    def seen_um(self) -> float:
        """Return where it truly stands for the next image; then it moves on."""
        if self.fault == "settles":
            # The middle of an exposure and its end.
            way, times = self.z_um - self.rests_um, np.array([0.5, 1.0]) / self.amount
            found, self.z_um = self.rests_um + way * np.exp(-times)
            return float(found)
        found, self._waits = self.z_um, self._waits - 1.0
        if self._waits <= 0:
            self.z_um = self.rests_um
        return found


STAGE_FAULTS = {
    "stuck": 0.0,
    "sticks": 5.0,
    "reversed": 0.0,
    "late": 1.0,
    "late_afar": 2.0,
    "delayed": 1.0,
    "settles": 1.0,
    "slow": 0.3,
    "creeps": 0.3,
    "noisy": 0.2,
    "backlash": 0.3,
}
"""What a stage may do wrong, and how much unless said otherwise.

Stands still from the first move on, or from the one after so many; runs the other way;
arrives when so many images were taken or with the next command, always or on ways
longer than so many depths of field; begins to move when so many images were taken;
settles with so many exposures as its time constant; has this share of the way to go;
creeps back so far after the image, in depths of field as the two others: misses by this
deviation; has so much play.
"""
SCENE_FAULTS = {
    "blank": 0.0,
    "saturated": 6e5,
    "half_saturated": 0.01,
    "bleaching": 0.85,
    "dust": 0.5,
    "drift": 0.1,
    "flicker": 0.3,
    "glides": 16.0,
    "beyond": 15.0,
}
"""What images may lack, and how much unless said otherwise.

Detail; light below saturation, by photons or by the share of pixels that saturate in
focus; the light that is left after each image; a clean chip, by the shadows' share;
rest: depths of field from one image to the next, the share that the lamp is off, pixels
sideways; nearness: depths of field.
"""
CASES = ("none", *STAGE_FAULTS, *SCENE_FAULTS)


def spoiled(
    case: str, scene: Scene, stage: Stage, unit_um: float, amount: float | None
) -> Stage:
    """Make a run one of `CASES`: spoil its scene, or return another stage.

    `amount` as told there; None: the usual one.
    """
    much = (STAGE_FAULTS | SCENE_FAULTS).get(case, 0.0) if amount is None else amount
    if case in STAGE_FAULTS:
        if case in ("creeps", "noisy", "backlash", "late_afar"):
            much *= unit_um
        return Stage(stage.z_um, case, much, scene.rng.spawn(1)[0])
    _spoil_light(case, scene, much)
    if case == "drift":
        scene.drift_um = much * unit_um * float(scene.rng.choice([-1, 1]))
    elif case == "glides":
        scene.sharp = np.concatenate([scene.sharp, scene.sharp[:, ::-1]], axis=1)
        scene.glides_px = round(much)
    elif case == "beyond":
        side = np.sign(scene.focus_um - stage.z_um)
        scene.focus_um += float(side) * much * unit_um
    return stage


def _spoil_light(case: str, scene: Scene, much: float) -> None:
    if case == "blank":
        scene.sharp = np.full_like(scene.sharp, 0.02)
    elif case == "saturated":
        scene.camera = camera(much)
    elif case == "half_saturated":
        light = float(np.quantile(scene.planes().at(0.0), 1 - much))
        scene.camera = camera(FULL_WELL_E / light)
    elif case == "bleaching":
        scene.bleach = much
    elif case == "dust":
        shadow = draw_specimen("beads", scene.sharp.shape, np.random.default_rng(3))
        scene.dust = 1.0 - much * shadow / max(float(shadow.max()), 1e-6)
    elif case == "flicker":
        scene.flicker = much


def camera(photons: float = 2000.0) -> CameraModel:
    """Return an sCMOS camera of 16 bits."""
    return CameraModel(
        photons=photons,
        gain_e_per_count=GAIN_E,
        offset_counts=DARK,
        read_noise_e=1.6,
        bit_depth=16,
    )


REFERENCE = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.2)
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
