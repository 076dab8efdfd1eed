"""Offline: the error expected in restored images, stated beside them or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr
from engine_kit import write_brightness_joint
from image_file_kit import specimen
from loop_kit import command, failed, succeeded

import rtfocus
from rtfocus.config import load_config
from rtfocus.config.loading import restoring_in
from rtfocus.errors import ExitCode
from rtfocus.offline import ImageProcessor

OPTICS = rtfocus.Optics(0.5, wavelength_nm=520, pixel_size_um=0.65)


@pytest.fixture
def stating(tmp_path) -> Path:
    """A config, without optics, of an engine that states the error it leaves."""
    write_brightness_joint(tmp_path / "engines/weighed", share=0.25, log_error=-4.0)
    processing = {
        "classifier": "weighed",
        "restoration": {"method": "weighed"},
        "engine_folders": [str(tmp_path / "engines")],
    }
    config = tmp_path / "stating.yaml"
    config.write_text(json.dumps({"processing": processing}))
    return config


def stack_of(path: Path) -> np.ndarray:
    """Write three slices of different brightness; returns them."""
    planes = [specimen(n)[:150] * 1000 * n + 200 for n in (1, 2, 3)]
    stack = np.array(planes).astype(np.uint16)
    metadata = {"axes": "ZYX", "unit": "um", "spacing": 2.0}
    size = (1 / 0.65, 1 / 0.65)
    tifffile.imwrite(path, stack, imagej=True, resolution=size, metadata=metadata)
    return stack


@pytest.mark.parametrize("ending", [".ome.zarr", ".tif"])
def test_the_expected_error_is_written_a_pixel_per_tile(tmp_path, stating, ending):
    path, out = tmp_path / "stack.tif", tmp_path / f"sharp{ending}"
    stack, errors = stack_of(path), tmp_path / f"errors{ending}"
    options = ("-o", out, "--expected-error", errors, "--config", stating)
    said = command("restore", path, *options)
    succeeded(said)
    assert f"expected error: {errors}" in said.err
    with ImageProcessor(load_config(stating)) as processor:
        results = [processor.restore(plane) for plane in stack]
    wanted = np.array([result.expected_error for result in results])
    grid = results[0].defocus.grid
    assert wanted.shape == (3, grid.rows, grid.columns)
    assert grid.rows != grid.columns
    assert len(np.unique(wanted)) == 3
    step, first = round(grid.stride_px * 0.65, 9), grid.origin_px * 0.65
    if ending == ".tif":
        with tifffile.TiffFile(errors) as file:
            found, told = file.asarray(), str(file.ome_metadata)
        assert f'PhysicalSizeX="{step}"' in told
        assert f'PositionX="{first}"' in told
    else:
        yaozarrs.validate_zarr_store(str(errors))
        group = zarr.open_group(errors, mode="r")
        told = json.dumps(dict(group.attrs))
        found = group["0"][0, 0]
        (place,) = group.attrs["ome"]["multiscales"][0]["datasets"]
        scale, translation = place["coordinateTransformations"]
        assert scale["scale"] == [1, 1, 2, step, step]
        assert translation["translation"] == [0, 0, 0, first, first]
    np.testing.assert_array_equal(found, wanted)
    assert "root mean square over a tile, in counts" in told
    assert "weighed@" in told
    # A result of rtfocus like any other.
    assert "exists" in failed(command("restore", path, *options))
    succeeded(command("restore", path, *options, "--overwrite"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--orientations", 2), "nobody knows it of the mean over 2 orientations"),
        (("--optics", "NA=0.5,wavelength=520"), "blind, and the optics are told"),
        (("--set", "processing.classifier=delpnet"), "not with classifier 'delpnet'"),
        (
            ("--engine", "wiener", "--optics", "NA=0.5,wavelength=520"),
            "take engine",
        ),
        (("--scheduler", "local:2", "--orientations", 2), "the mean over 2 orientat"),
    ],
)
def test_where_no_error_is_stated_it_is_said_why_before_the_work(
    tmp_path, stating, options, why
):
    path, out, errors = (tmp_path / name for name in ("a.tif", "b.tif", "c.tif"))
    stack_of(path)
    asked = ("-o", out, "--expected-error", errors, "--config", stating)
    assert why in failed(command("restore", path, *asked, *options))
    assert not out.exists()
    assert not errors.exists()


def test_channels_whose_engines_have_other_tiles_are_told_before_the_work(tmp_path):
    for name, stride_px in (("coarse", 48), ("fine", 24), ("as_fine", 24)):
        place = tmp_path / "engines" / name
        write_brightness_joint(place, share=0.25, log_error=-4.0, stride_px=stride_px)

    def config_of(*engines: str) -> Path:
        channels = [
            {"name": f"{n} {engine}", "classifier": engine}
            | {"restoration": {"method": engine}}
            for n, engine in enumerate(engines)
        ]
        processing = {"engine_folders": [str(tmp_path / "engines")]}
        file = tmp_path / "channels.yaml"
        file.write_text(json.dumps({"processing": processing, "channels": channels}))
        return file

    path, out, errors = (tmp_path / name for name in ("a.tif", "b.tif", "c.tif"))
    planes = np.array([specimen(n) * 1000 + 200 for n in (1, 2)]).astype(np.uint16)
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "CYX"})
    asked = ("restore", path, "-o", out, "--expected-error", errors)
    for more in ((), ("--scheduler", "local:1"), ("--init",)):
        said = failed(
            command(*asked, "--config", config_of("coarse", "fine"), *more),
            ExitCode.CONFIG,
        )
        assert "a.tif', channel '1 fine': no expected error" in said
        assert "of 96 px every 24 px from 47.5 px on, 'coarse', of channel" in said
        assert "take one engine for all channels, or give each channel" in said
        assert sorted(one.name for one in tmp_path.glob("*.tif*")) == ["a.tif"]
    succeeded(command(*asked[:4], "--config", config_of("coarse", "fine")))
    again = (*asked, "--overwrite", "--config", config_of("fine", "as_fine"))
    succeeded(command(*again))
    assert tifffile.imread(errors).shape == (2, 7, 7)
    assert (tifffile.imread(errors) > 0).all()


def test_told_optics_that_are_hidden_leave_the_error_stated(tmp_path, stating):
    path, errors = tmp_path / "a.tif", tmp_path / "c.tif"
    stack_of(path)
    asked = ("-o", tmp_path / "b.tif", "--expected-error", errors, "--config", stating)
    hidden = ("--optics", "NA=0.5,wavelength=520", "--set", "processing.blind=true")
    succeeded(command("restore", path, *asked, *hidden))
    assert (tifffile.imread(errors) > 0).all()


def test_keys_of_a_config_can_be_set_without_one(tmp_path, stating):
    path, out = tmp_path / "a.tif", tmp_path / "b.tif"
    stack_of(path)
    folders = f"processing.engine_folders=['{tmp_path / 'engines'}']"
    options = ("--set", folders, "--set", "processing.classifier=weighed")
    told = ("--optics", "NA=0.5,wavelength=520", "--set", "processing.blind=true")
    errors = ("--expected-error", tmp_path / "c.tif", "--engine", "weighed")
    succeeded(command("restore", path, "-o", out, *options, *told, *errors))
    other = (tmp_path / "d.tif", "--config", stating, *told)
    succeeded(command("restore", path, "-o", *other))
    np.testing.assert_array_equal(tifffile.imread(out), tifffile.imread(other[0]))
    # What is named is not replaced by the engine for images of unknown optics.
    wiener = ("--set", "processing.restoration.method=wiener")
    said = failed(command("restore", path, "-o", tmp_path / "e.tif", *wiener))
    assert "'wiener' computes with them" in said
    assert "processing.blnd" in failed(
        command("restore", path, "-o", out, "--set", "processing.blnd=true")
    )


def test_a_folder_gets_a_folder_of_errors_without_the_broken_image(tmp_path, stating):
    folder, errors = tmp_path / "in", tmp_path / "errors"
    folder.mkdir()
    stack_of(folder / "a.tif")
    tifffile.imwrite(folder / "b.tif", np.full((256, 256), np.nan, np.float32))
    asked = ("-o", tmp_path / "out", "--expected-error", errors, "--config", stating)
    failed(command("restore", folder, *asked), ExitCode.INCOMPLETE)
    assert [path.name for path in errors.iterdir()] == ["a.tif"]
    assert np.isfinite(tifffile.imread(errors / "a.tif")).all()


def test_the_expected_error_comes_with_an_array_of_planes(tmp_path, stating):
    stack = stack_of(tmp_path / "a.tif").reshape(1, 3, 150, 240)
    restored, errors = rtfocus.restore(stack, config=stating, expected_error=True)
    np.testing.assert_array_equal(restored, rtfocus.restore(stack, config=stating))
    with ImageProcessor(load_config(stating)) as processor:
        wanted = [processor.restore(plane).expected_error for plane in stack[0]]
    np.testing.assert_array_equal(errors, [wanted])
    colours = np.stack([stack[0, 0]] * 3, axis=-1)
    _, of_colours = rtfocus.restore(colours, config=stating, expected_error=True)
    assert of_colours.shape == errors.shape[2:]
    with pytest.raises(rtfocus.ConfigError, match="no expected error: 'wiener'"):
        rtfocus.restore(stack, optics=OPTICS, expected_error=True)


def test_a_plane_without_a_number_has_no_expected_error(tmp_path, stating):
    path, out, errors = (tmp_path / name for name in ("a.tif", "b.tif", "c.tif"))
    planes = stack_of(path).astype(np.float32)
    planes[1] = np.nan
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "ZYX"})
    asked = ("-o", out, "--expected-error", errors, "--config", stating)
    succeeded(command("restore", path, *asked))
    stated = np.isfinite(tifffile.imread(errors)).all(axis=(1, 2))
    assert stated.tolist() == [True, False, True]
    assert np.isnan(tifffile.imread(errors)[1]).all()
    np.testing.assert_array_equal(tifffile.imread(out)[1], planes[1])


def test_of_a_mean_over_orientations_no_error_is_stated(stating):
    config = restoring_in(load_config(stating), 2)
    pixels = (specimen(1) * 1000).astype(np.uint16)
    with ImageProcessor(config) as processor:
        mean = processor.restore(pixels)
    assert mean.defocus is not None
    assert mean.expected_error is None
