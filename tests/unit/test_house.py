"""The house grows only on purpose: a number raised here has its reason in a commit."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.house import Counts, count, imported_by_one, longest_chain, modules


def test_the_house_does_not_splinter() -> None:
    house = count()
    most = Counts(
        modules=190, by_one=28, depth=12, processing_lines=8_140, longest_lines=450
    )
    grown = {
        name: (is_now, limit)
        for name in Counts.__dataclass_fields__
        if (is_now := getattr(house, name)) > (limit := getattr(most, name))
    }
    assert not grown


def test_the_readme_stays_a_first_page() -> None:
    page = Path(__file__).parents[2] / "README.md"
    assert len(page.read_text("utf-8").splitlines()) <= 150


def test_counting_sees_chains_and_single_importers() -> None:
    graph = {
        "a": {"a.b", "c"},
        "a.b": {"c"},
        "c": {"d"},
        "d": set(),
    }
    assert longest_chain(graph, "a") == ("a", "a.b", "c", "d")
    assert imported_by_one(graph) == [("a.b", "a"), ("d", "c")]


def test_every_module_says_what_it_is_in_one_line() -> None:
    for path in modules().values():
        said = ast.get_docstring(ast.parse(Path(path).read_text("utf-8")))
        assert said, path
        assert said.splitlines()[0].endswith((".", ":")), path


def test_no_module_sets_a_name_twice() -> None:
    # Of two constants of one name, functions above the second see the second.
    for path in modules().values():
        tree = ast.parse(Path(path).read_text("utf-8"))
        names = Counter(name for node in tree.body for name in _names_set(node))
        assert not {name for name, times in names.items() if times > 1}, path


_MOST_BY_PLACE = 6


def test_no_function_is_given_many_things_by_their_place_alone() -> None:
    # Of a command every option is an argument, and typer gives each by its name.
    found = {
        f"{name}:{node.name}"
        for name, path in modules().items()
        if not name.startswith("rtfocus.cli")
        for node in ast.walk(ast.parse(Path(path).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len(_by_place(node)) > _MOST_BY_PLACE
    }
    assert not found


_READ_THE_CLOCK = {
    "rtfocus.machine",  # keeps the run's own
    # What people read, and a wait that a clock that leaps cuts short.
    "rtfocus.batch.plan",
    "rtfocus.evaluation.scorecard",
    "rtfocus.writers.folder",
}


def test_no_run_goes_by_a_clock_that_somebody_may_set() -> None:
    readings = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}
    found = {
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(Path(path).read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in readings
    }
    assert found == _READ_THE_CLOCK


def _by_place(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    names = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
    return [name for name in names if name not in ("self", "cls")]


def _names_set(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        # Signatures of one function for type checkers: the last one is the function.
        if "overload" not in map(ast.unparse, node.decorator_list):
            yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id
