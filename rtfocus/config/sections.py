"""Config sections: where frames come from, what is acquired, and what happens then.

First the microscope and the plan, then what happens to a frame between receive and
write.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.fields import FieldInfo

from rtfocus.channel import OpticalSystem


class Section(BaseModel):
    """A frozen part of the config; its docstrings are the reference."""

    model_config = ConfigDict(
        frozen=True, defer_build=True, extra="forbid", allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _plausible(cls, given: Any) -> Any:
        """Refuse what no key can mean, whatever else its own rule allows."""
        for name in given if isinstance(given, dict) else ():
            key = cls.model_fields.get(name)
            if key is not None and (why := _implausible(name, given[name], key)):
                raise ImplausibleError(name, given[name], why)
        return given


class ImplausibleError(ValueError):
    """A value that no key can have; says of itself which key and value."""

    def __init__(self, key: str, value: object, why: str) -> None:
        super().__init__(why)
        self.keys = (key,)
        self.value = value


_MOST = 1e12
"""Beyond any size, count or distance of a microscope."""
_MOST_S = 1e6
"""Eleven days; a Windows timer holds 24."""
_UNPRINTABLE = frozenset(map(chr, [*range(9), *range(11, 32), 127]))

Px = Annotated[int, Field(gt=0, le=1 << 14)]


def types_within(annotation: Any) -> set[object]:
    """Return every type within an annotation."""
    inner = get_args(annotation)
    return {annotation}.union(*map(types_within, inner)) if inner else {annotation}


def _implausible(name: str, value: object, key: FieldInfo) -> str | None:
    types = types_within(key.annotation)
    if isinstance(value, bool):
        if bool not in types and {int, float} & {*types, *map(type, types)}:
            return "a number is needed; YAML reads yes, no, on and off as none"
    elif isinstance(value, int | float) and name != "seed":
        most = _MOST_S if name.endswith("_s") else _MOST
        if abs(value) > most:
            return f"no more than {most:g} can be"
    elif isinstance(value, str):
        if not value and key.default != value:
            return "give a value, or leave the key out"
        if _UNPRINTABLE & set(value):
            return "no name or path has such characters; type it anew"
    return None


class SpecimenConfig(Section):
    """What the virtual microscope looks at."""

    kind: Literal["nuclei", "filaments", "tissue", "beads", "image", "stack"] = "nuclei"
    """A drawn specimen, any sharp ``image``, or a recorded z-``stack``."""
    path: Path | None = None
    """Image or stack file; required by kinds ``image`` and ``stack``."""
    z_step_um: PositiveFloat = 1.0
    """Distance between the planes of a recorded stack."""
    seed: NonNegativeInt = 1
    """Another number draws another specimen."""

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
    """How far the middle lies above the corners: a curved coverslip."""
    drift_um_per_min: float = 0.0
    """Speed at which the surface moves away from the objective."""
    drift_from_s: NonNegativeFloat = 0.0
    """When the drift begins, after the first exposure."""


class ZStageConfig(Section):
    """Faults of the z-stage: what autofocus has to live with."""

    backlash_um: NonNegativeFloat = 0.0
    """Distance lost when the stage turns; arriving upwards is exact."""
    reversed: bool = False
    """The stage runs opposite to what Micro-Manager was told: up is away."""


class VirtualMicroscopeConfig(Section):
    """Camera, z-stage and xy-stage that image a specimen through a PSF."""

    source: Literal["virtual"] = "virtual"
    """Chooses this microscope."""
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
    """True optics of this microscope; null: the channel's. Heights count from where
    their Strehl ratio is largest."""
    photons: PositiveFloat = 2000.0
    """Expected photons per pixel and 10 ms where the specimen is brightest."""
    background_photons: NonNegativeFloat = 20.0
    """Expected photons per pixel and 10 ms everywhere."""
    gain_e_per_count: PositiveFloat = 0.6
    """Photo-electrons per count."""
    offset_counts: NonNegativeFloat = 100.0
    """Camera offset in counts."""
    read_noise_e: NonNegativeFloat = 1.6
    """Standard deviation of the read noise in electrons."""
    noise: Literal["poisson", "pool", "none"] = "poisson"
    """``poisson``: exact; ``pool``: pre-drawn, fast, for rate tests; ``none``."""
    frames_per_s: PositiveFloat | None = None
    """Highest frame rate; null: as fast as exposure and computer allow."""
    seed: NonNegativeInt = 1
    """Another number draws other noise."""


class DemoCameraConfig(Section):
    """Micro-Manager's own DemoCamera with its demo configuration."""

    source: Literal["democamera"] = "democamera"
    """Chooses this microscope."""
    adapter_path: Path | None = None
    """Folder of the device adapters; null: those of package mm-test-adapters."""
    config_file: Path | None = None
    """Micro-Manager ``.cfg``; null: the demo's, ``MMConfig_demo.cfg``."""
    properties: dict[str, dict[str, str | int | float]] = {}
    """Device properties to set after loading: {device: {property: value}}."""
    pixel_size_um: PositiveFloat | None = None
    """Overrides the pixel size of the core, which is 0 when uncalibrated."""


class MicroManagerConfig(Section):
    """Your own microscope through its Micro-Manager configuration."""

    source: Literal["micromanager"]
    """Chooses this microscope."""
    config_file: Path
    """Your Micro-Manager ``.cfg``."""
    adapter_paths: list[Path] = []
    """Folders of the device adapters, usually the Micro-Manager folder."""
    properties: dict[str, dict[str, str | int | float]] = {}
    """Device properties to set after loading: {device: {property: value}}."""
    pixel_size_um: PositiveFloat | None = None
    """Overrides the pixel size of the core, which is 0 when uncalibrated."""
    sequence_buffer_mb: PositiveInt | None = None
    """Size of Micro-Manager's circular buffer; null: leave it as it is."""


class ReplayConfig(Section):
    """Recorded images, sent as if they were being acquired."""

    source: Literal["replay"]
    """Chooses this microscope."""
    path: Path
    """TIFF, OME-TIFF, PNG, OME-Zarr, or a folder of images, sent by name."""
    frames_per_s: PositiveFloat | None = None
    """Frame rate; null: as fast as the processor takes them."""
    repeats: PositiveInt = 1
    """How often to play the recording."""
    pixel_size_um: PositiveFloat | None = None
    """Overrides the pixel size stored with the images."""


MicroscopeConfig = Annotated[
    VirtualMicroscopeConfig | DemoCameraConfig | MicroManagerConfig | ReplayConfig,
    Field(discriminator="source"),
]


class LiveConfig(Section):
    """Free-running acquisition without a plan."""

    frames: PositiveInt | None = None
    """Stop after this many; null: at Ctrl-C."""
    exposure_ms: PositiveFloat | None = None
    """Exposure time; null: as the camera is set."""


class AcquisitionConfig(Section):
    """What to acquire: a useq plan, or free-running; a replay needs neither."""

    mda: dict[str, Any] | Path | None = None
    """useq ``MDASequence``: written here, or the path of a useq YAML/JSON file."""
    live: LiveConfig | None = None
    """Free-running camera instead of a plan."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "AcquisitionConfig":
        if self.mda is not None and self.live is not None:
            msg = "both 'mda' and 'live' are given; keep one"
            raise ValueError(msg)
        return self


class CameraConfig(Section):
    """Turns counts into a signal proportional to light; applied first."""

    offset_counts: NonNegativeFloat = 0.0
    """Counts in the dark; subtracted before anything else."""
    gain_e_per_count: PositiveFloat | None = None
    """Photo-electrons per count. Wiener finds the photon noise with it; null: it
    reads the noise from each frame alone."""
    flat_field: Path | None = None
    """Image of an evenly lit field. Frames are divided by it, scaled to mean 1."""
    saturation_counts: PositiveFloat | None = None
    """From here on a pixel is saturated; null: full scale of the bit depth."""


class RestorationConfig(Section):
    """How a frame is restored."""

    method: str = "wiener"
    """``wiener``, ``richardson_lucy``, ``richardson_lucy_accelerated``,
    ``richardson_lucy_tiles`` (patch by patch, as published), ``richardson_lucy_blind``
    (finds the kernel too), ``none``, or the name of a restorer or joint engine."""
    iterations: PositiveInt | None = None
    """Richardson-Lucy only; null: 15, accelerated 4, blind 8 rounds."""
    noise_to_signal: PositiveFloat | None = None
    """Wiener only: noise power by signal power; null: estimated per frame."""
    window: Literal["triangular", "rectangular"] = "triangular"
    """How tiles are blended (He 2020); ``rectangular`` shows seams, to compare."""
    halo_px: NonNegativeInt | None = None
    """Pixels around a tile; null: radius of 99 % of the PSF's energy, in tiles 13."""
    orientations: Literal[1, 2, 4, 8] = 1
    """Networks, on files: mean of this many turned and mirrored copies."""


def _listed(value: object) -> object:
    """Read one number as a list of one."""
    return [value] if isinstance(value, int | str) else value


def _distinct(numbers: list[int]) -> list[int]:
    if len(set(numbers)) < len(numbers):
        msg = f"a GPU is named twice in {numbers}; name each once"
        raise ValueError(msg)
    return numbers


class GpuConfig(Section):
    """How GPUs are used, if `ProcessingConfig.device` takes them."""

    index: Annotated[
        list[NonNegativeInt],
        BeforeValidator(_listed),
        AfterValidator(_distinct),
        Field(min_length=1),
    ] = [0]
    """Which GPU of the driver's list; several, as ``[0, 1]``, share the frames."""
    backend: Literal["auto", "tensorrt", "tensorrt_rtx", "torch-cuda"] = "auto"
    """What runs networks; ``auto``: the first available, in this order."""
    precision: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    """Weights file; ``auto``: fp16 if an engine has it, else fp32."""
    tf32: bool = True
    """false: fp32 networks keep all 23 bits; slower, for comparisons."""
    frames_in_flight: Annotated[int, Field(ge=1)] = 4
    """Frames in a GPU's memory at once: 3 or more overlap copies and compute."""
    on_lack_of_memory: Literal["fewer_frames", "error"] = "fewer_frames"
    """``fewer_frames``: start with fewer frames in flight and say so."""
    tiles_per_batch: Annotated[int, Field(ge=1)] | None = None
    """Most tiles a restorer's network sees at once; fewer take less memory. null: as
    many as the card's memory allows, or the frame as one tile."""
    cuda_graphs: bool = True
    """Replay recorded GPU work: less work for the CPU."""


class ProcessingConfig(Section):
    """Engines and how they run."""

    classifier: str | None = "delpnet"
    """Engine that finds the defocus; null: none does, and only a restorer that needs
    no defocus restores. A joint engine that is also the restoration method does both
    in one pass."""
    restoration: RestorationConfig = RestorationConfig()
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """``gpu``: an error if there is none; ``auto``: the GPU if it can, else the CPU."""
    backend: Literal["auto", "openvino", "onnxruntime"] = "auto"
    """What runs networks on the CPU; ``auto``: the first available, in this order."""
    precision: Literal["auto", "f32", "bf16", "fp16", "int8"] = "auto"
    """``f32``, ``bf16``: what the CPU computes in. ``fp16``, ``int8``: the weights
    file of that name, of engines that have it. ``auto``: the fastest of f32, bf16 and
    int8, measured at the first start; int8 only if it is exact."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Threads for networks and FFTs; null: one per core."""
    engine_folders: list[Path] = []
    """More folders with engines, searched before the shipped ones."""
    gpu: GpuConfig = GpuConfig()
    ignore_optics: bool = False
    """Run an engine outside the optics it was trained for."""
    blind: bool = False
    """Do not tell engines a channel's optics: no aberrations and, if they can do
    without, no sampling. Depths in um are still computed with them."""


class PreviewConfig(Section):
    """Newest frames and metrics for viewers; never slows the recording."""

    endpoint: str | None = "tcp://127.0.0.1:5573"
    """Where the processor publishes; null: nowhere."""
    max_side_px: PositiveInt = 1024
    """Longest side of a preview frame; larger frames are reduced."""
    interval_s: PositiveFloat = 0.2
    """Shortest time between two preview frames of a channel."""
    control: str | None = None
    """Where viewers may ask for autofocus, hold and stop; null: nowhere. Whoever
    reaches the preview can reach it, so it is off unless you set it."""


class TransportConfig(Section):
    """Sockets between the microscope side and the processor."""

    frames: str = "tcp://127.0.0.1:5571"
    """Address for frames; the microscope side binds it, the processor connects."""
    control: str = "tcp://127.0.0.1:5572"
    """Address for credit, receipts, estimates and requests; bound likewise."""
    pairing: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Word that both sides must share; null: made of config file and user (beyond
    this computer: of ``run.name``). Guards against mix-ups, not attackers."""
    preview: PreviewConfig = PreviewConfig()
    slots: Annotated[int, Field(ge=2)] = 32
    """Frames held per side; the microscope side keeps each until it is durable."""
    memory_mb: PositiveFloat = 2048
    """Most memory for the slots of a side; large frames get fewer slots."""
    stall_timeout_s: PositiveFloat = 10.0
    """A stall longer than this follows `on_stall`."""
    on_stall: Literal["wait", "raw_only", "abort"] = "wait"
    """``wait``; ``raw_only``: keep writing raw, restore later; ``abort``."""
    heartbeat_s: PositiveFloat = 0.5
    """Time between heartbeats; a side that is silent for 6 of them is lost."""
    connect_timeout_s: PositiveFloat = 30.0
    """How long either side waits for the other at the start."""
    shared_memory: Literal["auto", "off"] = "auto"
    """``auto``: on one machine pixels go through memory; ``off``: always by TCP."""
    max_frame_mb: PositiveFloat = 256
    """Larger messages are refused and disconnect their sender."""
    curve_keys: Path | None = None
    """Folder of ``rtfocus keys``; needed beyond this computer. Encrypts, so slower."""
    insecure: bool = False
    """Allow addresses beyond this computer without CURVE keys."""


class StoreConfig(Section):
    """The run folder ``NAME.rtfocus``."""

    raw: bool = True
    """Write ``raw.ome.zarr``."""
    restored: bool = True
    """Write ``restored.ome.zarr``."""
    restored_dtype: Literal["camera", "float32"] = "camera"
    """``camera``: clipped and rounded to the camera's pixel type."""
    chunk_px: PositiveInt = 512
    """Side of the inner chunks."""
    shard_frames: PositiveInt = 1
    """Frames (along t) per shard; frames become durable shard by shard."""
    codec: Literal["zstd", "blosc-zstd", "blosc-lz4", "none"] = "blosc-lz4"
    """Compression of the chunks."""
    codec_level: Annotated[int, Field(ge=0, le=22)] = 1
    """Compression level."""
    fsync: bool = False
    """Flush every frame to the disk itself: survives a power cut, but slower."""
    outstanding: PositiveInt = 8
    """Frames being written at once."""
    min_free_mb: NonNegativeFloat = 500
    """The run ends cleanly when less than this is left on the disk."""
    overwrite: bool = False
    """Replace a finished run folder of this name, unless it holds anything else."""


AlarmKind = Literal["focus", "disk", "frames", "end"]


class AlarmConfig(Section):
    """Who is called if focus or frames are lost, the disk fills up, or a run ends.

    A line says it in any case. What cannot be delivered is counted in the report and
    never hurts the run.
    """

    on: list[AlarmKind] = ["focus", "disk", "frames", "end"]
    """Kinds of alarm that are sent."""
    webhook: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """URL that gets a JSON message by POST, its ``text`` for people."""
    command: Annotated[list[str], Field(min_length=1)] | None = None
    """Program and its arguments, run without a shell. It gets the message as JSON on
    standard input, and as ``RTFOCUS_ALARM_TEXT``, ``..._KIND`` and ``..._RUN`` in its
    environment."""
    sound: bool = False
    """Ring the terminal's bell."""
    focus_lost_um: PositiveFloat | None = None
    """Distance beyond which focus is lost; null: three depths of field."""
    focus_lost_s: NonNegativeFloat = 10.0
    """How long every frame must be beyond it."""
    disk_full_min: NonNegativeFloat = 10.0
    """Alarm if the disk will be full in less than this, before the plan ends."""
    interval_s: NonNegativeFloat = 300.0
    """Shortest time between two alarms of one kind."""
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Longest time for one delivery."""
