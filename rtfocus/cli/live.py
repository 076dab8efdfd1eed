"""Live commands: run, acquire, process and autofocus, and view, which shows a run.

The main loop is imported once a command runs and its config is read: ``--help`` and a
mistake in a config are answered without it.
"""

import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from rtfocus.cli.commands import (
    ConfigArgument,
    QuietOption,
    SetOption,
    read_config,
    refuse_options,
)
from rtfocus.cli.display import Rows, defocus_text, display, display_run
from rtfocus.cli.endings import interruptible, said, stop_at_end_of_input
from rtfocus.cli.runs import print_report
from rtfocus.config import Config
from rtfocus.config.sections import ReplayConfig
from rtfocus.errors import ConfigError, ExitCode, InputError, RtfocusError
from rtfocus.machine import RUN_CLOCK
from rtfocus.transport.sockets import is_local
from rtfocus.workers import in_steps

if TYPE_CHECKING:
    from rtfocus.transport.preview import PreviewPublisher
    from rtfocus.transport.publisher import FramePublisher, PublisherStatus

PORT = 8573

StopOnEndOfInput = Annotated[bool, typer.Option("--stop-on-end-of-input", hidden=True)]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(view)
    app.command()(run)
    app.command()(acquire)
    app.command()(process)
    app.command()(autofocus)


def view(
    source: Annotated[
        str,
        typer.Argument(
            metavar="[ENDPOINT | RUN]",
            help="Preview endpoint of a processor, or a run folder.",
        ),
    ] = "tcp://127.0.0.1:5573",
    host: Annotated[
        str, typer.Option(help="Address to serve; beyond this computer with a token.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help=f"Port; default: {PORT}, or a free one."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys", help="Folder with CURVE keys, see transport.curve_keys."
        ),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
    stop_on_end_of_input: StopOnEndOfInput = False,
) -> None:
    """Show a run in the browser: live, while it is written, or afterwards.

    It only displays and never slows a recording. Ctrl-C ends it.

    [bold]Example:[/] rtfocus view runs/demo.rtfocus
    """
    _assert_installed()
    from rtfocus.view.scene import LiveSource, RunSource, Scene
    from rtfocus.view.server import Listening, usual_or_free

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
        in_steps(stop.wait)


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
    if config.transport.preview.endpoint is not None:
        return config
    return config.with_preview(endpoint="tcp://127.0.0.1:*")


@contextmanager
def view_process(endpoint: str, keys: Path | None) -> Iterator[None]:
    """Show a processor in a process of its own while the block runs.

    It prints where; whatever becomes of it, the block goes on.
    """
    from rtfocus.launch import end_child, start_child

    encrypted = [] if keys is None else ["--keys", str(keys)]
    process = start_child(["view", endpoint, *encrypted])
    try:
        yield
    finally:
        end_child(process, within_s=10)


def _assert_installed() -> None:
    for name in ("starlette", "uvicorn", "websockets"):
        if find_spec(name) is None:
            msg = f'the view needs {name}; run: pip install "rtfocus[view]"'
            raise ConfigError(msg)


def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    quiet: QuietOption = False,
    view: Annotated[
        bool,
        typer.Option("--view", help="Show the run in the browser while it lasts."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check plan, channels, engines and disk; expose and write nothing.",
        ),
    ] = False,
) -> None:
    """Acquire, find defocus, restore and record, all on this machine.

    Ctrl-C ends the acquisition; what was acquired is still processed and written.
    The exit code is 0 only if every planned frame is written, 5 if some are not.

    [bold]Example:[/] rtfocus run democamera --set run.folder=D:/data
    """
    settings = read_config(config, overrides)
    if dry_run:
        raise typer.Exit(_dry_run(settings))
    if view:
        settings = with_preview(settings)
    _refuse_mistyped(settings)
    from rtfocus import app as loop

    with ExitStack() as viewing:

        def show(preview: "PreviewPublisher") -> None:
            if view and preview.endpoint is not None:
                keys = settings.transport.curve_keys
                viewing.enter_context(view_process(preview.endpoint, keys))

        with (
            interruptible() as (stop, abandon),
            display_run(quiet=quiet) as on_monitor,
        ):
            folder = loop.run(
                settings,
                stop=stop,
                abandon=abandon,
                on_monitor=on_monitor,
                on_preview=show,
            )
    if folder is None:
        raise typer.Exit(ExitCode.INTERRUPTED)
    raise typer.Exit(print_report(folder).exit_code)


def _refuse_mistyped(config: Config) -> None:
    """Refuse a mistyped plan or engine before both sides start, which takes long.

    Only what this run is sure to ask for: engines of the channels that its plan names.
    """
    if config.acquisition.mda is None or isinstance(config.microscope, ReplayConfig):
        return
    from rtfocus.engines.registry import find_engine
    from rtfocus.microscope.sequence import read_sequence
    from rtfocus.processing.channel_plan import restored_as_it_is

    processing = config.processing
    for planned in read_sequence(config.acquisition.mda).channels:
        name, method = config.engines_of(planned.config)
        restored_as_it_is(method, processing)
        if config.channel(planned.config).optics is not None and name is not None:
            find_engine(name, processing.engine_folders)


def _dry_run(config: Config) -> ExitCode:
    """Print what was looked at; errors go to standard error as those of a run."""
    # The microscope side is loaded for this alone.
    from rtfocus.launch import preflight

    code = ExitCode.DONE
    for check in preflight(config):
        if check.error is None:
            typer.echo(f"{check.topic + ':':12} {check.said}")
        else:
            typer.echo(f"error: {check.error}", err=True)
            code = code or check.error.exit_code
    if code is ExitCode.DONE:
        typer.echo("nothing stands in the way of this run")
    return code


def process(
    config: ConfigArgument,
    overrides: SetOption = None,
    quiet: QuietOption = False,
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="End after one series, or when no microscope side answers.",
        ),
    ] = False,
    stop_on_end_of_input: StopOnEndOfInput = False,
) -> None:
    """Receive, find defocus, restore and record: the processor side alone.

    Stays until Ctrl-C: it waits for the next series, and for a microscope side that
    went silent.

    [bold]Example:[/] rtfocus process my.yaml --set transport.frames=tcp://scope:5571
    """
    settings = read_config(config, overrides)
    from rtfocus import app as loop

    codes = [ExitCode.DONE]

    def told(error: RtfocusError) -> None:
        typer.echo(f"error: {said(error)}", err=True)
        codes.append(error.exit_code)

    with (
        interruptible() as (stop, _),
        display_run(quiet=quiet) as on_monitor,
    ):
        if stop_on_end_of_input:
            stop_at_end_of_input(stop)
        if once:
            folder = loop.process(settings, stop=stop, on_monitor=on_monitor)
        else:
            folder = None
            loop.serve(
                settings,
                stop=stop,
                on_monitor=on_monitor,
                on_finished=lambda path: codes.append(print_report(path).exit_code),
                on_failure=told,
                any_port=stop_on_end_of_input,  # a child of `rtfocus.stream`
            )
    if folder is not None:
        codes.append(print_report(folder).exit_code)
    raise typer.Exit(max(codes))


def acquire(
    config: ConfigArgument,
    overrides: SetOption = None,
    quiet: QuietOption = False,
    stop_on_end_of_input: StopOnEndOfInput = False,
) -> None:
    """Acquire one series and send it to a processor: the microscope side alone.

    [bold]Example:[/] rtfocus acquire my.yaml --set acquisition.mda=plan.yaml
    """
    settings = read_config(config, overrides)
    from rtfocus import app as loop

    publishers: list[FramePublisher] = []
    with interruptible() as (stop, _):
        if stop_on_end_of_input:
            stop_at_end_of_input(stop)
        with display(lambda: _publisher_rows(publishers), quiet=quiet):
            report = loop.acquire(
                settings,
                stop=stop,
                on_publisher=publishers.append,
                on_focus=lambda line: None if quiet else typer.echo(line),
            )
    if not quiet:
        typer.echo(report)
        typer.echo(f"recorded by {publishers[-1].status().recorder or 'nobody'}")
    elif not report.outcome.is_complete:
        typer.echo(report.outcome, err=True)
    raise typer.Exit(report.outcome.exit_code)


def _recorder(status: "PublisherStatus") -> str:
    """Say who records, so that a stranger is not taken for the own processor."""
    if status.recorder_alive:
        return status.recorder or "connected"
    return f"lost: {status.recorder}" if status.recorder else "waiting for one"


def _publisher_rows(publishers: list["FramePublisher"]) -> Rows:
    if not publishers:
        return [("state", "starting")]
    status = publishers[-1].status()
    return [
        ("sent", str(status.sent)),
        ("received", str(status.received_upto)),
        ("durable", str(status.durable_upto)),
        ("free slots", str(status.free_slots)),
        ("defocus", defocus_text(status.estimate)),
        ("recorder", _recorder(status)),
        ("resent", str(status.resent)),
        ("stalls", str(status.stalls)),
    ]


def autofocus(
    config: ConfigArgument,
    overrides: SetOption = None,
    hold: Annotated[
        bool,
        typer.Option("--hold/--once", help="Hold focus until Ctrl-C, or find it once."),
    ] = False,
    interval_s: Annotated[
        float | None,
        typer.Option(
            "--interval", min=0.0, help="Hold: seconds between images; default: 1."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Hold: end after so many.")
    ] = None,
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Append every decision, as NDJSON.")
    ] = None,
) -> None:
    """Find focus with the camera's own images, or hold it.

    The stage stays between autofocus.low_um and high_um. If focus was not found, the
    exit code is 1 and the stage stands at the sharpest z that was seen.

    [bold]Example:[/] rtfocus autofocus my.yaml --set autofocus.high_um=4200
    """
    from rtfocus.autofocus.devices import CoreStage
    from rtfocus.autofocus.focuser import FocusJournal
    from rtfocus.autofocus.hold import Holder
    from rtfocus.focusing import open_focuser
    from rtfocus.holding import HeldPlace, estimate_of
    from rtfocus.images.outputs import OutputGuard
    from rtfocus.microscope.core import open_core

    if not hold:
        of_hold = {"--interval": interval_s, "--images": images}
        refuse_options(of_hold, "focus is found once; give --hold too")
    settings = read_config(config, overrides)
    if settings.autofocus.actuator == "offset":
        why = "the hardware holds focus already (autofocus.actuator: offset)"
        refuse_options({"--hold": hold or None}, why)
    if isinstance(settings.microscope, ReplayConfig):
        msg = "recorded images cannot be focused; give a microscope with a z-stage"
        raise ConfigError(msg)
    log = FocusJournal(journal and OutputGuard([Path(config)]).claim_journal(journal))
    with (
        interruptible() as (stop, _),
        open_core(settings) as core,
        open_focuser(core, settings, journal=log, tell=typer.echo) as focuser,
    ):
        search = partial(focuser.focus, is_canceled=stop.is_set)
        verdict = search()
        if not verdict.focused:
            raise typer.Exit(ExitCode.INTERRUPTED if stop.is_set() else ExitCode.FAILED)
        if not hold:
            return
        channel = focuser.channel()
        models, limits = focuser.models(channel), focuser.limits_around(None)
        holder = Holder(models, focuser.move_rule(models.unit_um, limits))
        stage, taken = CoreStage(core), 0
        place = HeldPlace(focuser, holder, stage, search)
        place.begin(verdict, RUN_CLOCK.now_s())
        pause_s = 1.0 if interval_s is None else interval_s
        while not stop.wait(pause_s) and (images is None or taken < images):
            if step_um := place.follow(RUN_CLOCK.now_s()):
                typer.echo(f"held: {step_um:+.2f} um to z {stage.position_um():.2f} um")
            if not place.is_paused:
                taken, z_um = taken + 1, stage.position_um()
                holder.take(estimate_of(focuser.look(channel, z_um), taken, z_um))
        typer.echo(f"held: {taken} images, z {stage.position_um():.2f} um at the end")
