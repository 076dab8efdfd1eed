"""Panels: images side by side in one PNG, with captions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP_PX = 8
CAPTION_PX = 22
# Anchors of a perceptually even colour scale from dark blue over green to yellow.
_SCALE = np.array(
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]
)
_BACKGROUND = np.array([40, 40, 40])


@dataclass(frozen=True)
class Panel:
    """One image with its caption."""

    caption: str
    pixels: NDArray[np.generic]
    """Axes (y, x): grey between `low` and `high`; (y, x, 3): as it is, uint8."""
    low: float = 0.0
    high: float = 255.0


def colour_map(
    values: NDArray[np.generic], low: float, high: float
) -> NDArray[np.uint8]:
    """Return colours (y, x, 3) of a map; NaN (background) is dark grey."""
    numbers = values.astype(np.float32)
    place = np.clip((np.nan_to_num(numbers, nan=low) - low) / (high - low), 0, 1)
    place = place * (len(_SCALE) - 1)
    lower = np.minimum(place.astype(int), len(_SCALE) - 2)
    part = (place - lower)[..., np.newaxis]
    colours = _SCALE[lower] * (1 - part) + _SCALE[lower + 1] * part
    colours = np.where(np.isnan(numbers)[..., np.newaxis], _BACKGROUND, colours)
    return colours.astype(np.uint8)


def enlarge(values: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Repeat the pixels of a small map up to `shape` (y, x), nearest neighbour."""
    rows = np.arange(shape[0]) * values.shape[0] // shape[0]
    columns = np.arange(shape[1]) * values.shape[1] // shape[1]
    repeated: NDArray[np.generic] = values[rows][:, columns]
    return repeated


def save_panels(path: Path, panels: list[Panel], *, columns: int) -> None:
    """Write panels of equal size in rows of `columns` as a PNG."""
    height, width = panels[0].pixels.shape[:2]
    rows = -(-len(panels) // columns)
    size = (
        columns * (width + GAP_PX) + GAP_PX,
        rows * (height + CAPTION_PX + GAP_PX) + GAP_PX,
    )
    canvas = Image.new("RGB", size, "black")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left = GAP_PX + column * (width + GAP_PX)
        top = GAP_PX + row * (height + CAPTION_PX + GAP_PX)
        draw.text((left, top), panel.caption, fill="white", font=font)
        canvas.paste(Image.fromarray(_as_bytes(panel)), (left, top + CAPTION_PX))
    canvas.save(path)


def _as_bytes(panel: Panel) -> NDArray[np.uint8]:
    if panel.pixels.ndim == 3:
        return panel.pixels.astype(np.uint8)
    span = max(panel.high - panel.low, 1e-9)
    scaled = (panel.pixels.astype(np.float32) - panel.low) / span * 255
    clipped: NDArray[np.uint8] = np.clip(scaled, 0, 255).astype(np.uint8)
    return clipped
