"""Files are replaced and removed whole, retried while held, and named portably."""

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus import files
from rtfocus.errors import OutputError, WriterError
from rtfocus.files import Patience, is_reserved_name, portable_name


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def patience(self) -> Patience:
        return Patience(clock=lambda: self.now_s, sleep=self.wait)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def held_for(
    clock: Clock, seconds: float, action: Callable[..., None]
) -> Callable[..., None]:
    """Refuse `action` as Windows does while another program has the file open."""

    def act(*args: object, **kwargs: object) -> None:
        if clock.now_s < seconds:
            raise PermissionError(errno.EACCES, "being used by another process")
        action(*args, **kwargs)

    return act


@pytest.fixture
def clock() -> Clock:
    return Clock()


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "inner.txt").write_text(text)
    return path


def hidden(place: Path) -> list[str]:
    return [p.name for p in place.iterdir() if p.name.startswith(".")]


def test_a_held_file_is_replaced_once_it_is_let_go(tmp_path, clock, monkeypatch):
    part, target = tmp_path / "part", tmp_path / "target"
    part.write_text("new")
    target.write_text("old")
    monkeypatch.setattr(os, "replace", held_for(clock, 2.0, os.replace))
    files.replace(part, target, clock.patience())
    assert target.read_text() == "new"
    assert 2.0 <= clock.now_s < files.PATIENCE_S


def test_what_stays_held_is_refused_in_one_line_and_kept(tmp_path, clock, monkeypatch):
    part, target = tmp_path / "part", tmp_path / "target"
    part.write_text("new")
    target.write_text("old")
    monkeypatch.setattr(os, "replace", held_for(clock, 1e9, os.replace))
    with pytest.raises(OutputError, match=r"target' cannot be replaced: .*close what"):
        files.replace(part, target, clock.patience())
    assert clock.now_s == pytest.approx(files.PATIENCE_S, abs=0.2)
    assert (part.read_text(), target.read_text()) == ("new", "old")


def test_a_missing_part_is_refused_without_waiting(tmp_path, clock):
    with pytest.raises(OutputError, match="cannot be replaced"):
        files.replace(tmp_path / "none", tmp_path / "target", clock.patience())
    assert clock.now_s == 0.0


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    part, target = folder(tmp_path / "part", "new"), folder(tmp_path / "target", "old")
    files.replace(part, target)
    assert (target / "inner.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_come(
    tmp_path, clock, monkeypatch
):
    part, target = folder(tmp_path / "part", "new"), folder(tmp_path / "target", "old")
    rename = Path.rename

    def held(self: Path, to: Path) -> Path:
        if self == part:
            raise PermissionError(errno.EACCES, "held")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", held)
    with pytest.raises(OutputError):
        files.replace(part, target, clock.patience())
    assert (target / "inner.txt").read_text() == "old"
    assert (part / "inner.txt").read_text() == "new"


def test_a_folder_that_is_held_is_kept_whole(tmp_path, clock, monkeypatch):
    place = folder(tmp_path / "store", "mine")
    monkeypatch.setattr(Path, "rename", held_for(clock, 1e9, Path.rename))
    with pytest.raises(OutputError, match="cannot be removed"):
        files.remove(place, clock.patience())
    assert (place / "inner.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "link", "nothing"])
def test_removing_leaves_nothing_and_never_follows_a_link(tmp_path, kind):
    other = folder(tmp_path / "other", "mine")
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("x")
    elif kind == "folder":
        folder(path, "x")
    elif kind == "link":
        path.symlink_to(other)
    files.remove(path)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    assert (other / "inner.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def write() -> None:
        with files.whole(tmp_path / "new" / "deep" / "out.zarr") as part:
            folder(part, "half")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_appears_in_one_step(tmp_path):
    target = tmp_path / "new" / "out.txt"
    with files.whole(target) as part:
        part.write_text("all")
        assert not target.exists()
    assert target.read_text() == "all"
    assert hidden(target.parent) == []


def test_what_exists_is_kept_unless_overwriting(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(OutputError, match="exists"), files.whole(target):
        pytest.fail("the block must not run")
    with files.whole(target, overwrite=True) as part:
        part.write_text("new")
    assert target.read_text() == "new"


def test_what_came_while_writing_is_kept(tmp_path):
    target = tmp_path / "out.txt"

    def write() -> None:
        with files.whole(target) as part:
            part.write_text("new")
            target.write_text("somebody's")

    with pytest.raises(OutputError, match="exists"):
        write()
    assert target.read_text() == "somebody's"
    assert hidden(tmp_path) == []


def test_a_disk_that_refuses_is_told_with_the_target(tmp_path):
    with (
        pytest.raises(OutputError, match=r"out.txt' cannot be written: No space"),
        files.whole(tmp_path / "out.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_parent_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "out.txt"
    with pytest.raises(OutputError, match="cannot be made"), files.whole(below):
        pytest.fail("the block must not run")


_KILLED = """
import os, sys
from pathlib import Path
from rtfocus import files
target = Path(sys.argv[1])
if sys.argv[2] == "writing":
    with files.whole(target) as part:
        (part / "0").mkdir(parents=True)
        os._exit(9)
new = target.with_name("new")
new.mkdir()
rename = Path.rename
def die_after(self, to):
    rename(self, to)
    os._exit(9)
Path.rename = die_after
files.replace(new, target)
"""


def test_a_killed_try_is_cleared_and_what_it_was_replacing_comes_back(tmp_path):
    target = tmp_path / "out.zarr"
    command = [sys.executable, "-c", _KILLED, str(target)]
    assert subprocess.run([*command, "writing"]).returncode == 9
    assert len(hidden(tmp_path)) == 1
    with files.whole(target) as part:
        folder(part, "old")
    assert hidden(tmp_path) == []

    assert subprocess.run([*command, "replacing"]).returncode == 9
    assert not target.exists()
    files.recover(target)
    assert (target / "inner.txt").read_text() == "old"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "reserved"),
    [
        ("con", True),
        ("CON.txt", True),
        ("nul .tif", True),
        ("com1", True),
        ("COM¹.tar.gz", True),
        ("lpt9.tif", True),
        ("ab.", True),
        ("ab ", True),
        ("console", False),
        ("com10", False),
        ("a.con", False),
        (".tif", False),
    ],
)
def test_reserved_names(name, reserved):
    assert is_reserved_name(name) is reserved


@given(st.text())
def test_every_text_gives_a_portable_name(text):
    name = portable_name(text)
    assert name
    assert not is_reserved_name(name)
    assert len(name.encode()) <= files.MOST_NAME_BYTES
    assert not set(name) & set('/\\:*?"<>|\n\r\t\0')
    assert not name.startswith(".")
    assert portable_name(name) == name


def test_ordinary_names_stay_and_long_ones_stay_different():
    assert portable_name("slide-1.8_ROI1.ome.tif") == "slide-1.8_ROI1.ome.tif"
    assert portable_name("ümläut 日本") == "ümläut 日本"
    long = [portable_name("日" * 300 + end) for end in "ab"]
    assert long[0] != long[1]


def test_a_drive_that_is_not_there_is_named(tmp_path, monkeypatch):
    # As on Windows, where not even the root of a path need be there.
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    with pytest.raises(WriterError, match=r"runs': there is no '.*'; connect that"):
        files.nearest_existing(tmp_path / "runs")


def test_a_folder_is_tried_without_a_trace_and_refused_as_the_system_does(
    tmp_path, monkeypatch
):
    files.try_writing(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        files.try_writing(tmp_path / "file")

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError):
        files.try_writing(tmp_path)


def test_temporary_files_are_as_windows_needs_them():
    # Where it may not write, `tempfile` looks for a free name there, for hours; and a
    # file that a driver or a virus scanner has open must not fail what is done.
    found = {
        (call.func.attr, *(f"{k.arg}={ast.unparse(k.value)}" for k in call.keywords))
        for path in Path(files.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "tempfile"
    }
    clears = "ignore_cleanup_errors=True"
    assert {name for name, *_ in found} == {"TemporaryDirectory", "gettempdir"}
    assert all(clears in rest or name == "gettempdir" for name, *rest in found)
