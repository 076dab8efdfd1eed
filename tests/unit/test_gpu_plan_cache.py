"""Plans on disk: found under all they depend on, whole or not at all."""

import dataclasses
import logging
import os
from pathlib import Path

import pytest

from rtfocus.machine import CACHE_VARIABLE, cache_folder, write_atomically
from rtfocus.runtimes.gpu import ShapeRange
from rtfocus.runtimes.tensorrt.plans import PlanCache, PlanKey

SHAPES = ShapeRange((1, 1, 64, 64), (8, 1, 64, 64), (8, 1, 64, 64))
KEY = PlanKey(
    engine="delpnet",
    precision="fp32",
    library="tensorrt",
    release="10.8.0",
    gpu="NVIDIA RTX A4000, 8.6",
    weights_sha256="ab" * 32,
    inputs={"tiles": SHAPES},
    tf32=True,
    workspace_bytes=None,
)
OTHERS = {
    "engine": "other",
    "precision": "fp16",
    "library": "tensorrt_rtx",
    "release": "10.13.0",
    "gpu": "NVIDIA RTX 4090, 8.9",
    "weights_sha256": "cd" * 32,
    "inputs": {"tiles": dataclasses.replace(SHAPES, largest=(9, 1, 64, 64))},
    "tf32": False,
    "workspace_bytes": 1 << 30,
}


def test_a_plan_is_found_again(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "new" / "plans")
    plan = os.urandom(1000) + b"\n" + os.urandom(1000)
    assert cache.find(KEY) is None
    assert cache.keep(KEY, plan)
    assert cache.find(dataclasses.replace(KEY)) == plan
    assert [path.suffix for path in cache.folder.iterdir()] == [".plan"]


@pytest.mark.parametrize("field", sorted(OTHERS))
def test_a_plan_for_anything_else_is_not_found(tmp_path: Path, field: str) -> None:
    assert set(OTHERS) == {field.name for field in dataclasses.fields(PlanKey)}
    cache = PlanCache(tmp_path)
    cache.keep(KEY, b"plan")
    assert cache.find(dataclasses.replace(KEY, **{field: OTHERS[field]})) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"release": "10.13.0"}, "built for release 10.8.0"),
        ({"gpu": "NVIDIA RTX 4090, 8.9"}, "built for NVIDIA RTX A4000, 8.6"),
        (
            {"weights_sha256": "cd" * 32, "inputs": OTHERS["inputs"]},
            "built for other weights, other shapes",
        ),
        ({"engine": "other"}, "none yet"),
        ({"precision": "fp16"}, "none yet"),
    ],
)
def test_what_the_plan_there_was_built_for_is_told(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    cache = PlanCache(tmp_path)
    cache.keep(KEY, b"plan")
    far = dataclasses.replace(KEY, release="9", gpu="x", tf32=False)
    cache.keep(far, b"plan")
    assert words in cache.why_absent(dataclasses.replace(KEY, **changes))


@pytest.mark.parametrize("damage", ["cut", "bit", "header", "empty", "no newline"])
def test_a_damaged_plan_is_told_and_counts_as_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = PlanCache(tmp_path)
    cache.keep(KEY, bytes(range(256)))
    path = cache.path(KEY)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-1],
            "bit": whole[:-1] + bytes([whole[-1] ^ 1]),
            "header": b"{" + whole,
            "empty": b"",
            "no newline": whole.partition(b"\n")[0],
        }[damage]
    )
    assert cache.find(KEY) is None
    assert str(path) in caplog.text
    assert "built again" in caplog.text
    # A damaged file neither hides the reason nor stands in the way of a new plan.
    assert cache.why_absent(KEY) == "there is none yet"
    assert cache.keep(KEY, b"new")
    assert cache.find(KEY) == b"new"


def test_a_folder_that_cannot_be_written_is_told_not_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = PlanCache(tmp_path / "file" / "plans")
    assert not cache.keep(KEY, b"plan")
    assert CACHE_VARIABLE in caplog.text
    assert cache.find(KEY) is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.mkdir()  # a file cannot replace a folder
    with pytest.raises(OSError, match="plan"):
        write_atomically(path, b"data")
    assert list(tmp_path.iterdir()) == [path]


def test_discard_is_silent_where_there_is_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PlanCache(tmp_path)
    cache.keep(KEY, b"plan")
    with caplog.at_level(logging.WARNING):
        cache.discard(KEY)
        cache.discard(KEY)
    assert cache.find(KEY) is None
    assert caplog.text == ""


def test_the_folder_is_the_users_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert cache_folder().name == "rtfocus"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert PlanCache().folder == tmp_path / "plans"
