"""Kernels are compiled on the user's machine by NVRTC; no GPU is needed for it."""

import pytest

from rtfocus.errors import EngineError
from rtfocus.processing.gpu.cuda import compiler
from rtfocus.processing.gpu.cuda.compiler import (
    compile_for,
    compiled_kernels,
    read_source,
    signatures,
    why_driver_too_old,
)
from rtfocus.processing.gpu.cuda.driver import (
    NVRTC,
    NativeLibrary,
    load_library,
    why_not_loadable,
)

ELF = b"\x7fELF"


@pytest.fixture
def nvrtc():
    """Skips where NVRTC is not installed."""
    if (why := why_not_loadable(NVRTC)) is not None:
        pytest.skip(why)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    "capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]
)
def test_kernels_compile_for_every_card(capability):
    code = compile_for(capability)
    assert code.startswith(ELF)
    assert all(name.encode() in code for name in signatures())


@pytest.mark.usefixtures("nvrtc")
def test_compiled_kernels_are_kept_until_their_text_changes(tmp_path, monkeypatch):
    first = compiled_kernels((8, 6), tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"from the cache")
    assert compiled_kernels((8, 6), tmp_path) == b"from the cache"
    changed = read_source() + "// changed"
    monkeypatch.setattr(compiler, "read_source", lambda: changed)
    assert compiled_kernels((8, 6), tmp_path) == first
    compiled_kernels((7, 5), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("nvrtc")
def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert compiled_kernels((8, 6), blocked / "kernels").startswith(ELF)
    assert "are not kept in" in caplog.text


@pytest.mark.usefixtures("nvrtc")
def test_text_that_does_not_compile_is_told_in_the_compilers_words():
    with pytest.raises(EngineError, match=r"sm_86: rtfocus.cu\(1\): error"):
        compile_for((8, 6), "__global__ void broken( {}")


@pytest.mark.usefixtures("nvrtc")
def test_a_card_too_old_or_too_new_is_told_with_the_remedy():
    with pytest.raises(EngineError, match=r"sm_35.*pip install -U nvidia-cuda-nvrtc"):
        compile_for((3, 5))


@pytest.mark.usefixtures("nvrtc")
def test_a_driver_too_old_is_told_with_the_remedy():
    assert why_driver_too_old(99000) is None
    assert "serves CUDA 11.4" in why_driver_too_old(11040)
    assert "nvidia-cuda-nvrtc-cu11" in why_driver_too_old(11040)


def test_a_missing_library_names_its_files_and_package():
    absent = NativeLibrary("x", ("libabsent.so.9",), ("absent.dll",), "nvidia-absent")
    with pytest.raises(EngineError, match=r"libabsent.*pip install nvidia-absent"):
        load_library(absent)


def test_signatures_are_those_of_the_text():
    found = signatures()
    assert found["to_counts"] == "PifPiP"
    assert len(found) == read_source().count('extern "C" __global__ void')
