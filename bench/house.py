"""House: how many modules the code has, how they hang together, a frame's way.

- *modules*: files of `rtfocus`, with and without ``__init__``,
- *imported by one*: those that a single other module imports,
- *depth*: the longest chain of imports that ``import rtfocus.app`` runs through,
- *lines*: of ``processing/``, and of the files that are longest,
- *a frame's way* (``--walk``): see `bench.walk`.

Run: python -m bench.house [--names] [--walk]
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import rtfocus

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
    parser.add_argument("--walk", action="store_true", help="follow a frame")
    arguments = parser.parse_args()
    said = [str(count())]
    files = modules()
    rooms = Counter(".".join(m.split(".")[1:2]) or "." for m in files)
    held = ", ".join(f"{room} {n}" for room, n in rooms.most_common() if n > 1)
    said.append(f"rooms: {held}")
    longest = sorted(files.values(), key=lines)[-5:]
    names = ", ".join(f"{path.name} {lines(path)}" for path in reversed(longest))
    said.append(f"longest: {names}")
    if arguments.names:
        for module, by in imported_by_one(imports(at_once=False)):
            said.append(f"  {module} <- {by}")
        chain = longest_chain(imports(at_once=True), "rtfocus.app")
        said.append("  " + " > ".join(chain))
    if arguments.walk:
        # Here, because it imports both sides.
        from bench.walk import walk

        followed = walk()
        for thread, passed in followed.table().items():
            said.append(f"  {thread}: {passed}")
        held = "; ".join(" > ".join(rooms) for rooms in followed.rooms())
        said.append(f"rooms: {held}; {len(followed.carrying())} files carry it")
    # At once: `head` may be gone before a second line.
    print("\n".join(said))


if __name__ == "__main__":
    main()
