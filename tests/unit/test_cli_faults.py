"""Every end of a command is one line and one exit code, also of a fault."""

import errno
import os
from pathlib import Path

import pytest

from rtfocus.cli import main
from rtfocus.cli.commands import load
from rtfocus.cli.endings import tell
from rtfocus.cli.runs import ReportConsole
from rtfocus.errors import ConfigError, EngineError, ExitCode, WorkerError


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("run.name is odd"), ExitCode.CONFIG, "run.name is odd"),
        (ConfigError("two\nlines"), ExitCode.CONFIG, "two lines"),
        (
            OSError(errno.EACCES, os.strerror(errno.EACCES), "a.tif"),
            ExitCode.FAILED,
            f"'a.tif': {os.strerror(errno.EACCES)}",
        ),
        (MemoryError(), ExitCode.FAILED, "not enough memory"),
        (
            caused(WorkerError("worker 'write' failed"), EngineError("no weights")),
            ExitCode.FAILED,
            "worker 'write' failed",
        ),
    ],
)
def test_what_a_user_can_act_on_is_told_alone(error, code, said, capsys):
    assert tell(error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert "fault of rtfocus" not in line


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        RuntimeError("two\nlines"),
        OSError("no errno"),
        caused(WorkerError("worker 'write' failed"), KeyError("z")),
    ],
)
def test_a_fault_leaves_its_traceback_in_a_file(error, capsys):
    with pytest.raises(type(error)) as raised:
        raise error
    assert tell(raised.value) == ExitCode.FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert "this is a fault of rtfocus" in line
    path = Path(line.rsplit("'", 2)[1])
    text = path.read_text("utf-8")
    assert "Traceback" in text
    assert type(error).__name__ in text
    assert "test_cli_faults.py" in text


def test_a_fault_without_a_writable_folder_is_still_one_line(
    monkeypatch, tmp_path, capsys
):
    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(file))
    monkeypatch.setattr("tempfile.tempdir", str(file / "below"))
    assert tell(ZeroDivisionError("division by zero")) == ExitCode.FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert "RTFOCUS_DEBUG=1" in line


def test_debug_shows_the_traceback_as_well(monkeypatch, capsys):
    monkeypatch.setenv("RTFOCUS_DEBUG", "1")
    try:
        msg = "run.name is odd"
        raise ConfigError(msg)
    except ConfigError as error:
        tell(error)
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1] == "error: run.name is odd"


@pytest.mark.parametrize(
    "words", [["check", ""], ["restore", "", "-o", "a"], ["restore", "a", "--output="]]
)
def test_an_empty_word_is_not_the_folder_one_works_in(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rtfocus", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.USAGE
    assert "is empty, as of a variable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["in/*.tif"], ExitCode.INPUT, "an OME-Zarr or a folder: that of the images"),
        (["in/a.tif", "in/b.tif"], ExitCode.USAGE, "a folder stands for all images"),
    ],
)
def test_who_gives_many_files_is_told_to_give_their_folder(
    words, code, said, monkeypatch, capsys
):
    for name, output in (("restore", ["-o", "out"]), ("classify", [])):
        monkeypatch.setattr("sys.argv", ["rtfocus", name, *words, *output])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        assert said in " ".join(capsys.readouterr().err.split())


def test_words_are_completed_behind_one_too_many():
    words = ["a.tif", "b.tif"]
    context = load("restore").make_context("restore", words, resilient_parsing=True)
    assert context.args == ["b.tif"]


def test_a_word_too_many_is_told_as_one_where_it_is_no_image(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rtfocus", "check", "one.rtfocus", "two.rtfocus"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "two.rtfocus" in said
    assert "images" not in said


def test_restore_without_an_output_asks_for_it_first(monkeypatch, capsys, tmp_path):
    words = ["rtfocus", "restore", str(tmp_path), "--picture", "a.png"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.CONFIG
    assert "is no run folder; say where to write with --output" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "given", ["runs", "runs/demo", "runs/demo.rtfocus/raw.ome.zarr", "."]
)
def test_the_run_that_a_path_means_is_named(given, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/demo.rtfocus")
    (run / "raw.ome.zarr").mkdir(parents=True)
    (run / "series.json").write_text("{}", "utf-8")
    monkeypatch.setattr("sys.argv", ["rtfocus", "check", given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == ExitCode.INPUT
    hint = "give a NAME.rtfocus" if given == "." else f"did you mean '{run}'?"
    assert hint in " ".join(capsys.readouterr().err.split())


def test_the_home_folder_is_found_where_no_shell_names_it(
    monkeypatch, capsys, tmp_path
):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for words in (["check", "~/gone"], ["report", "~/gone"]):
        monkeypatch.setattr("sys.argv", ["rtfocus", *words])
        with pytest.raises(SystemExit):
            main()
        assert f"{tmp_path}/gone" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(
    ("mistyped", "code", "said"),
    [
        ("processing.classifier=deplnet", ExitCode.ENGINE, "'delpnet'?"),
        ("processing.restoration.method=weiner", ExitCode.ENGINE, "'wiener'?"),
        ("acquisition.mda.tme_plan=3", ExitCode.CONFIG, "'time_plan'?"),
    ],
)
def test_what_is_mistyped_is_told_before_a_side_starts(
    mistyped, code, said, tmp_path, monkeypatch, capsys
):
    folder = f"run.folder={tmp_path}"
    words = ["rtfocus", "run", "demo", "--set", folder, "--set", mistyped]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("subprocess.Popen", None)  # no process can be started
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_line_of_a_report_is_one_where_no_terminal_is(capsys):
    line = "runs/day.rtfocus  (stopped by the user: " + "5 of 60 planned frames; " * 5
    ReportConsole().print(line)
    assert capsys.readouterr().out == f"{line}\n"


def test_a_report_that_nobody_reads_to_its_end_is_no_failure(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        console = ReportConsole()
        console.print("a.rtfocus (completed)")
        console.print("300 acquired = 300 written")
