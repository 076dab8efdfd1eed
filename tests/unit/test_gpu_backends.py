"""Order of GPU backends, and the reasons for those not taken."""

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rtfocus.errors import EngineError
from rtfocus.runtimes import gpu
from rtfocus.runtimes.gpu import (
    GPU_BACKENDS,
    Gpu,
    GpuBackend,
    GpuEngine,
    GpuRequest,
    ShapeRange,
    open_network,
)
from rtfocus.runtimes.tensorrt.engine import why_unavailable
from rtfocus.runtimes.tensorrt.library import (
    LIBRARIES,
    TensorRt,
    import_tensorrt,
    listed_capabilities,
    why_not_importable,
)
from rtfocus.runtimes.tensorrt.plans import ANY_CARD, rtx_target, target_of

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
        monkeypatch.setattr(gpu, "GPU_BACKENDS", given)

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
    assert 'pip install "rtfocus[' in why


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


def card(*capability: int) -> Gpu:
    """Return a GPU of a compute capability."""
    return dataclasses.replace(CARD, compute_capability=capability)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 3), (99, 0)])
def test_a_card_at_hand_is_named_by_no_plan_and_judged_by_the_runtime(
    rtx: TensorRt, capability: tuple[int, int]
) -> None:
    # Hopper is listed by no release, and runs.
    assert why_unavailable("tensorrt_rtx", card(*capability)) is None
    assert target_of(rtx, card(*capability)) == ANY_CARD


def test_turing_has_a_plan_of_its_own_and_older_cards_none(rtx: TensorRt) -> None:
    assert target_of(rtx, card(7, 5)).capabilities == ((7, 5),)
    assert "older than 7.5" in str(why_unavailable("tensorrt_rtx", card(7, 0)))
    with pytest.raises(EngineError, match=r"older than 7\.5"):
        target_of(rtx, card(7, 0))


def test_what_a_release_lists_counts_for_building_ahead_alone(rtx: TensorRt) -> None:
    listed = listed_capabilities(rtx)
    assert (8, 6) in listed
    assert all(rtx_target(rtx, c).capabilities == (c,) for c in listed)
    assert rtx_target(rtx, (max(listed)[0] + 1, 0)) == ANY_CARD
    with pytest.raises(EngineError, match=r"not for 9\.0; build without --capability"):
        rtx_target(rtx, (9, 0))
