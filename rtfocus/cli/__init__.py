"""Command line: one module per group of commands, errors told in one line."""

import logging
import sys

import typer

from rtfocus import __version__
from rtfocus.cli import (
    check,
    demo,
    doctor,
    engines,
    evaluate,
    kernels,
    live,
    offline,
    psf,
    train,
)
from rtfocus.errors import RtfocusError

app = typer.Typer(
    name="rtfocus",
    help="Finds, corrects and records defocus while a microscope acquires.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
demo.add_to(app)
live.add_to(app)
offline.add_to(app)
check.add_to(app)
doctor.add_to(app)
train.add_to(app)
psf.add_to(app)
evaluate.add_to(app)
kernels.add_to(app)
app.add_typer(engines.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rtfocus {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show it."
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what happens."),
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """Run the command line; one line for anything a user can act on."""
    # Piped output is UTF-8 everywhere, also where the console's code page is not.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        app()
    except RtfocusError as error:
        typer.echo(f"error: {error}", err=True)
        logging.getLogger(__name__).info("where it came from", exc_info=error)
        raise SystemExit(int(error.exit_code)) from None
