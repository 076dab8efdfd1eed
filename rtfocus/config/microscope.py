"""Microscope config: where frames come from and what is acquired."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rtfocus.channel import OpticalSystem
from rtfocus.config.form import Section

Px = Annotated[int, Field(gt=0)]


class SpecimenConfig(Section):
    """What the virtual microscope looks at."""

    kind: Literal["nuclei", "filaments", "tissue", "beads", "image", "stack"] = "nuclei"
    """Procedural specimen, any sharp ``image``, or a recorded z-``stack``."""
    path: Path | None = None
    """Image or stack file; required by kinds ``image`` and ``stack``."""
    z_step_um: Annotated[float, Field(gt=0)] = 1.0
    """Distance of the planes of a recorded stack."""
    seed: int = 1
    """Of the procedural specimen."""

    @model_validator(mode="after")
    def _path_given(self) -> "SpecimenConfig":
        if self.kind in ("image", "stack") and self.path is None:
            msg = f"kind '{self.kind}' needs 'path': the image file to show"
            raise ValueError(msg)
        return self


class SurfaceConfig(Section):
    """Height of the specimen's surface: where focus lies at each xy."""

    z_um: float = 0.0
    """Height in the middle of the field."""
    tilt_x_um: float = 0.0
    """Rise from the left to the right edge of the field."""
    tilt_y_um: float = 0.0
    """Rise from the upper to the lower edge of the field."""
    bow_um: float = 0.0
    """Height of the middle over the corners: a curved coverslip."""
    drift_um_per_min: float = 0.0
    """Speed at which the surface moves away from the objective."""
    drift_from_s: Annotated[float, Field(ge=0)] = 0.0
    """When the drift begins, after the first exposure."""


class ZStageConfig(Section):
    """Faults of the z-stage: what autofocus has to live with."""

    backlash_um: Annotated[float, Field(ge=0)] = 0.0
    """Way that is lost where the stage turns; arriving upwards is exact."""
    reversed: bool = False
    """The stage runs against what it tells Micro-Manager: up is away."""


class VirtualMicroscopeConfig(Section):
    """Camera, z-stage and xy-stage that image a specimen through a PSF."""

    source: Literal["virtual"] = "virtual"
    """Which microscope: this one."""
    height_px: Px = 512
    """Rows of a frame."""
    width_px: Px = 512
    """Columns of a frame."""
    bit_depth: Literal[8, 12, 16] = 12
    """Significant bits of a pixel."""
    rgb: bool = False
    """Colour camera: frames are (y, x, 3)."""
    specimen: SpecimenConfig = SpecimenConfig()
    surface: SurfaceConfig = SurfaceConfig()
    z_stage: ZStageConfig = ZStageConfig()
    optics: OpticalSystem | None = None
    """True optics of this microscope; default: the channel's."""
    photons: Annotated[float, Field(gt=0)] = 2000.0
    """Expected photons per pixel and 10 ms where the specimen is brightest."""
    background_photons: Annotated[float, Field(ge=0)] = 20.0
    """Expected photons per pixel and 10 ms everywhere."""
    gain_e_per_count: Annotated[float, Field(gt=0)] = 0.6
    """Photo-electrons per count."""
    offset_counts: Annotated[float, Field(ge=0)] = 100.0
    """Camera offset in counts."""
    read_noise_e: Annotated[float, Field(ge=0)] = 1.6
    """Standard deviation of the read noise in electrons."""
    noise: Literal["poisson", "pool", "none"] = "poisson"
    """``poisson``: exact; ``pool``: pre-drawn, fast, for rate tests; ``none``."""
    frames_per_s: Annotated[float, Field(gt=0)] | None = None
    """Highest frame rate; None: as fast as exposure and computing allow."""
    seed: int = 1
    """Of the noise."""


class DemoCameraConfig(Section):
    """Micro-Manager's own DemoCamera with its demo configuration."""

    source: Literal["democamera"] = "democamera"
    """Which microscope: this one."""
    adapter_path: Path | None = None
    """Folder of the device adapters; None: those of package mm-test-adapters."""
    config_file: Path | None = None
    """Micro-Manager ``.cfg``; None: the demo's, ``MMConfig_demo.cfg``."""
    properties: dict[str, dict[str, str | int | float]] = {}
    """Device properties to set after loading: {device: {property: value}}."""
    pixel_size_um: Annotated[float, Field(gt=0)] | None = None
    """Overrides the pixel size of the core, which is 0 when uncalibrated."""


class MicroManagerConfig(Section):
    """Your own microscope through its Micro-Manager configuration."""

    source: Literal["micromanager"]
    """Which microscope: this one."""
    config_file: Path
    """Your Micro-Manager ``.cfg``."""
    adapter_paths: list[Path] = []
    """Folders of the device adapters, usually the Micro-Manager folder."""
    properties: dict[str, dict[str, str | int | float]] = {}
    """Device properties to set after loading: {device: {property: value}}."""
    pixel_size_um: Annotated[float, Field(gt=0)] | None = None
    """Overrides the pixel size of the core, which is 0 when uncalibrated."""
    sequence_buffer_mb: Annotated[int, Field(gt=0)] | None = None
    """Size of Micro-Manager's circular buffer; None: leave as it is."""


class ReplayConfig(Section):
    """Recorded images, sent as if they were being acquired."""

    source: Literal["replay"]
    """Which microscope: this one."""
    path: Path
    """TIFF, OME-TIFF, PNG, OME-Zarr or a folder of images in name order."""
    frames_per_s: Annotated[float, Field(gt=0)] | None = None
    """Rate; None: as fast as the processor takes them."""
    repeats: Annotated[int, Field(gt=0)] = 1
    """How often to play the recording."""
    pixel_size_um: Annotated[float, Field(gt=0)] | None = None
    """Overrides the pixel size stored with the images."""


MicroscopeConfig = Annotated[
    VirtualMicroscopeConfig | DemoCameraConfig | MicroManagerConfig | ReplayConfig,
    Field(discriminator="source"),
]


class LiveConfig(Section):
    """Free-running acquisition without a plan."""

    frames: Annotated[int, Field(gt=0)] | None = None
    """Stop after so many; None: until Ctrl-C."""
    exposure_ms: Annotated[float, Field(gt=0)] | None = None
    """None: as the camera is set."""


class AcquisitionConfig(Section):
    """What to acquire: a useq plan or live mode; replay needs neither."""

    mda: dict[str, Any] | Path | None = None
    """useq ``MDASequence``: written here, or the path of a useq YAML/JSON file."""
    live: LiveConfig | None = None
    """Free-running mode instead of a plan."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "AcquisitionConfig":
        if self.mda is not None and self.live is not None:
            msg = "both 'mda' and 'live' are given; keep one"
            raise ValueError(msg)
        return self
