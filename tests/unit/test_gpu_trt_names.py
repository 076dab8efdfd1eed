"""The half of TensorRT that needs a GPU: every name we use exists in the library.

Nothing of it runs without a GPU, and without type stubs a name that a release has
dropped would be found out at the microscope.
"""

import ast
from pathlib import Path
from typing import Any

import pytest

from rtfocus.runtimes.tensorrt import engine, library, plans
from rtfocus.runtimes.tensorrt.library import (
    LIBRARIES,
    LibraryName,
    import_tensorrt,
    why_not_importable,
)

MODULES = (engine, library, plans)
CLASSES = {
    "builder": "Builder",
    "context": "IExecutionContext",
    "config": "IBuilderConfig",
    "engine": "ICudaEngine",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "self._cache": "IRuntimeCache",
    "self._context": "IExecutionContext",
    "self._config": "IRuntimeConfig",
    "self._engine": "ICudaEngine",
    "self._measuring": "IExecutionContext",
    "self._runtime": "Runtime",
}
"""What the variables of our modules hold."""
RUNTIME_CONFIGS = {"KernelCache", "compile_ahead"}
"""Where ``config`` is that of a context."""
RTX_ALONE = {
    "KernelCache",
    "TensorRtEngine",
    "compile_ahead",
    "listed_capabilities",
    "name_capabilities",
    "why_invalid",
    "why_not_capturable",
}
"""Classes and functions that ask for more where the library is that for RTX."""


def names_used() -> list[tuple[str, str]]:
    """Return (class, attribute) for every attribute our modules read or set."""
    return sorted({name for names in names_by_place().values() for name in names})


def names_by_place() -> dict[str, set[tuple[str, str]]]:
    """Return the names that every top-level class or function uses."""
    return {
        place.name: names_in(place)
        for module in MODULES
        for place in ast.parse(Path(str(module.__file__)).read_text("utf-8")).body
        if isinstance(place, ast.FunctionDef | ast.ClassDef)
    }


def names_in(place: ast.FunctionDef | ast.ClassDef) -> set[tuple[str, str]]:
    """Return (class, attribute) for every attribute of the library in a place."""
    used = set()
    for node in ast.walk(place):
        if isinstance(node, ast.Attribute):
            holder = ast.unparse(node.value)
            if holder == "config" and place.name in RUNTIME_CONFIGS:
                used.add(("IRuntimeConfig", node.attr))
            elif holder in CLASSES:
                used.add((CLASSES[holder], node.attr))
            elif holder == "api" or holder.endswith(".api"):
                used.add(("", node.attr))
            elif holder.startswith("api."):
                used.add((holder.removeprefix("api."), node.attr))
            elif ".api." in holder:
                used.add((holder.rpartition(".api.")[2], node.attr))
    return {(holder, name) for holder, name in used if not name.startswith("__")}


def test_the_search_finds_what_runs_a_network() -> None:
    used = names_used()
    assert ("IExecutionContext", "execute_async_v3") in used
    assert ("Runtime", "deserialize_cuda_engine") in used
    assert ("IRuntimeCache", "serialize") in used


@pytest.mark.parametrize(
    ("holder", "attribute"), names_used(), ids=lambda name: name or "api"
)
def test_the_library_has_the_name(holder: str, attribute: str) -> None:
    why = why_not_importable("tensorrt_rtx")
    if why is not None:
        pytest.skip(why)
    assert has(import_tensorrt("tensorrt_rtx").api, holder, attribute)


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_lacks_is_asked_for_in_known_places(name: LibraryName) -> None:
    why = why_not_importable(name)
    if why is not None:
        pytest.skip(why)
    api = import_tensorrt(name).api
    lacking = {
        place
        for place, names in names_by_place().items()
        if not all(has(api, *used) for used in names)
    }
    # TensorRT grew some of them later, e.g. runtime configurations in 10.13.
    assert lacking <= (set() if name == "tensorrt_rtx" else RTX_ALONE)


def has(api: Any, holder: str, attribute: str) -> bool:
    """Return whether a library, or a class of it, has a name."""
    return hasattr(getattr(api, holder, None) if holder else api, attribute)
