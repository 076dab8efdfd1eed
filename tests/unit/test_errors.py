"""Exit codes: one table, one code per meaning."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rtfocus import errors
from rtfocus.cli.commands import COMMANDS, load
from rtfocus.config.loading import find_config
from rtfocus.engines.registry import find_engine
from rtfocus.errors import ExitCode, RtfocusError, WriterError
from rtfocus.processing.restore import METHODS
from rtfocus.runs import open_run
from rtfocus.writers.header import write_json
from rtfocus.writers.journal import write_journal


def _all_errors() -> list[type[RtfocusError]]:
    return [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, RtfocusError)
    ]


@pytest.mark.parametrize("error", _all_errors())
def test_no_error_ends_as_done_or_as_a_fault(error: type[RtfocusError]) -> None:
    assert error.exit_code not in (ExitCode.DONE, ExitCode.FAULT)
    was_stopped = error.exit_code is ExitCode.INTERRUPTED
    assert was_stopped == (error is errors.StoppedError)


@pytest.mark.parametrize(
    ("typed", "look_for"),
    [
        ("dmeo", find_config),
        ("weiner", lambda name: find_engine(name, (), METHODS)),
        ("deplnet", find_engine),
        ("demo", lambda name: open_run(Path(name))),
    ],
)
def test_what_was_meant_is_said(
    typed: str,
    look_for: Callable[[str], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the nearest name there is, in the same line."""
    meant = {"dmeo": "demo", "weiner": "wiener", "deplnet": "delpnet"}
    (tmp_path / "demo.rtfocus").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RtfocusError) as refusal:
        look_for(typed)
    assert f"did you mean '{meant.get(typed, 'demo.rtfocus')}'?" in str(refusal.value)
    assert "train_" not in str(refusal.value)


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "your quota there is used up; free space of it"),
        (errno.EFBIG, "raise the limit (ulimit -f; FAT32 has 4 GB)"),
        (errno.EROFS, "allow writing there, or give another place"),
        (errno.EIO, "see to its disk"),
    ],
)
def test_whatever_stops_a_write_is_told_with_a_remedy(
    number: int, helps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    journal = tmp_path / "frames.ndjson"
    with pytest.raises(WriterError) as journal_refused:
        write_journal(journal, [b"{}"])
    with pytest.raises(WriterError) as file_refused:
        write_json(journal, {}, fsync=True)
    for refused in (journal_refused, file_refused):
        assert f"{os.strerror(number)}; " in str(refused.value)
        assert helps in str(refused.value)


def test_what_scripts_rely_on() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "CONFIG": 3,
        "INPUT": 4,
        "INCOMPLETE": 5,
        "ENGINE": 6,
        "BUSY": 7,
        "FAULT": 70,
        "INTERRUPTED": 130,
    }
    assert errors.ConfigError.exit_code is ExitCode.CONFIG
    assert errors.IncompleteError.exit_code is ExitCode.INCOMPLETE


def test_the_written_tables_are_those_of_the_code() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "commands.md"
    text = page.read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)
    assert rows == [(str(int(code)), code.name) for code in ExitCode]
    missing = [name for name in COMMANDS if f"`{name}`" not in text]
    assert missing == []


def test_every_option_stands_in_the_page_and_no_other() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "commands.md"
    rows = re.findall(r"^\| `([a-z ]+)` \| (`--.*) \|$", page.read_text("utf-8"), re.M)
    written = {command: re.findall(r"`(--[a-z0-9-]+)`", cell) for command, cell in rows}
    there = {}
    for name in COMMANDS:
        command = load(name)
        for below, one in [("", command), *getattr(command, "commands", {}).items()]:
            there[f"{name} {below}".strip()] = [
                option
                for given in one.params
                if given.param_type_name == "option" and not given.hidden
                for option in given.opts
                if option.startswith("--") and option != "--help"
            ]
    assert written == {name: options for name, options in there.items() if options}


def test_a_help_flows_and_names_its_arguments_as_it_is_called() -> None:
    repair = load("check")
    assert "no run folder, 5 sound but fewer frames than planned" in repair.help
    assert "\n\n[bold]Example:[/] rtfocus check" in repair.help
    assert [one.metavar for one in repair.params if one.name == "run"] == ["RUN"]


def test_no_option_is_explained_in_words_of_python() -> None:
    shown = {}
    for name in COMMANDS:
        command = load(name)
        for one in (command, *getattr(command, "commands", {}).values()):
            context = one.context_class(one)
            for param in one.params:
                if param.param_type_name == "option":
                    shown[name, param.name] = param.display_type_rich(context)
    assert len(shown) > 50
    assert not [at for at, kind in shown.items() if "bool" in kind or "list" in kind]
