"""Exports: a run for other programs, as OME-TIFF or plain OME-Zarr; its frames as CSV.

What the journal knows of a frame, its time, exposure and z, goes into the OME-XML; what
is missing is said, not made up.
"""

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import IncompleteError, InputError, number_of
from rtfocus.images.metadata import OutputImage, PlaneFacts, table_text
from rtfocus.images.ome_zarr import read_ome_zarr
from rtfocus.images.outputs import ImageOutput, OutputGuard
from rtfocus.images.series import ImageSeries, StagePosition
from rtfocus.images.zarr_writing import ZarrForm
from rtfocus.runs import NUMBERS, Kind, Run
from rtfocus.writers.arrays import list_shards
from rtfocus.writers.header import (
    INNER,
    JOURNAL_NAME,
    SIGN,
    ImageSpec,
    image_specs,
    is_finished,
)
from rtfocus.writers.journal import WRITTEN, Line, journal_lines
from rtfocus.writers.layout import image_groups, store_path
from rtfocus.writers.places import Plan, complete

_KINDS = get_args(Kind)
_MOST_NAMED = 20
_GONE = "whose file is gone"
_UNSIGNED = "distance from focus, without a sign"

Place = tuple[int, int, int, int]
"""(p, t, c, z)"""


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    files: list[Path]
    images: list[ImageSeries]
    empty: dict[str, dict[str, int]]
    """By image name and reason: planes that hold nothing, 0 or in maps NaN."""

    @property
    def gone(self) -> int:
        """Planes that were recorded, and whose files are gone since."""
        return sum(reasons.get(_GONE, 0) for reasons in self.empty.values())


class RunExport:
    """An export, checked before the first pixel is read.

    Parameters
    ----------
    run
        A finished run.
    output
        By its ending: ``.ome.tif``: one file, an image series for each position and
        kind; ``.ome.zarr``: unsharded, with a pyramid; none: a folder with an OME-TIFF
        for each.
    kinds
        Of `Run.kinds`; empty: all of them.
    zarr_version
        Of an OME-Zarr.
    overwrite
        Replace an earlier result of rtfocus.

    Raises
    ------
    InputError
        If the run is not finished, or has no such image.
    OutputError
        If the output must not be replaced, cannot be written, or cannot hold this.
    """

    def __init__(
        self,
        run: Run,
        output: Path,
        *,
        kinds: Sequence[Kind] = (),
        zarr_version: Literal["0.5", "0.4"] = "0.5",
        overwrite: bool = False,
    ) -> None:
        self._run = run
        self._kinds = _existing(run, kinds)
        known = [spec.name for spec in image_specs(run.header) if spec.name in _KINDS]
        self.lost = [] if kinds else [one for one in known if one not in self._kinds]
        """Images that the run had, and whose files are gone."""
        self._form = ZarrForm(version=zarr_version, pyramid=True)
        self._journal = _Journal(run)
        self._specs = {spec.name: spec for spec in image_specs(run.header)}
        specs = [self._specs[kind] for kind in self._kinds]
        self.images = [image for spec in specs for image in _series(run, spec)]
        """In the order in which they are written, position by position of each kind."""
        guard = OutputGuard([run.folder], overwrite=overwrite)
        self._output = ImageOutput(output, self.images, guard, run.folder)
        if self._output.ending == ".zarr":
            self._refuse_two_kinds_of_wells()

    @property
    def planes(self) -> int:
        """Number of planes that will be written."""
        return sum(map(len, self.images))

    def write(self, on_plane: Callable[[], None] = lambda: None) -> Exported:
        """Write everything, each target whole.

        Raises
        ------
        InputError
            If a plane cannot be read.
        IncompleteError
            If so, and other files of a folder are written.
        OutputError
            If the disk refuses it.
        """
        positions = len(self._run.positions)
        kinds = [kind for kind in self._kinds for _ in range(positions)]
        outputs, empty = [], {}
        for number, (kind, image) in enumerate(zip(kinds, self.images, strict=True)):
            lacking = self._journal.lacking(kind, number % positions, image)
            if lacking:
                empty[image.name] = {why: len(of) for why, of in lacking.items()}
            outputs.append(
                OutputImage(
                    like=image,
                    dtype=image.dtype,
                    planes=self._planes(kind, image, lacking, on_plane),
                    made=self._provenance(kind, lacking),
                    taken=self._journal.taken(kind, number % positions, image),
                )
            )
        remedy = f"what is damaged says: rtfocus check {self._run.folder}"
        try:
            broken = self._output.write(outputs, self._form)
        except InputError as error:
            msg = f"{error}; {remedy}"
            raise InputError(msg) from error
        if broken:
            done, of = self._output.written(), number_of(len(outputs), "file")
            msg = f"{broken[0].reason}; {len(done)} of {of} written; {remedy}"
            raise (IncompleteError if done else InputError)(msg)
        return Exported(self._output.written(), self.images, empty)

    def _planes(
        self,
        kind: Kind,
        image: ImageSeries,
        lacking: dict[str, list[str]],
        on_plane: Callable[[], None],
    ) -> Iterator[NDArray[np.generic]]:
        nothing = np.full(image.shape, self._specs[kind].fill_value, image.dtype)
        empty = set(itertools.chain.from_iterable(lacking.values()))
        for index in image.indices():
            yield nothing if _place_text(index) in empty else image.read(**index)
            on_plane()

    def _provenance(self, kind: Kind, lacking: dict[str, list[str]]) -> dict[str, str]:
        facts = {
            "command": "export",
            "run": self._run.folder.name,
            "series": self._run.series.series_uid,
            "image": kind,
        }
        if kind == "defocus":
            grid = self._run.header.grid
            signed = grid is not None and grid.signed
            facts["unit"] = f"um, {SIGN if signed else _UNSIGNED}"
        elif kind in INNER:
            said = self._specs[kind].says
            facts["unit"] = f"{said['unit']}, {said['meaning']}"
        for why, planes in lacking.items():
            more = len(planes) - _MOST_NAMED
            named = ", ".join(planes[:_MOST_NAMED])
            facts[f"planes {why}"] = named + (f" and {more} more" if more > 0 else "")
        return facts

    def _refuse_two_kinds_of_wells(self) -> None:
        if len(self._kinds) > 1 and self.images[0].place is not None:
            options = " or ".join(f"--image {kind}" for kind in self._kinds)
            msg = (
                f"a plate as OME-Zarr holds one image of each field; give {options}, "
                "or write .ome.tif"
            )
            raise InputError(msg)


def write_table(run: Run, output: Path, *, overwrite: bool = False) -> int:
    """Write a row per frame as CSV, in marked UTF-8; return the number of frames.

    Columns are ``time_s`` since the first frame, the names of position and channel,
    and those of `Run.frames`. What is unknown is empty. Also of an unfinished run.

    Raises
    ------
    OutputError
        If the output must not be replaced, or cannot be written.
    WriterError
        If the journal cannot be read.
    """
    guard = OutputGuard([run.folder], overwrite=overwrite)
    guard.claim(output)
    frames, unknown = run.frames, {name: value for name, _, value in NUMBERS}
    columns = frames.dtype.names or ()
    captured = [int(ns) for ns in frames["captured_ns"] if ns != unknown["captured_ns"]]
    first_ns = min(captured, default=0)
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["time_s", "position", "channel", *columns])
    for frame in frames.tolist():
        # NaN alone differs from itself.
        row = {
            name: None if value == unknown.get(name) or value != value else value
            for name, value in zip(columns, frame, strict=True)
        }
        ns, p, c = row["captured_ns"], row["p"], row["c"]
        seconds = None if ns is None else round((ns - first_ns) / 1e9, 6)
        position = None if p is None else run.positions[p]
        channel = None if c is None else run.channels[c]
        table.writerow([seconds, position, channel, *row.values()])
    with guard.whole(output) as part:
        part.write_text(table_text(file.getvalue()), "utf-8", newline="")
    return len(frames)


def _existing(run: Run, kinds: Sequence[Kind]) -> list[Kind]:
    """Return the kinds to export; refuse a run that is not finished."""
    if not is_finished(run.folder):
        msg = (
            f"'{run.folder}' is not finished; wait for its end, or where it was cut "
            f"off run: rtfocus check {run.folder} --repair"
        )
        raise InputError(msg)
    there = run.kinds
    requested = kinds or there or ("raw",)
    for kind in requested:
        if kind not in there:
            named = ", ".join(there) or "none that can be read"
            msg = f"'{run.folder}' has no image '{kind}'; it has {named}"
            raise InputError(msg)
    return list(dict.fromkeys(requested))


def _series(run: Run, spec: ImageSpec) -> list[ImageSeries]:
    """Return the images of all positions in their order, with what the run knows."""
    series = run.series
    optics = [channel.optics for channel in series.channels]
    first = next((known for known in optics if known is not None), None)
    named = []
    origin_um = spec.origin_um
    for position, image in zip(
        series.positions, _images_by_position(run, spec), strict=True
    ):
        stage = StagePosition(x_um=position.x_um, y_um=position.y_um)
        repeated = image.sizes["c"] // len(optics)
        waves = [None if known is None else known.wavelength_nm for known in optics]
        emission = [nm for nm in waves for _ in range(repeated)]
        channels = tuple(
            replace(channel, emission_nm=nm)
            # The description of the channels may have been removed.
            for channel, nm in zip(image.channels, emission, strict=False)
        )
        named.append(
            replace(
                image,
                name=f"{position.name} {spec.name}",
                files=(run.folder,),
                channels=channels,
                z_step_um=series.z_step_um,
                time_step_s=series.interval_s,
                position=position.name,
                place=image.place and replace(image.place, field=position.field),
                stage=stage.moved(origin_um, origin_um) if origin_um else stage,
                numerical_aperture=None if first is None else first.numerical_aperture,
                refractive_index=None if first is None else first.refractive_index,
            )
        )
    return named


def _images_by_position(run: Run, spec: ImageSpec) -> list[ImageSeries]:
    """Return the images by index p; maps inside the defocus lie at its wells."""
    outer = _by_position(run, read_ome_zarr(store_path(run.folder, spec.name)))
    if spec.name not in INNER:
        return outer
    groups = image_groups(run.folder, run.header, spec)
    # A folder's files are called after the path, which all positions share.
    path = run.folder / spec.name
    return [
        replace(image, path=path, place=around.place)
        for group, around in zip(groups, outer, strict=True)
        for image in read_ome_zarr(group)
    ]


def _by_position(run: Run, images: list[ImageSeries]) -> list[ImageSeries]:
    """Return images by index p; those of a plate are read well by well."""
    if len(images) != len(run.positions):
        msg = (
            f"'{run.folder}' has {len(images)} images, not {len(run.positions)} as its "
            f"positions; look at it with: rtfocus check {run.folder}"
        )
        raise InputError(msg)
    if images[0].place is None:
        return images
    places = {
        (
            place.rows[place.row],
            place.columns[place.column],
            image.name.rpartition("_")[2],
        ): image
        for image in images
        if (place := image.place) is not None
    }
    return [
        places[one.plate_row or "", one.plate_column or "", str(one.field)]
        for one in run.series.positions
    ]


def _place_text(index: dict[str, int]) -> str:
    return f"t={index['t']} c={index['c']} z={index['z']}"


def _why_empty(kind: Kind, line: Line) -> str:
    """Say why a frame has left a plane empty, from its line; empty: no frame came."""
    if not line:
        return "without a frame"
    if kind == "restored" or (kind == "expected_error" and line.get("skipped")):
        return "not restored"
    # Of what a repair found again it is not known what engines said.
    if not line.get("engines"):
        return "not processed"
    return "of which the engine states none"


class _Journal:
    """What the journal says of the frames of a run, by place."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._colours = run.header.planes
        self._started_ns = run.series.started_ns
        self._lines: dict[Place, Line] = {}
        path = run.folder / JOURNAL_NAME
        for line in journal_lines(path, Plan(run.series)):
            if line["status"] == WRITTEN:
                index = complete(line["index"])
                place = (index["p"], index["t"], index["c"], index["z"])
                self._lines[place] = line

    def lacking(
        self, kind: Kind, position: int, image: ImageSeries
    ) -> dict[str, list[str]]:
        """Name the planes of an image that hold nothing, by the reason."""
        there = self._with_files(kind, position)
        missing: dict[str, list[str]] = {}
        for index in image.indices():
            line = self._line(kind, position, index)
            why = None
            if kind not in line.get("stored", ()):
                why = _why_empty(kind, line)
            elif (index["t"], self._channel(kind, index), index["z"]) not in there:
                why = _GONE
            if why is not None:
                missing.setdefault(why, []).append(_place_text(index))
        return missing

    def _with_files(self, kind: Kind, position: int) -> set[tuple[int, int, int]]:
        """Return t, c and z of what may be read: of a file that is gone comes fill."""
        folder, header = self._run.folder, self._run.header
        spec = next(one for one in image_specs(header) if one.name == kind)
        array = image_groups(folder, header, spec)[position] / "0"
        shards = list_shards(array, header.store.shard_frames)
        return {(t, shard.c, shard.z) for shard in shards for t in shard.times}

    def taken(self, kind: Kind, position: int, image: ImageSeries) -> list[PlaneFacts]:
        """Return when and where the planes of an image were taken."""
        return [
            self._facts(self._line(kind, position, index)) for index in image.indices()
        ]

    def _line(self, kind: Kind, position: int, index: dict[str, int]) -> Line:
        place = position, index["t"], self._channel(kind, index), index["z"]
        return self._lines.get(place, {})

    def _channel(self, kind: Kind, index: dict[str, int]) -> int:
        """Return the channel of a plane: its colours are planes of their own."""
        return index["c"] // (self._colours if kind in ("raw", "restored") else 1)

    def _facts(self, line: Line) -> PlaneFacts:
        captured_ns = line.get("captured_ns")
        since_ns = None if captured_ns is None else captured_ns - self._started_ns
        return PlaneFacts(
            # A clock that was set back in between says nothing.
            delta_s=since_ns / 1e9 if since_ns is not None and since_ns >= 0 else None,
            exposure_ms=line.get("exposure_ms"),
            z_um=line.get("z_um"),
        )
