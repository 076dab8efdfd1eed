"""Order of GPU backends, and the reasons for those not taken."""

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rtfocus.errors import EngineError
from rtfocus.processing.gpu import backends
from rtfocus.processing.gpu.backends import (
    GPU_BACKENDS,
    open_network,
)
from rtfocus.processing.gpu.engine import (
    Gpu,
    GpuBackend,
    GpuEngine,
    GpuRequest,
    ShapeRange,
)
from rtfocus.processing.gpu.tensorrt.library import (
    LIBRARIES,
    import_tensorrt,
    listed_capabilities,
    why_not_importable,
    why_unsupported,
)

CARD = Gpu(0, "NVIDIA RTX A4000", (8, 6), 16 << 30)
SHAPES = ShapeRange((1, 1, 64, 64), (1, 1, 64, 64), (1, 1, 64, 64))
REQUEST = GpuRequest("delpnet", Path("model.onnx"), "00", "fp32", {"tiles": SHAPES})


def backend(name: str, why: str | None, opened: GpuEngine | str) -> GpuBackend:
    """Return a backend that is unavailable for a reason, or fails with a text."""

    def open_engine(request: GpuRequest, device: Gpu) -> GpuEngine:
        if isinstance(opened, str):
            raise EngineError(opened)
        return opened

    return GpuBackend(name, lambda device: why, open_engine)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the list of backends."""

    def replace(*given: GpuBackend) -> None:
        monkeypatch.setattr(backends, "GPU_BACKENDS", given)

    return replace


class Loaded:
    """What a backend returns; only its name is looked at here."""

    backend = "third 1.0"


def test_tensorrt_comes_first_then_rtx_then_torch() -> None:
    names = [backend.name for backend in GPU_BACKENDS]
    assert names == ["tensorrt", "tensorrt_rtx", "torch-cuda"]


def test_the_first_that_is_available_is_taken_and_the_others_told(
    choose: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = Loaded()
    choose(
        backend("first", "no library", "unused"),
        backend("second", None, "node 'x' is unknown"),
        backend("third", None, loaded),  # type: ignore[arg-type]
    )
    with caplog.at_level(logging.INFO):
        assert open_network("auto", REQUEST, CARD) is loaded
    assert "GPU backend: second (not first: no library)" in caplog.text
    assert "second passed over: node 'x' is unknown" in caplog.text
    assert "engine 'delpnet' runs on third 1.0" in caplog.text


def test_where_none_can_every_reason_is_given(choose: Callable[..., None]) -> None:
    choose(backend("first", None, "reason one"), backend("second", None, "reason two"))
    with pytest.raises(EngineError, match="reason one; reason two"):
        open_network("auto", REQUEST, CARD)
    choose(backend("first", "one is missing", ""), backend("second", "two too", ""))
    with pytest.raises(EngineError, match="first: one is missing; second: two too"):
        open_network("auto", REQUEST, CARD)


def test_a_named_backend_is_not_replaced(choose: Callable[..., None]) -> None:
    choose(backend("first", None, "reason one"), backend("second", None, "unused"))
    with pytest.raises(EngineError, match=r"^reason one$"):
        open_network("first", REQUEST, CARD)


def test_an_unknown_name_is_told_with_those_there_are() -> None:
    with pytest.raises(EngineError, match="tensorrt, tensorrt_rtx, torch-cuda and aut"):
        open_network("tensorflow", REQUEST, CARD)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_told_with_its_remedy(name: str) -> None:
    why = why_not_importable(name)  # type: ignore[arg-type]
    if why is None:
        pytest.skip(f"{name} is installed")
    assert f"{name} cannot be imported" in why
    assert "pip install rtfocus[" in why


def test_bindings_without_their_library_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On Windows the bindings look for the library themselves and raise this.
    module = tmp_path / "tensorrt.py"
    module.write_text("raise FileNotFoundError('Could not find: nvinfer_10.dll')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    import_tensorrt.cache_clear()
    try:
        why = why_not_importable("tensorrt")
    finally:
        import_tensorrt.cache_clear()
    assert why is not None
    assert "nvinfer_10.dll" in why


def test_cards_a_release_does_not_list_are_refused() -> None:
    why = why_not_importable("tensorrt_rtx")
    if why is not None:
        pytest.skip(why)
    rtx = import_tensorrt("tensorrt_rtx")
    listed = listed_capabilities(rtx)
    assert (8, 6) in listed
    assert all(why_unsupported(rtx, capability) is None for capability in listed)
    # Cards of the future take the general plan; data-centre cards are not served.
    assert why_unsupported(rtx, (max(listed)[0] + 1, 0)) is None
    hopper = why_unsupported(rtx, (9, 0))
    assert hopper is not None
    assert rtx.release in hopper
    assert "older than 7.5" in str(why_unsupported(rtx, (7, 0)))


def test_tensorrt_serves_data_centre_cards() -> None:
    why = why_not_importable("tensorrt_rtx")
    if why is not None:
        pytest.skip(why)
    # The rule looks at the library's name alone.
    library = dataclasses.replace(import_tensorrt("tensorrt_rtx"), name="tensorrt")
    assert why_unsupported(library, (9, 0)) is None
    assert why_unsupported(library, (7, 0)) is not None
