"""View kit: frames to look at, and a preview in a process of its own that shows them.

Run: python view_kit.py ENDPOINT SERIES_UID, then a line with a number per frame.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transport_kit import make_estimate, make_header, make_series, until

from rtfocus.config.sections import PreviewConfig
from rtfocus.frame import Act, DefocusMap, FrameResult, TileGrid
from rtfocus.transport.preview import PreviewPublisher
from rtfocus.transport.viewer import (
    Answer,
    PreviewStatus,
    PreviewViewer,
    Request,
    ShownSeries,
)
from rtfocus.view.codec import HEADER, PLANE

HEIGHT, WIDTH = 96, 128
SATURATION = 4095
GRID = TileGrid(2, 3, tile_px=40, stride_px=32.0, origin_px=23.5, signed=True)


def unpacked(packed: bytes) -> tuple[tuple, list[tuple[tuple, np.ndarray]]]:
    """Read a picture as the layout in the codec's docstring says, on its own."""
    # Here, because the preview's process has no use for it.
    import imagecodecs

    header = HEADER.unpack(packed[: HEADER.size])
    at, planes = HEADER.size, []
    for _ in range(header[3]):
        plane = PLANE.unpack(packed[at : at + PLANE.size])
        _, dtype, packing, samples, width, height, size, *_ = plane
        data = packed[at + PLANE.size : at + PLANE.size + size]
        if packing == 1:
            split = imagecodecs.lz4_decode(
                data, header=False, out=2 * width * height * samples
            )
            halves = np.frombuffer(split, np.uint8).reshape(2, -1)
            values = halves[0].astype("<u2") | halves[1].astype("<u2") << 8
        else:
            values = np.frombuffer(data, ["<u2", "<f4", "|u1"][dtype])
        shape = (height, width) if samples == 1 else (height, width, samples)
        planes.append((plane, values.reshape(shape)))
        at += PLANE.size + size
    assert at == len(packed)
    return header, planes


def frame_of(number: int) -> NDArray[Any]:
    """Return the pixels of a frame: noise of its own, one pixel saturated."""
    pixels = np.random.default_rng(number).integers(100, 3000, (HEIGHT, WIDTH))
    pixels[number % HEIGHT, 5] = SATURATION
    return pixels.astype("<u2")


def result_of(number: int) -> FrameResult:
    """Return its restored frame, the mirrored one, and maps; errors of even frames."""
    levels = np.array([[-8, -4, 0], [4, 8, np.nan]], np.float32)
    sure, level = np.ones_like(levels), np.zeros((2, 3), np.int16)
    stated = np.array([[0.25, 0.5, 1], [1.5, 2, np.nan]], np.float32)
    defocus = DefocusMap(GRID, levels, sure, level, stated_um=stated)
    restored = frame_of(number)[:, ::-1]
    error = np.float32([[10, 20, 30], [40, 50, np.nan]]) if number % 2 == 0 else None
    return FrameResult(make_estimate(number), defocus, restored, error)


class Looking:
    """Who looks at a run, and what the states told."""

    def __init__(self, viewer: PreviewViewer, control: str) -> None:
        self._viewer = viewer
        self._control = control
        self._uid = ""
        self._lines: dict[int, dict[str, Any]] = {}
        self.newest = 0

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        def is_so_now() -> bool:
            for one in self._viewer.received(0.2):
                if isinstance(one, PreviewStatus) and one.series is not None:
                    self._uid = one.series.series_uid
                    self._lines.update(one.focus)
                    self.newest = max([self.newest, *(p.sequence for p in one.points)])
                    return is_so()
            return False

        until(is_so_now, what)

    def ask(self, what: Act, series_uid: str | None = None) -> Answer:
        request = Request(1, series_uid or self._uid, what)
        return self._viewer.ask(self._control, request)

    def searches(self) -> int:
        return sum(line["kind"] == "verdict" for line in self._lines.values())

    def has_noted(self, what: Act) -> bool:
        return what in [line.get("what") for line in self._lines.values()]

    def moves_since(self, what: Act) -> int:
        lines = [line for _, line in sorted(self._lines.items())]
        since = [line.get("what") for line in lines].index(what)
        return sum(bool(line.get("step_um")) for line in lines[since:])


def main() -> None:
    endpoint, uid = sys.argv[1:]
    config = PreviewConfig(endpoint=endpoint, interval_s=1e-6)
    series = make_series(uid, shape=(HEIGHT, WIDTH), bit_depth=12, name=uid)
    preview = PreviewPublisher(config)
    numbers = {"frames_per_s": 12.5, "written": 3, "dropped": {"gap": 2}}
    preview.begin(ShownSeries(series, Path("nowhere"), lambda: numbers, SATURATION))
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
