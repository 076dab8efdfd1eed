"""Pictures: images side by side, and the confusion of levels, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from scipy.ndimage import uniform_filter

from rtfocus.drawing.panels import Panel, coloured, save_panels
from rtfocus.evaluation.evaluate import Outcome
from rtfocus.evaluation.level_score import LevelScore
from rtfocus.evaluation.samples import DataSet, Sample
from rtfocus.processing.camera import luminance

_SHOWN_PX = 320
# Scale on which the brightest part of a frame is looked for.
_SMOOTH_PX = 65
_CELL_PX = 44
_MARGIN_PX = 60
_BRIGHT = 0.6


def save_side_by_side(path: Path, data: DataSet, outcomes: Sequence[Outcome]) -> bool:
    """Write blurred | every contender | sharp, one row per frame.

    Parameters
    ----------
    path
        PNG to write.
    data
        Where the frames come from.
    outcomes
        Of contenders that restored them.

    Returns
    -------
    bool
        False: there is nothing to show.
    """
    shown = [one for one in outcomes if one.images]
    if not shown:
        return False
    names = set(shown[0].images)
    rows = [_row(one, shown) for one in data.samples() if one.name in names]
    panels = [panel for row in rows for panel in row]
    save_panels(path, panels, columns=len(rows[0]))
    return True


def save_confusion(path: Path, title: str, score: LevelScore) -> None:
    """Write true levels (down) against found ones (right), shares of a row in %."""
    counts = score.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [*(str(level) for level in score.levels), "bg"]
    rows, columns = shares.shape
    size = (_MARGIN_PX + columns * _CELL_PX, 2 * _MARGIN_PX + rows * _CELL_PX)
    canvas = Picture.new("RGB", size, "black")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    draw.text((8, 8), title, fill="white", font=font)
    draw.text((8, 28), "true level down, found level across, % of row", fill="white")
    colours = coloured(shares, 0.0, 1.0)
    for row, column in np.ndindex(shares.shape):
        left, top = _MARGIN_PX + column * _CELL_PX, _MARGIN_PX + row * _CELL_PX
        box = (left, top, left + _CELL_PX - 2, top + _CELL_PX - 2)
        draw.rectangle(box, fill=tuple(int(c) for c in colours[row, column]))
        if counts[row, column]:
            ink = "black" if shares[row, column] > _BRIGHT else "white"
            text = f"{100 * shares[row, column]:.0f}"
            draw.text((left + 10, top + 12), text, fill=ink, font=font)
    for row in range(rows):
        place = (16, _MARGIN_PX + row * _CELL_PX + 12)
        draw.text(place, names[row], fill="white", font=font)
    for column in range(columns):
        place = (_MARGIN_PX + column * _CELL_PX + 10, size[1] - _MARGIN_PX + 8)
        draw.text(place, names[column], fill="white", font=font)
    canvas.save(path)


def _row(sample: Sample, shown: Sequence[Outcome]) -> list[Panel]:
    like = sample.pixels if sample.sharp is None else sample.sharp
    window = _window(like)
    low, high = np.percentile(_grey(like)[window], (0.5, 99.9))
    before = {one.name: one for one in shown[0].frames}.get(sample.name)
    caption = f"{sample.name}"
    if before is not None:
        caption += f"  {before.before.psnr_db:.1f} dB"
    images = [(caption, sample.pixels)]
    for one in shown:
        scored = {frame.name: frame for frame in one.frames}.get(sample.name)
        suffix = f"  {scored.after.psnr_db:.1f} dB" if scored else ""
        images.append((f"{one.contender.title}{suffix}", one.images[sample.name]))
    if sample.sharp is not None:
        images.append(("sharp", sample.sharp))
    return [
        Panel(text, _grey(image)[window], float(low), float(high))
        for text, image in images
    ]


def _window(image: NDArray[np.generic]) -> tuple[slice, slice]:
    """Return the piece of at most 320 px around the brightest part."""
    grey = _grey(image)
    side = min(_SHOWN_PX, *grey.shape)
    peak = np.unravel_index(np.argmax(uniform_filter(grey, _SMOOTH_PX)), grey.shape)
    starts = [
        int(np.clip(place - side // 2, 0, length - side))
        for place, length in zip(peak, grey.shape, strict=True)
    ]
    rows, columns = (slice(start, start + side) for start in starts)
    return rows, columns


def _grey(image: NDArray[np.generic]) -> NDArray[np.float32]:
    return luminance(np.asarray(image, dtype=np.float32))
