"""GPU bench: the roofline of a shipped engine, whose weights are stored in 16 bits."""

import argparse

import pytest

from bench import gpu
from rtfocus.processing.gpu.engine import Gpu


def test_a_run_counts_the_shipped_network_and_says_what_bounds_it(
    tmp_path, monkeypatch
) -> None:
    device = Gpu(0, "card", (8, 6), 1 << 34)
    limits = {"copy_in_gb_s": 20.0, "matrix_tflop_s": 100.0}
    row = {"case": {"side": 1000}, "frames_per_s": 500.0}
    monkeypatch.setattr(gpu, "find_device", lambda index: device)
    monkeypatch.setattr(gpu, "ceilings", lambda device: limits)
    monkeypatch.setattr(gpu, "measure", lambda *case: dict(row))
    monkeypatch.setattr(gpu, "cases", lambda options: [gpu.Case(1000, "wiener", 4)])
    options = argparse.Namespace(
        gpu=0, engine="delpnet", frames=1, out=tmp_path / "gpu.json"
    )
    (found,) = gpu.run(options)["rows"]
    line = found["roofline"]
    assert line["network_multiply_adds_per_px"] == pytest.approx(5432, rel=0.01)
    # 2 MB in and out at 20 GB/s take 0.1 ms; 10.9 GFLOP at 100 TFLOP/s 0.109 ms.
    assert line["bound_by"] == "matrix units"
    assert line["bound_frames_per_s"] == pytest.approx(1e5 / 10.86, rel=0.01)
    assert line["fraction_reached"] == pytest.approx(0.0543, rel=0.01)
