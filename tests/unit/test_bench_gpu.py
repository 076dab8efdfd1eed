"""GPU bench: the roofline of a shipped engine, its time, and the table of results."""

import argparse
import json

import pytest

from bench import gpu, gpu_ceilings, gpu_table
from rtfocus.engines.registry import find_engine
from rtfocus.runtimes.gpu import Gpu


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
    monkeypatch.setattr(gpu, "loop", lambda *_: {"frames_per_s": 400.0})
    options = argparse.Namespace(
        gpu=0,
        engine="delpnet",
        frames=1,
        out=tmp_path / "gpu.json",
        minutes=None,
        series=0,
        sizes=[1000],
        methods=["wiener"],
        resume=False,
    )
    kept = []
    monkeypatch.setattr(gpu, "measure", lambda case, *_: row | {"case": vars(case)})
    (found,) = gpu.run(options, lambda part: kept.append(json.dumps(part)))["rows"]
    # A card that is taken away leaves what was measured so far.
    assert [sorted(json.loads(part))[-1] for part in kept] == ["rows", "rows"]
    assert ["loop" in json.loads(part) for part in kept] == [False, True]
    line = found["roofline"]
    assert line["network_multiply_adds_per_px"] == pytest.approx(5432, rel=0.01)
    # 2 MB in and out at 20 GB/s take 0.1 ms; 10.9 GFLOP at 100 TFLOP/s 0.109 ms.
    assert line["bound_by"] == "matrix units"
    assert line["bound_frames_per_s"] == pytest.approx(1e5 / 10.86, rel=0.01)
    assert line["fraction_reached"] == pytest.approx(0.0543, rel=0.01)
    options.minutes = 0
    late = gpu.run(options)
    assert late["rows"] == []
    assert [what.partition("(")[0] for what in late["left_out"]] == [
        "Case",
        "loop",
        "series",
    ]
    options.out.write_text(kept[-1], encoding="utf-8")
    options.resume = True
    resumed = gpu.run(options)
    assert resumed["rows"] == [found]
    assert resumed["loop"] == {"frames_per_s": 400.0}
    assert resumed["left_out"] == ["series"]
    monkeypatch.setattr(gpu, "find_device", lambda _: Gpu(0, "other", (8, 6), 1 << 34))
    with pytest.raises(SystemExit, match=r"is of card.*here are other"):
        gpu.run(options)


def test_restorers_count_too_and_a_frame_as_one_tile_has_no_halos() -> None:
    alone = gpu.multiply_adds_of(gpu.Case(2048, "wiener", 4), "delpnet")
    both = gpu.multiply_adds_of(gpu.Case(2048, "rrdb", 4), "delpnet")
    by_tiles = gpu_ceilings.multiply_adds_per_pixel(find_engine("rrdb"))
    # Tiles of 64 x 64 px own 32 x 32.
    assert both - alone == pytest.approx(by_tiles / 4)
    joint = gpu.multiply_adds_of(gpu.Case(2048, "rtfocus-1", 4), "rtfocus-1")
    assert joint == gpu_ceilings.network_multiply_adds(find_engine("rtfocus-1"))


def test_slow_work_is_measured_on_fewer_frames() -> None:
    assert [gpu.fewer(300, rate) for rate in (600.0, 2.0, 0.01)] == [300, 40, 2]


def test_torch_counts_what_openvino_counts(monkeypatch) -> None:
    pytest.importorskip("torch")
    found = find_engine("rtfocus-1")
    by_openvino = gpu_ceilings.network_multiply_adds(found)
    monkeypatch.setattr(gpu_ceilings, "multiply_adds_per_pixel", lambda _: None)
    assert gpu_ceilings.network_multiply_adds(found) == by_openvino > 1000


def test_results_stand_side_by_side_and_what_one_lacks_is_empty(tmp_path) -> None:
    case = vars(gpu.Case(2048, "wiener", 4))
    line = {"network_multiply_adds_per_px": 5432.0, "fraction_reached": 0.41}
    row = {"case": case, "frames_per_s": 590.2, "roofline": line}
    uncounted = {"network_multiply_adds_per_px": 0.0, "fraction_reached": 0.01}
    card = {"name": "NVIDIA H200"}
    old = {
        "gpu": card,
        "taken": "2026-11-27T20:00:00+00:00",
        "rows": [
            row
            | {
                "backends": {"delpnet": "torch-cuda 2.11 fp32"},
                "roofline": uncounted,
            }
        ],
        "ceilings": {
            "copy_in_gb_s": 55.1,
            "copy_out_gb_s": 55.0,
            "both_ways_gb_s": 98.4,
            "matrix_tflop_s": 476.0,
        },
    }
    times = {"p50": 2.0, "p99": 3.7, "max": 4.0}
    new = {
        "gpu": card,
        "taken": "2026-11-28T09:00:00+00:00",
        "rows": [
            row
            | {
                "backends": {"delpnet": "tensorrt_rtx 1.7 fp16 on GPU 0 (NVIDIA H200)"},
                "case": case | {"cuda_graphs": False},
            },
            {"case": case, "refused": "no"},
        ],
        "loop": {
            "frames_per_s": 531.0,
            "of_gpu_alone": 0.9,
            "cpu_ms_per_frame": 11.6,
            "accounting": {"dropped": {}, "in_error": {"aborted": 2}},
            "at_rate": [
                {
                    "wanted_frames_per_s": 100.0,
                    "to_estimate_ms": times,
                    "to_result_ms": {"p50": 3.0, "p99": 5.1, "max": 9.0},
                }
            ],
        },
        "series": {"used_mb": [1.0, 2.0, 2.0], "grown_mb": 0.0},
    }
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, result in zip(files, (old, new), strict=True):
        path.write_text(json.dumps(result), "utf-8")
    text = gpu_table.table_of(files)
    assert text.splitlines() == [
        "| work | NVIDIA H200, torch-cuda 2.11 fp32, 2026-11-27 "
        "| NVIDIA H200, tensorrt_rtx 1.7 fp16, 2026-11-28 |",
        "| --- | --- | --- |",
        "| delpnet + wiener, 2048 x 2048, 4 in flight | 590 frames/s |  |",
        "| copies in / out / both ways | 55 / 55 / 98 GB/s |  |",
        "| float16 products | 476 TFLOP/s |  |",
        "| delpnet + wiener, 2048 x 2048, 4 in flight, no graphs "
        "|  | 590 frames/s (41 % of the bound) |",
        "| the whole loop, as fast as it goes "
        "|  | 531 frames/s, 90 % of the GPU alone, 12 ms CPU a frame, 2 lost |",
        "| to estimate / result at 100 frames/s |  | p50 2.0 / 3.0, p99 3.7 / 5.1 ms |",
        "| memory after 3 series |  | +0.0 MB against the second |",
    ]
