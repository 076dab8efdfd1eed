"""View kit: frames to look at, and a preview in a process of its own that shows them.

Run: python view_kit.py ENDPOINT SERIES_UID, then a line with a number per frame.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transport_kit import make_estimate, make_header, make_series

from rtfocus.config.sections import PreviewConfig
from rtfocus.frame import DefocusMap, FrameResult, TileGrid
from rtfocus.transport.preview import PreviewPublisher
from rtfocus.transport.viewer import Shown

HEIGHT, WIDTH = 96, 128
SATURATION = 4095
GRID = TileGrid(2, 3, tile_px=40, stride_px=32.0, origin_px=23.5, signed=True)


def frame_of(number: int) -> NDArray[Any]:
    """Return the pixels of a frame: noise of its own, one pixel saturated."""
    pixels = np.random.default_rng(number).integers(100, 3000, (HEIGHT, WIDTH))
    pixels[number % HEIGHT, 5] = SATURATION
    return pixels.astype("<u2")


def result_of(number: int) -> FrameResult:
    """Return its restored frame, the mirrored one, and a defocus map."""
    levels = np.array([[-8, -4, 0], [4, 8, np.nan]], np.float32)
    defocus = DefocusMap(GRID, levels, np.ones_like(levels), np.zeros((2, 3), np.int16))
    return FrameResult(make_estimate(number), defocus, frame_of(number)[:, ::-1])


def main() -> None:
    endpoint, uid = sys.argv[1:]
    config = PreviewConfig(endpoint=endpoint, interval_s=1e-6)
    series = make_series(uid, shape=(HEIGHT, WIDTH), bit_depth=12, name=uid)
    preview = PreviewPublisher(config)
    numbers = {"frames_per_s": 12.5, "written": 3, "dropped": {"gap": 2}}
    preview.begin(Shown(series, Path("nowhere"), lambda: numbers, SATURATION))
    sys.stdout.write(f"{preview.endpoint}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        number = int(line)
        header = make_header(
            number, uid, shape=(HEIGHT, WIDTH), index={"t": number}, z_um=0.25 * number
        )
        preview.note(header, make_estimate(number, uid))
        preview.show(header, frame_of(number), result_of(number))


if __name__ == "__main__":
    main()
