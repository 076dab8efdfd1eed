"""Benches: each says how it is called, and stands on the page that lists them."""

import ast
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import stages
from rtfocus.engines.registry import find_engine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/figures/benches.md").read_text("utf-8")
MODULES = {path.stem: path.read_text("utf-8") for path in (ROOT / "bench").glob("*.py")}
BENCHES = sorted(
    name for name, text in MODULES.items() if '__name__ == "__main__"' in text
)
OF_LINUX = {"two_machines"}
"""Their modules ask Linux's kernel for namespaces, as nothing else here does."""


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_says_how_it_is_called(name, monkeypatch, capsys):
    if name in OF_LINUX and sys.platform != "linux":
        pytest.skip("its network is made of Linux's namespaces")
    monkeypatch.setattr(sys, "argv", [f"bench.{name}", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"bench.{name}").main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: bench.{name}")


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_has_its_line_on_the_page(name):
    command = re.compile(rf"\| `(sudo )?python -m bench\.{name}[ `]")
    lines = [line for line in PAGE.splitlines() if command.search(line)]
    assert len(lines) == 1
    # Name, what it measures, its command, how long it takes: none of them empty.
    cells = [cell.strip() for cell in lines[0].strip("| ").split(" | ")]
    assert len(cells) == 4
    assert all(cells)


def test_the_page_names_no_bench_that_is_gone():
    assert set(re.findall(r"bench\.(\w+)", PAGE)) <= set(BENCHES)


def test_what_is_no_bench_is_part_of_one():
    parts = set(MODULES) - set(BENCHES) - {"__init__"}
    used = {
        name
        for text in MODULES.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench")
        for name in (
            [one.name for one in node.names]
            if node.module == "bench"
            else [(node.module or "").removeprefix("bench.")]
        )
    }
    assert parts <= used


def test_stages_are_timed_of_an_engine_that_is_told_something_beside_pixels():
    found = find_engine("rtfocus-2")
    classifier = stages.open_classifier(found, (96, 112), "openvino", "f32", 1)
    prepared = classifier.prepare(np.ones((96, 112), np.float32))
    seen = classifier.see(prepared).defocus.level.shape
    bare = stages.bare_openvino(found, prepared, "f32", 1)()
    assert seen == bare[found.card.output.name].shape[-2:]
