"""Batches: many processes do what one would, whoever is killed or lacks something."""

import csv
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
import yaozarrs
import zarr
from batch_kit import (
    OPTICS,
    WIENER,
    picture,
    two_workers,
    write_folder,
    write_pairs,
    write_plate,
)
from engine_kit import write_brightness_joint
from filelock import FileLock
from image_file_kit import files_up_to
from loop_kit import command, failed, succeeded
from transport_kit import until

from rtfocus.batch.ends import Batch
from rtfocus.batch.plan import Failure, Ledger, Unit
from rtfocus.batch.scheduler import run_on
from rtfocus.batch.work import close_opened, doing, run_unit
from rtfocus.errors import ConfigError, ExitCode, IncompleteError
from rtfocus.files import resource_folder, whole
from rtfocus.images.series import ImageSeries

distributed = pytest.importorskip("distributed", reason="needs rtfocus[batch]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six TIFFs in two folders."""
    return write_folder(tmp_path / "in")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six fields sharp and blurred, with optics beside them."""
    return write_pairs(tmp_path / "mine")


@pytest.fixture
def plate(tmp_path: Path) -> Path:
    """Two wells of two fields."""
    return write_plate(tmp_path / "plate.zarr")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers."""
    with two_workers() as address:
        yield address


def worker_of(address: str, *more: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a worker, a process that nobody starts again."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "distributed.cli.dask_worker", address),
            *("--no-nanny", "--no-dashboard", "--nthreads", "1", *more),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


@contextmanager
def scheduler_without_workers() -> Iterator[str]:
    with distributed.LocalCluster(
        n_workers=0, dashboard_address="127.0.0.1:0", silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def wait_for_workers(address: str, number: int) -> None:
    with distributed.Client(address) as client:
        client.wait_for_workers(number, timeout=60)


def files_of(root: Path) -> dict[str, bytes]:
    """Return every file below a folder, or the file itself."""
    if root.is_file():
        return {"": root.read_bytes()}
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def assert_nothing_left(output: Path) -> None:
    assert [p.name for p in output.parent.iterdir() if "rtfocus" in p.name] == []


@pytest.mark.parametrize("name", ["out", "out.ome.zarr"])
def test_many_processes_write_what_one_writes(
    folder: Path, plate: Path, tmp_path: Path, address: str, name: str
) -> None:
    for source in (folder, plate):
        one, many = (tmp_path / f"{n} {source.name}" / name for n in ("one", "many"))
        succeeded(command("restore", source, "-o", one, *WIENER))
        said = succeeded(
            command("restore", source, "-o", many, *WIENER, "--scheduler", address)
        )
        assert "images; state in" in said
        assert files_of(one) == files_of(many)
        assert_nothing_left(many)
        if many.suffix == ".zarr":
            yaozarrs.validate_zarr_store(many)
        refused = failed(
            command("restore", source, "-o", many, *WIENER, "--scheduler", address)
        )
        assert "exists" in refused


@pytest.fixture
def stating(tmp_path: Path) -> tuple[str, ...]:
    """Options of an engine that states the error it leaves."""
    write_brightness_joint(tmp_path / "engines/weighed", share=0.25, log_error=-4.0)
    processing = {
        "blind": True,
        "classifier": "weighed",
        "restoration": {"method": "weighed"},
        "engine_folders": [str(tmp_path / "engines")],
    }
    config = tmp_path / "stating.yaml"
    config.write_text(json.dumps({"processing": processing}))
    return (*OPTICS, "--config", str(config))


@pytest.mark.parametrize("errors", ["errors", "errors.ome.zarr"])
def test_many_processes_state_the_errors_that_one_states(
    folder: Path,
    plate: Path,
    tmp_path: Path,
    address: str,
    stating: tuple[str, ...],
    errors: str,
) -> None:
    places = {}
    for n, more in (("one", ()), ("many", ("--scheduler", address))):
        for source, out in ((folder, "out"), (plate, "out.ome.zarr")):
            place = tmp_path / f"{n} {source.name}"
            asked = ("-o", place / out, "--expected-error", place / errors, *stating)
            said = command("restore", source, *asked, *more)
            succeeded(said)
            assert f"expected error: {place / errors}" in said.err
            places[n, source] = place
            assert_nothing_left(place / out)
    for source in (folder, plate):
        found = files_of(places["many", source])
        assert len([name for name in found if name.startswith("errors")]) > 3
        assert found == files_of(places["one", source])


def test_a_job_array_states_errors_and_goes_without_what_cannot_be_read(
    folder: Path, tmp_path: Path, stating: tuple[str, ...]
) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors.ome.zarr"
    broken, sound = folder / "f1.tif", (folder / "f1.tif").read_bytes()
    broken.write_bytes(sound[: len(sound) // 2])
    asked = ("restore", folder, "-o", out, *stating)
    stated = (*asked, "--expected-error", errors)
    errors.mkdir()
    assert "was not written by rtfocus" in failed(command(*stated, "--init"))
    errors.rmdir()
    succeeded(command(*stated, "--init"))
    said = failed(command(*asked, "--unit", "1/2"))
    assert "was begun with other expected error; --unit and --finish take" in said
    for part in ("1/2", "2/2"):
        command(*stated, "--unit", part)
    failed(command(*stated, "--finish"), ExitCode.INCOMPLETE)
    yaozarrs.validate_zarr_store(str(errors))
    names = [
        zarr.open_group(errors / str(n), mode="r").attrs["ome"]["multiscales"][0][
            "name"
        ]
        for n in range(5)
    ]
    assert names == [f"f{n} expected error" for n in (4, 5, 0, 2, 3)]
    # Mended, the same commands add what was missing.
    broken.write_bytes(sound)
    for step in (("--init",), ("--unit", "1/1"), ("--finish",)):
        succeeded(command(*stated, *step))
    one = tmp_path / "one.ome.zarr"
    whole = ("-o", tmp_path / "one", "--expected-error", one)
    succeeded(command("restore", folder, *whole, *stating))
    assert files_of(errors) == files_of(one)
    assert_nothing_left(out)


def test_classify_and_a_single_file(folder: Path, tmp_path: Path, address: str) -> None:
    many = ("--scheduler", address)
    for name, more in (("one.json", ()), ("many.json", many)):
        succeeded(
            command("classify", folder, *OPTICS, "--json", tmp_path / name, *more)
        )
    assert files_of(tmp_path / "one.json") == files_of(tmp_path / "many.json")
    source = folder / "f0.tif"
    for name, more in (("one.tif", ()), ("many.tif", many)):
        succeeded(command("restore", source, "-o", tmp_path / name, *WIENER, *more))
    assert files_of(tmp_path / "one.tif") == files_of(tmp_path / "many.tif")
    said = failed(command("restore", folder, "-o", tmp_path / "x.tif", *WIENER, *many))
    assert "would hold 6 images" in said
    assert "--json FILE" in failed(command("classify", folder, *OPTICS, *many))


def table_of(path: Path) -> list[dict[str, str]]:
    """Read a table as a spreadsheet does: with or without a mark, and names quoted."""
    text = path.read_bytes().decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def damaged(field: Path) -> Path:
    """Put something else in the place of a field's pixels; return their file."""
    files = [path for path in (field / "0").rglob("*") if path.is_file()]
    (chunk,) = (path for path in files if path.name[0] not in ".z")
    chunk.write_bytes(b"broken")
    return chunk


def test_the_table_of_a_plate_is_the_same_by_every_door(
    plate: Path, tmp_path: Path, address: str
) -> None:
    damaged(plate / "A/3/1")
    asked = ("classify", plate, *OPTICS)
    for name, more in (("one", ()), ("many", ("--scheduler", address))):
        both = ("--json", tmp_path / f"{name}.json", "--csv", tmp_path / f"{name}.csv")
        said = failed(command(*asked, *both, *more), ExitCode.INCOMPLETE)
        assert "1 image" in said
        assert_nothing_left(tmp_path / "many.json")
    alone = ("--csv", tmp_path / "array.csv")
    succeeded(command(*asked, *alone, "--init"))
    command(*asked, *alone, "--unit", "1/1")
    other = ("--json", tmp_path / "array.json", *alone, "--finish")
    assert "no batch was begun" in failed(command(*asked, *other))
    failed(command(*asked, *alone, "--finish"), ExitCode.INCOMPLETE)
    assert_nothing_left(tmp_path / "array.csv")
    json_file, table = ((tmp_path / "one").with_suffix(x) for x in (".json", ".csv"))
    assert json_file.read_bytes() == (tmp_path / "many.json").read_bytes()
    assert table.read_bytes() == (tmp_path / "many.csv").read_bytes()
    assert table.read_bytes() == (tmp_path / "array.csv").read_bytes()


def test_a_table_says_of_every_plane_what_the_json_says(
    plate: Path, tmp_path: Path
) -> None:
    chunk = plate / "A/3/1/0"
    whole = zarr.open_array(chunk, mode="r")[...]
    damaged(plate / "A/3/1")
    json_file, table = tmp_path / "found.json", tmp_path / "found.csv"
    asked = ("classify", plate, *OPTICS, "--csv", table)
    failed(command(*asked, "--json", json_file), ExitCode.INCOMPLETE)
    found = json.loads(json_file.read_text("utf-8"))
    *rows, broken = table_of(table)
    fields = [(row["well"], row["field"]) for row in rows]
    assert fields == [("A3", "0"), ("B3", "0"), ("B3", "1")]
    for row, image in zip(rows, found["images"], strict=True):
        assert_same(row, image)
    assert (broken["well"], broken["field"], broken["status"]) == ("A3", "1", "broken")
    assert (broken["level"], broken["t"], broken["foreground"]) == ("", "", "")
    assert broken["why"] == found["broken"][0]
    assert "cannot be read" in broken["why"]

    # Mended, a later call replaces its own table and nobody else's.
    zarr.open_array(chunk, mode="r+")[...] = whole
    assert "exists" in failed(command(*asked))
    succeeded(command(*asked, "--overwrite"))
    assert [row["status"] for row in table_of(table)] == ["classified"] * 4
    table.write_text("image,mine\n", "utf-8")
    for more in ((), ("--init",)):
        said = failed(command(*asked, "--overwrite", *more))
        assert "was not written by rtfocus" in said


def assert_same(row: dict[str, str], image: dict[str, Any]) -> None:
    """Compare a row of a table with what the JSON says of a field's plane."""
    assert (row["image"], row["plate"]) == ("plate.zarr", "screen")
    assert (row["name"], row["well"]) == (image["name"], image["well"])
    assert (row["t"], row["c"], row["z"]) == ("0", "0", "0")
    for key in ("level", "defocus_um", "signed", "confidence"):
        assert row[key] == str(image["estimate"][key])
    there = [tile for tile in image["tiles"] if tile["level"] is not None]
    off = sum(tile["level"] != 0 for tile in there)
    assert float(row["foreground"]) == len(there) / len(image["tiles"])
    assert float(row["out_of_focus"]) == off / len(there)
    stated = [tile["uncertainty_um"] for tile in there]
    assert float(row["uncertainty_um"]) == pytest.approx(np.median(stated))
    assert row["classifier"].startswith("delpnet@")
    assert "NA=0.75" in row["optics"]
    assert (row["channel"], row["z_um"], row["why"]) == ("", "", "")
    assert row["status"] == "classified"


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_names_in_a_table_are_those_of_the_files_as_far_as_text_can_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('Größe "µ", 1.tif', "two\nlines.tif", "no\udcfftext.tif"):
        tifffile.imwrite(folder / "day.1" / "new.tif", picture(7))
        (folder / "day.1" / "new.tif").rename(folder / name)
    (folder / "f1.tif").write_bytes(b"no TIFF")
    monkeypatch.chdir(tmp_path)
    asked = ("classify", folder.name, *OPTICS, "--csv")
    names = {'Größe "µ", 1.tif', "two\nlines.tif", "no\ufffdtext.tif", "day.1/f4.tif"}
    failed(command(*asked, "all.csv"), ExitCode.INCOMPLETE)
    assert names < {row["image"] for row in table_of(tmp_path / "all.csv")}
    refused = failed(command(*asked, "many.csv", "--init"), ExitCode.INPUT)
    assert "no\ufffdtext.tif': a batch takes names in UTF-8" in refused
    assert_nothing_left(tmp_path / "many.csv")
    (folder / "no\udcfftext.tif").unlink()
    refused = failed(command(*asked, "m\udcff.csv", "--init"), ExitCode.INPUT)
    assert "m\ufffd.csv': a batch takes names in UTF-8" in refused
    assert_nothing_left(tmp_path / "m\udcff.csv")
    said = command(*asked, "-")
    failed(said, ExitCode.INCOMPLETE)
    for step in (("--init",), ("--unit", "1/1"), ("--finish",)):
        command(*asked, "many.csv", *step)
    assert said.out == (tmp_path / "many.csv").read_text("utf-8")
    assert "classified 7 planes to -" in said.err
    rows = {row["image"]: row for row in table_of(tmp_path / "many.csv")}
    assert rows["f1.tif"]["status"] == "broken"
    assert rows["f1.tif"]["why"].startswith("'in/f1.tif' ")
    assert rows["f0.tif"]["well"] == rows["f0.tif"]["position"] == ""
    for place in ("-", "both.txt"):
        assert "two results" in failed(command(*asked, place, "--json", place))
    twice = ("both.txt", "--json", "both.txt", "--init")
    assert "two results" in failed(command(*asked, *twice))
    assert "--csv FILE" in failed(command(*asked, "-", "--init"))
    assert "give --csv a name.csv" in failed(command(*asked, "new.tif"))


def test_a_job_array_needs_no_scheduler(plate: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.ome.zarr", tmp_path / "many.ome.zarr"
    succeeded(command("restore", plate, "-o", one, *WIENER))
    asked = ("restore", plate, "-o", many, *WIENER)
    assert "--init" in failed(command(*asked, "--unit", "1/2"))
    assert "4 images" in succeeded(command(*asked, "--init"))
    assert "no part" in failed(command(*asked, "--unit", "0/2"))
    assert "give one of" in failed(command(*asked, "--unit", "1/2", "--finish"))
    assert "2 of 2" in succeeded(command(*asked, "--unit", "1/2"))
    said = failed(command(*asked, "--finish"), ExitCode.INCOMPLETE)
    assert "2 of 4 images not done" in said
    assert said.strip().endswith("do their parts again: --unit K/N")
    assert not many.exists()
    # Planned again it is still the same, and other settings are another batch.
    assert "2 of them done before" in succeeded(command(*asked, "--init"))
    other = ("restore", plate, "-o", many, *OPTICS, "--engine", "richardson_lucy")
    assert "other settings" in failed(command(*other, "--init"))
    for step in (("--unit", "2/2"), ("--finish",)):
        said = failed(command(*other, *step))
        assert "was begun with other settings; --unit and --finish take" in said
    assert "2 of 2" in succeeded(command(*asked, "--unit", "2/2"))
    assert "4 planes of 4 images" in succeeded(command(*asked, "--finish"))
    assert files_of(one) == files_of(many)
    assert_nothing_left(many)


def test_a_store_that_takes_no_more_is_named_with_what_helps(
    plate: Path, tmp_path: Path
) -> None:
    asked = ("restore", plate, "-o", tmp_path / "many.ome.zarr", *WIENER)
    succeeded(command(*asked, "--init"))
    with files_up_to(4_000):
        said = command(*asked, "--unit", "1/1")
    failed(said, ExitCode.INCOMPLETE)
    lines = [line for line in said.err.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 4
    assert all("cannot be written: File too large; a file there" in x for x in lines)
    assert all("store.ome.zarr/" in line for line in lines)
    succeeded(command(*asked, "--unit", "1/1"))
    succeeded(command(*asked, "--finish"))


def replace_pixels(image: Path) -> None:
    """Put other pixels into a TIFF, or a field, of the same shape."""
    before = {path: path.stat() for path in image.rglob("*")}
    if image.is_file():
        before = {image: image.stat()}
        tifffile.imwrite(image, picture(99))
    else:
        zarr.open_array(image / "0", mode="r+")[:] = picture(99)
    for path, stat in before.items():
        if path.stat().st_mtime_ns == stat.st_mtime_ns and path.is_file():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize("form", ["tiff", "zarr"])
def test_pixels_that_changed_are_never_taken_for_those_that_were_done(
    folder: Path, plate: Path, tmp_path: Path, form: str
) -> None:
    source, out, one = folder, tmp_path / "out", tmp_path / "one"
    first, second = folder / "f0.tif", folder / "f1.tif"
    if form == "zarr":
        source, out, one = plate, tmp_path / "out.zarr", tmp_path / "one.zarr"
        first, second = plate / "A/3/0", plate / "A/3/1"
    asked = ("restore", source, "-o", out, *WIENER)
    succeeded(command(*asked, "--init"))
    succeeded(command(*asked, "--unit", "1/2"))
    # Done, and another image since.
    replace_pixels(first)
    said = succeeded(command(*asked, "--init"))
    assert "1 image changed since, done anew" in said
    # Planned, and another image since: nobody restores it as what was planned.
    replace_pixels(second)
    told = command(*asked, "--unit", "1/1")
    assert told.code == ExitCode.INCOMPLETE
    assert "has changed since the batch was planned; the same command" in told.err
    said = failed(command(*asked, "--finish"), ExitCode.INCOMPLETE)
    assert "1 image changed since the batch was planned" in said
    assert "changed since and" not in succeeded(command(*asked, "--init"))
    succeeded(command(*asked, "--unit", "1/1"))
    succeeded(command(*asked, "--finish"))
    succeeded(command("restore", source, "-o", one, *WIENER))
    assert files_of(one) == files_of(out)


@pytest.mark.usefixtures("as_a_worker")
def test_ctrl_c_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("restore", folder, "-o", tmp_path / "out", *WIENER)
    succeeded(command(*asked, "--init"))
    # A worker that was ended in the middle of an image.
    with whole(tmp_path / "out" / "f3.tif") as part:
        part.touch()
        ended = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"],
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout.strip()
        killed = part.with_name(part.name.replace(f"-{os.getpid()}-", f"-{ended}-"))
        killed.touch()
    (tmp_path / "out" / "f3.tif").unlink()
    read, reads = ImageSeries.read, [0]

    def read_with_ctrl_c(self: ImageSeries, **index: int) -> np.ndarray:
        reads[0] += 1
        if reads[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return read(self, **index)

    with monkeypatch.context() as patched:
        patched.setattr(ImageSeries, "read", read_with_ctrl_c)
        told = command(*asked, "--unit", "1/1")
    assert told.code == ExitCode.INTERRUPTED
    assert "4 images not done; the same command goes on from there" in told.err
    assert not killed.exists()
    assert "6 of 6" in succeeded(command(*asked, "--unit", "1/1"))


@pytest.mark.usefixtures("as_a_worker")
def test_an_image_that_changes_while_it_is_read_is_not_half_of_two(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, image = tmp_path / "out", folder / "f0.tif"
    asked = ("restore", image, "-o", out, *WIENER)
    succeeded(command(*asked, "--init"))
    plan = Ledger(out).plan()
    assert plan is not None
    read = ImageSeries.read

    def read_while_it_changes(self: ImageSeries, **index: int) -> np.ndarray:
        plane = read(self, **index)
        replace_pixels(image)
        return plane

    with monkeypatch.context() as patched:
        patched.setattr(ImageSeries, "read", read_while_it_changes)
        failure = run_unit(str(out), plan.key, plan.units[0])
    assert failure is not None
    assert failure.fault == "changed"
    assert not (out / "f0.tif").exists()


def collect(asked: tuple[Any, ...], out: Path) -> None:
    """Do all of a batch up to where its state would go."""
    succeeded(command(*asked, "--init"))
    succeeded(command(*asked, "--unit", "1/1"))
    plan = Ledger(out).plan()
    assert plan is not None
    Batch(plan.job)._collect(plan, set())


def test_classify_killed_once_its_file_was_there_ends_without_overwrite(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    asked = ("classify", folder, *OPTICS, "--json", out)
    collect(asked, out)
    written = out.read_bytes()
    # What somebody else has put there stays.
    out.write_bytes(written.replace(b"f0.tif", b"g0.tif"))
    assert "exists" in failed(command(*asked, "--finish"))
    out.write_bytes(written)
    succeeded(command(*asked, "--finish"))
    assert out.read_bytes() == written
    assert_nothing_left(out)


def test_classify_killed_between_its_two_files_ends_without_overwrite(
    folder: Path, tmp_path: Path
) -> None:
    out, table = tmp_path / "found.json", tmp_path / "found.csv"
    asked = ("classify", folder, *OPTICS, "--json", out, "--csv", table)
    collect(asked, out)
    whole = table.read_bytes()
    table.unlink()
    said = succeeded(command(*asked, "--finish"))
    assert f"classified 6 planes of 6 images to {out} and {table}" in said
    assert table.read_bytes() == whole
    assert_nothing_left(out)


def test_what_cannot_be_read_is_named_and_the_rest_done(
    folder: Path, plate: Path, tmp_path: Path, address: str
) -> None:
    many = (*WIENER, "--scheduler", address)
    # The header is whole, half of the pixels are missing.
    broken, whole = folder / "f1.tif", (folder / "f1.tif").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    (folder / "f2.tif").write_bytes(b"no TIFF")
    one, out = tmp_path / "one", tmp_path / "out"
    said = failed(command("restore", folder, "-o", out, *many), ExitCode.INCOMPLETE)
    assert "2 images not restored" in said
    assert "f1.tif" in said
    assert sorted(p.name for p in out.rglob("*.tif")) == [
        f"f{n}.tif" for n in (0, 3, 4, 5)
    ]
    kept = (out / "f0.tif").stat().st_mtime_ns
    # Mended, the same command does what is left.
    broken.write_bytes(whole)
    tifffile.imwrite(folder / "f2.tif", picture(2))
    assert "4 of them done before" in succeeded(
        command("restore", folder, "-o", out, *many)
    )
    assert (out / "f0.tif").stat().st_mtime_ns == kept
    succeeded(command("restore", folder, "-o", one, *WIENER))
    assert files_of(one) == files_of(out)

    # Of a plate the fields that can be read make a plate of their own.
    chunk = next(
        path
        for path in (plate / "A/3/1/0").rglob("*")
        if path.is_file() and not path.name.startswith((".", "zarr"))
    )
    chunk.write_bytes(b"broken")
    out = tmp_path / "out.ome.zarr"
    said = failed(command("restore", plate, "-o", out, *many), ExitCode.INCOMPLETE)
    assert "1 image not restored" in said
    found = yaozarrs.validate_zarr_store(out)
    assert found is not None
    fields = [path for path in out.rglob("zarr.json") if path.parent.parent.name == "3"]
    assert sorted(str(p.parent.relative_to(out)) for p in fields) == [
        "A/3/0",
        "B/3/0",
        "B/3/1",
    ]
    succeeded(command("restore", plate / "B/3/1", "-o", tmp_path / "b.zarr", *WIENER))
    np.testing.assert_array_equal(
        zarr.open_array(out / "B/3/1/0", mode="r")[:],
        zarr.open_array(tmp_path / "b.zarr/0", mode="r")[:],
    )
    assert_nothing_left(out)


def test_killed_workers_and_clients_cost_what_was_under_way(
    tmp_path: Path, address: str
) -> None:
    source, one, out = (tmp_path / n for n in ("in", "one.ome.zarr", "out.ome.zarr"))
    source.mkdir()
    for number in range(24):
        tifffile.imwrite(source / f"f{number}.tif", picture(number))
    asked = ("restore", str(source), "-o", str(out), *WIENER, "--scheduler", address)
    client = subprocess.Popen(
        [sys.executable, "-m", "rtfocus", *asked],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = Ledger(out).folder / "done"

    def so_many(number: int) -> bool:
        return client.poll() is not None or (
            done.is_dir() and len(list(done.iterdir())) >= number
        )

    until(lambda: so_many(1), "the first image")
    worker = next(
        process
        for process in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(process.cmdline())
    )
    worker.kill()
    until(lambda: so_many(4), "images after a worker was killed")
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    before = len(list(done.iterdir()))
    assert 4 <= before < 24
    said = succeeded(command(*asked))
    assert "of them done before" in said
    succeeded(command("restore", source, "-o", one, *WIENER))
    assert files_of(one) == files_of(out)


@pytest.fixture
def as_a_worker() -> Iterator[None]:
    """This process does units, and frees its engines whatever the test finds."""
    yield
    close_opened()


def test_two_that_begin_the_same_batch_are_told_of_each_other(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("restore", folder, "-o", out, *WIENER)
    with FileLock(tmp_path / ".out.rtfocus-batch.lock"):
        for step in ("--init", "--finish"):
            said = failed(command(*asked, step), ExitCode.BUSY)
            assert f"another process works at the batch of '{out}'; wait" in said
    assert not out.exists()
    succeeded(command(*asked, "--init"))


@pytest.mark.usefixtures("as_a_worker")
def test_who_comes_late_takes_nothing_away_and_brings_nothing(
    folder: Path, tmp_path: Path
) -> None:
    """Workers that a scheduler gave up may live, and a job may be sent twice."""
    out = tmp_path / "out.ome.zarr"
    asked = ("restore", folder, "-o", out)
    succeeded(command(*asked, *WIENER, "--init"))
    ledger = Ledger(out)
    first = ledger.plan()
    assert first is not None
    done, again = first.units[:2]
    assert run_unit(str(out), first.key, done) is None
    chunks = ledger.store / done.target / "0" / "c"
    was = chunks.stat().st_ino
    # Another one does it too: it was not marked yet when that one began.
    (ledger.folder / "done" / done.key).unlink()
    assert run_unit(str(out), first.key, done) is None
    assert chunks.stat().st_ino == was
    ledger.failed(done, Failure("output", "came too late"))
    assert ledger.failures(first) == []
    # The batch begins anew with other settings; this process has the ones before.
    other = (*OPTICS, "--engine", "wiener", "--stretch", "--overwrite")
    succeeded(command(*asked, *other, "--init"))
    late = run_unit(str(out), first.key, again)
    assert late is not None
    assert "began anew" in late.reason
    second = ledger.plan()
    assert second is not None
    assert second.key != first.key
    assert len(ledger.left(second.units)) == 6
    assert ledger.failures(second) == []
    assert not (ledger.store / again.target / "0" / "c").exists()


def test_a_worker_without_the_engine_gives_its_images_to_others(
    folder: Path, pairs: Path, tmp_path: Path, address: str
) -> None:
    preload = tmp_path / "lacks.py"
    preload.write_text(
        "from pathlib import Path\nfrom rtfocus import files\n"
        f"files._PACKAGE = Path({str(tmp_path)!r}) / 'nothing' / 'here'\n"
    )
    lacking = worker_of(address, "--preload", str(preload))
    try:
        wait_for_workers(address, 3)
        asked = ("restore", folder, "-o", tmp_path / "out", *OPTICS)
        many = ("--engine", "rtfocus-1", "--scheduler", address)
        succeeded(command(*asked, *many))
        assert len(list((tmp_path / "out").rglob("*.tif"))) == 6
        asked = ("evaluate", "delpnet", "--data", pairs, "--scheduler", address)
        said = succeeded(command(*asked, "-o", tmp_path / "evaluation"))
        assert "evaluation.json" in said
        assert "failed" not in said
    finally:
        lacking.kill()
        lacking.wait()


def test_where_no_worker_is_nothing_waits_for_ever(
    folder: Path, tmp_path: Path
) -> None:
    """None at the start, none that offers what is asked, none any more."""
    out = tmp_path / "out"
    succeeded(command("restore", folder, "-o", out, *WIENER, "--init"))
    plan = Ledger(out).plan()
    assert plan is not None
    notes: list[str] = []
    done: list[Unit] = []
    # Of another version, as its installation says.
    other = tmp_path / "site" / "rtfocus-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Name: rtfocus\nVersion: 9.9\n")
    path = os.pathsep.join((str(other.parent), *sys.path))
    with scheduler_without_workers() as address:

        def go(**more: Any) -> None:
            ask = {"wait_s": 0.0, "on_note": notes.append, **more}
            run_on(address, doing(plan), plan.units, on_unit, **ask)

        def on_unit(unit: Unit, failure: Failure | None) -> None:
            assert failure is None
            done.append(unit)
            worker.kill()

        with pytest.raises(ConfigError, match="no worker takes images for 0 s; start"):
            go()
        worker = worker_of(address, PYTHONPATH=path)
        stranger = worker
        try:
            wait_for_workers(address, 1)
            with pytest.raises(ConfigError, match="no worker has this rtfocus"):
                go()
            assert "gets nothing: rtfocus 9.9, here" in notes[-2]
            worker = worker_of(address)
            wait_for_workers(address, 2)
            with pytest.raises(ConfigError, match="no worker offers GPU=1"):
                go(resources={"GPU": 1})
            said = r"no worker has this .*; 5 images not done; the same command"
            with pytest.raises(IncompleteError, match=said):
                go()
        finally:
            for process in (stranger, worker):
                process.kill()
                process.wait()
    assert done == [plan.units[0]]


def test_an_end_that_was_killed_takes_no_pixels_away(
    plate: Path, tmp_path: Path
) -> None:
    one, out = tmp_path / "one.ome.zarr", tmp_path / "out.ome.zarr"
    succeeded(command("restore", plate, "-o", one, *WIENER))
    asked = ("restore", plate, "-o", out, *WIENER)
    ledger = Ledger(out)
    # A process killed before its plan had its name has left this.
    ledger.folder.mkdir()
    (ledger.folder / ".rtfocus-killed.part").write_bytes(b"half")
    chunk = next(
        path
        for path in (plate / "A/3/0/0").rglob("*")
        if path.is_file() and not path.name.startswith((".", "zarr"))
    )
    chunk.write_bytes(b"broken")
    succeeded(command(*asked, "--init"))
    failed(command(*asked, "--unit", "1/1"), ExitCode.INCOMPLETE)
    plan = ledger.plan()
    assert plan is not None
    unreadable = {unit.key for unit, _ in ledger.failures(plan)}
    assert len(unreadable) == 1
    # Killed once the output was laid out, before it had its place.
    Batch(plan.job)._without(plan, unreadable)
    failed(command(*asked, "--finish"), ExitCode.INCOMPLETE)
    for field in ("A/3/1", "B/3/0", "B/3/1"):
        found, wanted = (zarr.open_array(root / field / "0")[:] for root in (out, one))
        assert found.any()
        np.testing.assert_array_equal(found, wanted)

    # Killed after the output had its place, before the marks were gone.
    whole = tmp_path / "whole.ome.zarr"
    source = plate / "B/3/0"
    asked = ("restore", source, "-o", whole, *WIENER)
    succeeded(command(*asked, "--init"))
    succeeded(command(*asked, "--unit", "1/1"))
    Ledger(whole).store.rename(whole)
    succeeded(command(*asked, "--finish"))
    assert zarr.open_array(whole / "0")[:].any()
    assert_nothing_left(whole)


def test_no_scheduler_is_one_line(folder: Path, tmp_path: Path) -> None:
    asked = ("restore", folder, "-o", tmp_path / "out", *WIENER, "--scheduler")
    assert "is no address" in failed(command(*asked, "cluster"))
    assert "local:N" in failed(command(*asked, "local:0"))
    assert_nothing_left(tmp_path / "out")
    for wrong in ("GPU", "=1", "GPU=nan", "GPU=-1"):
        said = failed(command(*asked, "tcp://127.0.0.1:9", "--resources", wrong))
        assert "NAME=N" in said
    assert "give --scheduler" in failed(command(*asked[:-1], "--resources", "GPU=1"))
    said = failed(command(*asked, "local:1", "--resources", "GPU=1"))
    assert "those of --scheduler local:1 have none: leave it out" in said
    assert "certificates in DASK" in failed(command(*asked, "tls://127.0.0.1:9"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_as_http, args=(server,)).start()
        port = server.getsockname()[1]
        said = failed(command(*asked, f"tcp://127.0.0.1:{port}"))
    assert "no scheduler of dask answers" in said


def answer_as_http(server: socket.socket) -> None:
    """Answer one client as what it is not."""
    client, _ = server.accept()
    with client:
        client.recv(1)
        client.sendall(b"HTTP/1.1 400 Bad request\r\n\r\n" + bytes(64))


@pytest.mark.usefixtures("as_a_worker")
def test_a_worker_with_other_weights_or_optics_does_nothing(
    folder: Path, tmp_path: Path
) -> None:
    """Here the engine changes, of the same name, once the plan is there."""
    engine, out = tmp_path / "mine", tmp_path / "out.json"
    shutil.copytree(resource_folder("engines") / "delpnet", engine)
    asked = ("classify", folder, *OPTICS, "--json", out, "--engine", str(engine))
    succeeded(command(*asked, "--init"))
    card = engine / "engine.yaml"
    card.write_text(card.read_text("utf-8").replace("name: delpnet", "name: other"))
    told = command(*asked, "--unit", "1/1")
    assert told.code == ExitCode.INCOMPLETE
    assert "engines or optics are not those of the plan" in told.err
    assert "with other settings, weights" in failed(command(*asked, "--init"))


def test_a_full_disk_fails_the_images_it_refuses(folder: Path, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("needs tmpfs to make a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "rtfocus", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small disk")
    try:
        out = disk / "out"
        asked = ("restore", folder, "-o", out, *WIENER)
        succeeded(command(*asked, "--init"))
        filler = disk / "filler"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(bytes(free - 60_000))
        said = failed(command(*asked, "--unit", "1/1"), ExitCode.INCOMPLETE)
        assert "failed" in said
        assert "No space left" in command(*asked, "--finish").err
        some = len(list(out.rglob("*.tif")))
        assert 0 < some < 6
        filler.unlink()
        succeeded(command(*asked, "--unit", "1/1"))
        succeeded(command(*asked, "--finish"))
        assert len(list(out.rglob("*.tif"))) == 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)
