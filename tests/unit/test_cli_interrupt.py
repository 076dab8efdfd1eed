"""Requests to end: signals, and the console of Windows on a stand-in of its library."""

import ast
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rtfocus.cli
from rtfocus.cli.endings import (
    ConsoleClose,
    closing_console,
    ended_by_signals,
    interruptible,
)
from rtfocus.errors import ExitCode
from rtfocus.workers import in_steps

CTRL_C, CTRL_BREAK, CLOSE, LOGOFF, SHUTDOWN = 0, 1, 2, 5, 6
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def not_under_nohup():
    """What is ignored from outside stays ignored: here nothing is, to begin with."""
    if os.name == "posix":
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        yield
        signal.signal(signal.SIGHUP, before)
    else:
        yield


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_stops_and_the_second_abandons(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with interruptible() as (stop, abandon):
        signal.raise_signal(number)
        assert (stop.is_set(), abandon.is_set()) == (True, False)
        signal.raise_signal(number)
        assert abandon.is_set()
    assert signal.getsignal(number) is before


@POSIX
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_elsewhere_a_request_to_end_is_a_keyboard_interrupt(name):
    with ended_by_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(getattr(signal, name))


AMID = """
import signal, sys
from contextlib import suppress
from rtfocus.cli.endings import ended_by_signals, interruptible

def again(frame, event, _):
    if event == "call" and frame.f_code.co_name == "notify_all":
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)

with ended_by_signals() as asked, suppress(KeyboardInterrupt):
    sys.setprofile(again)
    signal.raise_signal(signal.SIGINT)
with interruptible() as (stop, abandon):
    sys.setprofile(again)
    signal.raise_signal(signal.SIGINT)
print(asked.is_set(), stop.is_set(), abandon.is_set())
"""
"""The second Ctrl-C comes while the first one wakes whoever waits for it."""


@POSIX
def test_a_second_signal_amid_the_first_waits_for_nothing():
    command = [sys.executable, "-c", AMID]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (said.stdout.split(), said.stderr) == (["True", "True", "True"], "")


@POSIX
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals(), interruptible() as (stop, _):
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_left_alone_in_other_threads():
    entered = []

    def enter():
        with interruptible():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered


class Kernel32:
    """What Windows' library does with handlers: the newest is asked first."""

    def __init__(self):
        self.handlers = []

    def SetConsoleCtrlHandler(self, handler, add):  # noqa: N802 (Windows' name)
        (self.handlers.append if add else self.handlers.remove)(handler)

    def event(self, number):
        return any(handler(number) for handler in reversed(self.handlers))


@pytest.mark.parametrize("number", [CLOSE, LOGOFF, SHUTDOWN])
def test_a_closed_console_ends_the_work_and_is_held_open_until_then(number):
    windows, asked, held = Kernel32(), threading.Event(), []
    with closing_console(asked.set, windows):
        closing = threading.Thread(target=lambda: held.append(windows.event(number)))
        closing.start()
        assert asked.wait(10)
        assert closing.is_alive(), "Windows would have ended the process"
    closing.join(10)
    assert held == [True]
    assert windows.handlers == []


@pytest.mark.parametrize("number", [CTRL_C, CTRL_BREAK])
def test_keys_are_left_to_signals(number):
    windows, asked = Kernel32(), threading.Event()
    with closing_console(asked.set, windows):
        assert not windows.event(number)
    assert not asked.is_set()


def test_a_console_is_not_held_longer_than_windows_waits():
    close = ConsoleClose(lambda: None, grace_s=0.0)
    assert close(CLOSE)


def test_whoever_waits_for_the_end_of_input_leaves_it_to_nobody_else():
    # On Windows a library that asks what standard input is waits for that thread.
    script = (
        "import os, subprocess, sys, threading\n"
        "from rtfocus.cli.endings import stop_at_end_of_input\n"
        "stop, parent = threading.Event(), os.fstat(0)\n"
        "stop_at_end_of_input(stop)\n"
        "assert not os.path.samestat(parent, os.fstat(0))\n"
        "reads = 'import sys; sys.stdout.write(repr(sys.stdin.read()))'\n"
        "subprocess.run([sys.executable, '-c', reads], timeout=30, check=True)\n"
        "print(' alone', not stop.is_set(), flush=True)\n"
        "print('ended', stop.wait(30))\n"
    )
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8") as ended:
        assert ended.stdout.readline() == "'' alone True\n"
        ended.stdin.close()
        assert ended.stdout.readline() == "ended True\n"


@POSIX
@pytest.mark.parametrize("loaded", ["rtfocus.errors", "typer", "pydantic.types"])
def test_an_interrupt_while_starting_is_one_line(loaded):
    # Python turns the signal into KeyboardInterrupt in the middle of the imports: the
    # first ones, those of the commands, and those of typer while it reads the line.
    code = (
        "import signal, sys, importlib.abc\n"
        "class AtImport(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == '{loaded}':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, AtImport())\n"
        "sys.argv = ['rtfocus', 'configs']\n"
        "from rtfocus.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (ExitCode.INTERRUPTED, "interrupted\n")


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_error_that_a_library_makes_of_an_interrupt_is_none(name):
    # As pydantic does while it builds the classes of a config.
    script = (
        "import signal, sys\n"
        "from rtfocus.cli import commands, main\n"
        "def load(_):\n"
        "    try:\n"
        f"        signal.raise_signal(signal.{name})\n"
        "    except KeyboardInterrupt:\n"
        "        raise TypeError('KeyboardInterrupt')\n"
        "commands.load = load\n"
        "sys.argv = ['rtfocus', 'configs']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (ExitCode.INTERRUPTED, "interrupted\n")


def test_waiting_in_steps_leaves_turns_to_ctrl_c():
    steps_s = []

    def wait(step_s):
        steps_s.append(step_s)
        return len(steps_s) == 3

    in_steps(wait)
    assert len(steps_s) == 3
    assert all(0 < step_s < 1 for step_s in steps_s)


def test_no_command_waits_without_end():
    # Windows hears no Ctrl-C in such a wait; a process that was killed has ended.
    commands = Path(rtfocus.cli.__file__).parent
    found = {
        ast.unparse(node)
        for path in (*commands.glob("*.py"), commands.with_name("launch.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "wait"
        and not (node.args or node.keywords)
    }
    assert found == {"process.wait()"}


@POSIX
def test_an_interrupt_while_an_engine_is_compiled_ends_as_one(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "image.png")
    script = (
        "import signal, sys, threading, openvino\n"
        "from rtfocus.cli import main\n"
        "compile_model = openvino.Core.compile_model\n"
        "def compile_until_the_end(*args, **options):\n"
        "    main_thread = threading.main_thread().ident\n"
        "    signal.pthread_kill(main_thread, signal.SIGINT)\n"
        "    while True:\n"
        "        compile_model(*args, **options)\n"
        "openvino.Core.compile_model = compile_until_the_end\n"
        "sys.argv = ['rtfocus', 'classify', 'image.png']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr[-12:]) == (
        ExitCode.INTERRUPTED,
        "interrupted\n",
    )


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_the_process_ends_leaves_its_exit_code(name):
    # Called after what was registered later: when the command has told its result.
    script = (
        "import atexit, signal, sys\n"
        "from rtfocus.cli import main\n"
        f"atexit.register(signal.raise_signal, signal.{name})\n"
        "sys.argv = ['rtfocus', '--version']\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert (ended.returncode, ended.stderr) == (ExitCode.DONE, b"")
    assert ended.stdout.startswith(b"rtfocus ")
