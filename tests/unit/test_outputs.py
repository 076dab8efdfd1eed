"""No output ever takes the place of an input, a companion or somebody's file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_file_kit import files_up_to

from rtfocus.errors import IncompleteError, InputError, OutputError, RtfocusError
from rtfocus.images.metadata import OutputImage, result_names, written_by_rtfocus
from rtfocus.images.outputs import ImageOutput, OutputGuard, json_text
from rtfocus.images.reading import companions, find_images
from rtfocus.images.series import ImageSeries

PIXELS = np.arange(20, dtype=np.uint16).reshape(4, 5)


def doubled(series: ImageSeries) -> OutputImage:
    """The simplest processing there is."""
    planes = (series.read(**index) * 2 for index in series.indices())
    return OutputImage(series, series.dtype, planes)


def process(source: Path, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Do what a command does: find, check everything, then compute and write."""
    found = find_images(source)
    guard = OutputGuard([source, *companions(found.series)], overwrite=overwrite)
    if source.is_dir() and found.series[0].path != source:
        guard = OutputGuard(companions(found.series), overwrite=overwrite)
    place = ImageOutput(output, found.series, guard, source)
    broken = place.write([doubled(series) for series in found.series])
    if broken or found.broken:
        raise InputError("; ".join(b.reason for b in (*broken, *found.broken)))
    return place.written()


def image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, PIXELS + np.uint16(value))
    return path


def store(path: Path) -> Path:
    """An OME-Zarr of somebody's."""
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.create_array("0", shape=(4, 5), dtype="u2", chunks=(4, 5))[...] = PIXELS
    axes = [{"name": axis, "type": "space"} for axis in "yx"]
    scale = [{"type": "scale", "scale": [1, 1]}]
    dataset = {"path": "0", "coordinateTransformations": scale}
    scales = [{"axes": axes, "datasets": [dataset]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": scales}
    return path


def contents(root: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's target."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def refused(root: Path, source: Path, output: Path, **options: bool) -> str:
    """Assert that nothing at all changes; return what is said."""
    before = contents(root)
    with pytest.raises(RtfocusError) as told:
        process(source, output, **options)
    assert contents(root) == before
    assert "\n" not in str(told.value)
    return str(told.value)


BOTH = pytest.mark.parametrize("overwrite", [False, True])


@BOTH
def test_an_input_is_no_output_by_whatever_name(tmp_path, overwrite):
    source = image(tmp_path / "d" / "a.tif")
    os.link(source, tmp_path / "hard.tif")
    (tmp_path / "soft.tif").symlink_to(source)
    (tmp_path / "dl").symlink_to(source.parent, target_is_directory=True)
    for output in (
        source,
        tmp_path / "hard.tif",
        tmp_path / "soft.tif",
        tmp_path / "dl" / "a.tif",
        tmp_path / "d" / ".." / "d" / "a.tif",
        tmp_path / "d",
        tmp_path / "dl",
    ):
        refused(tmp_path, source, output, overwrite=overwrite)
    refused(tmp_path, tmp_path / "soft.tif", source, overwrite=overwrite)


@BOTH
def test_nothing_is_put_into_a_run_folder(tmp_path, overwrite):
    source, run = image(tmp_path / "a.tif"), tmp_path / "b.rtfocus"
    run.mkdir()
    (run / "series.json").write_text("{}")
    for output in (run, run / "sub", run / "a.tif", run / "new.zarr"):
        told = refused(tmp_path, source, output, overwrite=overwrite)
        assert "run folder" in told


@BOTH
def test_a_name_that_differs_in_letter_case_only_is_the_input_on_some_disk(
    tmp_path, overwrite
):
    source = image(tmp_path / "Ä" / "a.tif")
    for output in ("A.TIF", "a.Tif", "../ä/A.tif"):
        place = source.parent / output
        told = refused(tmp_path, source, place.resolve(), overwrite=overwrite)
        assert "letter case" in told or "is the input" in told


@BOTH
def test_a_companion_is_no_output(tmp_path, overwrite):
    one, other = tmp_path / "set_1.ome.tif", image(tmp_path / "set_2.ome.tif")
    series = ImageSeries(
        "set",
        image(one),
        {"t": 1, "c": 1, "z": 1},
        (4, 5),
        PIXELS.dtype,
        lambda _t, _c, _z: PIXELS,
        files=(one, other),
    )
    before = contents(tmp_path)
    guard = OutputGuard(companions([series]), overwrite=overwrite)
    with pytest.raises(OutputError, match="is the input"):
        ImageOutput(other, [series], guard)
    assert contents(tmp_path) == before


@BOTH
def test_zarr_siblings_and_parents_are_no_outputs(tmp_path, overwrite):
    collection = tmp_path / "coll.zarr"
    zarr.open_group(collection, mode="w", zarr_format=3)
    for name in "01":
        store(collection / name)
    source = collection / "0"
    for output in (collection, source, collection / "1.zarr", collection / "x.tif"):
        refused(tmp_path, source, output, overwrite=overwrite)


@BOTH
def test_what_rtfocus_did_not_write_stays(tmp_path, overwrite):
    source = image(tmp_path / "a.tif")
    (tmp_path / "x.tif").mkdir()
    (tmp_path / "x.tif" / "precious.txt").write_text("mine")
    store(tmp_path / "mine.zarr")
    zarr.create_array(tmp_path / "array.zarr", shape=(3,), dtype="f4")
    zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
    (tmp_path / "real").mkdir()
    (tmp_path / "link.ome.zarr").symlink_to(tmp_path / "real")
    (tmp_path / "dangling.tif").symlink_to(tmp_path / "real" / "t.tif")
    (tmp_path / "file").write_text("x")
    for output in (
        *(tmp_path / name for name in ("x.tif", "mine.zarr", "array.zarr", "old.zarr")),
        *(tmp_path / name for name in ("link.ome.zarr", "dangling.tif", "file")),
        tmp_path / "file" / "below.tif",
        tmp_path / "out.png",
        tmp_path / ("x" * 300 + ".tif"),
    ):
        refused(tmp_path, source, output, overwrite=overwrite)


def test_an_earlier_result_is_replaced_only_with_overwrite(tmp_path):
    source = image(tmp_path / "in" / "a.tif")
    for output in (tmp_path / "o.tif", tmp_path / "o.ome.zarr", tmp_path / "o"):
        process(source, output)
        assert "exists" in refused(tmp_path, source, output)
        image(source, value=7)
        assert written_by_rtfocus(process(source, output, overwrite=True)[0])
        image(source)
    assert int(tifffile.imread(tmp_path / "o.tif").min()) == 14
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("first", "second"),
    [("a.ome.zarr", "a.ome.zarr/errors.tif"), ("B.zarr/sharp.tif", "b.zarr")],
)
def test_no_result_lies_in_another(tmp_path, first, second):
    found = find_images(image(tmp_path / "in.tif"))
    guard = OutputGuard(companions(found.series), overwrite=True)
    ImageOutput(tmp_path / first, found.series, guard)
    with pytest.raises(OutputError, match="hold another result, or lie in one"):
        ImageOutput(tmp_path / second, found.series, guard)
    ImageOutput(tmp_path / "apart.zarr", found.series, guard)


def test_a_foreign_image_is_replaced_only_if_it_is_named_itself(tmp_path):
    source, foreign = image(tmp_path / "in" / "a.tif"), image(tmp_path / "o" / "a.tif")
    refused(tmp_path, source, foreign)
    refused(tmp_path, source, tmp_path / "o", overwrite=True)
    process(source, foreign, overwrite=True)
    assert written_by_rtfocus(foreign)


def test_a_result_that_somebody_added_to_is_no_result_any_more(tmp_path):
    source, output = image(tmp_path / "a.tif"), tmp_path / "o.ome.zarr"
    process(source, output)
    assert written_by_rtfocus(output)
    store(output / "labels")
    assert not written_by_rtfocus(output)
    refused(tmp_path, source, output, overwrite=True)


def test_ctrl_c_within_a_plane_leaves_nothing_and_the_next_try_works(tmp_path):
    source = image(tmp_path / "in" / "a.tif")
    (series,) = find_images(source).series

    def interrupted() -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    for name in ("o.tif", "o.ome.zarr", "o"):
        place = ImageOutput(tmp_path / name, [series], OutputGuard())
        with pytest.raises(KeyboardInterrupt):
            place.write([OutputImage(series, series.dtype, interrupted())])
        assert [p.name for p in tmp_path.iterdir()] == ["in"]
    for name in ("o.tif", "o.ome.zarr", "o"):
        assert written_by_rtfocus(process(source, tmp_path / name)[0])


def test_a_broken_input_leaves_no_output_and_no_rest(tmp_path):
    source = image(tmp_path / "in" / "a.tif")
    found = find_images(source)

    def cut() -> Iterator[Any]:
        raise InputError("cut off")
        yield

    (series,) = found.series
    for name in ("o.tif", "o.ome.zarr"):
        place = ImageOutput(tmp_path / name, [series], OutputGuard())
        with pytest.raises(InputError, match="cut off"):
            place.write([OutputImage(series, series.dtype, cut())])
    place = ImageOutput(tmp_path / "o", [series], OutputGuard())
    (broken,) = place.write([OutputImage(series, series.dtype, cut())])
    assert broken.path == source
    assert place.written() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def named(folder: Path, *names: str) -> list[str]:
    """Return what the images of a folder are called below the output."""
    found = find_images(folder)
    assert len(found.series) == len(names)
    return sorted(map(str, result_names(found.series, folder)))


def test_dots_endings_and_folders_give_one_output_for_each_input(tmp_path):
    names = ["s-1.8_R1.ome.tif", "s-1.8_R2.ome.tif", "s-1.9.tif", "day1/w/i.tif"]
    names += ["day2/w/i.tif", "day2/w/I.TIF" if _has_case(tmp_path) else "day2/w/j.tif"]
    for number, name in enumerate(names):
        image(tmp_path / "in" / name, number)
    given = named(tmp_path / "in", *names)
    assert given[:2] == ["day1/w/i.tif", "day2/w/I.tif"] or not _has_case(tmp_path)
    assert {"s-1.8_R1.tif", "s-1.8_R2.tif", "s-1.9.tif", "day1/w/i.tif"} <= set(given)
    written = process(tmp_path / "in", tmp_path / "out")
    assert len({str(path).casefold() for path in written}) == len(names)
    values = sorted(int(tifffile.imread(path).min()) // 2 for path in written)
    assert values == list(range(len(names)))


def _has_case(place: Path) -> bool:
    (place / "case").mkdir()
    found = not (place / "CASE").exists()
    (place / "case").rmdir()
    return found


def test_equal_stems_keep_their_endings(tmp_path):
    from PIL import Image

    image(tmp_path / "cell.tif")
    for ending in ("png", "bmp", "jpg"):
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / f"cell.{ending}")
    assert named(tmp_path, *"1234") == [
        "cell.bmp.tif",
        "cell.jpg.tif",
        "cell.png.tif",
        "cell.tif",
    ]


@pytest.mark.parametrize(
    "names", [["a/b", "a:b", "con", "a_b"], ["x", "X", "x", "x_2"]]
)
def test_series_names_become_file_names_that_differ(tmp_path, names):
    path = tmp_path / "many.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for name in names:
            file.write(PIXELS, metadata={"axes": "YX", "Name": name})
    written = process(path, tmp_path / "out")
    assert len({p.name.casefold() for p in written}) == len(names)
    assert all(path.parent == tmp_path / "out" for path in written)


def test_json_is_no_image_no_folder_and_kept(tmp_path):
    source = image(tmp_path / "a.tif")
    (tmp_path / "keep.json").write_text('{"mine": 1}')
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    names = ["a.tif", "new.tif", ".", "keep.json", "file/o.json"]
    for overwrite in (False, True):
        guard = OutputGuard([source], overwrite=overwrite)
        for name in names:
            with pytest.raises(OutputError):
                guard.claim_text(tmp_path / name, "json")
    assert contents(tmp_path) == before
    target = tmp_path / "new" / "o.json"
    OutputGuard().write_text(target, json_text({"images": []}))
    assert json.loads(target.read_text())["images"] == []
    with pytest.raises(OutputError, match="exists"):
        OutputGuard().claim_text(target, "json")
    OutputGuard(overwrite=True).claim_text(target, "json")


def test_a_report_replaces_its_own_files_only(tmp_path):
    def write(text: str, *, overwrite: bool) -> None:
        guard = OutputGuard(overwrite=overwrite)
        with guard.report(tmp_path / "r", "r.json", ["r.md"]) as part:
            (part / "r.json").write_text('{"figures": 1}')
            (part / "r.md").write_text(text)

    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("mine")
    write("first", overwrite=False)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="exists"):
        write("second", overwrite=False)
    assert contents(tmp_path) == before
    write("second", overwrite=True)
    assert (tmp_path / "r" / "r.md").read_text() == "second"
    assert (tmp_path / "r" / "mine.txt").read_text() == "mine"
    (tmp_path / "r" / "r.json").write_text('{"mine": 1}')
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="not written by rtfocus"):
        write("third", overwrite=True)
    assert contents(tmp_path) == before


NAMES = st.sampled_from(
    ["a.tif", "A.tif", "a.b.tif", "a.ome.tif", "d/a.tif", "d/e/a.tif", "out/a.tif"]
)
KINDS = st.sampled_from(["image", "result", "hard", "soft", "broken", "text"])
OUTPUTS = st.sampled_from(
    ["out", "d", "d/e", "new", "a.tif", "d/a.tif", "out/a.tif", "o.tif", "o.zarr", "."]
)


@given(
    tree=st.dictionaries(NAMES, KINDS, min_size=1, max_size=5),
    source=st.sampled_from([".", "a.tif", "d"]),
    output=OUTPUTS,
    overwrite=st.booleans(),
)
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_byte_of_anything_changes_that_was_not_named(
    tmp_path_factory, tree, source, output, overwrite
):
    root = tmp_path_factory.mktemp("tree")
    grow(root, tree)
    before = contents(root)
    results = {name for name in before if written_by_rtfocus(root / name)}
    inputs = []
    try:
        inputs = find_images(root / source).series
        written = process(root / source, root / output, overwrite=overwrite)
    except RtfocusError:
        written = []
    else:
        many = output not in ("a.tif", "d/a.tif", "out/a.tif", "o.tif", "o.zarr")
        assert len(set(written)) == (len(inputs) if many else 1)
    after = contents(root)
    changed = {name for name in before if after.get(name) != before[name]}
    allowed = results | {output} if overwrite else set()
    assert changed <= allowed
    used = {os.stat(series.path).st_ino for series in inputs}
    assert not {n for n in changed if os.stat(root / n).st_ino in used}
    assert not [name for name in after if Path(name).name.startswith(".rtfocus")]


def grow(root: Path, tree: dict[str, str]) -> None:
    """Make files and links; links lead to the first image."""
    first = image(root / "first" / "first.tif", 3)
    for number, (name, kind) in enumerate(tree.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        if kind == "hard":
            os.link(first, path)
        elif kind == "soft":
            path.symlink_to(first)
        elif kind == "text":
            path.write_text("no image")
        elif kind == "broken":
            path.write_bytes(first.read_bytes()[:200])
        elif kind == "result":
            process(first, path)
        else:
            image(path, number)


def test_the_output_of_a_command_is_no_place_for_images(tmp_path, monkeypatch) -> None:
    source = image(tmp_path / "a.tif")
    monkeypatch.chdir(tmp_path)
    for place in (Path("-"), tmp_path / "-"):  # many processes are told the whole path
        assert "is no name for a file" in refused(tmp_path, source, place)
    assert str(OutputGuard().claim_text(Path("-"), "json")) == "-"


def test_files_that_a_full_disk_left_whole_are_told(tmp_path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    image(source / "a.tif")
    large = np.random.default_rng(1).random((100, 100), np.float32)
    tifffile.imwrite(source / "b.tif", large)
    image(source / "c.tif")
    with files_up_to(20_000), pytest.raises(IncompleteError) as said:
        process(source, out)
    assert "b.tif' cannot be written: File too large" in str(said.value)
    assert "; 1 of 3 files written; --overwrite does them again" in str(said.value)
    assert [path.name for path in out.iterdir()] == ["a.tif"]
    assert len(process(source, out, overwrite=True)) == 3


@pytest.mark.parametrize("name", ["CON.tif", "nul", "com1.ome.zarr", "a.", "aux/b.tif"])
def test_names_that_windows_reserves_are_refused_everywhere(tmp_path, name) -> None:
    with pytest.raises(OutputError, match="Windows reserves"):
        OutputGuard().claim(tmp_path / name)
    with pytest.raises(OutputError, match="Windows reserves"):
        OutputGuard().claim_folder(tmp_path / name)
    assert OutputGuard().claim_folder(tmp_path / "." / "..")


def test_a_drive_that_is_not_there_takes_no_output(tmp_path, monkeypatch):
    # As on Windows, where not even the root of a path need be there.
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    with pytest.raises(OutputError, match=r"out.tif' cannot be written: '.*' is no f"):
        OutputGuard().claim(tmp_path / "out.tif")


def test_a_folder_that_holds_an_input_is_no_output(tmp_path: Path) -> None:
    outer = tmp_path / "data.ome.zarr"
    inner = outer / "A" / "1"
    inner.mkdir(parents=True)
    (inner / "a.tif").write_bytes(b"pixels")
    guard = OutputGuard([inner / "a.tif"], overwrite=True)
    for target in (outer, outer / "A", inner):
        with pytest.raises(OutputError, match=r"holds the input '.*a\.tif'"):
            guard.claim(target)
    beside = tmp_path / "other.ome.zarr"
    assert guard.claim(beside) == beside
    assert (inner / "a.tif").read_bytes() == b"pixels"


def test_two_results_do_not_share_a_name_and_none_lies_in_another(
    tmp_path: Path,
) -> None:
    guard = OutputGuard()
    guard.claim(tmp_path / "a.tif")
    for second in ("a.tif", "A.TIF"):
        with pytest.raises(OutputError, match=r"two results would both be '.*"):
            guard.claim(tmp_path / second)
    with pytest.raises(OutputError, match="would hold another result, or lie in one"):
        guard.claim(tmp_path / "a.tif" / "b.tif")
    guard.claim(tmp_path / "d" / "b.tif")
    with pytest.raises(OutputError, match="would hold another result, or lie in one"):
        guard.claim(tmp_path / "d")


def test_a_report_is_refused_before_the_work_and_again_before_it_is_written(
    tmp_path: Path,
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.tif").write_bytes(b"pixels")
    (tmp_path / "file").write_text("a file")
    guard = OutputGuard([source, source / "a.tif"])
    for folder, said in (
        (source, "is the input"),
        (source / "r", "lies inside the input"),
        (tmp_path / "file", "is no folder; choose another output"),
        (tmp_path / "con", "Windows reserves the name 'con'"),
        (tmp_path / "file" / "r", "cannot be written: '.*file' is no folder"),
    ):
        with pytest.raises(OutputError, match=said):
            guard.claim_report(folder, "r.json", ["r.md"])
    # Beside its inputs it may lie, but not on them.
    guard = OutputGuard([source / "a.tif"])
    guard.claim_report(source, "r.json", ["r.md"])
    with pytest.raises(OutputError, match="is the input"):
        guard.claim_report(source, "r.json", ["a.tif"])

    place = tmp_path / "r"

    def write() -> None:
        with guard.report(place, "r.json", ["r.md"]) as part:
            (part / "r.json").write_text("{}")
            (part / "r.md").write_text("ours")
            place.mkdir()
            (place / "r.md").write_text("of somebody, meanwhile")

    with pytest.raises(OutputError, match=r"r\.md' exists"):
        write()
    assert (place / "r.md").read_text() == "of somebody, meanwhile"
    assert not (place / "r.json").exists()
