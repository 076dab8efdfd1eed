"""The layers of a run, as napari is given them; napari itself is not needed."""

from pathlib import Path

import pytest
from writer_kit import GRID, make_series, recording

from rtfocus.channel import Channel

reader = pytest.importorskip(
    "rtfocus.napari.reader", reason="dask is not installed: pip install rtfocus[napari]"
)


@pytest.mark.parametrize("expects_error", [True, False])
def test_what_is_stated_of_tiles_are_layers_with_their_units(
    tmp_path: Path, expects_error: bool
) -> None:
    series = make_series(
        sizes={"t": 2, "c": 2}, channels=[Channel("deviation"), Channel("FITC")]
    )
    with recording(
        tmp_path / "run.rtfocus", series, expects_error=expects_error
    ) as run:
        folder = run.close(run.send_all())
    found = {said["name"]: (data, said) for data, said, _ in reader.read_layers(folder)}
    wanted = ["", " restored", " defocus", " deviation (um)"]
    wanted += [" expected error (counts)"] * expects_error
    channels = ("deviation", "FITC")
    assert list(found) == [f"{c}{kind}" for kind in wanted for c in channels]
    # Frame 3 is that of time point 1 in FITC.
    values = {" defocus": 3.0, " deviation (um)": 4.25, " expected error (counts)": 3.5}
    for kind in wanted[2:]:
        data, said = found[f"FITC{kind}"]
        # Threads of dask's own would outlive the test.
        tiles = data[1, 0].compute(scheduler="synchronous")
        assert tiles.shape == (GRID.rows, GRID.columns)
        assert tiles[1, 1] == values[kind]
        assert said["scale"][-1] == round(GRID.stride_px * series.pixel_size_um, 9)
        assert said["translate"][-1] == GRID.origin_px * series.pixel_size_um
        assert not said["visible"]
        low, high = said["contrast_limits"]
        assert low < high
        is_signed = kind == " defocus" and GRID.signed
        assert said["colormap"]["name"] == ("defocus" if is_signed else "distance")
