"""Widgets: dock widgets that show a live run as layers, and that restore a layer.

A thread receives from the processor's preview socket and keeps the newest picture of
each channel; the window takes it when it is ready, so neither ever waits for the
other, and nothing the window does reaches the recording.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QTimer
from qtpy.QtGui import QCloseEvent
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QWidget,
)

from rtfocus.api import restore
from rtfocus.channel import OpticalSystem
from rtfocus.config.sections import PreviewConfig
from rtfocus.engines.card import input_of
from rtfocus.engines.registry import find_engine, list_engines
from rtfocus.errors import RtfocusError
from rtfocus.frame import SeriesStart
from rtfocus.napari.reader import MAPS, Placement, Receiver, map_look, map_place
from rtfocus.processing.restore import METHODS
from rtfocus.transport.viewer import Preview

_SHOW_MS = 40
"""25 pictures a second are a film."""


class NapariViewer(Protocol):
    """What is used of a napari viewer."""

    layers: Any
    dims: Any

    def add_image(self, data: Any, **arguments: Any) -> Any:  # noqa: ANN401 (napari's)
        """Add a layer."""
        ...


class FollowWidget(QWidget):  # type: ignore[misc, unused-ignore] # Qt has no types
    """Endpoint, start and stop, and what the newest frame says.

    Parameters
    ----------
    napari_viewer
        Gets the layers.
    """

    # napari knows the argument by its name.
    def __init__(self, napari_viewer: NapariViewer) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self.receiver: Receiver | None = None
        """None: no run is followed."""
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
        place = _flat(header.reduced * pixel_um)
        restored = picture.planes.get("restored")
        # One over the other they would add up; the eye in the layer list shows both.
        look = {"visible": restored is None}
        self._update(f"live {channel}", picture.pixels, place, look)
        if restored is not None:
            self._update(f"live {channel} restored", restored, place, {})
        for kind, called in MAPS.items():
            name, tiles = f"live {channel} {called}", picture.planes.get(kind)
            if tiles is not None and (grid := header.grid) is not None:
                look = map_look(tiles, grid.signed and kind == "defocus")
                self._update(name, tiles, map_place(_flat(pixel_um), grid), look)
            elif name in self._viewer.layers:
                # What was stated of a frame before is not said of this one.
                there = self._viewer.layers[name]
                there.data = np.full_like(there.data, np.nan)
        self.status.setText(_in_words(picture, channel, receiver))

    def _update(
        self, name: str, pixels: NDArray[Any], place: Placement, look: dict[str, Any]
    ) -> None:
        """Give a layer its newest pixels; make it where there is none that fits."""
        is_colour = pixels.ndim == 3
        there = self._viewer.layers[name] if name in self._viewer.layers else None
        if there is not None and there.rgb == is_colour:
            there.data = pixels
            there.scale, there.translate = place["scale"], place["translate"]
            return
        if there is not None:
            self._viewer.layers.remove(there)
        self._viewer.add_image(
            pixels,
            name=name,
            rgb=is_colour,
            blending="additive",
            **place,
            **look,
        )

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 (Qt's name)
        """Stop with the widget."""
        self.stop()
        super().closeEvent(event)


def _flat(pixel_um: float) -> Placement:
    """Return the place of a picture whose corner is that of the frame."""
    return {"scale": [pixel_um] * 2, "translate": [0.0] * 2, "units": ["um"] * 2}


def _channel(picture: Preview, series: SeriesStart | None) -> str:
    frame = picture.header.frame
    number = 0 if frame is None else frame.index.get("c", 0)
    if series is None or number >= len(series.channels):
        return f"c{number}"
    return series.channels[number].name


def _in_words(picture: Preview, channel: str, receiver: Receiver) -> str:
    frame, estimate = picture.header.frame, picture.header.estimate
    parts = [channel]
    if frame is not None:
        parts += [f"{axis} {number}" for axis, number in frame.index.items()]
        if frame.z_um is not None:
            parts.append(f"stage at {frame.z_um:.2f} um")
    if estimate is not None and estimate.defocus_um is not None:
        sign = "+" if estimate.signed else ""
        parts.append(f"defocus {estimate.defocus_um:{sign}.2f} um")
    rate = receiver.metrics.get("frames_per_s")
    if isinstance(rate, int | float):
        parts.append(f"{rate:.1f} frames/s")
    if receiver.skipped:
        parts.append(f"{receiver.skipped} not shown")
    return ", ".join(parts)


Restored = tuple[NDArray[Any], NDArray[Any] | None]
"""Pixels, and the error expected to be left in each tile, where it is asked for."""
_LOOK_MS = 50
_PLACE = ("scale", "translate", "units")
"""What a layer says of each of its axes."""
_SHOWN_PERCENT = (0.1, 99.9)


def engine_names() -> list[str]:
    """Return what restores: the methods built in, then the engines there are."""
    engines = [
        engine.name for engine in list_engines() if engine.card.kind != "classifier"
    ]
    return list(dict.fromkeys([*METHODS, *engines]))


class RestoreWidget(QWidget):  # type: ignore[misc, unused-ignore] # Qt has no types
    """Layer, engine and optics; the result is a layer beside the first, or two.

    Parameters
    ----------
    napari_viewer
        Gives and gets the layers.
    """

    # napari knows the argument by its name.
    def __init__(self, napari_viewer: NapariViewer) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="napari restore")
        self._work: Future[Restored] | None = None
        self._engine = ""
        """That is at work."""
        self._arguments: dict[str, Any] = {}
        """Of the layer of what it makes."""
        self.layer = QComboBox()
        self.engine = QComboBox()
        self.engine.addItems(engine_names())
        self.optics_known = QCheckBox("optics as below")
        self.optics_known.setToolTip("otherwise an engine that runs blind is needed")
        self.aperture = _number(0.01, 2.0, 3)
        self.wavelength_nm = _number(10.0, 1e6, 1)
        self.index = _number(1.0, 5.0, 3)
        self.pixel_um = _number(0.001, 1000.0, 4)
        self.all_planes = QCheckBox("all planes, not the one that is shown")
        self.expected_error = QCheckBox("the error that is left, as a layer")
        self.expected_error.setToolTip("stated by rtfocus-2, where no optics are given")
        self.button = QPushButton("Restore")
        self.status = QLabel("")
        self.status.setWordWrap(True)
        self._lay_out()
        self._timer = QTimer(self)
        self._timer.timeout.connect(self.finish)
        self.button.clicked.connect(self.start)
        self.layer.currentTextChanged.connect(self._take_optics)
        events = self._viewer.layers.events
        events.inserted.connect(self._list_layers)
        events.removed.connect(self._list_layers)
        self._list_layers()

    def _lay_out(self) -> None:
        layout = QFormLayout(self)
        for label, field in (
            ("Layer", self.layer),
            ("Engine", self.engine),
            ("", self.optics_known),
            ("NA", self.aperture),
            ("Wavelength (nm)", self.wavelength_nm),
            ("Refractive index", self.index),
            ("Pixel size (um)", self.pixel_um),
            ("", self.all_planes),
            ("", self.expected_error),
        ):
            layout.addRow(label, field)
        layout.addRow(self.button)
        layout.addRow(self.status)

    @property
    def optics(self) -> OpticalSystem | None:
        """As they stand in the fields; None: unknown.

        Raises
        ------
        ValueError
            If no objective has them.
        """
        if not self.optics_known.isChecked():
            return None
        return replace(
            self._stated() or OpticalSystem(0.5, 520.0, 0.325),
            numerical_aperture=self.aperture.value(),
            wavelength_nm=self.wavelength_nm.value(),
            refractive_index=self.index.value(),
            pixel_size_um=self.pixel_um.value(),
        )

    def start(self) -> None:
        """Begin to restore; the window stays free."""
        layer = self._chosen()
        if layer is None or self._work is not None:
            return
        try:
            optics = self.optics
        except ValueError as error:
            self.status.setText(str(error))
            return
        engine = self._engine = self.engine.currentText()
        states_error = self.expected_error.isChecked()
        pixels, place = self._selected(layer)
        self._arguments = {
            "name": f"{layer.name} {engine}",
            "rgb": layer.rgb,
            "blending": layer.blending,
            "metadata": dict(layer.metadata),
            **place,
        }
        if not layer.rgb:
            self._arguments["colormap"] = layer.colormap

        def work() -> Restored:
            # Lazy pixels are read here, not in the window's thread.
            image = np.asarray(pixels)
            if not states_error:
                return restore(image, optics=optics, engine=engine), None
            return restore(image, optics=optics, engine=engine, expected_error=True)

        self._work = self._worker.submit(work)
        self.button.setEnabled(False)
        self.status.setText(f"{engine} restores {pixels.shape} pixels ...")
        self._timer.start(_LOOK_MS)

    def wait(self, timeout_s: float) -> None:
        """Wait until the work under way is done, and show it."""
        if self._work is not None:
            self._work.exception(timeout_s)
        self.finish()

    def finish(self) -> None:
        """Show the result, if it is there by now."""
        work = self._work
        if work is None or not work.done():
            return
        self._timer.stop()
        self._work = None
        self.button.setEnabled(True)
        error = work.exception()
        if error is not None:
            text = str(error) if isinstance(error, RtfocusError) else repr(error)
            self.status.setText(text)
            return
        restored, errors = work.result()
        self._viewer.add_image(restored, **self._arguments, **_limits(restored))
        if errors is not None:
            self._viewer.add_image(errors, **self._of_tiles(errors))
        self.status.setText(f"restored: '{self._arguments['name']}'")

    def _of_tiles(self, errors: NDArray[Any]) -> dict[str, Any]:
        """Return how the errors are shown, a pixel of the layer for each tile."""
        arguments, tiles = self._arguments, input_of(find_engine(self._engine).card)
        return {
            "name": f"{arguments['name']} {MAPS['expected_error']}",
            "blending": "additive",
            "metadata": arguments["metadata"],
            **map_place({name: arguments[name] for name in _PLACE}, tiles),
            **map_look(errors, signed=False),
        }

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 (Qt's name)
        """End the thread with the widget; what it is at is finished first."""
        self._timer.stop()
        self._worker.shutdown(wait=True, cancel_futures=True)
        super().closeEvent(event)

    def _chosen(self) -> Any:  # noqa: ANN401 (napari's)
        name = self.layer.currentText()
        return self._viewer.layers[name] if name in self._viewer.layers else None

    def _stated(self) -> OpticalSystem | None:
        """Return the optics that a layer of a run folder brings."""
        layer = self._chosen()
        stated = {} if layer is None else layer.metadata.get("rtfocus", {})
        optics = stated.get("optics") if isinstance(stated, dict) else None
        return optics if isinstance(optics, OpticalSystem) else None

    def _list_layers(self, _event: object = None) -> None:
        chosen = self.layer.currentText()
        images = [
            one.name for one in self._viewer.layers if type(one).__name__ == "Image"
        ]
        self.layer.blockSignals(True)
        self.layer.clear()
        self.layer.addItems(images)
        if chosen in images:
            self.layer.setCurrentText(chosen)
        self.layer.blockSignals(False)
        if self.layer.currentText() != chosen:
            self._take_optics()

    def _take_optics(self, _name: str = "") -> None:
        """Fill the fields with what the layer says of its optics."""
        layer, stated = self._chosen(), self._stated()
        self.optics_known.setChecked(stated is not None)
        if stated is not None:
            self.aperture.setValue(stated.numerical_aperture)
            self.wavelength_nm.setValue(stated.wavelength_nm)
            self.index.setValue(stated.refractive_index)
            self.pixel_um.setValue(stated.pixel_size_um)
        elif layer is not None:
            self.pixel_um.setValue(float(layer.scale[-1]))

    def _selected(self, layer: Any) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
        """Return the pixels to restore, and where they lie."""
        pixels = layer.data[0] if layer.multiscale else layer.data
        # Of layers with different units napari ignores those of all.
        lies = {name: list(getattr(layer, name)) for name in _PLACE}
        axes = len(lies["scale"])
        if self.all_planes.isChecked() or axes == 2:
            return pixels, lies
        steps = self._viewer.dims.current_step[-axes:][:-2]
        inside = zip(steps, pixels.shape, strict=False)
        place = tuple(min(step, length - 1) for step, length in inside)
        return pixels[place], {name: values[-2:] for name, values in lies.items()}


def _number(least: float, most: float, digits: int) -> QDoubleSpinBox:
    field = QDoubleSpinBox()
    field.setDecimals(digits)
    field.setRange(least, most)
    return field


def _limits(pixels: NDArray[Any]) -> dict[str, list[float]]:
    sample = pixels[..., ::4, ::4] if pixels.ndim == 2 else pixels
    known = sample[np.isfinite(sample)]
    if not known.size:
        return {}
    low, high = np.percentile(known, _SHOWN_PERCENT)
    return {"contrast_limits": [float(low), float(high)]} if high > low else {}
