"""Follow: a dock widget that shows the newest frames of a live run as layers.

A thread receives from the processor's preview socket and keeps the newest picture of
each channel; the window takes it when it is ready, so neither ever waits for the
other, and nothing the window does reaches the recording.
"""

import threading
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QTimer
from qtpy.QtGui import QCloseEvent
from qtpy.QtWidgets import QFormLayout, QLabel, QLineEdit, QPushButton, QWidget

from rtfocus.config.sections import PreviewConfig
from rtfocus.errors import ProtocolError, RtfocusError
from rtfocus.frame import SeriesStart
from rtfocus.napari.reader import SIGNED_MAP, UNSIGNED_MAP
from rtfocus.transport.preview_messages import Preview, PreviewStatus, PreviewViewer
from rtfocus.workers import Newest

_LOOK_S = 0.2
_SHOW_MS = 40
"""25 pictures a second are a film."""


class Viewer(Protocol):
    """What is used of a napari viewer."""

    layers: Any
    dims: Any

    def add_image(self, data: Any, **arguments: Any) -> Any:  # noqa: ANN401 (napari's)
        """Add a layer."""
        ...


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
        """Set with every picture; whoever waits for one clears it."""
        self.series: SeriesStart | None = None
        self.metrics: Mapping[str, Any] = {}
        self.fault: str | None = None
        """What came last and could not be understood."""
        self._thread = threading.Thread(target=self._run, name="napari follow")
        self._thread.start()

    def take(self) -> list[Preview]:
        """Return the newest picture of every channel, each once; from any thread."""
        taken = (slot.take() for slot in list(self._pictures.values()))
        return [picture for picture in taken if picture is not None]

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
                    came = viewer.received(_LOOK_S)
                except ProtocolError as error:
                    self.fault = str(error)
                    continue
                for one in came:
                    self._note(one)

    def _note(self, one: Preview | PreviewStatus) -> None:
        if isinstance(one, PreviewStatus):
            self.series, self.metrics = one.series or self.series, one.metrics
            return
        frame = one.header.frame
        # One without is for whoever wants estimates alone: nobody knows its channel.
        if frame is not None:
            channel = frame.index.get("c", 0)
            self._pictures.setdefault(channel, Newest()).put(one)
            self.arrived.set()


class FollowWidget(QWidget):  # type: ignore[misc, unused-ignore] # Qt has no types
    """Endpoint, start and stop, and what the newest frame says.

    Parameters
    ----------
    napari_viewer
        Gets the layers.
    """

    # napari knows the argument by its name.
    def __init__(self, napari_viewer: Viewer) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self.receiver: Receiver | None = None
        """None: nobody is followed."""
        self.endpoint = QLineEdit(PreviewConfig().endpoint or "")
        self.endpoint.setToolTip("transport.preview.endpoint of the processor")
        self.button = QPushButton("Follow")
        self.button.clicked.connect(self.toggle)
        self.status = QLabel("not following")
        self.status.setWordWrap(True)
        layout = QFormLayout(self)
        layout.addRow("Endpoint", self.endpoint)
        layout.addRow(self.button)
        layout.addRow(self.status)
        self._timer = QTimer(self)
        self._timer.timeout.connect(self.show_newest)

    def toggle(self) -> None:
        """Begin to follow, or stop."""
        if self.receiver is not None:
            self.stop()
            return
        try:
            self.receiver = Receiver(self.endpoint.text().strip())
        except RtfocusError as error:
            self.status.setText(str(error))
            return
        self.button.setText("Stop")
        self.endpoint.setEnabled(False)
        self.status.setText(f"waiting for {self.endpoint.text()}")
        self._timer.start(_SHOW_MS)

    def stop(self) -> None:
        """Stop following; the layers stay."""
        self._timer.stop()
        if self.receiver is not None:
            self.receiver.close()
            self.receiver = None
        self.button.setText("Follow")
        self.endpoint.setEnabled(True)
        self.status.setText("not following")

    def show_newest(self) -> None:
        """Show the newest picture of every channel, if there is one."""
        receiver = self.receiver
        if receiver is None:
            return
        if receiver.fault is not None:
            self.status.setText(receiver.fault)
            receiver.fault = None
        for picture in receiver.take():
            self._show(picture, receiver)

    def _show(self, picture: Preview, receiver: Receiver) -> None:
        header, series = picture.header, receiver.series
        channel = _channel(picture, series)
        pixel_um = 1.0 if series is None else series.pixel_size_um
        step = header.reduced * pixel_um
        restored = picture.planes.get("restored")
        # One over the other they would add up; the eye in the layer list shows both.
        look = {"visible": restored is None}
        self._update(f"live {channel}", picture.pixels, step, 0.0, look)
        if restored is not None:
            self._update(f"live {channel} restored", restored, step, 0.0, {})
        tiles, grid = picture.planes.get("defocus"), header.grid
        if tiles is not None and grid is not None:
            look = _map_look(tiles, grid.signed)
            step, origin = grid.stride_px * pixel_um, grid.origin_px * pixel_um
            self._update(f"live {channel} defocus", tiles, step, origin, look)
        self.status.setText(_in_words(picture, channel, receiver))

    def _update(
        self,
        name: str,
        pixels: NDArray[Any],
        step_um: float,
        origin_um: float,
        look: dict[str, Any],
    ) -> None:
        """Give a layer its newest pixels; make it where there is none that fits."""
        is_colour = pixels.ndim == 3
        there = self._viewer.layers[name] if name in self._viewer.layers else None
        if there is not None and there.rgb == is_colour:
            there.data = pixels
            there.scale, there.translate = [step_um] * 2, [origin_um] * 2
            return
        if there is not None:
            self._viewer.layers.remove(there)
        self._viewer.add_image(
            pixels,
            name=name,
            rgb=is_colour,
            scale=[step_um] * 2,
            translate=[origin_um] * 2,
            units=["um"] * 2,
            blending="additive",
            **look,
        )

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 (Qt's name)
        """Stop with the widget."""
        self.stop()
        super().closeEvent(event)


def _channel(picture: Preview, series: SeriesStart | None) -> str:
    frame = picture.header.frame
    number = 0 if frame is None else frame.index.get("c", 0)
    if series is None or number >= len(series.channels):
        return f"c{number}"
    return series.channels[number].name


def _map_look(tiles: NDArray[Any], signed: bool) -> dict[str, Any]:
    known = tiles[np.isfinite(tiles)]
    reach = float(np.abs(known).max()) if known.size else 1.0
    reach = reach or 1.0
    return {
        "colormap": SIGNED_MAP if signed else UNSIGNED_MAP,
        "contrast_limits": [-reach if signed else 0.0, reach],
        "interpolation2d": "nearest",
        "opacity": 0.6,
        "visible": False,
    }


def _in_words(picture: Preview, channel: str, receiver: Receiver) -> str:
    frame, estimate = picture.header.frame, picture.header.estimate
    said = [channel]
    if frame is not None:
        said += [f"{axis} {number}" for axis, number in frame.index.items()]
        if frame.z_um is not None:
            said.append(f"stage at {frame.z_um:.2f} um")
    if estimate is not None and estimate.defocus_um is not None:
        sign = "+" if estimate.signed else ""
        said.append(f"defocus {estimate.defocus_um:{sign}.2f} um")
    rate = receiver.metrics.get("frames_per_s")
    if isinstance(rate, int | float):
        said.append(f"{rate:.1f} frames/s")
    if receiver.skipped:
        said.append(f"{receiver.skipped} not shown")
    return ", ".join(said)
