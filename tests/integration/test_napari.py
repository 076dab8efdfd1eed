"""The napari plugin: layers of runs, a live run followed, a layer restored."""

import os
import re
import tomllib
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transport_kit import DEADLINE_S, make_estimate, until
from writer_kit import GRID, indices, make_series, numbered, recording

import rtfocus
from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.sections import PreviewConfig
from rtfocus.frame import DefocusMap, FrameHeader, FrameResult, Position
from rtfocus.specimens import draw_specimen
from rtfocus.transport.preview import PreviewPublisher
from rtfocus.transport.viewer import ShownSeries

OPTICS = OpticalSystem(0.8, 460.0, 0.325)
KINDS = (
    "",
    " restored",
    " defocus",
    " deviation (um)",
    " expected error (counts)",
)
CHANNELS = [Channel("DAPI", OPTICS), Channel("FITC")]
MANIFEST = Path(rtfocus.__file__).parent / "napari" / "napari.yaml"

pytestmark = [
    pytest.mark.skipif(
        find_spec("napari") is None or find_spec("PySide6") is None,
        reason="napari is not installed: pip install rtfocus[napari]",
    ),
    # What napari, its dependencies and Qt warn of is theirs to mend.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    """Qt without a screen."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            widgets = import_module("qtpy.QtWidgets")
        except ImportError as error:
            pytest.skip(f"Qt finds no library of the system: {error}")
        yield widgets.QApplication.instance() or widgets.QApplication([])


@pytest.fixture
def viewer(app: Any) -> Iterator[Any]:
    """The viewer's model: all of napari but the canvas, which needs a GPU's driver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = import_module("napari.components").ViewerModel()
    # Its own threads would outlive the test.
    with import_module("dask").config.set(scheduler="synchronous"):
        yield model


def opened(viewer: Any, folder: Path) -> dict[str, Any]:
    """Open a run as napari does, through the manifest; returns its layers."""
    npe2 = import_module("npe2")
    manifest = npe2.PluginManifest.from_file(MANIFEST)
    (reader,) = manifest.contributions.readers
    assert folder.match(reader.filename_patterns[0])
    assert reader.accepts_directories
    (command,) = (c for c in manifest.contributions.commands if c.id == reader.command)
    module, _, name = command.python_name.partition(":")
    read = getattr(import_module(module), name)(str(folder))
    for data, arguments, kind in read(str(folder)):
        assert kind == "image"
        viewer.add_image(data, **arguments)
    return {layer.name: layer for layer in viewer.layers}


def record(folder: Path, positions: list[Position], *, end: bool = True) -> Any:
    series = make_series(
        sizes={"t": 3, "p": len(positions), "c": 2, "z": 2},
        positions=positions,
        channels=CHANNELS,
    )
    with recording(folder, series, expects_error=True) as run:
        for sequence, index in enumerate(indices(series)):
            if end or index["t"] < 2:
                run.send(sequence, index)
        run.writer.drain()
        if end:
            run.close(len(list(indices(series))))
    return series


def test_the_manifest_is_valid_and_what_it_names_is_there(app: Any) -> None:
    manifest = import_module("npe2").PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    project = tomllib.loads((MANIFEST.parents[2] / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["entry-points"]["napari.manifest"] == {
        manifest.name: f"rtfocus.napari:{MANIFEST.name}"
    }


def test_positions_are_layers_at_their_places(viewer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sites.rtfocus"
    sites = [Position("left", x_um=0.0, y_um=4.0), Position("right", 20.0, 4.0)]
    series = record(folder, sites)
    layers = opened(viewer, folder)
    assert list(layers) == [
        f"{site} {channel}{kind}"
        for kind in KINDS
        for site in ("left", "right")
        for channel in ("DAPI", "FITC")
    ]
    for sequence, index in enumerate(indices(series)):
        site, channel = sites[index["p"]].name, CHANNELS[index["c"]].name
        raw = layers[f"{site} {channel}"].data[index["t"], index["z"]]
        np.testing.assert_array_equal(np.asarray(raw), numbered(sequence, series))
    raw, restored = layers["right FITC"], layers["right FITC restored"]
    assert raw.scale.tolist() == [0.25, 1.5, 0.325, 0.325]
    assert raw.translate.tolist() == [0, 0, 4, 20]
    assert [str(unit) for unit in raw.units][1:] == ["micrometer"] * 3
    assert (raw.visible, restored.visible) == (False, True)
    assert raw.contrast_limits[1] < 65535
    defocus = layers["right FITC defocus"]
    # The first tile's centre, 7.5 pixels from that of the first pixel.
    centre = defocus.data_to_world((0, 0, 0, 0))[2:]
    assert centre == pytest.approx((4 + 7.5 * 0.325, 20 + 7.5 * 0.325))
    assert defocus.scale[-1] == pytest.approx(GRID.stride_px * 0.325)
    assert layers["left DAPI"].metadata["rtfocus"]["optics"] == OPTICS


@pytest.mark.parametrize("steps", [(2.5, 1.5), (None, 1.5), (2.5, None)])
def test_axes_without_a_scale_are_counted(
    viewer: Any, tmp_path: Path, steps: tuple[float | None, float | None]
) -> None:
    interval_s, z_step_um = steps
    series = make_series(
        sizes={"t": 2, "z": 2}, interval_s=interval_s, z_step_um=z_step_um
    )
    with recording(tmp_path / "run.rtfocus", series) as run:
        folder = run.close(run.send_all())
    for layer in opened(viewer, folder).values():
        assert layer.scale.tolist()[:2] == [interval_s or 1.0, z_step_um or 1.0]
        assert [str(unit) for unit in layer.units][:2] == [
            "second" if interval_s else "pixel",
            "micrometer" if z_step_um else "pixel",
        ]


def test_positions_without_places_are_an_axis(viewer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "three.rtfocus"
    series = record(folder, [Position(f"site {n}") for n in range(3)])
    layers = opened(viewer, folder)
    assert len(layers) == 2 * len(KINDS)
    layer = layers["FITC"]
    assert layer.axis_labels == ("t", "p", "z", "y", "x")
    wanted = {"t": 2, "p": 1, "c": 1, "z": 0}
    sequence = list(indices(series)).index(wanted)
    shown = np.asarray(layer.data[2, 1, 0])
    np.testing.assert_array_equal(shown, numbered(sequence, series))


def test_a_run_that_is_recorded_shows_what_is_there(
    viewer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "now.rtfocus"
    record(folder, [Position("site")], end=False)
    layers = opened(viewer, folder)
    assert layers["DAPI"].data.shape == (2, 2, 40, 56)


def test_what_is_no_run_is_left_to_others(app: Any, tmp_path: Path) -> None:
    reader = import_module("rtfocus.napari.reader")
    assert reader.get_reader(str(tmp_path)) is None
    assert reader.get_reader([str(tmp_path)]) is None


def test_a_live_run_is_followed_newest_first(viewer: Any, tmp_path: Path) -> None:
    series = make_series(channels=CHANNELS, sizes={"t": None, "c": 2})
    config = PreviewConfig(endpoint="tcp://127.0.0.1:*", interval_s=1e-6)
    preview = PreviewPublisher(config)
    widget = import_module("rtfocus.napari.widgets").FollowWidget(viewer)
    try:
        widget.endpoint.setText(preview.endpoint)
        widget.toggle()
        until(lambda: preview.watched, "the viewer")
        preview.begin(ShownSeries(series, tmp_path, lambda: {"frames_per_s": 7.5}))
        receiver = widget.receiver
        until(lambda: receiver.series is not None, "the series")
        for sequence in range(4):
            arrive(receiver, preview, series, sequence)
        # Four came while the window was busy: it shows the last.
        widget.show_newest()
        layers = {layer.name: layer for layer in viewer.layers}
        assert list(layers) == [f"live FITC{kind}" for kind in KINDS]
        shown = layers["live FITC"]
        np.testing.assert_array_equal(shown.data, numbered(3, series))
        assert shown.scale.tolist() == [0.325, 0.325]
        visible = [layer.visible for layer in layers.values()]
        assert visible == [False, True, False, False, False]
        for kind, value in zip(KINDS[2:], (3, 4, 5), strict=True):
            assert (layers[f"live FITC{kind}"].data == value).all()
        assert "FITC, t 3" in widget.status.text()
        assert "defocus" in widget.status.text()
        found = re.search(r"(\d+) not shown", widget.status.text())
        assert found is not None
        assert int(found[1]) >= 3
        # The next one goes into the same layers, and leaves what the user has set.
        shown.contrast_limits = (5, 50)
        arrive(receiver, preview, series, 4)
        widget.show_newest()
        assert len(viewer.layers) == len(KINDS)
        np.testing.assert_array_equal(shown.data, numbered(4, series))
        assert shown.contrast_limits == [5, 50]
        # Of frame 4 no error is stated: that of frame 3 is not shown for it.
        assert np.isnan(layers[f"live FITC{KINDS[-1]}"].data).all()
    finally:
        widget.close()
        preview.close()
    assert widget.receiver is None


def test_an_endpoint_that_is_none_is_told(viewer: Any) -> None:
    widget = import_module("rtfocus.napari.widgets").FollowWidget(viewer)
    widget.endpoint.setText("nonsense")
    widget.toggle()
    assert widget.receiver is None
    assert "nonsense" in widget.status.text()
    widget.close()


def arrive(
    receiver: Any, preview: PreviewPublisher, series: Any, sequence: int
) -> None:
    """Offer a frame until it has come: after each the preview rests for a while."""
    receiver.arrived.clear()

    def arrived() -> bool:
        offer(preview, series, sequence, c=1)
        if not receiver.arrived.wait(0.02):
            return False
        # It may be the frame before, offered twice and on its way until now.
        return receiver._pictures[1]._item.header.frame.sequence == sequence

    until(arrived, f"frame {sequence}")


def offer(preview: PreviewPublisher, series: Any, sequence: int, c: int) -> None:
    pixels = numbered(sequence, series)
    header = FrameHeader(
        version=1,
        series_uid=series.series_uid,
        sequence=sequence,
        shape=series.shape,
        dtype=series.dtype,
        captured_ns=1,
        exposure_ms=5.0,
        index={"t": sequence, "c": c},
    )
    tiles = np.full((GRID.rows, GRID.columns), sequence, np.float32)
    level = np.zeros(tiles.shape, np.int16)
    defocus = DefocusMap(GRID, tiles, tiles, level, stated_um=tiles + 1)
    error = tiles + 2 if sequence < 4 else None
    result = FrameResult(make_estimate(sequence), defocus, pixels[::-1].copy(), error)
    preview.show(header, pixels, result)


def test_a_layer_is_restored_with_the_engine_that_is_chosen(
    viewer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run.rtfocus"
    series = record(folder, [Position("site")])
    layers = opened(viewer, folder)
    widget = import_module("rtfocus.napari.widgets").RestoreWidget(viewer)
    try:
        widget.layer.setCurrentText("DAPI")
        assert widget.optics == OPTICS
        widget.engine.setCurrentText("wiener")
        viewer.dims.set_current_step(0, 2)
        widget.start()
        widget.wait(DEADLINE_S)
        result = viewer.layers["DAPI wiener"]
        index = {"t": 2, "p": 0, "c": 0, "z": 0}
        sequence = list(indices(series)).index(index)
        expected = rtfocus.restore(
            numbered(sequence, series), optics=OPTICS, engine="wiener"
        )
        np.testing.assert_array_equal(result.data, expected)
        assert result.scale.tolist() == layers["DAPI"].scale[2:].tolist()
        assert result.units == layers["DAPI"].units[2:]
        # Every engine that restores can be chosen; the layer made just now, too.
        names = [widget.engine.itemText(n) for n in range(widget.engine.count())]
        assert {"wiener", "richardson_lucy", "rtfocus-1"} <= set(names)
        assert "delpnet" not in names
        assert widget.layer.findText("DAPI wiener") >= 0
        # Wiener computes with the optics: without them it says so, and nothing is made.
        widget.layer.setCurrentText("FITC")
        assert widget.optics is None
        widget.start()
        widget.wait(DEADLINE_S)
        assert "the optics are unknown" in widget.status.text()
        assert "FITC wiener" not in viewer.layers
    finally:
        widget.close()


def test_the_error_that_is_left_is_a_layer_at_its_tiles(viewer: Any) -> None:
    rng = np.random.default_rng(3)
    pixels = rng.poisson(800 * draw_specimen("nuclei", (160, 208), rng) + 90)
    image = pixels.astype(np.uint16)
    place = {"scale": [0.5, 0.25], "translate": [7.0, 3.0]}
    layer = viewer.add_image(image, name="mine", **place)
    widget = import_module("rtfocus.napari.widgets").RestoreWidget(viewer)
    try:
        widget.layer.setCurrentText("mine")
        widget.engine.setCurrentText("rtfocus-2")
        widget.expected_error.setChecked(True)
        widget.start()
        widget.wait(DEADLINE_S)
        restored, errors = rtfocus.restore(
            image, engine="rtfocus-2", expected_error=True
        )
        np.testing.assert_array_equal(viewer.layers["mine rtfocus-2"].data, restored)
        shown = viewer.layers[f"mine rtfocus-2{KINDS[-1]}"]
        np.testing.assert_array_equal(shown.data, errors)
        assert (shown.visible, shown.units) == (False, layer.units)
        grid = rtfocus.classify(image, engine="rtfocus-2").grid
        for tile in ((0, 0), (grid.rows - 1, grid.columns - 1)):
            pixel = [grid.origin_px + grid.stride_px * number for number in tile]
            assert shown.data_to_world(tile) == pytest.approx(
                layer.data_to_world(pixel)
            )
        # What states none says so, and nothing is made.
        widget.engine.setCurrentText("wiener")
        widget.optics_known.setChecked(True)
        widget.start()
        widget.wait(DEADLINE_S)
        assert "no expected error: 'wiener' states none" in widget.status.text()
        assert "mine wiener" not in viewer.layers
    finally:
        widget.close()
