"""View command: a page in the browser that shows a run, live or finished."""

import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import psutil
import typer

from rtfocus.cli.endings import interruptible, stop_at_end_of_input
from rtfocus.config import Config
from rtfocus.errors import ConfigError, InputError
from rtfocus.transport.sockets import is_local

PORT = 8573


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(view)


def view(
    source: Annotated[
        str,
        typer.Argument(
            metavar="[ENDPOINT | RUN]",
            help="Preview endpoint of a processor, or a run folder.",
        ),
    ] = "tcp://127.0.0.1:5573",
    host: Annotated[
        str, typer.Option(help="Address to listen at; beyond this machine: a token.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help=f"Port; {PORT}, or a free one."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", help="Folder of CURVE keys, as transport.curve_keys."),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
    stop_on_end_of_input: Annotated[
        bool, typer.Option("--stop-on-end-of-input", hidden=True)
    ] = False,
) -> None:
    """Show a run in the browser: live, while it is written, or afterwards.

    It only looks; a recording is never slowed. Ctrl-C ends it.

    [bold]Example:[/] rtfocus view runs/demo.rtfocus
    """
    _assert_installed()
    from rtfocus.view.scene import Scene
    from rtfocus.view.server import Listening, usual_or_free
    from rtfocus.view.sources import LiveSource, RunSource

    with suppress(psutil.Error, OSError):
        # Where the computer has too much to do, the recording comes first.
        below = getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", 19)
        psutil.Process().nice(below)
    scene = Scene()
    with ExitStack() as opened:
        stop, _ = opened.enter_context(interruptible())
        if "://" in source:
            if keys is None and not is_local(source):
                typer.echo(
                    f"'{source}' is read in clear text; --keys encrypts", err=True
                )
            opened.enter_context(LiveSource(scene, source, keys))
        else:
            opened.enter_context(RunSource(scene, _existing(source)))
        listening = Listening(host, PORT if port is None else port)
        server = usual_or_free(scene, listening, told=port is not None)
        opened.enter_context(server)
        typer.echo(f"view: {server.url}")
        sys.stdout.flush()
        if not listening.is_local:
            typer.echo(
                "whoever has this link sees the images; the page itself is not "
                "encrypted: on a network you do not trust, use an SSH tunnel",
                err=True,
            )
        if open_browser:
            webbrowser.open(server.url)
        if stop_on_end_of_input:
            stop_at_end_of_input(stop)
        stop.wait()


def _existing(source: str) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        msg = (
            f"'{source}' is neither a run folder nor an endpoint (tcp://HOST:PORT); "
            "give one of them"
        )
        raise InputError(msg)
    return folder


def with_preview(config: Config) -> Config:
    """Return `config` with a preview socket, for a run that is to be seen.

    Raises
    ------
    ConfigError
        If the extra is not installed.
    """
    _assert_installed()
    transport = config.transport
    if transport.preview.endpoint is not None:
        return config
    preview = transport.preview.model_copy(update={"endpoint": "tcp://127.0.0.1:*"})
    transport = transport.model_copy(update={"preview": preview})
    return config.model_copy(update={"transport": transport})


@contextmanager
def view_process(endpoint: str, keys: Path | None) -> Iterator[None]:
    """Show a processor in a process of its own while the block runs.

    It prints where; whatever becomes of it, the block goes on.
    """
    command = [sys.executable, "-m", "rtfocus", "view", endpoint]
    if keys is not None:
        command += ["--keys", str(keys)]
    process = subprocess.Popen(
        [*command, "--stop-on-end-of-input"],
        stdin=subprocess.PIPE,
        # Out of the reach of Ctrl-C: it ends with the run.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _assert_installed() -> None:
    for name in ("starlette", "uvicorn", "websockets"):
        if find_spec(name) is None:
            msg = f"the view needs {name}; run: pip install 'rtfocus[view]'"
            raise ConfigError(msg)
