"""Every command answers for itself: help with an example, lists, diagnosis."""

import pytest
from loop_kit import command, process_of, succeeded
from typer.main import get_command

from rtfocus.cli import app

COMMANDS = sorted(get_command(app).commands)


def test_the_commands_are_those_that_are_promised():
    promised = {"run", "acquire", "process", "demo", "restore", "classify", "check"}
    promised |= {"doctor", "engines", "configs", "train", "export", "kernels"}
    assert promised <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name):
    said = succeeded(command(name, "--help"))
    assert f"Example: rtfocus {name}" in " ".join(said.split())


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
        assert f"{name}.yaml" in said


def test_doctor_tells_what_this_machine_has(tmp_path):
    said = succeeded(process_of("doctor", cwd=tmp_path))
    for topic in ("cpu", "openvino", "onnxruntime", "DemoCamera", "tensorrt"):
        assert topic.lower() in said.lower()


def test_engines_are_listed():
    said = succeeded(command("engines"))
    assert "implementation" in said


def test_an_unknown_option_is_a_usage_error():
    said = command("run", "demo", "--fast")
    assert said.code == 2
    assert "--fast" in said.err
