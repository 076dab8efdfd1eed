"""Stages bench: every processing stage of one 512 x 512 frame alone, wall and CPU.

The frame is a tilted surface, six defocus levels at once. Classification is
compared with a bare OpenVINO loop on the same tensors, both taking turns, so that
load from outside hits both; labels are compared with ONNX Runtime in f32.

Run: python -m bench.stages [--engine delpnet] [--rounds 60] [--size 512]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import CameraConfig, ProcessingConfig, RestorationConfig
from rtfocus.engines.card import input_of, verified_file
from rtfocus.engines.registry import FoundEngine, find_engine, fit_frame, parts
from rtfocus.frame import TileGrid
from rtfocus.optics.formation import BlurredPlanes
from rtfocus.processing.camera import CameraCorrection
from rtfocus.processing.channel_plan import ChannelPlan, ClassifierPlan
from rtfocus.processing.classify import Conditions
from rtfocus.processing.cpu.classifier import FrameClassifier, NetworkView
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import WHOLE_FRAME
from rtfocus.runtimes.cpu_engine import import_openvino
from rtfocus.specimens import draw_specimen

OFFSET = 100
PATCH_PX = 84
"""Side of the paper's patch, the unit of patch-equivalents."""


def tilted_frame(side: int, optics: OpticalSystem, step_um: float) -> np.ndarray:
    """Expose nuclei on a surface that falls from focus to level 5."""
    rng = np.random.default_rng(1)
    sharp = draw_specimen("nuclei", (side, side), rng)
    depth = np.linspace(0, 5 * step_um, side, dtype=np.float32)
    surface = np.broadcast_to(depth[:, None], sharp.shape)
    seen = np.maximum(BlurredPlanes(sharp, optics).at(surface), 0)
    return (rng.poisson(seen * 2500 + 20) + OFFSET).astype(np.uint16)


def open_classifier(
    found: FoundEngine,
    shape: tuple[int, int],
    backend: str,
    precision: str,
    threads: int,
) -> FrameClassifier:
    """Open an engine for frames of a shape."""
    settings = ProcessingConfig.model_validate(
        {"backend": backend, "precision": precision}
    )
    return FrameClassifier(classifier_plan(found, shape), settings, threads)


def classifier_plan(found: FoundEngine, shape: tuple[int, int]) -> ClassifierPlan:
    """Plan an engine for frames of a shape, seen by the optics it was made for."""
    fit = fit_frame(input_of(found.card), shape)
    levels, _ = parts(found.card)
    return ClassifierPlan(
        found,
        fit,
        step_um=levels.step_um,
        quantum=1.0,
        conditions=conditions_of(found),
    )


def conditions_of(found: FoundEngine) -> Conditions:
    """Return what an engine is told in the optics it was made for."""
    optics = parts(found.card)[1].reference
    return Conditions(found.card, optics, blind=False, signed=False)


def bare_openvino(
    found: FoundEngine, prepared: NetworkView, precision: str, threads: int
) -> Callable[[], Any]:
    """Return the least that runs the network: one request on shared tensors."""
    openvino = import_openvino()
    core = openvino.Core()
    network = core.read_model(verified_file(found.folder, found.card))
    given = {input_of(found.card).name: prepared.tiles}
    if found.card.condition is not None:
        told = conditions_of(found).unknown(len(prepared.tiles))
        assert told is not None
        given[found.card.condition.name] = told
    network.reshape({name: list(tensor.shape) for name, tensor in given.items()})
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(network, "CPU", options).create_infer_request()
    for name, tensor in given.items():
        request.set_tensor(name, openvino.Tensor(tensor, shared_memory=True))
    return request.infer


def take_turns(
    steps: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, dict[str, float]]:
    """Run every step once per round; medians in ms, warm-up left out."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            begun, used = time.perf_counter(), time.process_time()
            step()
            if turn >= 2:
                wall[name].append((time.perf_counter() - begun) * 1e3)
                cpu[name].append((time.process_time() - used) * 1e3)
    return {
        name: {
            "wall_ms": statistics.median(wall[name]),
            "wall_p95_ms": float(np.percentile(wall[name], 95)),
            "cpu_ms": statistics.median(cpu[name]),
        }
        for name in steps
    }


def agreement(
    found: FoundEngine, frame: np.ndarray, precisions: list[str]
) -> dict[str, float]:
    """Share of labels equal to ONNX Runtime f32, over shifted views of the frame."""
    shape = (frame.shape[0] - 64, frame.shape[1] - 64)
    views = [
        np.ascontiguousarray(frame[y : y + shape[0], x : x + shape[1]], np.float32)
        for y in range(0, 64, 16)
        for x in range(0, 64, 16)
    ]
    reference = open_classifier(found, shape, "onnxruntime", "f32", 1)
    wanted = [reference.see(reference.prepare(view)).defocus.level for view in views]
    result = {}
    for precision in precisions:
        ours = open_classifier(found, shape, "openvino", precision, 1)
        got = [ours.see(ours.prepare(view)).defocus.level for view in views]
        result[precision] = float(np.mean(np.equal(got, wanted)))
    return result


def restorations(
    plan: ChannelPlan, frame: np.ndarray, grid: TileGrid
) -> dict[str, Callable[[], Any]]:
    """Return a step per method, with the labels that the tilt really has."""
    centres = grid.origin_px + grid.stride_px * np.arange(grid.rows)
    rows = np.rint(5 * np.clip(centres / frame.shape[0], 0, 1)).astype(np.int16)
    labels = np.repeat(rows[:, None], grid.columns, axis=1)
    signal = frame.astype(np.float32) - OFFSET
    montage = Montage(grid, frame.shape)
    steps: dict[str, Callable[[], Any]] = {}
    for method in WHOLE_FRAME:
        settings = RestorationConfig(method=method)
        restorer = DepthVariantRestorer(montage, plan.psfs, settings, quantum=1.0)
        out = np.empty_like(signal)
        steps[f"restore {method}"] = partial(restorer.restore, signal, labels, out)
    return steps


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time every stage and compare with the bare runtime."""
    folders = [options.engines] if options.engines else []
    found = find_engine(options.engine, folders)
    levels, optics = parts(found.card)
    frame = tilted_frame(options.size, optics.reference, levels.step_um)
    camera = CameraConfig(offset_counts=OFFSET)
    correction = CameraCorrection(camera, frame.shape, frame.dtype)
    signal = np.empty(frame.shape, np.float32)
    correction.to_signal(frame, signal)
    counts = np.empty_like(frame)
    fastest = open_classifier(found, frame.shape, "openvino", "auto", options.threads)
    prepared = fastest.prepare(signal)
    precisions = sorted({"f32", fastest.precision})
    steps: dict[str, Callable[[], Any]] = {
        "correct": lambda: correction.to_signal(frame, signal),
        "normalise": lambda: fastest.prepare(signal),
        "to counts": lambda: correction.to_counts(signal.copy(), counts, None),
    }
    for precision in precisions:
        ours = open_classifier(
            found, frame.shape, "openvino", precision, options.threads
        )
        steps[f"classify {precision}"] = partial(ours.see, prepared)
        steps[f"bare openvino {precision}"] = bare_openvino(
            found, prepared, precision, options.threads
        )
    reference = open_classifier(
        found, frame.shape, "onnxruntime", "f32", options.threads
    )
    steps["classify onnxruntime"] = lambda: reference.see(prepared).defocus
    stages = take_turns(steps, options.rounds)
    plan = ChannelPlan(
        "nuclei",
        frame.shape,
        correction,
        ProcessingConfig(),
        optics=optics.reference,
        classifier=classifier_plan(found, frame.shape),
    )
    slow = restorations(plan, frame, fastest.grid)
    stages |= take_turns(slow, max(3, options.rounds // 4))
    best = f"classify {fastest.precision}"
    bare = f"bare openvino {fastest.precision}"
    per_second = 1e3 / stages[best]["wall_ms"]
    return {
        "engine": found.name,
        "precision": fastest.precision,
        "threads": options.threads,
        "shape": list(frame.shape),
        "rounds": options.rounds,
        "stages": stages,
        "ratio_to_bare_openvino": stages[bare]["wall_ms"] / stages[best]["wall_ms"],
        "tiles_per_s": per_second * fastest.grid.rows * fastest.grid.columns,
        "patch_equivalents_per_s": per_second * frame.size / PATCH_PX**2,
        "labels_equal_to_onnxruntime_f32": agreement(found, frame, precisions),
    }


def main() -> None:
    """Measure, print the ratios and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", default="delpnet")
    parser.add_argument("--engines", type=Path, help="folder of further engines")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a few rounds only")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.size = 3, 256
    figures = measure(options)
    for name, times in figures["stages"].items():
        print(f"{name:42} {times['wall_ms']:8.2f} ms  cpu {times['cpu_ms']:8.2f} ms")
    for name, share in figures["labels_equal_to_onnxruntime_f32"].items():
        print(f"labels equal to ONNX Runtime f32, {name}: {share:.4f}")
    print(
        f"{figures['patch_equivalents_per_s']:.0f} patch-equivalents of 84 x 84/s, "
        f"{figures['tiles_per_s']:.0f} tiles/s"
    )
    print(
        f"classification / bare OpenVINO ({figures['precision']}): "
        f"{figures['ratio_to_bare_openvino']:.3f}"
    )
    print(machine.write("stages", figures, options.out))


if __name__ == "__main__":
    main()
