"""Focus trace: what autofocus did in a run, as one line and as a picture.

The picture shows, for the first position, the defocus as the images told it: held, and
as it would have become had the stage stood still.
"""

from pathlib import Path
from typing import Any

PICTURE = "focus.png"
_WIDTH, _HEIGHT, _MARGIN = 760, 300, 48
_HELD, _ALONE, _MOVE = "#1f4e9c", "#c0502d", "#777777"

Line = dict[str, Any]


def focus_line(lines: list[Line]) -> str:
    """Sum up searches, corrections and drift in one line."""
    verdicts = [line for line in lines if line.get("kind") == "verdict"]
    holds = [line for line in lines if line.get("kind") == "hold"]
    found = sum(bool(line["focused"]) for line in verdicts)
    images = sum(int(line["images"]) for line in verdicts)
    text = (
        f"autofocus: {found} of {len(verdicts)} searches found focus, {images} images"
    )
    if failures := sum(line.get("kind") == "failure" for line in lines):
        text += f", {failures} failed"
    if holds:
        moves = sum(bool(line["step_um"]) for line in holds)
        text += (
            f"; held {len(holds)} stacks with {moves} corrections, drift "
            f"{holds[-1]['drift_um']:+.1f} um"
        )
    return text


def draw_focus(folder: Path, lines: list[Line]) -> Path | None:
    """Draw the trace of the first held position; None where none was held."""
    holds = [line for line in lines if line.get("kind") == "hold"]
    if not holds:
        return None
    mine = [line for line in holds if line["p"] == holds[0]["p"]]
    time_s = [(line["time_ns"] - mine[0]["time_ns"]) / 1e9 for line in mine]
    held = [line["error_um"] - line["step_um"] for line in mine]
    moved, total = [], 0.0
    for line in mine:
        total += line["step_um"]
        moved.append(total)
    alone = [error + way for error, way in zip(held, moved, strict=True)]
    top = max(max(map(abs, held + alone)), 0.1)
    # Loaded when there is something to draw: a processor side starts without it.
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)

    def at(seconds: float, um: float) -> tuple[float, float]:
        across = _MARGIN + (_WIDTH - 2 * _MARGIN) * seconds / max(time_s[-1], 1e-9)
        return across, _HEIGHT / 2 - (_HEIGHT / 2 - _MARGIN) * um / top

    draw.line([at(0, 0), at(time_s[-1], 0)], fill="#bbbbbb")
    for seconds, line in zip(time_s, mine, strict=True):
        if line["step_um"]:
            draw.line([at(seconds, -top), at(seconds, -0.95 * top)], fill=_MOVE)
    for values, colour in ((alone, _ALONE), (held, _HELD)):
        points = [at(s, um) for s, um in zip(time_s, values, strict=True)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2)
    draw.text(
        (_MARGIN, 8),
        "defocus in um: held (blue), had the stage stood still (red); ticks: moves",
        "black",
    )
    draw.text((4, _MARGIN - 6), f"{top:+.1f}", "black")
    draw.text((4, _HEIGHT - _MARGIN - 6), f"{-top:+.1f}", "black")
    draw.text((_WIDTH - 2 * _MARGIN, _HEIGHT - 22), f"{time_s[-1]:.0f} s", "black")
    canvas.save(folder / PICTURE)
    return folder / PICTURE
