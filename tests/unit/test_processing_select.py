"""The choice of a frame processor says why."""

from dataclasses import replace

import pytest

from rtfocus.config import parse_config
from rtfocus.errors import EngineError
from rtfocus.processing import processor
from rtfocus.processing.cpu.device import share_threads
from rtfocus.processing.processor import open_processor


@pytest.fixture
def no_gpu(monkeypatch):
    """The reason of a machine without a GPU, wherever the test runs."""
    kinds = [
        replace(kind, why_unavailable=lambda: "the NVIDIA driver shows no GPU")
        if kind.name == "gpu"
        else kind
        for kind in processor.DEVICES
    ]
    monkeypatch.setattr(processor, "DEVICES", tuple(kinds))


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_the_cpu_and_says_why_not_the_gpu(caplog):
    caplog.set_level("INFO")
    processor = open_processor(parse_config({}))
    assert "frame processor: cpu (not gpu: the NVIDIA driver shows no" in caplog.text
    processor.close()


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_demanded_and_missing_is_an_error():
    config = parse_config({"processing": {"device": "gpu"}})
    with pytest.raises(EngineError, match=r"'gpu'.*shows no GPU.*device to cpu"):
        open_processor(config)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 8, 64])
def test_threads_are_shared_so_that_each_side_has_some(total):
    threads = share_threads(total)
    assert threads.classify >= 1
    assert 1 <= threads.restore <= 4
    assert threads.classify + threads.restore <= max(total, 2)
