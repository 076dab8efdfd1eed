"""The DemoCamera through the whole loop: every plane at its own index."""

from itertools import product

import numpy as np
import pytest
import zarr
from loop_kit import (
    assert_whole,
    process_of,
    read_journal,
    run_loop,
    sets,
    shipped,
    stored,
    succeeded,
)

pytest.importorskip("mm_test_adapters", reason="the DemoCamera is not installed")

PLACES = list(product(range(2), range(2), range(2), range(3)))
"""All (t, p, c, z) of democamera.yaml with two time points."""
# Noise, because the usual sine waves repeat from frame to frame.
REDUCED = (
    "acquisition.mda.time_plan={interval: 0.1, loops: 2}",
    "acquisition.mda.channels=[{config: DAPI, exposure: 1}, "
    "{config: FITC, exposure: 2}]",
    "microscope.properties.Camera={PixelType: 16bit, BitDepth: 12, "
    "OnCameraCCDXSize: 96, OnCameraCCDYSize: 64, Mode: Noise}",
)


def test_every_plane_is_at_its_index_and_identical(tmp_path):
    run = run_loop(shipped("democamera", tmp_path, *REDUCED))
    assert sorted(run.sent) == PLACES
    assert len({pixels.tobytes() for pixels in run.sent.values()}) == len(PLACES)
    for place, pixels in run.sent.items():
        assert pixels.shape == (64, 96)
        np.testing.assert_array_equal(run.stored("raw", *place), pixels)
    assert_whole(run.folder, frames=24)
    for p in range(2):
        array = zarr.open_array(run.folder / f"raw.ome.zarr/{p}/0", mode="r")
        assert (array.shape, array.dtype) == ((2, 2, 3, 64, 96), np.uint16)
    # The order of acquisition is that of the plan: t, p, c, z.
    written = [tuple(line["index"][a] for a in "tpcz") for line in run.journal]
    assert written == PLACES
    exposures = {line["index"]["c"]: line["exposure_ms"] for line in run.journal}
    assert exposures == {0: 1.0, 1: 2.0}


def test_the_command_records_the_same_plan_in_two_processes(tmp_path):
    options = sets("run.folder=runs", *REDUCED)
    done = process_of("run", "democamera", *options, "--quiet", cwd=tmp_path)
    said = succeeded(done)
    assert "24 acquired = 24 written + 0 dropped + 0 in error" in said
    folder = tmp_path / "runs" / "democamera.rtfocus"
    assert_whole(folder, frames=24)
    frames = {stored(folder, "raw", *place).tobytes() for place in PLACES}
    assert len(frames) == len(PLACES)
    heights = {line["index"]["z"]: line["z_um"] for line in read_journal(folder)}
    assert heights == pytest.approx({0: -2.0, 1: 0.0, 2: 2.0}, abs=0.05)
