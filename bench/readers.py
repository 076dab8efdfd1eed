"""Readers: which programs open a run folder's images and its exports, really tried.

python -m bench.readers [--out FILE]

For every library that is installed: a run of one position, of several, and of a plate,
each as recorded and as exported, is opened through the library's own front door; one
plane of every position is compared with what was recorded. What is not installed is
left out: iohub needs an environment of its own, with Zarr 2.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

SHAPE = (96, 128)
PLACE = (1, 1, 0)
"""(t, c, z) of the plane that is compared."""

Planes = dict[int, "np.ndarray[Any, Any]"]
"""By position."""


@dataclass(frozen=True)
class Layout:
    """Where the positions of a run lie."""

    name: str
    positions: tuple[dict[str, Any], ...]
    paths: tuple[str, ...]
    """Of each position's image inside the OME-Zarr."""
    grid: tuple[tuple[int, int, int], ...] = ()
    """Position, row, column of the fields in a mosaic of a plate."""

    def expected(self, position: int) -> "np.ndarray[Any, Any]":
        """Return the plane at `PLACE`."""
        t, c, z = PLACE
        return pixels(t, position, c, z)


LAYOUTS = (
    Layout("single", ({"name": "site"},), ("",)),
    Layout(
        "positions",
        (
            {"name": "left", "x_um": 0.0, "y_um": 0.0},
            {"name": "right", "x_um": 50.0, "y_um": 0.0},
        ),
        ("0", "1"),
    ),
    Layout(
        "plate",
        (
            {"name": "B03 0", "plate_row": "B", "plate_column": "03", "field": 0},
            {"name": "B03 1", "plate_row": "B", "plate_column": "03", "field": 1},
            {"name": "C11", "plate_row": "C", "plate_column": "11"},
        ),
        ("B/03/0", "B/03/1", "C/11/0"),
        ((0, 0, 0), (2, 1, 1)),
    ),
)
FORMS = ("as recorded", "exported 0.5", "exported 0.4")


def pixels(t: int, p: int, c: int, z: int) -> "np.ndarray[Any, Any]":
    """Return a plane that no other place has."""
    number = ((t * 3 + p) * 2 + c) * 2 + z
    values = np.arange(SHAPE[0] * SHAPE[1]) * 31 + (number + 1) * 97
    return (values % 4096).astype(np.uint16).reshape(SHAPE)


def record(folder: Path, layout: Layout) -> Path:
    """Record a run of 2 time points, 2 channels, 2 slices."""
    from rtfocus.channel import Channel
    from rtfocus.config.sections import StoreConfig
    from rtfocus.frame import (
        FrameHeader,
        FrameResult,
        Position,
        SeriesEnd,
        SeriesStart,
        SlotPool,
    )
    from rtfocus.metrics import Accounting
    from rtfocus.writers.run import open_writer

    series = SeriesStart(
        version=1,
        series_uid=layout.name,
        name=layout.name,
        started_ns=time.time_ns(),
        shape=SHAPE,
        dtype="<u2",
        sizes={"t": 2, "p": len(layout.positions), "c": 2, "z": 2},
        channels=[Channel("DAPI"), Channel("FITC")],
        positions=[Position(**one) for one in layout.positions],
        pixel_size_um=0.325,
        z_step_um=1.0,
        bit_depth=12,
    )
    pool = SlotPool(8, SHAPE[0] * SHAPE[1] * 2)
    accounting = Accounting()
    places = list(np.ndindex(2, len(layout.positions), 2, 2))
    accounting.set_acquired(len(places))
    with open_writer(
        folder,
        series,
        StoreConfig(min_free_mb=0, restored=False),
        grid=None,
        accounting=accounting,
        on_durable=lambda _: None,
        on_free=pool.release,
        provenance={},
    ) as writer:
        for sequence, (t, p, c, z) in enumerate(places):
            slot = pool.acquire(timeout_s=20)
            assert slot is not None
            header = FrameHeader(
                version=1,
                series_uid=series.series_uid,
                sequence=sequence,
                shape=SHAPE,
                dtype="<u2",
                captured_ns=time.time_ns(),
                exposure_ms=5.0,
                index={"t": t, "p": p, "c": c, "z": z},
            )
            slot.prepare(header)[...] = pixels(t, p, c, z)
            slot.received_ns = time.perf_counter_ns()
            writer.append(slot, FrameResult(None, None, None))
        end = SeriesEnd(1, series.series_uid, len(places), "completed")
        return writer.close(end, {})


def stores(folder: Path, layout: Layout) -> dict[str, Path]:
    """Make a run and its exports; returns the OME-Zarr of each of `FORMS`."""
    from rtfocus.exports import RunExport
    from rtfocus.runs import open_run

    run = record(folder / f"{layout.name}.rtfocus", layout)
    found = {FORMS[0]: run / "raw.ome.zarr"}
    numbers: tuple[Literal["0.5", "0.4"], ...] = ("0.5", "0.4")
    for form, number in zip(FORMS[1:], numbers, strict=True):
        output = folder / f"{layout.name}-{number}.ome.zarr"
        RunExport(open_run(run), output, zarr_version=number).write()
        found[form] = output
    return found


# -- the readers --------------------------------------------------------------------


def with_zarr(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through zarr-python."""
    import zarr

    root = zarr.open_group(store, mode="r")
    arrays: list[Any] = [root[f"{path}/0".lstrip("/")] for path in layout.paths]
    return {p: np.asarray(a[PLACE]) for p, a in enumerate(arrays)}, "all"


def with_tensorstore(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through tensorstore."""
    import tensorstore as ts

    is_new = (store / "zarr.json").is_file()
    planes = {}
    for p, path in enumerate(layout.paths):
        place = {"driver": "file", "path": str(store / path / "0")}
        driver = "zarr3" if is_new else "zarr"
        array = ts.open({"driver": driver, "kvstore": place}, read=True).result()
        planes[p] = array[PLACE].read().result()
    return planes, "all"


def with_dask(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through dask.array."""
    import dask.array as da

    arrays = [da.from_zarr(str(store / path / "0")) for path in layout.paths]
    return {p: np.asarray(a[PLACE]) for p, a in enumerate(arrays)}, "all"


def with_yaozarrs(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through yaozarrs, which validates it first."""
    import yaozarrs

    yaozarrs.validate_zarr_store(str(store))
    group = yaozarrs.open_group(str(store))
    planes = {}
    for p, path in enumerate(layout.paths):
        array: Any = group[f"{path}/0".lstrip("/")].to_zarr_python()
        planes[p] = np.asarray(array[PLACE])
    return planes, "valid; all"


def with_ome_zarr_models(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through ome-zarr-models, whose models validate it."""
    import zarr
    from ome_zarr_models import open_ome_zarr
    from ome_zarr_models.v05.bioformats2raw import BioFormats2Raw

    root = zarr.open_group(store, mode="r")
    is_collection = layout.name == "positions" and root.metadata.zarr_format == 3
    if is_collection:
        # `open_ome_zarr` does not try this model of its own for version 0.5.
        BioFormats2Raw.from_zarr(root)
    else:
        open_ome_zarr(root)
    planes = {}
    for p, path in enumerate(layout.paths):
        image: Any = root[path] if path else root
        open_ome_zarr(image)
        planes[p] = np.asarray(image["0"][PLACE])
    how = "valid, named as `BioFormats2Raw`; all" if is_collection else "valid; all"
    return planes, how


def with_ome_zarr(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through ome-zarr-py, which shows the first fields of a plate as a mosaic."""
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    def opened(path: Path) -> list[Any]:
        # The version is found by itself, and wondered at where it is not the newest.
        return list(Reader(parse_url(path))())

    nodes = opened(store)
    if layout.grid:
        return _cut(nodes[0].data[0], layout), "first field of each well"
    if nodes:
        return {0: np.asarray(nodes[0].data[0][PLACE])}, "all"
    found = [opened(store / path)[0].data[0] for path in layout.paths]
    return {
        p: np.asarray(a[PLACE]) for p, a in enumerate(found)
    }, "one by one: `/0`, `/1`"


def with_napari_ome_zarr(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through the reader of the napari plugin."""
    from napari_ome_zarr import napari_get_reader

    reader = napari_get_reader(str(store))
    layers = [data[0] if isinstance(data, list) else data for data, *_ in reader(store)]
    if layout.grid:
        return _cut(layers[0], layout), "first field of each well"
    return {p: np.asarray(one[PLACE]) for p, one in enumerate(layers)}, "all"


def with_iohub(store: Path, layout: Layout) -> tuple[Planes, str]:
    """Through iohub, which knows no collections."""
    from iohub import open_ome_zarr

    planes = {}
    if layout.grid:
        with open_ome_zarr(store, mode="r") as plate:
            images = dict(plate.positions())
            for p, path in enumerate(layout.paths):
                planes[p] = np.asarray(images[path][0][PLACE])
        return planes, "all"
    for p, path in enumerate(layout.paths):
        with open_ome_zarr(store / path, mode="r") as image:
            planes[p] = np.asarray(image[0][PLACE])
    return planes, "all" if layout.name == "single" else "one by one: `/0`, `/1`"


def _cut(mosaic: Any, layout: Layout) -> Planes:
    """Return the fields of a plate that a mosaic shows."""
    plane = np.asarray(mosaic[PLACE])
    height, width = SHAPE
    return {
        p: plane[row * height : (row + 1) * height, column * width :][:, :width]
        for p, row, column in layout.grid
    }


READERS: dict[str, Callable[[Path, Layout], tuple[Planes, str]]] = {
    "zarr": with_zarr,
    "tensorstore": with_tensorstore,
    "dask": with_dask,
    "yaozarrs": with_yaozarrs,
    "ome-zarr-models": with_ome_zarr_models,
    "ome-zarr": with_ome_zarr,
    "napari-ome-zarr": with_napari_ome_zarr,
    "iohub": with_iohub,
}
"""By the name of their package."""


def installed(package: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tried(reader: str, store: Path, layout: Layout) -> str:
    """Say how a reader opens a store; raises what the reader raises.

    Raises
    ------
    AssertionError
        If it shows other pixels than were recorded.
    """
    with _in_one_thread():
        planes, how = READERS[reader](store, layout)
    for p, plane in planes.items():
        assert np.array_equal(plane, layout.expected(p)), f"other pixels at {p}"
    return how


def _in_one_thread() -> AbstractContextManager[Any]:
    """Let dask, which some readers read through, start no threads that outlive it."""
    if installed("dask") is None:
        return nullcontext()
    import dask

    return dask.config.set(scheduler="synchronous")


@dataclass
class Table:
    """What every reader makes of every store."""

    versions: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, str]] = field(default_factory=dict)

    def fill(self, made: dict[str, dict[str, Path]]) -> None:
        """Try everything that is installed."""
        for reader in READERS:
            if (release := installed(reader)) is None:
                continue
            self.versions[reader] = release
            self.cells[reader] = {
                f"{layout.name}, {form}": _said(reader, made[layout.name][form], layout)
                for layout in LAYOUTS
                for form in FORMS
            }


def _said(reader: str, store: Path, layout: Layout) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tried(reader, store, layout)
    except Exception as error:  # what it says is the finding
        text = " ".join(str(error).split())[:120]
        return f"no: {type(error).__name__}: {text}"


def main() -> None:
    """Make the stores, or take those of an earlier call, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON with versions and cells")
    parser.add_argument("--keep", type=Path, help="make the stores here, and stop")
    parser.add_argument("--at", type=Path, help="take the stores that lie here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.at or options.keep or Path(scratch)
        if options.at is None:
            made = {one.name: stores(folder, one) for one in LAYOUTS}
            if options.keep is not None:
                return
        else:
            # Without rtfocus: where iohub is, there is no Zarr 3.
            made = {
                one.name: {
                    FORMS[0]: folder / f"{one.name}.rtfocus" / "raw.ome.zarr",
                    FORMS[1]: folder / f"{one.name}-0.5.ome.zarr",
                    FORMS[2]: folder / f"{one.name}-0.4.ome.zarr",
                }
                for one in LAYOUTS
            }
        table = Table()
        table.fill(made)
    for reader, cells in table.cells.items():
        print(f"{reader} {table.versions[reader]}")
        for place, said in cells.items():
            print(f"  {place}: {said}")
    if options.out is not None:
        found = {"versions": table.versions, "cells": table.cells}
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
