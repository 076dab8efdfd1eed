"""Camera counts to signal and back: offset, flat field, NaN, saturation, types."""

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.config.sections import CameraConfig
from rtfocus.errors import ConfigError, InputError
from rtfocus.optics.normalisation import luminance
from rtfocus.processing.camera import CameraCorrection, write_counts


def correct(pixels, camera=None, bit_depth=None):
    correction = CameraCorrection(
        camera or CameraConfig(), pixels.shape, pixels.dtype, bit_depth
    )
    signal = np.empty(pixels.shape, np.float32)
    return correction, signal, correction.to_signal(pixels, signal)


def pedestal_of(pixels, camera):
    return CameraCorrection(camera, pixels.shape, pixels.dtype).pedestal(pixels)


@given(
    offset=st.floats(0, 4000),
    dtype=st.sampled_from(["|u1", "<u2"]),
    seed=st.integers(0, 2**31),
)
def test_counts_come_back_exactly_whatever_the_offset(offset, dtype, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, np.iinfo(dtype).max, (9, 7), endpoint=True).astype(dtype)
    correction, signal, marks = correct(pixels, CameraConfig(offset_counts=offset))
    out = np.empty_like(pixels)
    correction.to_counts(signal, out, marks.invalid)
    np.testing.assert_array_equal(out, pixels)


def test_flat_field_evens_the_frame(tmp_path):
    shade = np.linspace(0.5, 1.5, 40, dtype=np.float32)[None].repeat(30, axis=0)
    tifffile.imwrite(tmp_path / "flat.tif", (shade * 1000 + 100).astype(np.uint16))
    camera = CameraConfig(offset_counts=100, flat_field=tmp_path / "flat.tif")
    pixels = (shade * 400 + 100).astype(np.uint16)
    _, signal, _ = correct(pixels, camera)
    assert signal.std() < 1.0
    assert signal.mean() == pytest.approx(400, rel=0.01)


def test_flat_field_of_another_shape_is_refused_with_the_remedy(tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", np.ones((8, 8), np.uint16))
    camera = CameraConfig(flat_field=tmp_path / "flat.tif")
    with pytest.raises(ConfigError, match="same ROI and binning"):
        correct(np.zeros((9, 8), np.uint16), camera)


@pytest.mark.parametrize("counts", [0.0, 60.0, np.nan])
def test_a_flat_field_without_light_above_the_offset_is_refused(counts, tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", np.full((9, 8), counts, np.float32))
    camera = CameraConfig(offset_counts=100, flat_field=tmp_path / "flat.tif")
    with pytest.raises(ConfigError, match=r"above camera\.offset_counts \(100\)"):
        correct(np.zeros((9, 8), np.uint16), camera)


def test_missing_flat_field_names_the_config_key(tmp_path):
    camera = CameraConfig(flat_field=tmp_path / "none.tif")
    with pytest.raises(ConfigError, match=r"camera\.flat_field.*does not exist"):
        correct(np.zeros((9, 8), np.uint16), camera)


def test_nan_takes_the_median_for_processing_and_stays_nan_in_the_result():
    pixels = np.full((6, 6), 3.0, np.float32)
    pixels[0, 0] = np.nan
    pixels[1, 1] = np.inf
    correction, signal, marks = correct(pixels)
    assert marks.flags == ("nan",)
    np.testing.assert_array_equal(signal, 3.0)
    out = np.empty_like(pixels)
    correction.to_counts(signal, out, marks.invalid)
    assert np.isnan(out[[0, 1], [0, 1]]).all()
    assert np.isfinite(out).sum() == 34


@pytest.mark.parametrize(
    ("value", "bit_depth", "camera", "saturated"),
    [
        (255, None, CameraConfig(), True),
        (254, None, CameraConfig(), False),
        (200, None, CameraConfig(saturation_counts=200), True),
        (127, 7, CameraConfig(), True),
    ],
)
def test_saturated_frames_are_marked(value, bit_depth, camera, saturated):
    pixels = np.full((4, 4), value, np.uint8)
    _, _, marks = correct(pixels, camera, bit_depth)
    assert ("saturated" in marks.flags) is saturated


def test_twelve_bit_frames_saturate_at_4095():
    pixels = np.zeros((4, 4), np.uint16)
    pixels[2, 2] = 4095
    assert correct(pixels, bit_depth=12)[2].flags == ("saturated",)
    assert correct(pixels)[2].flags == ()


def test_results_are_rounded_and_clipped_to_the_type():
    correction, _, _ = correct(np.zeros((1, 4), np.uint8))
    signal = np.array([[-5.0, 3.6, 254.6, 900.0]], np.float32)
    out = np.empty((1, 4), np.uint8)
    correction.to_counts(signal, out, None)
    assert out.tolist() == [[0, 4, 255, 255]]


@pytest.mark.parametrize("dtype", ["<i2", "<i4", "<f4"])
def test_a_frame_with_negative_values_is_lifted_to_light_and_comes_back(dtype):
    pixels = np.array([[-300, 5, 0, 700]], dtype)
    camera = CameraConfig(offset_counts=100)
    correction, signal, marks = correct(pixels, camera)
    pedestal = pedestal_of(pixels, camera)
    assert (signal + pedestal).min() == 0
    out = np.empty_like(pixels)
    correction.to_counts(signal, out, marks.invalid)
    np.testing.assert_array_equal(out, pixels)


def test_a_frame_of_counts_is_not_lifted_below_a_flat_field_it_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", np.full((1, 4), 101, np.float32))
    flat = CameraConfig(offset_counts=100, flat_field=tmp_path / "flat.tif")
    counts = np.array([[0, 5, np.nan, 7]], np.float32)
    for camera in (flat, CameraConfig(offset_counts=100)):
        assert pedestal_of(counts, camera) == 0
    with pytest.raises(InputError, match=r"down to -1; camera\.flat_field"):
        pedestal_of(counts - 1, flat)


def test_luminance_weighs_green_most_and_leaves_grey_alone():
    colour = np.eye(3, dtype=np.float32)[None]
    red, green, blue = luminance(colour)[0]
    assert green > red > blue
    assert red + green + blue == pytest.approx(1.0)
    grey = np.ones((3, 3), np.float32)
    assert luminance(grey) is grey


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8", "<u8"])
def test_what_is_too_bright_for_a_wide_integer_does_not_wrap(dtype):
    out = np.zeros(3, dtype)
    write_counts(np.array([-1e30, 1e30, 7.5], np.float32), out, None)
    limits = np.iinfo(dtype)
    assert out[0] == limits.min
    assert 0.999999 * limits.max < out[1] <= limits.max
    assert out[2] == 8
