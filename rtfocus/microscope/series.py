"""Series: what is known of a series before its first frame.

What pymmcore-plus says of a run travels in small JSON form. What it only logs although
a frame may be wrong counts too: a stage or channel that cannot be set is a log line
there and the run goes on. The lines are collected for the report, so that users need
not read a log to learn it.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
import useq
from pymmcore_plus.experimental.unicore import UniMMCore
from pymmcore_plus.metadata.serialize import to_builtins

from rtfocus.channel import Channel
from rtfocus.config import Config
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.frame import PROTOCOL_VERSION, Position, SeriesStart
from rtfocus.machine import RUN_CLOCK
from rtfocus.microscope.delivery import LOGGER, pixel_size_change
from rtfocus.microscope.plan import AcquisitionPlan, sequence_json
from rtfocus.microscope.sequence import refuse_too_many
from rtfocus.microscope.virtual_devices import BIT_DEPTH


def summary_json(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a ``SummaryMetaV1`` as JSON, without the plan: it has its own field."""
    values = {k: v for k, v in (summary or {}).items() if k != "mda_sequence"}
    return dict(to_builtins(values))


_MOST_KINDS = 20
# Said at every cancellation, which the report states anyway.
_NO_COMPLAINT = "MDA Canceled"
# Begins what is said of a channel, stage, exposure or property that is not set.
_FAILED_SETTING = "Failed to set "
# pymmcore-plus' thread that takes the images of a camera written in Python.
_CAMERA_THREAD = "AcquisitionThread"


def warn_of_silent_stage(core: UniMMCore) -> None:
    """Say that images have no z, as `Complaints` hears it."""
    logging.getLogger(LOGGER).warning(
        "z-stage '%s' does not say where it stands: its images are stored without "
        "their z; check its connection",
        core.getFocusDevice(),
    )


def _is_complaint(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_COMPLAINT)


class Complaints(logging.Handler):
    """Distinct warnings with their counts, at most `_MOST_KINDS` of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._counts: Counter[str] = Counter()
        self.fault: str | None = None
        """What a camera written in Python died of during a hardware sequence; its
        thread tells nothing else."""
        self.failed_settings = 0
        """How often a device did not take what an event sets."""
        self.first_failed: str | None = None
        """What was said of the first of them."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The warnings in the order of their first appearance."""
        return tuple(
            text if count == 1 else f"{text} ({count} times)"
            for text, count in self._counts.items()
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Note one warning."""
        text = " ".join(record.getMessage().split())
        if text.startswith(_FAILED_SETTING):
            self.failed_settings += 1
            self.first_failed = self.first_failed or text
        if _is_complaint(record):
            self._note(text)

    def _note(self, text: str) -> None:
        if text in self._counts or len(self._counts) < _MOST_KINDS:
            self._counts[text] += 1
        else:
            self._counts["further warnings"] += 1

    @contextmanager
    def heard(self, *, alone: bool = True) -> Iterator[None]:
        """Listen while the block runs; `alone`: the terminal gets no lines meanwhile.

        The logger also leaves out its line per MDA event then, which costs
        as much as the event itself, and the whole plan that a cancellation repeats.
        """
        logger = logging.getLogger(LOGGER)
        level = logger.level
        terminals = [
            (handler, handler.level)
            for handler in logger.handlers
            if alone and type(handler) is logging.StreamHandler
        ]
        logger.addHandler(self)
        if alone:
            logger.setLevel(logging.WARNING)
            logger.addFilter(_is_complaint)
        for handler, _ in terminals:
            handler.setLevel(logging.CRITICAL)
        hook, threading.excepthook = threading.excepthook, self._note_thread
        self._next_hook = hook
        try:
            yield
        finally:
            threading.excepthook = hook
            logger.removeHandler(self)
            logger.removeFilter(_is_complaint)
            logger.setLevel(level)
            for handler, before in terminals:
                handler.setLevel(before)

    def _note_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Note what a sequence of images died of; pass on everything else."""
        if type(failed.thread).__name__ != _CAMERA_THREAD:
            self._next_hook(failed)
            return
        self.fault = " ".join(str(failed.exc_value).split())
        self._note(self.fault)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What must stay as it is within a series."""

    shape: tuple[int, ...]
    dtype: str
    bit_depth: int
    roi: tuple[int, ...]
    """x, y, width, height on the chip."""
    pixel_size_um: float
    """Of the objective that the core knows of, binning included; 0: not calibrated."""

    def change(self, now: "Geometry") -> str | None:
        """Name what differs; None when nothing does."""
        for name in ("shape", "dtype", "bit_depth", "roi"):
            before, after = getattr(self, name), getattr(now, name)
            if before != after:
                return f"camera {name} changed from {before} to {after}"
        return pixel_size_change(self.pixel_size_um, now.pixel_size_um)

    def __str__(self) -> str:
        height, width, *colours = self.shape
        colour = " RGB" if colours else ""
        x, y = self.roi[:2]
        return (
            f"{width} x {height} px from ({x}, {y}), {self.dtype}{colour}, "
            f"{self.bit_depth} bit"
        )


def camera_geometry(core: UniMMCore) -> Geometry:
    """Ask the core what its camera delivers.

    Raises
    ------
    MicroscopeError
        If there is no camera, several are joined, or the pixels are neither grey nor
        RGB of 8 or 16 bits.
    """
    if not core.getCameraDevice():
        msg = "the core has no camera; choose one (property Camera of device Core)"
        raise MicroscopeError(msg)
    if (cameras := core.getNumberOfCameraChannels()) > 1:
        msg = (
            f"camera '{core.getCameraDevice()}' joins {cameras} cameras; choose one of "
            "them as core camera (microscope.properties: {Core: {Camera: NAME}})"
        )
        raise MicroscopeError(msg)
    shape: tuple[int, ...] = (core.getImageHeight(), core.getImageWidth())
    components = core.getNumberOfComponents()
    pixel_bytes = core.getBytesPerPixel()
    if components > 1:
        # Micro-Manager's colour frames are BGRA; pymmcore-plus turns them to RGB.
        shape = (*shape, 3)
    if _is_python(core, core.getCameraDevice()):
        # Unlike the C++ core, Python devices count bytes per component.
        pixel_bytes *= components
    component_bytes = pixel_bytes // components
    if components not in (1, 3, 4) or component_bytes not in (1, 2):
        msg = (
            f"camera '{core.getCameraDevice()}' delivers {components} components of "
            f"{component_bytes} bytes; set its pixel type to 8 or 16 bit grey, or RGB"
        )
        raise MicroscopeError(msg)
    dtype = np.dtype(f"<u{component_bytes}") if component_bytes > 1 else np.dtype("u1")
    # As the core knows it: asking an objective turret each time would slow it down.
    pixel_size_um = float(core.getPixelSizeUm(True))
    return Geometry(
        shape, dtype.str, _bit_depth(core), tuple(core.getROI()), pixel_size_um
    )


def describe_series(
    config: Config,
    core: UniMMCore,
    geometry: Geometry,
    *,
    plan: AcquisitionPlan | None,
    frames: int | None = None,
    summary: Mapping[str, Any] | None = None,
) -> SeriesStart:
    """Put together what the processor must know before frame 0.

    Parameters
    ----------
    config
        Name of the run, channels and their optics.
    core
        Asked for the pixel size and, in live mode, the channel.
    plan
        None in live mode.
    frames
        Length of a live run; None: until it is stopped.
    summary
        pymmcore-plus' ``SummaryMetaV1``.

    Raises
    ------
    ConfigError
        If no pixel size is known, or it contradicts a channel's optics; if section
        autofocus names what neither camera nor plan have.
    """
    _check_autofocus(config, core, geometry)
    names = list(plan.channel_names) if plan else []
    channels = [
        config.channel(name).channel for name in names or [current_channel(core)]
    ]
    sizes: dict[str, int | None] = {"t": frames, "p": 1, "c": 1, "z": 1}
    return SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid=uuid4().hex,
        name=config.run.name,
        started_ns=RUN_CLOCK.restart(),
        shape=geometry.shape,
        dtype=geometry.dtype,
        sizes=dict(plan.sizes) if plan else sizes,
        channels=channels,
        positions=plan.positions if plan else [Position(name="p0")],
        pixel_size_um=find_pixel_size_um(config, core.getPixelSizeUm(), channels),
        z_step_um=plan.z_step_um if plan else None,
        interval_s=plan.interval_s if plan else None,
        bit_depth=geometry.bit_depth,
        mda_sequence=sequence_json(plan.sequence) if plan else None,
        summary=summary_json(summary),
        planned=len(plan) if plan else frames,
    )


def _check_autofocus(config: Config, core: UniMMCore, geometry: Geometry) -> None:
    """Refuse a region outside of the frame, and offsets of channels there are not."""
    height, width = geometry.shape[:2]
    region = config.autofocus.region
    if region is not None and (region[0] >= width or region[1] >= height):
        msg = (
            f"autofocus.region {list(region)} lies outside of the camera's frame of "
            f"{width} x {height} pixels; give x, y, width, height within it"
        )
        raise ConfigError(msg)
    group = core.getChannelGroup()
    presets = core.getAvailableConfigs(group) if group else ()
    known = {*presets, *(channel.name for channel in config.channels)}
    for name in config.autofocus.channel_offsets_um:
        if name not in known:
            msg = (
                f"autofocus.channel_offsets_um: there is no channel '{name}', so its "
                f"offset would be lost; there are {', '.join(sorted(known))}"
            )
            raise ConfigError(msg)


def find_pixel_size_um(
    config: Config, found_um: float | None, channels: Sequence[Channel]
) -> float:
    """Return the pixel size: configured, else as found, else that of the optics.

    Raises
    ------
    ConfigError
        If it is not known (the core of an uncalibrated objective says 0), or it
        contradicts the optics that PSFs are computed from.
    """
    configured_um: float | None = getattr(config.microscope, "pixel_size_um", None)
    known = {c.name: c.optics for c in channels if c.optics is not None}
    of_optics = {optics.pixel_size_um for optics in known.values()}
    size_um = configured_um or found_um or (min(of_optics) if of_optics else None)
    if not size_um:
        where = "the images say" if found_um is None else "the core says"
        msg = (
            f"the pixel size is unknown ({where} {found_um}); set "
            "microscope.pixel_size_um, or calibrate the objective in Micro-Manager "
            "(Devices > Pixel Size Calibration)"
        )
        raise ConfigError(msg)
    for name, optics in known.items():
        if not optics.has_pixels_of(size_um):
            msg = (
                f"channel '{name}' has optics.pixel_size_um={optics.pixel_size_um}, "
                f"but the camera's pixels are {size_um:g} um (binning included); "
                "correct the optics or set microscope.pixel_size_um"
            )
            raise ConfigError(msg)
    return float(size_um)


def current_channel(core: UniMMCore) -> str:
    """Return the preset that the channel group is in; ``default`` without one."""
    group = core.getChannelGroup()
    return (core.getCurrentConfig(group) if group else "") or "default"


def _is_python(core: UniMMCore, device: str) -> bool:
    """Whether a device is written in Python; a plain `CMMCorePlus` has none."""
    is_py_device = getattr(core, "isPyDevice", None)
    return is_py_device is not None and bool(is_py_device(device))


def _bit_depth(core: UniMMCore) -> int:
    camera = core.getCameraDevice()
    # For Python cameras the core knows the width of the pixel type only.
    if _is_python(core, camera) and core.hasProperty(camera, BIT_DEPTH):
        return int(core.getProperty(camera, BIT_DEPTH))
    return core.getImageBitDepth()


def with_field_of_view(
    sequence: useq.MDASequence, width_px: int, height_px: int, pixel_size_um: float
) -> useq.MDASequence:
    """Give grids that name no field of view this one; of a known pixel size, not 0.

    useq takes 1 um for one that is not given. Sizes that the plan names are kept:
    tiles may overlap on purpose.

    Raises
    ------
    ConfigError
        If these are more tiles than a run can have.
    """
    if not pixel_size_um:
        return sequence
    width_um, height_um = width_px * pixel_size_um, height_px * pixel_size_um

    def filled(part: useq.MDASequence) -> useq.MDASequence | None:
        grid = part.grid_plan
        if (
            grid is None
            or not {"fov_width", "fov_height"} <= type(grid).model_fields.keys()
        ):
            return None
        missing = {
            name: size
            for name, size in (("fov_width", width_um), ("fov_height", height_um))
            if getattr(grid, name) is None
        }
        return part.replace(grid_plan=grid.replace(**missing)) if missing else None

    positions = sequence.stage_positions
    if not isinstance(positions, useq.WellPlatePlan):
        inner = [None if p.sequence is None else filled(p.sequence) for p in positions]
        if any(part is not None for part in inner):
            positions = tuple(
                p if part is None else p.model_copy(update={"sequence": part})
                for p, part in zip(positions, inner, strict=True)
            )
            sequence = sequence.replace(stage_positions=positions)
    sequence = filled(sequence) or sequence
    refuse_too_many(sequence, "acquisition.mda")
    return sequence
