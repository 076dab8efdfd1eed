"""GPU timeline: a picture of which stage of which frame runs when."""

from pathlib import Path
from typing import Any

STAGES = ("copy in", "classify", "restore", "copy out")
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_WIDTH, _ROW, _LEFT = 1000, 34, 80


def draw_timeline(rows: list[dict[str, Any]], path: Path) -> str | None:
    """Draw the steady state of the first case that ran; returns the file's name.

    Parameters
    ----------
    rows
        Of the bench; ``timeline_ms`` holds (sequence, {stage: (begin, end)}).
    path
        Of the SVG.
    """
    shown = next((row["timeline_ms"] for row in rows if row.get("timeline_ms")), None)
    if shown is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_svg(shown), encoding="utf-8")
    return path.name


def to_svg(shown: list[tuple[int, dict[str, tuple[float, float]]]]) -> str:
    """Return an SVG with one line per stage, one colour per frame."""
    spans = [span for _, stages in shown for span in stages.values()]
    first, last = min(b for b, _ in spans), max(e for _, e in spans)
    scale = (_WIDTH - _LEFT - 10) / max(last - first, 1e-6)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" '
        f'height="{_ROW * len(STAGES) + 30}" font-family="sans-serif" font-size="12">'
    ]
    for line, stage in enumerate(STAGES):
        y = 6 + line * _ROW
        parts.append(f'<text x="4" y="{y + 18}">{stage}</text>')
        for sequence, stages in shown:
            if stage not in stages:
                continue
            begin, end = stages[stage]
            x = _LEFT + (begin - first) * scale
            width = max((end - begin) * scale, 0.5)
            colour = _COLOURS[sequence % len(_COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 8}" '
                f'fill="{colour}"><title>frame {sequence}, {end - begin:.3f} ms'
                "</title></rect>"
            )
    parts.append(
        f'<text x="{_LEFT}" y="{_ROW * len(STAGES) + 22}">'
        f"{last - first:.2f} ms, frames {shown[0][0]} to {shown[-1][0]}</text></svg>"
    )
    return "\n".join(parts)
