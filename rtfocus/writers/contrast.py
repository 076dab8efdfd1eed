"""Contrast: which grey values of a run a viewer shows black and white.

From frames spread over the whole run, one window per channel for all positions, so
that they can be compared by eye.
"""

import numpy as np
from numpy.typing import NDArray

from rtfocus.errors import WriterError
from rtfocus.writers.arrays import RunImages
from rtfocus.writers.journal import WRITTEN, Line
from rtfocus.writers.layout import Windows
from rtfocus.writers.places import Index, complete
from rtfocus.writers.specs import CONFIDENCE, DEFOCUS, ImageSpec

_MOST_FRAMES = 8
"""Looked at per channel; a frame of 2048 x 2048 is read in some 10 ms."""
_MOST_PIXELS = 1 << 16
"""Looked at per plane, evenly spread."""
_PERCENTILES = (0.1, 99.9)
_MAP_PERCENTILES = (2.0, 98.0)
"""Of defocus: single tiles are far off, and would be all that is seen."""


class FrameSample:
    """Places of stored frames, evenly spread, however many there are."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, int], list[Index]] = {}
        self._strides: dict[tuple[str, int], tuple[int, int]] = {}

    def note(self, line: Line) -> None:
        """Look at one line of the journal."""
        if line["status"] != WRITTEN:
            return
        index = complete(line["index"])
        for name in line["stored"]:
            self._keep((name, index["c"]), index)

    def places(self, image: str, channel: int) -> list[Index]:
        """Return where to look."""
        return self._places.get((image, channel), [])

    def _keep(self, key: tuple[str, int], index: Index) -> None:
        """Keep every n-th; n doubles when there are too many."""
        stride, count = self._strides.get(key, (1, 0))
        kept = self._places.setdefault(key, [])
        if count % stride == 0:
            kept.append(index)
        if len(kept) > _MOST_FRAMES:
            del kept[1::2]
            stride *= 2
        self._strides[key] = stride, count + 1


def contrast(images: RunImages, sample: FrameSample) -> dict[str, Windows]:
    """Return the windows of all images, by name; one per index of axis c.

    None stands where there is nothing to see: the planned one holds there.
    """
    channels = images.channels
    found: dict[str, Windows] = {}
    for spec in images.specs:
        if spec.name == CONFIDENCE:
            continue
        found[spec.name] = [
            window
            for channel in range(channels)
            for window in [_window(images, spec, sample.places(spec.name, channel))]
            * spec.planes
        ]
    return found


def _window(
    images: RunImages, spec: ImageSpec, places: list[Index]
) -> tuple[float, float] | None:
    values = [_values(images, spec.name, place) for place in places]
    seen = np.concatenate(values) if values else np.empty(0)
    if seen.size == 0:
        return None
    if spec.name == DEFOCUS:
        low, high = np.percentile(seen, _MAP_PERCENTILES)
        # Where both signs occur grey is focus.
        reach = max(abs(low), abs(high))
        low, high = (-reach, reach) if low < 0 else (0.0, high)
    else:
        low, high = np.percentile(seen, _PERCENTILES)
    if np.dtype(spec.dtype).kind != "f":
        low, high = np.floor(low), max(np.ceil(high), np.floor(low) + 1)
    return (float(low), float(high)) if high > low else None


def _values(images: RunImages, name: str, place: Index) -> NDArray[np.generic]:
    try:
        plane = images.read(name, place)
    except WriterError:
        # A damaged frame is told by the check, and does not keep a run from its end.
        return np.empty(0)
    step = max(1, int(np.sqrt(plane.size / _MOST_PIXELS)))
    seen = plane[::step, ::step].ravel()
    return seen[np.isfinite(seen)] if seen.dtype.kind == "f" else seen
