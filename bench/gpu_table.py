"""GPU table: results of the GPU bench side by side, as Markdown for a README."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Results = dict[str, Any]


def table_of(files: Sequence[Path]) -> str:
    """Return what result files say, a column each; what one lacks stays empty."""
    return table([json.loads(path.read_text("utf-8")) for path in files])


def table(results: Sequence[Results]) -> str:
    """Return a Markdown table of results of `bench.gpu`, a column each."""
    lines: dict[str, list[str]] = {}
    for place, result in enumerate(results):
        for name, said in _lines(result):
            cells = lines.setdefault(name, [""] * len(results))
            cells[place] = said
    heads = ["work", *map(_head, results)]
    rows = [heads, ["---"] * len(heads), *([n, *cells] for n, cells in lines.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _head(result: Results) -> str:
    """Say what the figures of a file ran on."""
    runtimes = sorted({said for row in _ran(result) for said in _runtimes(row)})
    taken = str(result.get("taken", ""))[:10]
    return ", ".join([result["gpu"]["name"], *runtimes, taken])


def _runtimes(row: Row) -> list[str]:
    return [said.partition(" on GPU")[0] for said in row["backends"].values()]


def _ran(result: Results) -> list[Row]:
    return [row for row in result["rows"] if "refused" not in row]


def _lines(result: Results) -> list[tuple[str, str]]:
    """Return name and text of everything a file says."""
    found = [(_work(row), _rate(row)) for row in _ran(result)]
    for what, tell in _PARTS.items():
        if what in result:
            found += tell(result[what])
    return found


def _work(row: Row) -> str:
    case, engine = row["case"], next(iter(row["backends"]))
    side, method = case["side"], case["method"]
    options = [f"{case['frames_in_flight']} in flight"]
    if case["precision"] != "auto":
        options.append(case["precision"])
    if not case["cuda_graphs"]:
        options.append("no graphs")
    name = engine if method == engine else f"{engine} + {method}"
    return f"{name}, {side} x {side}, {', '.join(options)}"


def _rate(row: Row) -> str:
    said = f"{row['frames_per_s']:.0f} frames/s"
    line = row.get("roofline", {})
    # Of a network whose products nobody counted the bound is not known.
    share = line.get("network_multiply_adds_per_px") and line["fraction_reached"]
    return said if not share else f"{said} ({100 * share:.0f} % of the bound)"


def _loop(loop: dict[str, Any]) -> list[tuple[str, str]]:
    losses = {
        k: v for k, v in loop["accounting"].items() if k in ("dropped", "in_error")
    }
    lost = sum(sum(places.values()) for places in losses.values())
    share = loop["of_gpu_alone"]
    said = f"{loop['frames_per_s']:.0f} frames/s"
    if share is not None:
        said += f", {100 * share:.0f} % of the GPU alone"
    said += f", {loop['cpu_ms_per_frame']:.0f} ms CPU a frame, {lost} lost"
    found = [("the whole loop, as fast as it goes", said)]
    for at in loop["at_rate"]:
        name = f"to estimate / result at {at['wanted_frames_per_s']:.0f} frames/s"
        pairs = [
            (at["to_estimate_ms"][p], at["to_result_ms"][p]) for p in ("p50", "p99")
        ]
        (e50, r50), (e99, r99) = pairs
        said = f"p50 {e50:.1f} / {r50:.1f}, p99 {e99:.1f} / {r99:.1f} ms"
        found.append((name, said))
    return found


def _series(series: dict[str, Any]) -> list[tuple[str, str]]:
    name = f"memory after {len(series['used_mb'])} series"
    return [(name, f"{series['grown_mb']:+.1f} MB against the second")]


def _ceilings(limits: dict[str, float]) -> list[tuple[str, str]]:
    copies = "copy_in_gb_s", "copy_out_gb_s", "both_ways_gb_s"
    rates = " / ".join(f"{limits[name]:.0f}" for name in copies)
    return [
        ("copies in / out / both ways", f"{rates} GB/s"),
        ("float16 products", f"{limits['matrix_tflop_s']:.0f} TFLOP/s"),
    ]


_PARTS: dict[str, Callable[[Any], list[tuple[str, str]]]] = {
    "loop": _loop,
    "series": _series,
    "ceilings": _ceilings,
}
"""By the key of the results, in the order of the table."""
