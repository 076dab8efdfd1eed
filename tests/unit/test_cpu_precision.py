"""Precision auto: the fastest by measurement, and the same one ever after."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from rtfocus.config.sections import ProcessingConfig
from rtfocus.engines.card import Int8Card, read_card
from rtfocus.engines.registry import FoundEngine
from rtfocus.machine import CACHE_VARIABLE, processor_flags
from rtfocus.runtimes import cpu_backends
from rtfocus.runtimes.cpu_backends import (
    Backend,
    Decisions,
    Key,
    choices,
    fastest,
    open_engine,
    runs_on,
    time_passes,
    timed_shape,
)
from rtfocus.runtimes.cpu_engine import OnnxRuntimeEngine

KEY = Key("delpnet", ("ab",), "EPYC", "openvino 2026.4", 1, (1, 1, 96, 96), ("logits",))
SLOW_BF16 = {"f32": 20.0, "bf16": 30.0}


class Clock:
    """Time that passes only when a pass takes it."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s

    def takes(self, *seconds):
        left = list(seconds)

        def run():
            self.now_s += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_passes_are_timed_by_their_shortest_after_a_first_one():
    clock = Clock()
    # The first pass compiles, the third one meets a busy moment.
    passes = {"f32": clock.takes(5, 0.02), "bf16": clock.takes(9, 0.03, 0.4, 0.01)}
    assert time_passes(passes, clock) == pytest.approx({"f32": 20, "bf16": 10})


def test_timing_ends_with_its_budget_once_all_had_their_turn():
    clock = Clock()
    slow = {"f32": clock.takes(3), "bf16": clock.takes(4)}
    assert time_passes(slow, clock) == pytest.approx({"f32": 3000, "bf16": 4000})
    assert clock() == 14


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        (SLOW_BF16, "f32"),
        ({"f32": 20.0, "bf16": 10.0}, "bf16"),
        ({"f32": 20.0, "bf16": 19.0}, "f32"),
        ({"f32": 20.0, "bf16": 12.0, "int8": 9.0}, "int8"),
        ({"f32": 20.0, "bf16": 10.0, "int8": 9.5}, "bf16"),
        ({"f32": 20.0, "bf16": 35.0, "int8": 13.0}, "int8"),
        ({"f32": 20.0}, "f32"),
    ],
)
def test_the_fastest_is_taken_where_it_is_worth_it(times, taken):
    assert fastest(times) == taken


def test_a_decision_stays_although_later_times_differ(tmp_path):
    first = Decisions(tmp_path).decide(KEY, lambda: {"f32": 20.0, "bf16": 10.0})
    again = Decisions(tmp_path).decide(KEY, lambda: SLOW_BF16)
    assert first.taken == again.taken == "bf16"
    assert str(again) == "f32 20 ms, bf16 10 ms"


@pytest.mark.parametrize(
    "other",
    [
        {"processor": "Xeon"},
        {"runtime": "openvino 2027.1"},
        {"weights_sha256": ("cd",)},
        {"threads": 2},
        {"shape": (1, 1, 192, 96)},
    ],
)
def test_another_machine_runtime_or_weights_are_measured_anew(tmp_path, other):
    Decisions(tmp_path).decide(KEY, lambda: {"f32": 20.0, "bf16": 10.0})
    changed = Key(
        **({name: getattr(KEY, name) for name in Key.__struct_fields__} | other)
    )
    assert Decisions(tmp_path).decide(changed, lambda: SLOW_BF16).taken == "f32"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"taken": "bf16"}'])
def test_a_damaged_file_is_measured_again_and_replaced(tmp_path, damage, caplog):
    Decisions(tmp_path).path(KEY).write_bytes(damage)
    assert Decisions(tmp_path).decide(KEY, lambda: SLOW_BF16).taken == "f32"
    assert "measured again" in caplog.text
    kept = json.loads(Decisions(tmp_path).path(KEY).read_text("utf-8"))
    assert kept["times_ms"] == SLOW_BF16


def test_what_cannot_be_kept_holds_for_the_process(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    decisions = Decisions(blocked / "precision")
    assert decisions.decide(KEY, lambda: SLOW_BF16).taken == "f32"
    assert CACHE_VARIABLE in caplog.text
    assert decisions.decide(KEY, lambda: {"f32": 9.0, "bf16": 1.0}).taken == "f32"


def test_of_two_processes_the_first_to_finish_decides(tmp_path):
    def measure_while_another_decides():
        Decisions(tmp_path).decide(KEY, lambda: {"f32": 20.0, "bf16": 10.0})
        return SLOW_BF16

    found = Decisions(tmp_path).decide(KEY, measure_while_another_decides)
    assert found.taken == "bf16"
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("stated", "exact", "names"),
    [
        (None, True, ["f32", "bf16"]),
        ({"restored_db": -0.16, "labels_alike": 0.992}, True, ["f32", "bf16", "int8"]),
        ({"restored_db": -0.16, "labels_alike": 0.992}, False, ["f32", "bf16"]),
        ({"restored_db": -0.16, "labels_alike": 0.97}, True, ["f32", "bf16"]),
        ({"restored_db": -0.31, "labels_alike": 0.995}, True, ["f32", "bf16"]),
        ({"labels_alike": 0.995}, True, ["f32", "bf16", "int8"]),
    ],
)
def test_int8_is_a_choice_where_it_is_stated_near_and_added_exactly(
    engine_folder, monkeypatch, stated, exact, names
):
    monkeypatch.setattr(cpu_backends, "adds_int8_exactly", lambda: exact)
    section = stated and Int8Card(command="measured", **stated)
    card = read_card(engine_folder / "sharpness").model_copy(
        update={"files": {"fp32": "a.onnx", "int8": "b.onnx"}, "int8": section}
    )
    assert [one.name for one in choices(card, ("f32", "bf16"))] == names


def test_auto_runs_what_was_kept_and_says_the_times(
    engine_folder, monkeypatch, tmp_path
):
    asked = []

    def open_counting(request):
        asked.append((request.precision, request.inputs.shape))
        return OnnxRuntimeEngine(replace(request, precision="f32"))

    two = Backend("onnxruntime", lambda: None, open_counting, lambda: ("f32", "bf16"))
    monkeypatch.setattr(cpu_backends, "BACKENDS", (two,))
    monkeypatch.setattr(cpu_backends, "DECISIONS", Decisions(tmp_path))
    folder = engine_folder / "sharpness"
    found = FoundEngine(folder, read_card(folder))
    shape = (1, 1, 1152, 240)

    def opened(wanted):
        asked.clear()
        settings = ProcessingConfig(precision=wanted)
        engine = open_engine(found, settings, shape=shape, outputs=("logits",))
        assert np.isfinite(engine.infer(np.ones(shape, np.float32))["logits"]).all()
        engine.close()
        return runs_on(engine)

    said = opened("auto")
    timed = timed_shape(found.card, shape)
    assert timed == (1, 1, 576, 240)
    assert asked[:2] == [("f32", timed), ("bf16", timed)]
    assert asked[2][1] == shape
    assert said.startswith("onnxruntime f32 (f32 ")
    (kept,) = tmp_path.iterdir()
    other = "f32" if asked[2][0] == "bf16" else "bf16"
    kept.write_text(
        json.dumps(json.loads(kept.read_text("utf-8")) | {"taken": other}), "utf-8"
    )
    monkeypatch.setattr(cpu_backends, "DECISIONS", Decisions(tmp_path))
    opened("auto")
    assert asked == [(other, shape)]
    assert opened("f32") == "onnxruntime f32"
    assert asked == [("f32", shape)]


CHECK = """
from rtfocus.runtimes import cpu_engine
cpu_engine.processor_flags = frozenset
print(cpu_engine.adds_int8_exactly())
"""


@pytest.mark.skipif(not processor_flags(), reason="this system does not tell of VNNI")
@pytest.mark.parametrize("limit", ["ALL", "AVX2"])
def test_sums_of_int8_show_by_themselves_whether_there_is_vnni(limit):
    """Where the system does not tell; oneDNN can be held to an older processor."""
    found = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": limit},
        capture_output=True,
        text=True,
        check=True,
    )
    told = any("vnni" in flag for flag in processor_flags())
    assert found.stdout.strip() == str(told and limit == "ALL")
