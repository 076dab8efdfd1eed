"""`rtfocus engines build` on a machine without a GPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from engine_kit import write_smooth_restorer
from loop_kit import interrupt_group, started
from typer.testing import CliRunner

from rtfocus.cli.engines import app
from rtfocus.engines.registry import find_engine
from rtfocus.errors import ConfigError, EngineError, ExitCode
from rtfocus.machine import CACHE_VARIABLE
from rtfocus.processing.gpu.cuda.driver import find_device, why_no_gpu
from rtfocus.runtimes.gpu import gpu_request
from rtfocus.runtimes.tensorrt.library import import_tensorrt, why_not_importable
from rtfocus.runtimes.tensorrt.plans import ANY_CARD, ready_plan

SMALL = ["delpnet", "--precision", "fp32", "--frame", "200x300"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "plans"


@pytest.fixture
def rtx() -> None:
    """Skip where TensorRT for RTX is not installed."""
    why = why_not_importable("tensorrt_rtx")
    if why is not None:
        pytest.skip(why)


@pytest.fixture
def no_gpu() -> str:
    """Why there is no GPU; skips where there is one."""
    why = why_no_gpu()
    if why is None:
        pytest.skip("this machine has a GPU: the command builds for that")
    return why


def run(*arguments: str) -> str:
    """Run the command and return its output; raises what it raises."""
    result = CliRunner().invoke(app, ["build", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("rtx", "no_gpu")
def test_it_builds_once_for_any_card(cache: Path) -> None:
    first = run(*SMALL)
    assert "for 8.0 and later" in first
    assert "built in" in first
    assert len(list(cache.glob("delpnet-fp32-tensorrt_rtx-*.plan"))) == 1
    assert "was there" in run(*SMALL)
    assert "built in" in run(*SMALL, "--rebuild")


@pytest.mark.usefixtures("rtx", "no_gpu")
@pytest.mark.parametrize(("told", "batch"), [(3, 3), (None, 35)])
def test_a_plan_has_the_batch_of_the_run_it_is_for(
    cache: Path, tmp_path: Path, told: int | None, batch: int
) -> None:
    write_smooth_restorer(tmp_path / "smooth")
    options = [] if told is None else ["--tiles-per-batch", str(told)]
    place = str(tmp_path / "smooth")
    output = run(place, "--precision", "fp32", "--frame", "200x300", *options)
    assert f"{batch} tiles at once" in output
    library = import_tensorrt("tensorrt_rtx")
    found = find_engine(place)
    # As the channel of a run asks.
    request = gpu_request(found, (200, 300), "fp32", tiles_per_batch=told)
    assert ready_plan(library, request, ANY_CARD).build_s is None
    assert len(list(cache.glob("*.plan"))) == 1


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("capability", ["7.5", "8.6", "12.0"])
def test_it_builds_for_a_capability_that_is_not_at_hand(
    cache: Path, capability: str
) -> None:
    output = run(*SMALL, "--backend", "tensorrt_rtx", "--capability", capability)
    assert f"plan for {capability}," in output
    assert len(list(cache.glob("*.plan"))) == 1


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frame", "2048"], "--frame '2048'"),
        (["--frame", "0x10"], "--frame '0x10'"),
        (["--capability", "ampere"], "--capability 'ampere'"),
        (["--capability", "8.6", "--gpu", "0"], "--capability is for"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run("delpnet", *arguments)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["wei_classifier", "--precision", "int8"],
            "has no int8 weights; it has .*fp32",
        ),
        (
            ["delpnet", "--capability", "9.0"],
            r"by name, not for 9\.0; build without --cap",
        ),
        (["delpnet", "--capability", "6.1"], "older than 7.5"),
        (["nowhere"], "'nowhere' not found"),
    ],
)
def test_what_cannot_be_built_is_told(arguments: list[str], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        run(*arguments)


@pytest.mark.usefixtures("rtx")
def test_ctrl_c_ends_a_build_and_leaves_no_plan(cache: Path, tmp_path: Path) -> None:
    large = ("delpnet", "--precision", "fp32", "--backend", "tensorrt_rtx")
    with started("engines", "build", *large, cwd=tmp_path) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "building the" in line)
        interrupt_group(process)
        said = process.communicate()[1]
    assert process.returncode == ExitCode.INTERRUPTED
    assert said.strip().splitlines()[-1] == "interrupted"
    assert not list(cache.glob("*"))


@pytest.mark.usefixtures("rtx")
def test_a_gpu_that_is_asked_for_and_not_there_is_told(no_gpu: str) -> None:
    with pytest.raises(EngineError, match="tensorrt_rtx plan for this GPU") as told:
        run(*SMALL, "--backend", "tensorrt_rtx", "--gpu", "0")
    assert no_gpu in str(told.value)
    with pytest.raises(EngineError):
        find_device(0)


@pytest.mark.skipif(
    find_spec("tensorrt") is not None or find_spec("tensorrt_rtx") is not None,
    reason="a TensorRT library is installed",
)
def test_without_a_library_every_reason_is_given() -> None:
    with pytest.raises(EngineError, match=r"rtfocus\[gpu\].*rtfocus\[rtx\]"):
        run(*SMALL)
