"""Picture: panels of one size that show how well a PSF fits."""

import numpy as np
from numpy.typing import NDArray

from rtfocus.images.panels import Panel, colour_map, enlarge

Image = NDArray[np.float32]

SHOWN_PX = 256
"""Side of every panel."""

# Intensity of a PSF spans decades: shown as a root, so that its halo is seen.
_GAMMA = 0.5
_CROSS_PX = 3
_MARK = np.array([255, 60, 60], dtype=np.uint8)


def centre(image: NDArray[np.generic], side_px: int = SHOWN_PX) -> NDArray[np.generic]:
    """Cut the middle out of an image and enlarge it to the side of a panel."""
    sides = [min(side_px, length) for length in image.shape]
    starts = [
        (length - side) // 2 for length, side in zip(image.shape, sides, strict=True)
    ]
    rows, columns = (
        slice(start, start + side) for start, side in zip(starts, sides, strict=True)
    )
    return enlarge(image[rows, columns], (SHOWN_PX, SHOWN_PX))


def grey(caption: str, image: Image, like: Image | None = None) -> Panel:
    """Show an image between the percentiles of another, or of itself."""
    low, high = np.percentile(image if like is None else like, (1.0, 99.8))
    return Panel(caption, centre(image), float(low), float(high))


def residual_panel(caption: str, error: Image, span: float) -> Panel:
    """Show errors around grey; black and white are a tenth of the range."""
    limit = 0.1 * span
    return Panel(f"{caption}, +-{limit:.3g}", centre(error), -limit, limit)


def psf_panel(caption: str, psf: Image, peak: float | None = None) -> Panel:
    """Show a PSF, or a section of one, as the root of its intensity."""
    shown = np.maximum(psf, 0.0) ** _GAMMA
    highest = float(psf.max() if peak is None else peak) ** _GAMMA
    pixels = enlarge(shown, (SHOWN_PX, SHOWN_PX))
    return Panel(caption, pixels, 0.0, highest)


def map_panel(
    caption: str, quality_db: NDArray[np.float64], place: tuple[float, float]
) -> Panel:
    """Show PSNR over two parameters, best 6 dB, with a cross at `place` (0 to 1)."""
    highest = float(quality_db.max())
    shape = (SHOWN_PX, SHOWN_PX)
    pixels = np.array(colour_map(enlarge(quality_db, shape), highest - 6.0, highest))
    row, column = (
        int(np.clip(share * SHOWN_PX, _CROSS_PX, SHOWN_PX - 1 - _CROSS_PX))
        for share in place
    )
    pixels[row, column - _CROSS_PX : column + _CROSS_PX + 1] = _MARK
    pixels[row - _CROSS_PX : row + _CROSS_PX + 1, column] = _MARK
    return Panel(caption, pixels)
