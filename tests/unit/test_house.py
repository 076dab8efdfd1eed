"""The house grows only on purpose: a number raised here has its reason in a commit."""

import ast
from pathlib import Path

from bench.house import Counts, count, imported_by_one, longest_chain, modules

HOUSE = count()


def test_the_house_does_not_splinter() -> None:
    most = Counts(
        modules=231, by_one=49, depth=12, processing_lines=9_669, longest_lines=460
    )
    grown = {
        name: (is_now, limit)
        for name in Counts.__dataclass_fields__
        if (is_now := getattr(HOUSE, name)) > (limit := getattr(most, name))
    }
    assert not grown


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
