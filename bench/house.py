"""House: how many modules the code has, how they hang together, a frame's way.

- *modules*: files of `rtfocus`, with and without ``__init__``,
- *imported by one*: those that a single other module imports,
- *depth*: the longest chain of imports that ``import rtfocus.app`` runs through,
- *lines*: of ``processing/``, and of the files that are longest,
- *a frame's way* (``--walk``): every file that is entered while frames flow.

Run: python -m bench.house [--names] [--walk]
"""

import argparse
import ast
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType

import rtfocus

LOOP = Path(__file__).with_name("loop.yaml")
SMALL = (
    "microscope.width_px=192",
    "microscope.height_px=192",
    "transport.preview.endpoint=tcp://127.0.0.1:*",
)
ROOT = Path(rtfocus.__file__).parent
Graph = dict[str, set[str]]
"""Module to the modules of rtfocus that it imports."""


def modules() -> dict[str, Path]:
    """Return every module of rtfocus with its file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[: -1 if parts[-1] == "__init__" else None])] = path
    return found


def imports(*, at_once: bool) -> Graph:
    """Return who imports whom; `at_once`: only what runs when a module is loaded."""
    files = modules()
    graph: Graph = {}
    for module, path in files.items():
        named = set(_named(_tree(path), at_once=at_once))
        graph[module] = {name for name in named if name in files} - {module}
    return graph


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _named(tree: ast.AST, *, at_once: bool) -> Iterator[str]:
    """Yield what may be a module in the import statements of a tree."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            yield from _named(node, at_once=at_once)


def longest_chain(graph: Graph, start: str) -> tuple[str, ...]:
    """Return the longest way down from a module; it has no circles."""

    @cache
    def below(module: str) -> tuple[str, ...]:
        ways = (below(name) for name in sorted(graph[module]))
        return (module, *max(ways, key=len, default=()))

    return below(start)


def imported_by_one(graph: Graph) -> list[tuple[str, str]]:
    """Return modules, packages left out, that one other imports, with that one."""
    packages = {name.rpartition(".")[0] for name in graph}
    by: dict[str, set[str]] = {}
    for module, named in graph.items():
        for name in named:
            by.setdefault(name, set()).add(module)
    return sorted(
        (name, next(iter(who)))
        for name, who in by.items()
        if len(who) == 1 and name not in packages
    )


def lines(path: Path) -> int:
    """Return how many lines a file has."""
    return len(path.read_text("utf-8").splitlines())


class Calls:
    """Counts how often each function of rtfocus is called, in every thread."""

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, str, int]] = Counter()
        """By file below the package, name and line."""

    def note(self, frame: FrameType, event: str, _: object) -> None:
        """Be told of a call, as `sys.setprofile` does."""
        if event != "call":
            return
        code = frame.f_code
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT):
            place = (str(path.relative_to(ROOT)), code.co_name, code.co_firstlineno)
            self.counted[place] += 1

    def __enter__(self) -> "Calls":
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def calls_of_series(frames: int) -> Counter[tuple[str, str, int]]:
    """Send a series through both sides, in this process, and count the calls."""
    from rtfocus.app import acquire, process
    from rtfocus.config import load_config
    from rtfocus.launch import on_free_ports

    # Before calls are counted: counted imports outlast the patience of the sides.
    for module in ("focusing", "holding", "microscope.acquisition", "report.page"):
        import_module(f"rtfocus.{module}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        loops = f"acquisition.mda.time_plan.loops={frames}"
        config = on_free_ports(
            load_config(LOOP, [loops, f"run.folder={folder}", *SMALL])
        )
        stop = threading.Event()
        with Calls() as calls:
            side = threading.Thread(
                target=process, args=(config,), kwargs={"stop": stop}
            )
            side.start()
            acquire(config, stop=stop)
            side.join()
    return calls.counted


def walk(few: int = 12, more: int = 24) -> list[str]:
    """Return the files that a frame passes: a function there is called for each.

    What is called at least once more for every frame more is on the way; what a
    series calls at its start or its end, or now and then, is not: a picture of more
    frames has a few more ticks.
    """
    before, after = calls_of_series(few), calls_of_series(more)
    more_often = (
        place for place in after if after[place] - before[place] >= more - few
    )
    return sorted({file for file, _, _ in more_often})


@dataclass(frozen=True)
class Counts:
    """The house in numbers."""

    modules: int
    """Files, without ``__init__``."""
    by_one: int
    """Of them, those that a single other module imports."""
    depth: int
    """Of the imports that ``import rtfocus.app`` runs through."""
    processing_lines: int
    longest_lines: int
    """Of the longest file."""


def count() -> Counts:
    """Count the house."""
    files = modules()
    in_processing = [p for m, p in files.items() if m.startswith("rtfocus.processing")]
    return Counts(
        modules=sum(path.name != "__init__.py" for path in files.values()),
        by_one=len(imported_by_one(imports(at_once=False))),
        depth=len(longest_chain(imports(at_once=True), "rtfocus.app")),
        processing_lines=sum(map(lines, in_processing)),
        longest_lines=max(map(lines, files.values())),
    )


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", action="store_true", help="which modules they are")
    parser.add_argument("--walk", action="store_true", help="run a series, list files")
    arguments = parser.parse_args()
    print(count())
    files = modules()
    rooms = Counter(".".join(m.split(".")[1:2]) or "." for m in files)
    print("rooms:", ", ".join(f"{r} {n}" for r, n in rooms.most_common() if n > 1))
    longest = sorted(files.values(), key=lines)[-5:]
    print("longest:", ", ".join(f"{p.name} {lines(p)}" for p in reversed(longest)))
    if arguments.names:
        for module, by in imported_by_one(imports(at_once=False)):
            print(f"  {module} <- {by}")
        chain = longest_chain(imports(at_once=True), "rtfocus.app")
        print("  " + " > ".join(chain))
    if arguments.walk:
        passed = walk()
        print(f"a frame passes {len(passed)} files: {', '.join(passed)}")


if __name__ == "__main__":
    main()
