"""Plans built for real, without a GPU, by TensorRT for RTX."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from network_kit import CONDITION_ENTRIES, quantise, write_restorer, write_with_operator

from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import GpuRequest, ShapeRange, batched
from rtfocus.runtimes.tensorrt.library import (
    TensorRt,
    UnusablePlanError,
    listed_capabilities,
    load_error,
)
from rtfocus.runtimes.tensorrt.plans import (
    ANY_CARD,
    PlanCache,
    build_plan,
    ready_plan,
    rtx_target,
)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A restorer of the engines' form in every precision."""
    folder = tmp_path_factory.mktemp("networks")
    single = write_restorer(folder / "model.fp32.onnx")
    return {
        "fp32": single,
        "fp16": write_restorer(folder / "model.fp16.onnx", half=True),
        "int8": quantise(single, folder / "model.int8.onnx"),
    }


def request_of(model: Path, precision: str = "fp32", side_px: int = 64) -> GpuRequest:
    """Ask for a restorer on tiles of a side, 1 to 8 per batch."""
    return GpuRequest(
        name="restorer",
        model=model,
        weights_sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
        precision=precision,  # type: ignore[arg-type]
        inputs={
            "tiles": batched((8, 1, side_px, side_px)),
            "condition": batched((8, CONDITION_ENTRIES)),
        },
    )


def served(library: TensorRt, precision: str) -> bool:
    """Return whether a release builds a precision: int8 came with 1.7."""
    major, minor = library.release.split(".")[:2]
    return precision != "int8" or (int(major), int(minor)) >= (1, 7)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("capabilities", [(), ((8, 6),), ((8, 9), (12, 0))])
def test_a_restorer_builds_in_every_precision(
    rtx: TensorRt,
    networks: dict[str, Path],
    precision: str,
    capabilities: tuple[tuple[int, int], ...],
) -> None:
    request = request_of(networks[precision], precision)
    if not served(rtx, precision):
        with pytest.raises(EngineError, match=r"int8 needs tensorrt_rtx 1\.7 or later"):
            build_plan(rtx, request, capabilities)
        return
    plan = build_plan(rtx, request, capabilities)
    assert plan.startswith(b"vtrt")


def test_tf32_off_reaches_the_plan(rtx: TensorRt, networks: dict[str, Path]) -> None:
    request = request_of(networks["fp32"])
    # The plan spells out what its kernels are compiled with on the card.
    assert b" tf32=1\n" in build_plan(rtx, request)
    exact = build_plan(rtx, dataclasses.replace(request, tf32=False))
    assert b" tf32=0\n" in exact
    assert b" tf32=1\n" not in exact


def test_every_listed_capability_takes_the_fp16_network(
    rtx: TensorRt, networks: dict[str, Path]
) -> None:
    request = request_of(networks["fp16"], "fp16")
    for capability in listed_capabilities(rtx):
        assert build_plan(rtx, request, [capability])


def test_a_card_without_fp32_products_is_told_to_use_fp16(
    rtx: TensorRt, networks: dict[str, Path]
) -> None:
    if not served(rtx, "int8"):
        # Before 1.7 the lack was found on the card.
        assert build_plan(rtx, request_of(networks["fp32"]), [(7, 5)])
        return
    with pytest.raises(EngineError, match=r"'film'.*--precision fp16"):
        build_plan(rtx, request_of(networks["fp32"]), [(7, 5)])


def test_a_capability_that_no_release_builds_for_is_refused(
    rtx: TensorRt, networks: dict[str, Path]
) -> None:
    with pytest.raises(EngineError, match=r"compute capability 6\.1"):
        build_plan(rtx, request_of(networks["fp32"]), [(6, 1)])


def test_progress_is_told_with_phases_that_end(
    rtx: TensorRt, networks: dict[str, Path]
) -> None:
    told: list[tuple[str, int, int]] = []

    def progress(phase: str, done: int, steps: int) -> bool:
        told.append((phase, done, steps))
        return True

    build_plan(rtx, request_of(networks["fp32"]), progress=progress)
    assert told[0][1] == 0
    assert all(0 <= done <= steps for _, done, steps in told)
    assert any(0 < done == steps for _, done, steps in told)


def test_progress_can_cancel(rtx: TensorRt, networks: dict[str, Path]) -> None:
    with pytest.raises(EngineError, match=r"'restorer'.*cancelled"):
        build_plan(rtx, request_of(networks["fp32"]), progress=lambda *_: False)


def test_what_progress_raises_comes_out(
    rtx: TensorRt, networks: dict[str, Path]
) -> None:
    def progress(phase: str, _done: int, _steps: int) -> bool:
        raise KeyError(phase)

    with pytest.raises(KeyError):
        build_plan(rtx, request_of(networks["fp32"]), progress=progress)


@pytest.mark.parametrize("fault", ["cut", "no onnx", "empty"])
def test_a_damaged_file_is_named(
    rtx: TensorRt, networks: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    path = tmp_path / "model.onnx"
    whole = networks["fp32"].read_bytes()
    data = {"cut": whole[: len(whole) // 2], "no onnx": b"GIF89a" * 50, "empty": b""}
    path.write_bytes(data[fault])
    with pytest.raises(EngineError, match=r"'restorer'.*model\.onnx.*export"):
        build_plan(rtx, request_of(path))


def test_a_missing_file_is_named(rtx: TensorRt, networks: dict[str, Path]) -> None:
    request = request_of(networks["fp32"])
    gone = dataclasses.replace(request, model=request.model.with_name("gone.onnx"))
    with pytest.raises(EngineError, match=r"gone\.onnx.*No such file"):
        build_plan(rtx, gone)


def test_an_unknown_operator_is_told_with_its_node(
    rtx: TensorRt, tmp_path: Path
) -> None:
    path = write_with_operator(tmp_path / "odd.onnx", "Unique", "rare_values")
    request = dataclasses.replace(
        request_of(path), inputs={"tiles": batched((8, 1, 64, 64))}
    )
    with pytest.raises(EngineError, match=r"node 'rare_values' \(Unique\).*torch-cuda"):
        build_plan(rtx, request)


def test_a_quantised_bias_is_told_with_its_node(
    rtx: TensorRt, networks: dict[str, Path], tmp_path: Path
) -> None:
    path = quantise(networks["fp32"], tmp_path / "bias.onnx", quantise_bias=True)
    with pytest.raises(EngineError, match=r"node 'b\w*_Deq.*QuantizeBias off"):
        build_plan(rtx, request_of(path, "int8"))


def _odd_sides(request: GpuRequest) -> dict[str, ShapeRange]:
    return {**request.inputs, "tiles": batched((8, 1, 63, 63))}


def _wrong_condition(request: GpuRequest) -> dict[str, ShapeRange]:
    return {**request.inputs, "condition": batched((8, CONDITION_ENTRIES - 1))}


def _shrinking(request: GpuRequest) -> dict[str, ShapeRange]:
    shape = request.inputs["tiles"]
    upside_down = ShapeRange(shape.largest, shape.usual, shape.smallest)
    return {**request.inputs, "tiles": upside_down}


def _no_condition(request: GpuRequest) -> dict[str, ShapeRange]:
    return {"tiles": request.inputs["tiles"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_odd_sides, "skip.*multiple_px"),
        (_wrong_condition, "condition.*card"),
        (_shrinking, "tiles.*smallest"),
        (_no_condition, r"\['tiles'\].*\['condition', 'tiles'\]"),
    ],
)
def test_shapes_that_do_not_suit_are_named(
    rtx: TensorRt,
    networks: dict[str, Path],
    change: Callable[[GpuRequest], dict[str, ShapeRange]],
    words: str,
) -> None:
    request = request_of(networks["fp32"])
    request = dataclasses.replace(request, inputs=change(request))
    with pytest.raises(EngineError, match=words):
        build_plan(rtx, request)


def test_too_small_a_workspace_is_told_with_the_remedy(
    rtx: TensorRt, networks: dict[str, Path]
) -> None:
    request = dataclasses.replace(
        request_of(networks["fp32"], side_px=512), workspace_bytes=1 << 10
    )
    with pytest.raises(EngineError, match=r"workspace.*lower processing.*tiles_per"):
        build_plan(rtx, request)


def test_tf32_off_is_another_plan(
    rtx: TensorRt, networks: dict[str, Path], tmp_path: Path
) -> None:
    cache = PlanCache(tmp_path)
    request = request_of(networks["fp32"])
    exact = dataclasses.replace(request, tf32=False)
    plans = [
        ready_plan(rtx, asked, ANY_CARD, cache=cache) for asked in (request, exact)
    ]
    assert plans[0].key.stem != plans[1].key.stem
    assert all(plan.build_s is not None for plan in plans)


def test_the_first_start_builds_and_says_so_the_second_does_not(
    rtx: TensorRt,
    networks: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = PlanCache(tmp_path)
    request = request_of(networks["fp32"])
    first = ready_plan(rtx, request, ANY_CARD, cache=cache)
    assert first.build_s is not None
    assert "building the fp32 plan of engine 'restorer'" in caplog.text
    caplog.clear()
    second = ready_plan(rtx, request, ANY_CARD, cache=cache)
    assert second.build_s is None
    assert second.data == first.data
    assert caplog.text == ""
    assert (
        ready_plan(rtx, request, ANY_CARD, cache=cache, rebuild=True).build_s
        is not None
    )


def test_a_damaged_plan_is_built_again_with_a_notice(
    rtx: TensorRt,
    networks: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = PlanCache(tmp_path)
    request = request_of(networks["fp32"])
    path = cache.path(ready_plan(rtx, request, ANY_CARD, cache=cache).key)
    path.write_bytes(path.read_bytes()[:-100])
    caplog.clear()
    again = ready_plan(rtx, request, ANY_CARD, cache=cache)
    assert again.build_s is not None
    assert "damaged" in caplog.text
    assert cache.find(again.key) == again.data


def test_a_plan_of_another_release_is_not_used(
    rtx: TensorRt,
    networks: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = PlanCache(tmp_path)
    request = request_of(networks["fp32"])
    older = dataclasses.replace(rtx, release="1.0.0")
    ready_plan(older, request, ANY_CARD, cache=cache)
    caplog.clear()
    plan = ready_plan(rtx, request, ANY_CARD, cache=cache)
    assert plan.build_s is not None
    assert "built for release 1.0.0" in caplog.text


def test_an_unwritable_cache_still_gives_the_plan(
    rtx: TensorRt,
    networks: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = PlanCache(tmp_path / "file" / "plans")
    plan = ready_plan(rtx, request_of(networks["fp32"]), ANY_CARD, cache=cache)
    assert plan.data.startswith(b"vtrt")
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("plan", [b"no plan at all" * 100, b""])
def test_what_is_no_plan_is_told_as_the_plans_fault(rtx: TensorRt, plan: bytes) -> None:
    rtx.logger.errors.clear()
    runtime = rtx.api.Runtime(rtx.logger)
    assert runtime.deserialize_cuda_engine(plan) is None
    error = load_error(rtx, "restorer", runtime, plan)
    assert isinstance(error, UnusablePlanError)
    assert "rtfocus engines build restorer" in str(error)


def test_the_key_in_the_file_reads_back(
    rtx: TensorRt, networks: dict[str, Path], tmp_path: Path
) -> None:
    cache = PlanCache(tmp_path)
    request = request_of(networks["fp32"])
    plan = ready_plan(rtx, request, rtx_target(rtx, (8, 6)), cache=cache)
    header = json.loads(cache.path(plan.key).read_bytes().partition(b"\n")[0])
    assert header["key"]["release"] == rtx.release
    assert header["key"]["gpu"] == "8.6"
    assert header["key"]["inputs"]["tiles"]["largest"] == [8, 1, 64, 64]
