"""Reader: a run as napari layers, stored or live; it needs no window.

Layers of a run folder are its images and maps, at their places. Axes are t, z, y,
x, with channels as layers of their own. A few positions of which the stage's places are
known are layers too, each at its place; others have an axis p. Pixels are read when
they are looked at.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import zarr
from dask.array import Array
from numpy.typing import NDArray

from rtfocus.engines.card import InputCard
from rtfocus.errors import ProtocolError
from rtfocus.frame import Position, SeriesStart, TileGrid
from rtfocus.runs import Kind, Run, open_run
from rtfocus.transport.viewer import Preview, PreviewStatus, PreviewViewer
from rtfocus.workers import Newest
from rtfocus.writers.header import HEADER_NAME, INNER, JOURNAL_NAME
from rtfocus.writers.journal import WRITTEN, journal_lines
from rtfocus.writers.layout import store_path
from rtfocus.writers.places import Plan, position_paths

LayerData = tuple[Array, dict[str, Any], str]
"""What napari makes a layer of: pixels, arguments, kind of layer."""
Read = Callable[[str | Path], list[LayerData]]
Placement = dict[str, list[Any]]
"""Scale, place and axes of a layer, by napari's names for them."""

SIGNED_MAP = {
    "name": "defocus",
    "colors": [[0.25, 0.6, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.65, 0.1, 1.0]],
}
"""Blue: too near the objective, orange: too far, black: in focus.

The hues of the report and of `view`; black, not white, in the middle, because napari
lays the map over the image.
"""
UNSIGNED_MAP = {
    "name": "distance",
    "colors": [[0.0, 0.0, 0.0, 1.0], [1.0, 0.65, 0.1, 1.0]],
}
MAPS = {
    "defocus": "defocus",
    "deviation": "deviation (um)",
    "expected_error": "expected error (counts)",
}
"""What the layers of maps are called, by their names in runs and previews."""
_TILES = {"interpolation2d": "nearest", "opacity": 0.6}
"""Of a map: a tile is a measured value, nothing is between two of them."""
_MOST_PLACED = 8
"""Positions shown as layers; each has one for every channel and image."""


def get_reader(path: str | Sequence[str]) -> Read | None:
    """Return what reads a run folder; None: it is none."""
    if isinstance(path, str) and (Path(path) / HEADER_NAME).is_file():
        return read_layers
    return None


def read_layers(path: str | Path) -> list[LayerData]:
    """Return the layers of a run, also of one that is still being recorded.

    Parameters
    ----------
    path
        The folder.

    Raises
    ------
    WriterError
        If its header or journal cannot be read.
    InputError
        If an image of it cannot be read.
    """
    run = open_run(path)
    frames = _frames(run)
    there = run.kinds
    shown = "restored" if _is_restored(run) else there[0] if there else ""
    return [
        layer
        for kind in there
        for layer in _layers(run, kind, frames, is_shown=kind == shown)
    ]


def _is_restored(run: Run) -> bool:
    """Tell whether there is a restored image with anything in it."""
    if run.report is None:
        return store_path(run.folder, "restored").is_dir()
    stored = run.report.get("totals", {}).get("stored", {})
    return bool(stored.get("restored"))


def _frames(run: Run) -> int | None:
    """Return how many time points there are by now; None: all that the images have."""
    if run.report is not None:
        return None
    lines = journal_lines(run.folder / JOURNAL_NAME, Plan(run.series))
    written = (line for line in lines if line["status"] == WRITTEN)
    return max((line["index"].get("t", 0) for line in written), default=0) + 1


def _layers(
    run: Run, kind: Kind, frames: int | None, *, is_shown: bool
) -> list[LayerData]:
    positions = run.series.positions
    arrays = [_pixels(run, kind, p, frames) for p in range(len(positions))]
    if len(positions) == 1 or _are_placed(positions):
        return [
            layer
            for position, pixels in zip(positions, arrays, strict=True)
            for layer in _of_channels(run, kind, pixels, position, is_shown)
        ]
    # Beside t: that is how a person looks at them.
    together = da.stack(arrays, axis=1)
    return _of_channels(run, kind, together, None, is_shown)


def _pixels(run: Run, kind: Kind, position: int, frames: int | None) -> Array:
    """Return an image with axes t, c, z, y, x, a chunk a plane."""
    image = run.image(kind, position)
    plane = (1, 1, 1, *image.shape[-2:])
    return da.from_array(image, chunks=plane)[:frames]


def _are_placed(positions: list[Position]) -> bool:
    """Tell whether a layer for each position shows them side by side."""
    places = {(one.x_um, one.y_um) for one in positions}
    known = all(one.x_um is not None and one.y_um is not None for one in positions)
    return known and len(places) == len(positions) <= _MOST_PLACED


def _of_channels(
    run: Run, kind: Kind, pixels: Array, position: Position | None, is_shown: bool
) -> list[LayerData]:
    """Return a layer for each index of axis c, which is the second last but two."""
    described = _described(run, kind)
    several = len(run.positions) > 1
    of_position = f"{position.name} " if position is not None and several else ""
    layers: list[LayerData] = []
    for c in range(pixels.shape[-4]):
        channel = described[c] if c < len(described) else {}
        name = str(channel.get("label", f"c{c}"))
        title = f"{name} {kind}" if kind == "restored" else name
        if kind in MAPS:
            title = name.removesuffix(kind) + MAPS[kind]
        arguments = {
            "name": f"{of_position}{title}",
            "blending": "additive",
            "visible": is_shown,
            "metadata": {"rtfocus": _facts(run, kind, c, position)},
            **_place(run, kind, position, pixels.ndim - 1),
            **_look(run, kind, channel),
        }
        layers.append((pixels[..., c, :, :, :], arguments, "image"))
    return layers


def _described(run: Run, kind: Kind) -> list[dict[str, Any]]:
    """Return what the image says of its channels: label, colour, contrast."""
    first = position_paths(run.series.positions)[0]
    inner = kind if kind in INNER else ""
    group = zarr.open_group(store_path(run.folder, kind) / first / inner, mode="r")
    attributes: Any = dict(group.attrs)
    channels = attributes.get("ome", {}).get("omero", {}).get("channels", [])
    return channels if isinstance(channels, list) else []


def _facts(
    run: Run, kind: Kind, c: int, position: Position | None
) -> dict[str, object]:
    colours = 1 if kind in MAPS else run.header.planes
    channel = run.series.channels[c // colours]
    return {
        "run": str(run.folder),
        "image": kind,
        "channel": channel.name,
        "position": None if position is None else position.name,
        "optics": channel.optics,
    }


def _place(run: Run, kind: Kind, position: Position | None, ndim: int) -> Placement:
    """Return scale and place of a layer with axes t, (p,) z, y, x."""
    series, grid = run.series, run.header.grid
    y_um = x_um = 0.0
    if position is not None:
        y_um, x_um = position.y_um or 0.0, position.x_um or 0.0
    between = [1.0] * (ndim - 4)
    # What has no scale is counted; napari's word for that is pixel.
    t_unit = "s" if run.header.has_scale("t") else "pixel"
    z_unit = "um" if run.header.has_scale("z") else "pixel"
    outer = [series.interval_s or 1.0, *between, series.z_step_um or 1.0]
    place: Placement = {
        "scale": [*outer, series.pixel_size_um, series.pixel_size_um],
        "translate": [0.0] * (ndim - 2) + [y_um, x_um],
        "axis_labels": ["t", *(["p"] * len(between)), "z", "y", "x"],
        "units": [t_unit, *(["pixel"] * len(between)), z_unit, "um", "um"],
    }
    return map_place(place, grid) if kind in MAPS and grid is not None else place


def map_place(pixels: Placement, tiles: TileGrid | InputCard) -> Placement:
    """Return where a map lies over a layer of pixels, with a pixel for each tile."""
    *outer, y, x = pixels["scale"]
    *before, top, left = pixels["translate"]
    step, first = tiles.stride_px, tiles.origin_px
    return {
        **pixels,
        "scale": [*outer, round(step * y, 9), round(step * x, 9)],
        "translate": [*before, top + first * y, left + first * x],
    }


def _look(run: Run, kind: Kind, channel: dict[str, Any]) -> dict[str, object]:
    """Return colour, contrast and how pixels are drawn."""
    look: dict[str, object] = {"colormap": f"#{channel.get('color', 'FFFFFF')}"}
    if kind in MAPS:
        grid = run.header.grid
        signed = kind == "defocus" and grid is not None and grid.signed
        look = {"colormap": SIGNED_MAP if signed else UNSIGNED_MAP, **_TILES}
    window = channel.get("window")
    # Before its end a run does not say what is in it: napari looks itself.
    if run.report is not None and isinstance(window, dict):
        limits = [window.get("start"), window.get("end")]
        if all(isinstance(one, int | float) and np.isfinite(one) for one in limits):
            look["contrast_limits"] = limits
    return look


_LOOK_S = 0.2


class Receiver:
    """Receives previews in a thread of its own until it is closed.

    Parameters
    ----------
    endpoint
        ``transport.preview.endpoint`` of the processor.

    Raises
    ------
    TransportError
        If the endpoint is none.
    """

    def __init__(self, endpoint: str) -> None:
        self._viewer = PreviewViewer(endpoint)
        self._pictures: dict[int, Newest[Preview]] = {}
        self._ending = threading.Event()
        self.arrived = threading.Event()
        """Set with every picture; a waiting reader clears it."""
        self.series: SeriesStart | None = None
        self.metrics: Mapping[str, Any] = {}
        self.fault: str | None = None
        """What came last and could not be understood."""
        self._thread = threading.Thread(target=self._run, name="napari follow")
        self._thread.start()

    def take(self) -> list[Preview]:
        """Return the newest picture of every channel, each once; from any thread."""
        pictures = (slot.take() for slot in list(self._pictures.values()))
        return [picture for picture in pictures if picture is not None]

    @property
    def skipped(self) -> int:
        """Pictures that gave way to newer ones here."""
        return sum(slot.dropped for slot in list(self._pictures.values()))

    def close(self) -> None:
        """End the thread, and the socket with it."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        with self._viewer as viewer:
            while not self._ending.is_set():
                try:
                    messages = viewer.received(_LOOK_S)
                except ProtocolError as error:
                    self.fault = str(error)
                    continue
                for one in messages:
                    self._note(one)

    def _note(self, one: Preview | PreviewStatus) -> None:
        if isinstance(one, PreviewStatus):
            self.series, self.metrics = one.series or self.series, one.metrics
            return
        frame = one.header.frame
        # One without a picture carries an estimate alone, and its channel is not known.
        if frame is not None:
            channel = frame.index.get("c", 0)
            self._pictures.setdefault(channel, Newest()).put(one)
            self.arrived.set()


def map_look(tiles: NDArray[Any], signed: bool) -> dict[str, Any]:
    """Return colour and contrast of a map; NaN is unknown."""
    known = tiles[np.isfinite(tiles)]
    reach = float(np.abs(known).max()) if known.size else 1.0
    reach = reach or 1.0
    return {
        "colormap": SIGNED_MAP if signed else UNSIGNED_MAP,
        "contrast_limits": [-reach if signed else 0.0, reach],
        "visible": False,
        **_TILES,
    }
