"""Frame: what flows through rtfocus, in memory and on the wire alike.

The msgspec structs are both the typed in-memory form and, packed with msgpack,
the headers of wire protocol version 1 (`rtfocus/transport/PROTOCOL.md`).
Arrays keep axes (y, x) or (y, x, rgb); z, t, c and p live in ``index``.

Slots are the one place frames live in memory: a frame is copied once into a slot
and stays there until it is durable; after `SlotPool` is built nothing is allocated
per frame. A full pool is the backpressure of rtfocus: callers wait for a slot.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import prod
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel

PROTOCOL_VERSION = 1

BACKGROUND = int(np.iinfo(np.int16).min)
"""Level of a tile without a specimen; no signed level ever reaches it."""
AXES = ("t", "p", "c", "z")
"""Keys of `SeriesStart.sizes` and `FrameHeader.index`."""
MOST_PLACES = 1 << 40
"""Of the axes of a plan together: disks end long before."""

Act = Literal["autofocus", "hold_on", "hold_off", "stop"]
"""What a viewer may ask the microscope side for, where the config allows it."""


class Role(StrEnum):
    """Why a frame was exposed."""

    RECORD = "record"
    """Part of the plan: processed and stored."""
    FOCUS = "focus"
    """Autofocus probe outside the plan: processed and counted, never stored."""


class Position(msgspec.Struct, frozen=True, omit_defaults=True):
    """One xy site of the acquisition."""

    name: str
    """Unique within the series; becomes the image's name in the store."""
    x_um: float | None = None
    """Stage x; None where the xy-stage is not used."""
    y_um: float | None = None
    """Stage y."""
    plate_row: str | None = None
    """Row of the well, e.g. ``B``; None outside plates."""
    plate_column: str | None = None
    """Column of the well, e.g. ``03``."""
    field: int = 0
    """Index of the field of view within the well."""


class SeriesStart(msgspec.Struct, frozen=True, tag="start", tag_field="type"):
    """First message of a series: all that is known before frame 0."""

    version: int
    """`PROTOCOL_VERSION` of the sender."""
    series_uid: str
    """Unique per series; a new one opens a new run folder."""
    name: str
    """Human name of the series."""
    started_ns: int
    """Unix time of the start, sender's clock."""
    shape: tuple[int, ...]
    """Of every frame: (y, x) or (y, x, 3)."""
    dtype: str
    """NumPy byte-order form, little-endian: ``|u1``, ``<u2``, ``<f4``."""
    sizes: dict[str, int | None]
    """Planned length of axes t, p, c, z in acquisition order; None = unbounded t."""
    channels: list[Channel]
    """By index c; never empty."""
    positions: list[Position]
    """By index p; never empty."""
    pixel_size_um: float
    """In the specimen plane, binning included; > 0."""
    z_step_um: float | None = None
    """Distance of slices; None without a z-stack."""
    interval_s: float | None = None
    """Planned time between time points; None: it differs, or as fast as possible."""
    bit_depth: int | None = None
    """Significant bits of the camera, e.g. 12 in a ``<u2`` frame."""
    mda_sequence: dict[str, Any] | None = None
    """The plan as useq ``MDASequence`` in JSON form; None in live mode."""
    summary: dict[str, Any] = {}
    """pymmcore-plus ``SummaryMetaV1`` in JSON form."""
    planned: int | None = None
    """Images planned: not every place of `sizes` need have one. None: not stated."""


class FrameHeader(msgspec.Struct, frozen=True, tag="frame", tag_field="type"):
    """One frame's metadata; the pixels travel beside it."""

    version: int
    series_uid: str
    sequence: int
    """Counts all frames of the series from 0, without holes at the sender."""
    shape: tuple[int, ...]
    dtype: str
    captured_ns: int
    """End of exposure as Unix time, sender's clock."""
    exposure_ms: float
    index: dict[str, int]
    """Place in the store: keys t, p, c, z as in ``SeriesStart.sizes``."""
    role: Role = Role.RECORD
    z_um: float | None = None
    """Absolute z-stage position during the exposure."""
    z_offset_um: float = 0.0
    """Planned distance from the reference plane (z-stack slice); 0 outside stacks."""
    event_index: int | None = None
    """Ordinal of the planned MDA event from 0; tells a lost frame's place in it."""
    camera_image_number: int | None = None
    """The camera's own counter within a hardware sequence, where it has one."""
    planned_s: float | None = None
    """Planned start since the series began; None: no plan."""
    actual_s: float | None = None
    """Actual start since the series began, sender's clock."""
    frame_meta: dict[str, Any] = {}
    """pymmcore-plus ``FrameMetaV1`` in JSON form."""


class SeriesEnd(msgspec.Struct, frozen=True, tag="end", tag_field="type"):
    """Last message of a series."""

    version: int
    series_uid: str
    frames_sent: int
    """Frames sent, both roles: sequence runs from 0 to frames_sent - 1."""
    reason: str
    """``completed``, ``canceled``, or why it broke off."""
    camera_lost: int = 0
    """Planned images that were exposed, or should have been, and never came."""
    not_acquired: int = 0
    """Planned images whose turn never came."""
    warnings: tuple[str, ...] = ()
    """What the sender complained of without stopping."""
    focus_log: tuple[dict[str, Any], ...] = ()
    """Lines of ``focus.ndjson`` that no frame took along."""


class FocusReading(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one frame says of focus, for autofocus; see `rtfocus.autofocus`."""

    defocus_um: float | None
    """In the middle of the region looked at, tilt removed; positive = specimen too far
    from the objective, only the distance where `signed` is False; None: refused."""
    sd_um: float | None
    """Its standard deviation; None: refused."""
    signed: bool
    refusal: str | None = None
    """Why there is no estimate: ``blank``, ``few_tiles``, ``saturated``, ``flat``,
    ``two_peaks``, ``edge`` of the engine's range, or ``left_out``: hold had no time."""
    detail: str = ""
    """The refusal with its numbers."""
    tilt_um: tuple[float, float] = (0.0, 0.0)
    """Rise of the defocus across the frame along x and y; 0 where not measurable."""
    tiles: int = 0
    """Tiles that were used."""
    spectrum: list[float] = []
    """Ring amplitudes of the image, 48 numbers, or none where there is no image to
    read; see `rtfocus.autofocus.appearance`."""
    noise: float = 0.0
    """Noise amplitude of a ring."""
    saturated: float = 0.0
    """Share of the pixels that are saturated."""
    early: bool = False
    """Read before the classifier was done: spectrum and saturation alone. The whole
    reading follows."""


class Estimate(msgspec.Struct, frozen=True, tag="estimate", tag_field="type"):
    """One frame's defocus in one number, published before restoration ends."""

    series_uid: str
    sequence: int
    level: int | None
    """Most confident level over the tiles; None: background only."""
    defocus_um: float | None
    """Confidence-weighted over the tiles, positive = specimen too far from the
    objective; None: background only."""
    signed: bool
    """False: only the distance is known."""
    confidence: float
    """0 to 1."""
    foreground: float
    """Fraction of tiles that are not background."""
    z_um: float | None
    """z at which the frame was taken."""
    z_offset_um: float
    index: dict[str, int]
    captured_ns: int
    """Sender's clock, copied from the frame."""
    estimated_ns: int
    """Unix time at which the estimate was ready, processor's clock."""
    focus: FocusReading | None = None
    """For autofocus; None: the processor was not asked for it."""

    @property
    def is_early(self) -> bool:
        """Whether this is for hold alone; the classifier's own estimate follows."""
        return self.focus is not None and self.focus.early


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Where the tiles of a frame lie; the same for every frame of a series."""

    rows: int
    columns: int
    tile_px: int
    """Side of a tile in frame pixels."""
    stride_px: float
    """Distance between neighbouring tile centres in frame pixels."""
    origin_px: float
    """Frame coordinate (both axes) of the centre of tile (0, 0)."""
    signed: bool
    """False: only the distance from focus is known."""

    def centres_px(self, count: int) -> NDArray[np.float64]:
        """Return where the first `count` tiles of an axis have their centres."""
        return self.origin_px + self.stride_px * np.arange(count, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class DefocusMap:
    """Defocus of one frame, tile by tile; all arrays have axes (tile_y, tile_x)."""

    grid: TileGrid
    defocus_um: NDArray[np.float32]
    """Positive = specimen too far from the objective; only the distance where
    `TileGrid.signed` is False; NaN = background."""
    confidence: NDArray[np.float32]
    """Probability of the chosen label, 0 to 1."""
    level: NDArray[np.int16]
    """Label per tile, negative levels are too near; `BACKGROUND` = no specimen."""
    uncertainty_um: NDArray[np.float32] | None = None
    """Standard deviation of `defocus_um` by the engine's probabilities, NaN =
    background; None: the engine gives none."""
    stated_um: NDArray[np.float32] | None = None
    """How far off `defocus_um` may be, as measured where the truth is known; None:
    not stated yet, see `FrameResult`, or the engine gives no `uncertainty_um`."""

    def __repr__(self) -> str:
        # Of a dataclass it would be all its arrays.
        rows, columns = self.defocus_um.shape
        known = self.defocus_um[np.isfinite(self.defocus_um)]
        text = f"{rows} x {columns} tiles, {known.size} with specimen"
        if known.size:
            quantity = "defocus" if self.grid.signed else "distance from focus"
            text += f", {quantity} {known.min():.2f} to {known.max():.2f} um"
        return f"DefocusMap({text})"

    def distances(self) -> "DefocusMap":
        """Return a map without the sides of focus, for where they are unknown.

        They show by aberrations. Where those are unknown the sides of equal tiles are
        guessed differently, and signed defocus would cancel in the mean of a frame.
        """
        level = np.where(self.level == BACKGROUND, BACKGROUND, np.abs(self.level))
        return replace(
            self,
            grid=replace(self.grid, signed=False),
            defocus_um=np.abs(self.defocus_um),
            level=level.astype(np.int16),
        )

    def with_coarser(
        self,
        coarser: "DefocusMap",
        least_um: NDArray[np.float32],
        *,
        step_um: float,
        farthest: int,
    ) -> "DefocusMap":
        """Return a map that takes far defocus from the frame of half the size.

        Parameters
        ----------
        coarser
            Of the frame of half the size.
        least_um
            Distance that it must exceed to count, axes (tile_y, tile_x).
        step_um
            Defocus between two levels.
        farthest
            Highest level: the label of every defocus beyond it.
        """
        axes = zip(self.level.shape, coarser.level.shape, strict=True)
        nearest = [_nearest(*tiles, self.grid, coarser.grid) for tiles in axes]
        places = np.ix_(*nearest)
        defocus_um = 2 * coarser.defocus_um[places]
        is_coarser = np.abs(defocus_um) > least_um

        def doubled(
            fine: NDArray[np.float32] | None, coarse: NDArray[np.float32] | None
        ) -> NDArray[np.float32] | None:
            if fine is None or coarse is None:
                return fine
            return np.where(is_coarser, 2 * coarse[places], fine)

        known_um = np.where(is_coarser, defocus_um, 0)
        level = np.clip(np.rint(known_um / step_um), -farthest, farthest)
        return DefocusMap(
            self.grid,
            np.where(is_coarser, defocus_um, self.defocus_um),
            np.where(is_coarser, coarser.confidence[places], self.confidence),
            np.where(is_coarser, level, self.level).astype(np.int16),
            doubled(self.uncertainty_um, coarser.uncertainty_um),
            doubled(self.stated_um, coarser.stated_um),
        )


def _nearest(
    fine: int, coarse: int, grid: TileGrid, halved_grid: TileGrid
) -> NDArray[np.intp]:
    """Return for each tile of an axis the nearest one of the frame of half the size."""
    centres = (grid.centres_px(fine) - 0.5) / 2
    places = np.rint((centres - halved_grid.origin_px) / halved_grid.stride_px)
    return np.clip(places, 0, coarse - 1).astype(np.intp)


@dataclass(slots=True)
class FrameResult:
    """What processing made of one frame; arrays are valid until the slot is freed."""

    estimate: Estimate | None
    """None: no classifier for this channel."""
    defocus: DefocusMap | None
    restored: NDArray[Any] | None
    """Same shape as the frame, camera dtype or float32; None: not restored."""
    expected_error: NDArray[np.float32] | None = None
    """Root mean square of the error left, in counts, by tile; None: not known."""
    skipped: str | None = None
    """Why there is no restored frame, e.g. ``raw_only: stalled``."""
    flags: tuple[str, ...] = ()
    """``nan``, ``saturated``, ``below_offset``: what is doubtful about the pixels."""
    engines: dict[str, str] = field(default_factory=dict)
    """Kind of engine to ``name@hash`` of its weights."""
    stage_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds per stage: ``normalise``, ``classify``, ``restore`` ..."""
    device: str = ""
    """Where it was processed, e.g. ``GPU 0``."""


class Slot:
    """One frame's buffer with the header of the frame that is in it."""

    __slots__ = ("_buffer", "header", "index", "pixels", "received_ns")

    def __init__(self, index: int, buffer: NDArray[np.uint8]) -> None:
        self.index = index
        """Position in the pool; stable, so that others keep per-slot buffers."""
        self._buffer = buffer
        self.header: FrameHeader | None = None
        self.pixels: NDArray[np.generic] = buffer[:0]
        """View of the buffer with the frame's shape and dtype."""
        self.received_ns = 0
        """Arrival by this process's ``time.perf_counter_ns``."""

    def frame(self) -> FrameHeader:
        """Return the header of the frame in this slot; ValueError when empty."""
        if self.header is None:
            msg = f"slot {self.index} holds no frame"
            raise ValueError(msg)
        return self.header

    def prepare(self, header: FrameHeader) -> NDArray[np.generic]:
        """Make this the slot of `header` and return its pixels to be filled.

        Raises
        ------
        ValueError
            If the frame is larger than the slot.
        """
        dtype = np.dtype(header.dtype)
        size_bytes = dtype.itemsize * prod(header.shape)
        if size_bytes > self._buffer.size:
            msg = f"frame of {size_bytes} bytes in a slot of {self._buffer.size}"
            raise ValueError(msg)
        self.header = header
        self.pixels = self._buffer[:size_bytes].view(dtype).reshape(header.shape)
        return self.pixels


class SlotPool:
    """Fixed number of equal slots, handed out and given back from any thread."""

    def __init__(self, count: int, slot_bytes: int) -> None:
        # One allocation, each slot aligned to a page: pinning and O_DIRECT like it.
        stride = -(-slot_bytes // 4096) * 4096
        self.count = count
        memory = self._allocate(count * stride)
        # Written to, because a fresh page costs more at first use than the copy of
        # what is in it: the first frames of a run must not be the slowest.
        memory.fill(0)
        self._free = deque(
            Slot(i, memory[i * stride : i * stride + slot_bytes]) for i in range(count)
        )
        self._changed = threading.Condition()
        self._closed = False

    def _allocate(self, size_bytes: int) -> NDArray[np.uint8]:
        return np.empty(size_bytes, dtype=np.uint8)

    @property
    def free(self) -> int:
        """Number of slots that are free."""
        with self._changed:
            return len(self._free)

    def acquire(self, timeout_s: float | None = None) -> Slot | None:
        """Take a free slot, waiting for one; None on time-out or after `close`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._free and not self._closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            return None if self._closed else self._free.popleft()

    def release(self, slot: Slot) -> None:
        """Give a slot back; its frame is gone from here on."""
        with self._changed:
            if slot in self._free:
                msg = f"slot {slot.index} was released twice"
                raise ValueError(msg)
            slot.header = None
            self._free.append(slot)
            self._changed.notify()

    def close(self) -> None:
        """Wake all waiters; `acquire` returns None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
