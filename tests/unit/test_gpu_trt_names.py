"""The half of TensorRT that needs a GPU: every name we use exists in the library.

Nothing of it runs without a GPU, and without type stubs a name that a release has
dropped would be found out at the microscope.
"""

import ast
from pathlib import Path

import pytest

from rtfocus.processing.gpu.tensorrt import build, engine
from rtfocus.processing.gpu.tensorrt.library import import_tensorrt, why_not_importable

MODULES = (build, engine)
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "engine": "ICudaEngine",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "self._cache": "IRuntimeCache",
    "self._context": "IExecutionContext",
    "self._config": "IRuntimeConfig",
    "self._engine": "ICudaEngine",
    "self._measuring": "IExecutionContext",
    "self._runtime": "Runtime",
}
"""What the variables of our modules hold."""
RUNTIME_CONFIGS = {"engine"}
"""Where ``config`` is that of a context."""


def names_used() -> list[tuple[str, str]]:
    """Return (class, attribute) for every attribute our modules read or set."""
    used = set()
    for module in MODULES:
        name = module.__name__.rpartition(".")[2]
        tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            holder = ast.unparse(node.value)
            if holder == "config" and name in RUNTIME_CONFIGS:
                used.add(("IRuntimeConfig", node.attr))
            elif holder in CLASSES:
                used.add((CLASSES[holder], node.attr))
            elif holder == "api" or holder.endswith(".api"):
                used.add(("", node.attr))
            elif holder.startswith("api."):
                used.add((holder.removeprefix("api."), node.attr))
    return sorted(used)


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
    api = import_tensorrt("tensorrt_rtx").api
    assert hasattr(getattr(api, holder) if holder else api, attribute)
