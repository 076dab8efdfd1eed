"""Runs: a run folder as arrays and tables, read when they are asked for.

For a run that is being recorded as well as for a finished one: what is durable can
be read, everything else is fill.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray

from rtfocus.errors import InputError, WriterError
from rtfocus.files import path_given
from rtfocus.frame import AXES, SeriesStart
from rtfocus.images.ome_zarr import open_zarr
from rtfocus.metrics import Outcome
from rtfocus.writers.commit import report_of
from rtfocus.writers.header import (
    INNER,
    JOURNAL_NAME,
    RunHeader,
    image_specs,
    is_finished,
    read_header,
)
from rtfocus.writers.journal import Line, read_journal
from rtfocus.writers.layout import store_path
from rtfocus.writers.places import complete, position_paths

Kind = Literal["raw", "restored", "defocus", "deviation", "expected_error"]

NUMBERS = (
    ("sequence", np.int64, -1),
    *((axis, np.int32, -1) for axis in AXES),
    ("captured_ns", np.int64, -1),
    ("received_ns", np.int64, -1),
    ("durable_ns", np.int64, -1),
    ("exposure_ms", np.float64, np.nan),
    ("z_um", np.float64, np.nan),
    ("z_offset_um", np.float64, np.nan),
    ("planned_s", np.float64, np.nan),
    ("actual_s", np.float64, np.nan),
    ("level", np.int32, np.iinfo(np.int32).min),
    ("defocus_um", np.float64, np.nan),
    ("confidence", np.float64, np.nan),
    ("foreground", np.float64, np.nan),
    ("expected_error_counts", np.float64, np.nan),
)
"""Columns of the table of frames that hold numbers, and what stands for "unknown"."""
_OBJECTS = ("signed", "status", "role", "why", "file")
"""Further columns; None stands for "unknown"."""


def open_run(path: Path | str) -> "Run":
    """Open a run folder, ``NAME.rtfocus``; nothing but its header is read.

    Parameters
    ----------
    path
        The folder; a finished run, one that was cut off, or one that is still
        being recorded.

    Returns
    -------
    Run
        Its images and tables are read when they are asked for.

    Raises
    ------
    WriterError
        If it is not a run folder.
    InputError
        If `path` is not a path.

    Examples
    --------
    ::

        run = rtfocus.open_run("runs/demo.rtfocus")
        plane = run.raw[0, 0, 0]  # t, c, z
        sharpest = run.frames[np.nanargmin(abs(run.frames["defocus_um"]))]
    """
    folder = path_given(path, "run")
    return Run(folder, read_header(folder))


@dataclass(frozen=True)
class RunImage:
    """An image of one position; pixels are read when it is indexed.

    Has what NumPy, Dask and viewers ask of an array: ``shape``, ``dtype``, ``ndim``,
    indexing and ``numpy.asarray``.
    """

    array: "zarr.Array[Any]"
    """The Zarr array itself, read-only."""
    axes: tuple[str, ...]
    """Names of the axes: ``t``, ``c``, ``z``, ``y``, ``x``; of a defocus map y and x
    count tiles. Colour is three channels."""
    scale: dict[str, float]
    """Distance of neighbours along each axis: um for z, y, x; s for t where known."""
    channels: tuple[str, ...]
    """Names of the channels of the series, by index c of `Run.frames`."""
    position: str
    """Name of the position."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the `axes`."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self.array.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.array.ndim

    @property
    def pixel_size_um(self) -> tuple[float, float]:
        """Height and width of a pixel, or of a tile's step, in the specimen."""
        return self.scale["y"], self.scale["x"]

    def __getitem__(self, key: Any) -> NDArray[Any]:  # noqa: ANN401 (as NumPy's)
        try:
            return np.asarray(self.array[key])
        except IndexError:
            raise
        # What damaged shards raise differs from codec to codec.
        except (ValueError, RuntimeError, OSError) as error:
            msg = (
                f"the image of position '{self.position}' cannot be read at "
                f"{key!r:.80}: {error}; run rtfocus check, which names what is damaged"
            )
            raise InputError(msg) from error

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(
        self,
        dtype: DTypeLike | None = None,
        copy: bool | None = None,
    ) -> NDArray[Any]:
        return np.asarray(self[...], dtype=dtype)


@dataclass(frozen=True)
class Run:
    """A run folder: images, a table of the frames, and the report."""

    folder: Path
    header: RunHeader
    """What was known before the first frame."""

    def __repr__(self) -> str:
        # Of a dataclass it would be the whole header: screens of devices and plan.
        return (
            f"Run('{self.folder}', channels={_few(self.channels)}, "
            f"positions={_few(self.positions)}, planned={self.series.sizes})"
        )

    @property
    def series(self) -> SeriesStart:
        """The series as the microscope side announced it."""
        return self.header.series

    @property
    def positions(self) -> tuple[str, ...]:
        """Names of the positions, by index p."""
        return tuple(position.name for position in self.series.positions)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, by index c."""
        return tuple(channel.name for channel in self.series.channels)

    @property
    def pixel_size_um(self) -> float:
        """Of the camera in the specimen, binning included."""
        return self.series.pixel_size_um

    @property
    def config(self) -> dict[str, Any]:
        """The config it was recorded with, as plain values."""
        return dict(self.header.provenance.get("config", {}))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The images it has, of ``raw``, ``restored``, ``defocus``, ``deviation``, ...

        ``deviation`` and ``expected_error`` are there where an engine states them.
        """
        names = [spec.name for spec in image_specs(self.header)]
        return tuple(
            kind
            for kind in get_args(Kind)
            if kind in names and store_path(self.folder, kind).is_dir()
        )

    @cached_property
    def raw(self) -> RunImage:
        """What the camera saw at the first position; others: `image`."""
        return self.image("raw")

    @cached_property
    def restored(self) -> RunImage:
        """The restored frames of the first position; others: `image`."""
        return self.image("restored")

    @cached_property
    def defocus(self) -> RunImage:
        """Defocus in um per tile at the first position; others: `image`.

        NaN = no specimen, or no frame.
        """
        return self.image("defocus")

    @cached_property
    def deviation(self) -> RunImage:
        """Standard deviation of the defocus in um per tile, as its engine states it.

        At the first position; others: `image`. NaN = no specimen, or no frame.
        """
        return self.image("deviation")

    @cached_property
    def expected_error(self) -> RunImage:
        """Error expected in restored frames per tile, in counts, root mean square.

        At the first position; others: `image`. NaN = not known, or no frame.
        """
        return self.image("expected_error")

    @cached_property
    def _places(self) -> list[str]:
        return position_paths(self.series.positions)

    def image(self, kind: Kind, position: int | str = 0) -> RunImage:
        """Return an image of the run.

        Parameters
        ----------
        kind
            One of `kinds`.
        position
            Index p or name.

        Raises
        ------
        InputError
            If the run has no such image or position.
        """
        names = self.positions
        if isinstance(position, str) and position in names:
            position = names.index(position)
        if not isinstance(position, int) or not 0 <= position < len(names):
            msg = f"'{self.folder}' has no position {position!r}; it has {_few(names)}"
            raise InputError(msg)
        store = store_path(self.folder, kind)
        place = store / self._places[position]
        place /= kind if kind in INNER else ""
        try:
            group = open_zarr(place)
            scales: Any = group.attrs["ome"]
            scales = scales["multiscales"][0]
            first = scales["datasets"][0]
            array = group[first["path"]]
            if not isinstance(array, zarr.Array):
                raise KeyError(first["path"])
            axes = tuple(axis["name"] for axis in scales["axes"])
            steps = map(float, first["coordinateTransformations"][0]["scale"])
            scale = dict(zip(axes, steps, strict=True))
        # Damaged metadata make the parsers raise whatever they stumble over.
        except Exception as error:
            there = self.kinds
            msg = (
                f"'{place}' cannot be read; the files say more: rtfocus check "
                f"{self.folder}"
                if kind in there
                else f"'{self.folder}' has no image '{kind}' that can be read; "
                f"it has {_few(there)}"
            )
            raise InputError(msg) from error
        return RunImage(
            array=array,
            axes=axes,
            scale=scale,
            channels=self.channels,
            position=names[position],
        )

    @property
    def frames(self) -> NDArray[Any]:
        """The journal as a table: a structured array with a row per frame.

        Columns are ``sequence``; the place ``t``, ``p``, ``c``, ``z``; ``status``
        (``written``, ``focus``, ``missing``, ``in_error``) and ``why``; ``file`` where
        the frame was replayed; the times
        ``captured_ns``, ``received_ns``, ``durable_ns`` (Unix time), ``planned_s``,
        ``actual_s``; ``exposure_ms``, ``z_um``, ``z_offset_um``; and the estimate:
        ``level``, ``defocus_um``, ``signed`` (False: a distance without a side),
        ``confidence``, ``foreground``; and the frame's ``expected_error_counts``.
        Unknown numbers are NaN, whole ones -1 (``level``: the smallest int32), all
        else None.

        Raises
        ------
        WriterError
            If the journal cannot be read.
        """
        types = [(name, dtype) for name, dtype, _ in NUMBERS]
        objects = [(name, object) for name in _OBJECTS]
        path = self.folder / JOURNAL_NAME
        try:
            rows = [_row(line) for line in read_journal(path)]
            return np.array(rows, dtype=[*types, *objects])
        except (
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            OverflowError,
        ) as error:
            msg = (
                f"journal '{path}' has a line that is of no frame ({error}); run: "
                f"rtfocus check {self.folder} --repair"
            )
            raise WriterError(msg) from error

    @property
    def report(self) -> dict[str, Any] | None:
        """``report.json``: accounting, throughput, stage times; None: not finished.

        Raises
        ------
        WriterError
            If it is there and cannot be read.
        """
        return report_of(self.folder) if is_finished(self.folder) else None

    @property
    def outcome(self) -> Outcome | None:
        """Whether everything planned is there; None: not finished."""
        report = self.report
        return None if report is None else Outcome.of_report(report)


def _row(line: Line) -> tuple[Any, ...]:
    """Return the columns of one line of the journal."""
    place = line.get("index")
    known = line if place is None else line | complete(place)
    known = known | (line.get("estimate") or {})
    numbers = (
        unknown if known.get(name) is None else known[name]
        for name, _, unknown in NUMBERS
    )
    why = next((line[k] for k in ("error", "reason", "skipped") if line.get(k)), None)
    objects = (known.get("signed"), line["status"], line.get("role"), why)
    return (*numbers, *objects, line.get("file"))


def _few(names: tuple[str, ...]) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:8]) or "none"
    return listed if len(names) <= 8 else f"{listed} and {len(names) - 8} more"
