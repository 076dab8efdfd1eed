"""Header: what is known about a run before frame 0, kept as ``series.json``.

It is what a restarted processor or a repair needs to go on with a cut-off run. A
folder may come from anywhere: what it says is checked before it is used. From it
follows what each array of the run is like: shape, type, scale, codecs.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from glob import escape, glob
from math import ceil, prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rtfocus.config.sections import StoreConfig
from rtfocus.errors import NoRunError, OutputError, WriterError, why_not_written
from rtfocus.files import replace
from rtfocus.frame import AXES, MOST_PLACES, SeriesStart, TileGrid

HEADER_NAME = "series.json"
REPORT_NAME = "report.json"
JOURNAL_NAME = "frames.ndjson"
REJECTED_NAME = "rejected.json"
FORMAT = 1

LOCK_NAME = "writer.lock"
HOLDER_NAME = "writer.json"
LOCK_NAMES = frozenset({LOCK_NAME, HOLDER_NAME, f".{HOLDER_NAME}.part"})
"""Who writes the folder: see `rtfocus.writers.folder`."""

MOST_PIXELS = 1 << 33
"""Of a frame; beyond every camera, and below what overflows anywhere."""


@dataclass(frozen=True, slots=True)
class RunHeader:
    """Everything that decides what the run folder looks like."""

    series: SeriesStart
    store: StoreConfig
    grid: TileGrid | None
    """None: no defocus maps."""
    restored: bool
    """Whether a restored image is written."""
    provenance: dict[str, Any]
    """Config and whatever else says where the run came from."""
    expects_error: bool = False
    """Whether maps of the error left in restored frames are written."""
    states_deviation: bool = False
    """Whether every defocus map has one of how far off it may be; not in old runs."""

    @property
    def planes(self) -> int:
        """Planes per frame: 3 for RGB, each a channel of its own in the store."""
        return 1 if len(self.series.shape) == 2 else int(self.series.shape[2])

    def size(self, axis: str) -> int | None:
        """Return the planned length of an axis; None: unbounded time."""
        return self.series.sizes.get(axis, 1)

    def has_scale(self, axis: str) -> bool:
        """Tell whether time points (t) or slices (z) are equally far apart, or one."""
        step = self.series.interval_s if axis == "t" else self.series.z_step_um
        return step is not None or self.size(axis) == 1

    def write(self, folder: Path) -> None:
        """Write the header; it appears whole or not at all."""
        content = {
            "format": FORMAT,
            "series": msgspec.to_builtins(self.series),
            "store": self.store.model_dump(mode="json"),
            "grid": None if self.grid is None else asdict(self.grid),
            "restored": self.restored,
            "expects_error": self.expects_error,
            "states_deviation": self.states_deviation,
            "provenance": self.provenance,
        }
        write_json(folder / HEADER_NAME, content, fsync=self.store.fsync)


def read_header(folder: Path) -> RunHeader:
    """Read the header of a run folder.

    Raises
    ------
    NoRunError
        If there is none, or it cannot be opened.
    WriterError
        If it is damaged, or of another version.
    """
    path = folder / HEADER_NAME
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict)
        if content["format"] != FORMAT:
            msg = (
                f"'{path}' has format {content['format']}, this rtfocus reads "
                f"{FORMAT}; use the version that wrote it"
            )
            raise WriterError(msg)
        header = RunHeader(
            series=msgspec.convert(content["series"], SeriesStart),
            store=StoreConfig.model_validate(content["store"]),
            grid=msgspec.convert(content["grid"], TileGrid | None),
            restored=bool(content["restored"]),
            provenance=dict(content["provenance"]),
            expects_error=bool(content.get("expects_error", False)),
            states_deviation=bool(content.get("states_deviation", False)),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else _short(error)
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EIO):
            msg = f"'{path}' cannot be read: {reason}; allow it, or see to its disk"
            raise NoRunError(msg) from error
        msg = (
            f"'{folder}' is no run folder: '{HEADER_NAME}' cannot be read ({reason}); "
            f"{_meant_by(folder)}"
        )
        kind = NoRunError if isinstance(error, OSError) else WriterError
        raise kind(msg) from error
    if (fault := next(_faults(header), None)) is not None:
        msg = f"'{path}' is damaged: {fault}; the images can be read by other programs"
        raise WriterError(msg)
    return header


def _meant_by(folder: Path) -> str:
    """Say which run a path may mean that is the name of one, in one or around some."""
    beside, within = f"{folder}.rtfocus", glob(f"{escape(str(folder))}/*.rtfocus")
    others = (*map(str, folder.parents), *sorted(within))
    near = [beside] if os.path.lexists(beside) else []
    near += [run for run in others if os.path.lexists(os.path.join(run, HEADER_NAME))]
    return f"did you mean '{near[0]}'?" if near else "give a NAME.rtfocus"


def series_in_words(series: SeriesStart) -> str:
    """Return shape, pixels and lengths of a series in one line."""
    words = {"t": "time points", "p": "positions", "c": "channels", "z": "slices"}
    sizes = [
        f"{'endless' if size is None else size} {words[axis]}"
        for axis, size in series.sizes.items()
        if size != 1
    ]
    shape = " x ".join(map(str, series.shape))
    text = f"{shape} pixels, {series.pixel_size_um:g} um each"
    return ": ".join([text, ", ".join(sizes)]) if sizes else text


def sizes_fault(header: RunHeader) -> str | None:
    """Return how the planned sizes disagree with the lists; None: they do not."""
    series = header.series
    listed = {"p": len(series.positions), "c": len(series.channels)}
    for axis, number in listed.items():
        if header.size(axis) != number:
            return (
                f"series '{series.name}' plans {header.size(axis)} along {axis} but "
                f"lists {number}; SeriesStart.sizes must agree with its lists"
            )
    return None


def _faults(header: RunHeader) -> Iterator[str]:
    """Yield what no run of rtfocus has."""
    series, grid = header.series, header.grid
    shape, sizes = series.shape, series.sizes
    is_frame = len(shape) >= 2 and shape[2:] in ((), (3,))
    if not (is_frame and _fits(shape, MOST_PIXELS)):
        yield f"shape={shape} is no frame"
    if not _is_pixel_type(series.dtype):
        yield f"dtype={series.dtype!r} is no pixel type"
    has_end = None not in [size for axis, size in sizes.items() if axis != "t"]
    lengths = [1 if size is None else size for size in sizes.values()]
    if not (set(sizes) <= set(AXES) and has_end and _fits(lengths, MOST_PLACES)):
        yield f"sizes={sizes} are no plan"
    if not (series.channels and series.positions):
        yield "it lists no channel or no position"
    if not 0 < series.pixel_size_um < float("inf"):
        yield f"pixel_size_um={series.pixel_size_um} is no length"
    if grid is not None:
        tiles, step_px = (grid.rows, grid.columns), grid.stride_px
        if not (_fits(tiles, MOST_PIXELS) and 0 < step_px < float("inf")):
            yield f"its maps have {tiles} tiles every {step_px} px"
    if not isinstance(header.provenance.get("config", {}), dict):
        yield "its config is none"
    if (fault := sizes_fault(header)) is not None:
        yield fault


def _fits(lengths: Sequence[int], most: int) -> bool:
    return all(length >= 1 for length in lengths) and prod(lengths) <= most


def _is_pixel_type(dtype: str) -> bool:
    try:
        return np.dtype(dtype).kind in "uif"
    except (TypeError, ValueError):
        return False


def _short(error: Exception) -> str:
    """Return the first line of what a library says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_finished(folder: Path) -> bool:
    """Tell whether the run was closed: the report is the last file written."""
    return (folder / REPORT_NAME).is_file()


def is_bare(folder: Path) -> bool:
    """Tell whether a folder holds at most what a run makes before its header."""
    journal = folder / JOURNAL_NAME
    before_header = {JOURNAL_NAME, f".{HEADER_NAME}.part", *LOCK_NAMES}
    return {path.name for path in folder.iterdir()} <= before_header and (
        not journal.exists() or journal.stat().st_size == 0
    )


def is_document(path: Path) -> bool:
    """Tell whether a file is a JSON object, not lost, torn or full of zeros."""
    try:
        msgspec.json.decode(path.read_bytes(), type=dict)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


def write_json(path: Path, content: dict[str, Any], *, fsync: bool = False) -> None:
    """Replace a JSON file atomically; NaN becomes null."""
    data = msgspec.json.format(msgspec.json.encode(content), indent=1)
    write_file(path, data, fsync=fsync)


def write_file(path: Path, data: bytes, *, fsync: bool) -> None:
    """Replace a small file of the run folder atomically.

    Raises
    ------
    WriterError
        If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        msg = f"cannot write '{path}': {why_not_written(error)}, then repair"
        raise WriterError(msg) from error
    except OutputError as error:
        raise WriterError(str(error)) from error


DIMENSIONS = ("t", "c", "z", "y", "x")
"""Of every array."""
RAW = "raw"
RESTORED = "restored"
DEFOCUS = "defocus"
CONFIDENCE = "confidence"
DEVIATION = "deviation"
EXPECTED_ERROR = "expected_error"
INNER = (CONFIDENCE, DEVIATION, EXPECTED_ERROR)
"""Maps that lie inside the OME-Zarr of the defocus."""

# With the separator "/" every frame makes four folders per image, which costs more
# than its file: 0.5 ms against 0.15 ms on ext4. OME-Zarr 0.5 allows both.
SEPARATOR = "."


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """One OME-Zarr image; every position of the series has one of these."""

    name: str
    """``raw``, ``restored``, ``defocus``, or one of `INNER`."""
    dtype: str
    """NumPy name, e.g. ``uint16``."""
    planes: int
    """Planes along c per channel of the series: 3 for RGB, else 1."""
    plane_shape: tuple[int, int]
    """(y, x) of a plane."""
    spacing_um: float
    """Distance of pixels in the specimen plane."""
    origin_um: float
    """Coordinate (both axes) of pixel (0, 0) in the frame's coordinates, in which
    the centre of the frame's first pixel lies at 0."""
    window: tuple[float, float]
    """Values shown black and white."""
    says: Mapping[str, Any] = field(default_factory=dict)
    """What its values are, for the attribute ``rtfocus``."""

    @property
    def fill_value(self) -> float:
        """What a missing frame reads as: NaN where the map can hold it."""
        return float("nan") if self.name in (DEFOCUS, *INNER) else 0.0

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame before compression."""
        pixels = self.planes * self.plane_shape[0] * self.plane_shape[1]
        return pixels * np.dtype(self.dtype).itemsize

    def shard_shape(self, chunk_px: int) -> tuple[int, int]:
        """Return (y, x) of the shard: the plane, rounded up to whole chunks."""
        (chunk_y, chunk_x) = self.chunk_shape(chunk_px)
        height, width = self.plane_shape
        return ceil(height / chunk_y) * chunk_y, ceil(width / chunk_x) * chunk_x

    def chunk_shape(self, chunk_px: int) -> tuple[int, int]:
        """Return (y, x) of the inner chunks, no larger than the plane."""
        height, width = self.plane_shape
        return min(chunk_px, height), min(chunk_px, width)


def image_specs(header: RunHeader) -> list[ImageSpec]:
    """Return the images that the run writes, raw first."""
    series, store = header.series, header.store
    dtype = np.dtype(series.dtype).name
    specs = []
    if store.raw:
        specs.append(_pixel_spec(header, RAW, dtype))
    if header.restored:
        camera = store.restored_dtype == "camera"
        specs.append(_pixel_spec(header, RESTORED, dtype if camera else "float32"))
    if header.grid is not None:
        depth_um = _depth_um(header)
        windows = {DEFOCUS: (-depth_um, depth_um), CONFIDENCE: (0.0, 1.0)}
        if header.states_deviation:
            windows[DEVIATION] = (0.0, depth_um / 4)
        if header.expects_error:
            windows[EXPECTED_ERROR] = (0.0, _top(series))
        specs += [_tile_spec(header, header.grid, *one) for one in windows.items()]
    return specs


SIGN = "positive: specimen too far from the objective"
_SAYS: dict[str, dict[str, str]] = {
    DEFOCUS: {"unit": "micrometer", "sign": SIGN},
    CONFIDENCE: {},
    DEVIATION: {"unit": "micrometer", "meaning": "standard deviation of the defocus"},
    EXPECTED_ERROR: {
        "unit": "count",
        "meaning": "root mean square, over each tile, of the error that is expected to "
        "be left in the restored frame: against an image in focus and without noise",
    },
}


def _top(series: SeriesStart) -> float:
    """Return the largest value of the camera; 1 of real numbers."""
    camera = np.dtype(series.dtype)
    if camera.kind == "f":
        return 1.0
    return float(2.0 ** (series.bit_depth or 8 * camera.itemsize) - 1)


def _pixel_spec(header: RunHeader, name: str, dtype: str) -> ImageSpec:
    series = header.series
    return ImageSpec(
        name=name,
        dtype=dtype,
        planes=header.planes,
        plane_shape=(series.shape[0], series.shape[1]),
        spacing_um=series.pixel_size_um,
        origin_um=0.0,
        window=(0.0, _top(series)),
    )


def _tile_spec(
    header: RunHeader, grid: TileGrid, name: str, window: tuple[float, float]
) -> ImageSpec:
    return ImageSpec(
        name=name,
        dtype="float32",
        planes=1,
        plane_shape=(grid.rows, grid.columns),
        spacing_um=round(grid.stride_px * header.series.pixel_size_um, 9),
        origin_um=round(grid.origin_px * header.series.pixel_size_um, 9),
        window=window,
        says=_SAYS[name] | ({"signed": grid.signed} if name == DEFOCUS else {}),
    )


def _depth_um(header: RunHeader) -> float:
    """Range of defocus to show: eleven units n lambda / NA^2, else 10 um."""
    units = [c.optics.defocus_unit_um for c in header.series.channels if c.optics]
    return 11 * max(units) if units else 10.0


def array_metadata(
    spec: ImageSpec, shape: list[int], store: StoreConfig
) -> dict[str, Any]:
    """Return the Zarr v3 metadata of an image's array."""
    # JSON has no NaN; Zarr v3 writes it as a string.
    fill: Any = "NaN" if np.isnan(spec.fill_value) else spec.fill_value
    if np.dtype(spec.dtype).kind != "f":
        fill = int(fill)
    frames = store.shard_frames
    outer = [frames, spec.planes, 1, *spec.shard_shape(store.chunk_px)]
    inner = [1, 1, 1, *spec.chunk_shape(store.chunk_px)]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little, *_compression(store, np.dtype(spec.dtype).itemsize)]
    index_codecs = [little, {"name": "crc32c"}]
    shard = {"chunk_shape": inner, "codecs": codecs, "index_codecs": index_codecs}
    return {
        "shape": shape,
        "data_type": spec.dtype,
        "fill_value": fill,
        "dimension_names": list(DIMENSIONS),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "chunk_key_encoding": {
            "name": "default",
            "configuration": {"separator": SEPARATOR},
        },
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }


def _compression(store: StoreConfig, itemsize: int) -> list[dict[str, Any]]:
    """Return the codecs that follow ``bytes``: compression, then a checksum.

    The checksum lets `rtfocus check` find a flipped bit; it costs far less than
    the fastest compression.
    """
    checksum = {"name": "crc32c"}
    if store.codec == "none":
        return [checksum]
    if store.codec == "zstd":
        options: dict[str, Any] = {"level": store.codec_level, "checksum": False}
        return [{"name": "zstd", "configuration": options}, checksum]
    options = {
        "cname": store.codec.removeprefix("blosc-"),
        "clevel": min(store.codec_level, 9),
        "shuffle": "shuffle" if itemsize > 1 else "noshuffle",
        "typesize": itemsize,
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": options}, checksum]
