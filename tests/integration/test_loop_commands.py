"""Every command answers for itself: help with an example, lists, diagnosis."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loop_kit import command, failed, succeeded
from typer.main import get_command

from rtfocus.cli.commands import COMMANDS as PLACES
from rtfocus.cli.commands import app, load
from rtfocus.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(get_command(app).commands)


def test_the_commands_are_those_that_are_promised():
    promised = {"run", "acquire", "process", "demo", "restore", "classify", "check"}
    promised |= {"doctor", "engines", "configs", "train", "export", "kernels"}
    assert promised <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name):
    said = succeeded(command(name, "--help"))
    assert f"Example: rtfocus {name}" in " ".join(said.split())


@pytest.mark.parametrize("name", [*COMMANDS, "engines build", "psf fit"])
def test_help_cuts_no_word_off_in_80_columns(name):
    assert "\u2026" not in succeeded(command(*name.split(), "--help"))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says_of_itself(name):
    first = load(name).help.partition("\n\n")[0]
    assert " ".join(first.split()) == PLACES[name].summary


def test_help_lists_all_commands():
    said = succeeded(command("--help"))
    for name in COMMANDS:
        assert f" {name} " in said


def test_version_and_bare_call():
    assert succeeded(command("--version")).startswith("rtfocus ")
    assert "Usage" in command().out


def test_configs_are_listed_with_what_they_are_for():
    said = succeeded(command("configs"))
    for name in ("demo", "democamera", "micromanager", "replay", "virtual_tilt"):
        assert re.search(rf"^{name} +\w", said, re.MULTILINE)


def test_engines_are_listed():
    said = succeeded(command("engines"))
    assert "implementation" in said


@pytest.mark.parametrize("place", ["home", "nowhere"])
def test_an_unwritable_home_keeps_no_command_from_working(place, tmp_path):
    """A user without a home, or with one on a read-only disk: a file stands there.

    The doctor tells what the machine has all the same.
    """
    home = tmp_path / "home"
    home.write_text("no folder")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HOME": str(home if place == "home" else home / "below"),
    }
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "PYMM_LOG_FILE"):
        environment.pop(name, None)
    told = {"doctor": ("cpu", "openvino", "onnxruntime", "democamera", "tensorrt")}
    for arguments in (["doctor"], ["configs"], ["acquire", "nothing.yaml"]):
        done = subprocess.run(
            [sys.executable, "-m", "rtfocus", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert "Traceback" not in done.stderr
        # pymmcore-plus lets everybody's loggers speak.
        assert "DEBUG" not in done.stderr
        assert done.returncode == (0 if len(arguments) == 1 else ExitCode.CONFIG)
        assert [path.name for path in tmp_path.iterdir()] == ["home"]
        for topic in told.get(arguments[0], ()):
            assert topic in done.stdout.lower()


@pytest.mark.skipif(sys.platform == "win32", reason="file names are Unicode there")
def test_a_locale_of_ascii_alone_is_no_obstacle(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "rtfocus", "check", "\u00fc.rtfocus"],
        cwd=tmp_path,
        env={**os.environ, **plain, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    said = done.stderr.decode("utf-8")
    assert done.returncode == ExitCode.INPUT
    assert said.startswith("error: ")
    assert "\u00fc.rtfocus" in said


def test_an_unknown_option_is_a_usage_error():
    said = command("run", "demo", "--fast")
    assert said.code == 2
    assert "--fast" in said.err


def test_keys_say_who_needs_which_and_are_what_the_remedy_names(tmp_path):
    folder = tmp_path / "lab"
    said = succeeded(command("keys", folder))
    for name in ("server.key_secret", "client.key_secret", "clients/client.key"):
        assert name in said
        assert (folder / name).is_file()
    again = command("keys", folder)
    assert "already holds CURVE keys" in failed(again, ExitCode.INPUT)
    far = ["--set", "transport.control=tcp://0.0.0.0:*", "--quiet"]
    assert "rtfocus keys" in failed(command("acquire", "replay", *far))
