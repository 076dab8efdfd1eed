"""References that are written out: every key, every command's options."""

import re
from pathlib import Path
from typing import Any

from rtfocus.cli.commands import COMMANDS, load
from rtfocus.config.model import reference
from rtfocus.files import resource_folder


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.rstrip().endswith("|  |")] == []


def test_the_written_reference_is_what_the_models_say() -> None:
    page = resource_folder("configs") / "README.md"
    assert page.read_text("utf-8").endswith(reference()), (
        "run: rtfocus configs --reference, and put it into configs/README.md"
    )


def test_the_page_of_commands_has_every_option() -> None:
    page = Path(__file__).parents[2] / "docs/reference/commands.md"
    rows = re.findall(r"^\| `([\w ]+)` \| (`--.*) \|$", page.read_text("utf-8"), re.M)
    told = {name: re.findall(r"`(--[\w-]+)`", options) for name, options in rows}
    there: dict[str, list[str]] = {}
    for name in COMMANDS:
        there |= _options(name, load(name))
    assert told == {name: options for name, options in there.items() if options}


def _options(name: str, command: Any) -> dict[str, list[str]]:
    """Return the long name of every option that is shown, by command."""
    found = {
        name: [
            next(option for option in param.opts if option.startswith("--"))
            for param in command.params
            if param.param_type_name == "option"
            and param.name != "help"
            and not param.hidden
        ]
    }
    for inner, below in getattr(command, "commands", {}).items():
        found |= _options(f"{name} {inner}", below)
    return found
