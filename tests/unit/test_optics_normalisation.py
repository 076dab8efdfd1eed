"""Normalisation and background rule, on arrays."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.optics.normalisation import (
    ContrastToNoise,
    LocalStandardisation,
    PercentileRange,
    around,
    haar,
    halved,
    mean_product,
    pad_frame,
    told_below,
)
from rtfocus.specimens import draw_specimen

GRID = {"tile_px": 96, "stride_px": 48, "start_px": -12}


@cache
def scene(shape=(240, 288), seed=1):
    rng = np.random.default_rng(seed)
    light = draw_specimen("nuclei", shape, rng)
    noise = rng.standard_normal(shape).astype(np.float32)
    return np.rint(1000 * light + 100 + 3 * noise).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(gain=st.floats(0.01, 50), offset=st.floats(-500, 30000))
def test_gain_and_offset_change_nothing(gain, offset):
    frame = scene()
    changed = (frame * gain + offset).astype(np.float32)
    normal = LocalStandardisation()
    # What is left is the rounding of the changed frame's own 24 bits.
    step = np.spacing(np.abs(changed).max()) / (gain * 3)
    np.testing.assert_allclose(
        normal.apply(changed), normal.apply(frame), atol=1e-3 + 20 * step
    )


def test_the_middle_of_a_window_is_divided_by_its_weighted_deviation():
    """The frame's central pixels, written out without matrices."""
    frame = scene((132, 132), seed=3).astype(np.float64)  # there a nucleus lies
    cells = frame.reshape(11, 12, 11, 12)
    falling = np.maximum(1 - np.abs(np.arange(11) - 5) / 6, 0)
    weight = np.outer(falling, falling) / falling.sum() ** 2
    median = np.median(cells.mean(axis=(1, 3)))
    power = (((cells - median) ** 2).mean(axis=(1, 3)) * weight).sum()
    found = LocalStandardisation().apply(frame.astype(np.float32))
    # Around the centre of cell (5, 5) neighbouring cells take half a pixel's share.
    block = (frame[65:67, 65:67].mean() - median) / np.sqrt(power)
    assert block > 2
    assert found[65:67, 65:67].mean() == pytest.approx(block, rel=0.01)


def test_the_divisor_runs_linearly_from_cell_to_cell_and_is_level_at_the_edges():
    frame = scene((96, 144), seed=3).astype(np.float64)
    means = frame.reshape(8, 12, 12, 12).mean(axis=(1, 3))
    centred = frame - np.median(means)
    power = np.square(centred).reshape(8, 12, 12, 12).mean(axis=(1, 3))
    by_axis = []
    for cells in power.shape:
        apart = np.abs(np.subtract.outer(np.arange(cells), np.arange(cells)))
        falling = np.maximum(1 - apart / 6, 0)
        by_axis.append(falling / falling.sum(axis=1, keepdims=True))
    rows, columns = by_axis
    deviation = np.sqrt(rows @ power @ columns.T)
    divided = 1 / np.maximum(deviation, 0.05 * np.sqrt(power.mean()))
    for axis, cells in enumerate(power.shape):
        centres = 12 * np.arange(cells) + 5.5
        divided = np.apply_along_axis(
            lambda line, at=centres: np.interp(np.arange(12 * len(at)), at, line),
            axis,
            divided,
        )
    found = LocalStandardisation().apply(frame.astype(np.float32))
    np.testing.assert_allclose(found, centred * divided, rtol=1e-3, atol=1e-3)


def test_a_constant_frame_becomes_zero():
    found = LocalStandardisation().apply(np.full((96, 96), 4095, np.float32))
    assert not found.any()


def test_a_flat_corner_of_a_bright_frame_stays_flat():
    frame = scene((480, 480)).copy()
    frame[:200, :200] = 7
    found = LocalStandardisation().apply(frame)
    assert np.ptp(found[24:72, 24:72]) < 0.2


def test_sides_that_are_no_cells_are_refused_with_the_remedy():
    for shape in ((100, 96), (96, 100), (0, 96)):
        with pytest.raises(ValueError, match="pad_frame"):
            LocalStandardisation().apply(np.zeros(shape, np.float32))
    for window_px in (96, 133):
        with pytest.raises(ValueError, match="odd number of 12 px cells"):
            LocalStandardisation(window_px=window_px)
    with pytest.raises(ValueError, match="0 < floor < 1"):
        LocalStandardisation(floor=0)


@pytest.mark.parametrize("shape", [(1, 1), (50, 700), (96, 96), (520, 696)])
def test_padding_keeps_the_frame_and_reaches_the_multiple(shape):
    frame = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    padded = pad_frame(frame, 48, 96)
    assert all(side % 48 == 0 and side >= 96 for side in padded.shape)
    np.testing.assert_array_equal(padded[: shape[0], : shape[1]], frame)


@pytest.mark.parametrize("gain", [0.2, 1.0, 16.0])
def test_noise_is_measured_beside_a_specimen(gain):
    frame = scene((480, 480)) * np.float32(gain)
    # The quietest tenth of the cells lies a little below the mean.
    assert ContrastToNoise(quantum=0).noise(frame) == pytest.approx(3 * gain, rel=0.15)


def test_noise_is_no_illumination_that_falls_off():
    slanted = np.add.outer(np.arange(480) * 2.0, np.arange(480))  # only rows are read
    slanted += 3 * np.random.default_rng(2).standard_normal((480, 480))
    measured = ContrastToNoise(quantum=0).noise(slanted.astype(np.float32))
    assert measured == pytest.approx(3, rel=0.15)


def test_noise_is_never_less_than_the_rounding_error():
    frame = np.full((96, 96), 9, np.float32)
    assert ContrastToNoise(quantum=1).noise(frame) == pytest.approx(12**-0.5)


@pytest.mark.parametrize("gain", [1.0, 1 / 13, 16.0])
def test_empty_tiles_are_background_at_any_gain_and_others_are_not(gain):
    rng = np.random.default_rng(3)
    counts = 110 + 3 * rng.standard_normal((480, 480))
    counts[300:400, 300:400] += draw_specimen("nuclei", (100, 100), rng) * 900
    frame = np.rint(counts * gain).astype(np.float32)
    empty = ContrastToNoise().tiles(frame, **GRID)
    assert empty.shape == (9, 9)
    assert empty[:4, :4].all()
    assert not empty[6:7, 6:7].any()


def test_one_bright_point_is_no_background():
    rng = np.random.default_rng(4)
    frame = (100 + 3 * rng.standard_normal((144, 144))).astype(np.float32)
    rule = ContrastToNoise()
    assert rule.tiles(frame, **GRID).all()
    frame[20, 20] += 100
    empty = rule.tiles(frame, **GRID)
    assert not empty[0, 0]
    assert empty[1, 1]


def test_tiles_are_judged_each_by_its_own_cells():
    rng = np.random.default_rng(6)
    points = rng.random((180, 240)) < 3e-4
    frame = (100 + 3 * rng.standard_normal(points.shape) + 60 * points).astype("f4")
    rule = ContrastToNoise()
    # The first begins before the frame, the last ends behind it.
    found = rule.tiles(frame, tile_px=60, stride_px=36, start_px=-24, noise=3.0)
    assert 0 < found.sum() < found.size
    cells = frame.reshape(15, 12, 20, 12)
    means, peaks = cells.mean(axis=(1, 3)), cells.max(axis=(1, 3))
    for row, column in np.ndindex(found.shape):
        place = tuple(slice(max(3 * n - 2, 0), 3 * n + 3) for n in (row, column))
        contrast = means[place].max() - means[place].min()
        height = peaks[place].max() - means[place].min()
        assert found[row, column] == (contrast < 9 and height < 24)


def test_tiles_off_the_cells_are_refused():
    with pytest.raises(ValueError, match="multiples of 12"):
        ContrastToNoise().tiles(
            np.zeros((96, 96), np.float32), tile_px=84, stride_px=42
        )


def test_background_of_real_fields_agrees_with_the_rule_in_counts(shared_data):
    """He's rule holds for this camera: 230 and 30 counts."""
    from rtfocus.images.reading import open_images

    for path in sorted((shared_data / "bbbc006_16bit").glob("*/*.tif"))[:6]:
        frame = pad_frame(open_images(path)[0].read(), 48)
        empty = ContrastToNoise().tiles(frame, **GRID)
        counts = np.empty_like(empty)
        for i, j in np.ndindex(*empty.shape):
            rows, columns = (slice(max(48 * k - 12, 0), 48 * k + 84) for k in (i, j))
            tile = frame[rows, columns]
            counts[i, j] = tile.max() < 230 and np.ptp(tile) < 30
        assert (empty == counts).mean() > 0.9
        # What the rule in counts calls empty is empty here too.
        assert empty[counts].all()


def test_percentile_range_maps_the_percentiles_to_0_and_1():
    frame = np.arange(10_000, dtype=np.float32).reshape(100, 100) * 3 + 100
    ranged = PercentileRange(low_percent=10, high_percent=90)
    offset, scale = ranged.fit(frame)
    assert offset == pytest.approx(np.percentile(frame, 10))
    assert scale == pytest.approx(np.percentile(frame, 90) - np.percentile(frame, 10))
    np.testing.assert_allclose(ranged.apply(frame) * scale + offset, frame, rtol=1e-5)
    np.testing.assert_allclose(
        ranged.apply(frame * 7 - 50), ranged.apply(frame), atol=1e-5
    )


def test_percentile_range_leaves_a_constant_frame_flat():
    flat = PercentileRange().apply(np.full((40, 50), 130.0, np.float32))
    assert not flat.any()


def test_half_the_size_loses_no_step_of_eight_bits_and_keeps_other_types():
    counts = np.array([[1, 2, 9], [3, 5, 9], [9, 9, 9]], np.uint8)
    np.testing.assert_array_equal(halved(counts), np.array([[11]], np.uint16))
    deep = halved(counts.astype(np.uint16) * 10000)
    assert (deep.dtype, deep.item()) == (np.uint16, 27500)
    colour = halved(np.stack([counts.astype(np.float32)] * 3, axis=-1))
    assert colour.dtype == np.float32
    assert colour.tolist() == [[[2.75] * 3]]


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_what_tells_details_is_what_it_says_cell_by_cell(rows, columns, seed):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((4 * rows, 4 * columns), np.float32)
    mean, (down, across, diagonal) = haar(image)
    rebuilt = np.empty_like(image)
    for y, x in np.ndindex(2, 2):
        # Top and left are where a detail is positive.
        v, h = 1 - 2 * y, 1 - 2 * x
        rebuilt[y::2, x::2] = mean + v * down + h * across + v * h * diagonal
    np.testing.assert_allclose(rebuilt, image, atol=1e-5)
    details, others = rng.standard_normal((2, 3, 2 * rows, 2 * columns), np.float32)
    products = mean_product(details, others, 2)
    near = around(products)
    assert products.shape == near.shape == (rows, columns)
    for y, x in np.ndindex(rows, columns):
        cell = np.s_[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        expected = (details[cell] * others[cell]).sum(axis=0).mean()
        assert products[y, x] == pytest.approx(expected, abs=1e-5)
        place = np.s_[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        assert near[y, x] == pytest.approx(products[place].mean(), abs=1e-5)


@given(height=st.integers(1, 300), width=st.integers(1, 300), most=st.integers(1, 999))
def test_percentiles_are_read_from_as_few_pixels_as_are_enough(height, width, most):
    ranged = PercentileRange(low_percent=0, high_percent=100, sample_px=most)
    frame = np.arange(height * width, dtype=np.float32).reshape(height, width)
    step = ranged.step(frame.size)
    assert step**2 * most <= frame.size or step == 1
    assert (step + 1) ** 2 * most > frame.size
    seen = frame[::step, ::step]
    assert ranged.fit(frame) == (0, float(seen[-1, -1]) or 1)


@pytest.mark.parametrize(
    ("pixels", "offset", "is_told"),
    [
        (np.full((40, 60), 20, np.uint8), 100, True),
        (np.full((600, 9, 3), 79.0, np.float32), 100, True),
        (np.full((40, 60), 80, np.uint8), 100, False),
        # The dark of a noisy camera, half of whose pixels lie below the offset.
        (np.arange(5, 15, dtype=np.uint8).reshape(2, 5), 10, False),
        # Fewer than half.
        (np.repeat(np.uint16([20, 300]), [49, 51])[None], 100, False),
        # Lifted to light, whatever the offset.
        (np.int16([[-3, 5, 9, 20]]), 100, False),
        (np.full((40, 60), 20, np.uint8), 0, False),
        (np.full((40, 60), np.nan, np.float32), 100, False),
        (np.float32([[np.nan, 20, 21, 22]]), 100, True),
    ],
)
def test_counts_that_are_mostly_below_the_offset_are_told(pixels, offset, is_told):
    told = told_below(pixels, offset)
    assert (told is not None) is is_told
    if told:
        assert f"camera.offset_counts ({offset}; their median is " in told
        assert told.endswith("0 where they are subtracted already")
