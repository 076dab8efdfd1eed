"""Own images: what is taken, what is left out and told, and who is recommended."""

import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

from rtfocus.errors import ConfigError
from rtfocus.evaluation.own_fields import choose_fields
from rtfocus.evaluation.scores import Standing, judge
from rtfocus.images.optics import StatedOptics, stated_optics
from rtfocus.images.reading import find_images
from rtfocus.specimens import draw_specimen

OPTICS = "NA=0.5,wavelength=451,pixel=0.65"
STATED = StatedOptics(stated_optics(OPTICS), OPTICS)


def field(seed: int) -> np.ndarray:
    """Draw a sharp picture; each seed is another place."""
    rng = np.random.default_rng(seed)
    light = draw_specimen("filaments", (256, 256), rng)
    return rng.poisson(3000 * light / light.max() + 100).astype(np.uint16)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [field(seed) for seed in range(6)]


@pytest.fixture
def folder(tmp_path, pictures):
    place = tmp_path / "images"
    place.mkdir()
    for number, picture in enumerate(pictures[:5]):
        tifffile.imwrite(place / f"field{number}.tif", picture)
    return place


def chosen(folder, tmp_path, **options):
    cut = tmp_path / "cut"
    cut.mkdir()
    return choose_fields(find_images(folder), cut, stated=STATED, **options)


def stack_of(picture: np.ndarray, focus: int = 2) -> np.ndarray:
    """Blur a picture by its distance from a focus."""
    return np.stack(
        [
            gaussian_filter(picture.astype(np.float32), 1.5 * abs(z - focus))
            for z in range(5)
        ]
    ).astype(np.uint16)


def write_stack(path, planes, pixel_um=0.65):
    tifffile.imwrite(
        path,
        planes,
        ome=True,
        metadata={
            "axes": "ZYX",
            "PhysicalSizeX": pixel_um,
            "PhysicalSizeY": pixel_um,
        },
    )


def test_images_of_one_place_stand_on_one_side(folder, tmp_path, pictures):
    # A copy, a later time with other noise and drift: of field 2, held out.
    tifffile.imwrite(folder / "zcopy.tif", pictures[2])
    noisy = np.random.default_rng(9).poisson(np.roll(pictures[2], 8, axis=1))
    tifffile.imwrite(folder / "zlater.tif", noisy.astype(np.uint16))
    found = chosen(folder, tmp_path)
    sides = {one.source: one.side for one in found.fields}
    assert sides["zcopy"] == sides["zlater"] == sides["field2"] == "validation"
    assert [len(found.of(s)) for s in ("training", "validation", "test")] == [3, 3, 1]


def test_a_stack_gives_its_sharpest_plane_and_others_out_of_focus(
    folder, tmp_path, pictures
):
    write_stack(folder / "stack.ome.tif", stack_of(pictures[5]))
    found = chosen(folder, tmp_path)
    (one,) = (one for one in found.fields if one.source.startswith("stack"))
    assert one.source == "stack z2"
    assert len(one.blurred) == 2
    cut = tifffile.imread(tmp_path / "cut" / one.file)
    assert np.array_equal(cut, pictures[5])


def test_single_planes_of_one_stack_give_the_sharpest(folder, tmp_path, pictures):
    for z, plane in enumerate(stack_of(pictures[5])):
        tifffile.imwrite(folder / f"stack_z{z}.tif", plane)
    found = chosen(folder, tmp_path)
    taken = [one.source for one in found.fields if one.source.startswith("stack")]
    assert taken == ["stack_z2"]
    assert len(found.left_out) == 4


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: np.where(p > 2000, np.nan, p).astype(np.float32), "NaN"),
        (lambda p: np.minimum(p, np.percentile(p, 95)).astype(np.uint16), "saturated"),
        (lambda p: gaussian_filter(p, 6), "blurred"),
        (lambda p: np.full_like(p, 7), "empty"),
        (lambda p: np.dstack([p >> 4] * 3).astype(np.uint8), "colour"),
        (lambda p: p[:200, :200], "216"),
    ],
)
def test_what_cannot_be_learned_from_is_left_out_and_told(
    folder, tmp_path, pictures, spoil, said
):
    spoilt = spoil(pictures[5])
    kind = "rgb" if spoilt.ndim == 3 else "minisblack"
    tifffile.imwrite(folder / "spoilt.tif", spoilt, photometric=kind)
    found = chosen(folder, tmp_path)
    assert len(found.fields) == 5
    (line,) = found.left_out
    assert line.startswith("'spoilt'")
    assert said in line


def test_a_stack_that_misses_focus_is_left_out(folder, tmp_path, pictures):
    write_stack(folder / "stack.ome.tif", stack_of(pictures[5], focus=-1))
    assert "focus lies outside" in chosen(folder, tmp_path).left_out[0]


def test_too_few_fields_say_why(folder, tmp_path, pictures):
    blurred = gaussian_filter(pictures[0], 6)
    tifffile.imwrite(folder / "field0.tif", blurred)
    with pytest.raises(ConfigError, match=r"4 different sharp fields .*'field0' is bl"):
        chosen(folder, tmp_path)


def test_pixel_sizes_must_be_one(folder, tmp_path, pictures):
    write_stack(folder / "other.ome.tif", stack_of(pictures[5]), pixel_um=0.325)
    with pytest.raises(ConfigError, match=r"0\.325"):
        chosen(folder, tmp_path)


def test_a_channel_must_be_named_where_there_are_several(folder, tmp_path, pictures):
    both = np.stack(pictures[:2])
    tifffile.imwrite(folder / "two.ome.tif", both, ome=True, metadata={"axes": "CYX"})
    with pytest.raises(ConfigError, match="--channel"):
        chosen(folder, tmp_path)


@pytest.mark.parametrize(
    ("own", "use"),
    [
        (Standing("own", 7.0, 5.0, 46.0, None), "own"),
        (Standing("own", 6.04, 5.0, 46.0, None), "shipped"),
        (Standing("own", 7.0, 5.0, 39.0, None), "shipped"),
        (Standing("own", 7.0, 5.0, 46.0, 1.0), "shipped"),
        (Standing("own", 7.0, 5.0, 46.0, 2.5), "own"),
    ],
)
def test_ones_own_is_recommended_only_where_it_is_better(own, use):
    planes = None if own.own_planes_db is None else 2.0
    shipped = [
        Standing("shipped", 6.0, 4.0, 48.0, planes),
        Standing("weak", 2.0, -3.0, 60.0, planes),
    ]
    verdict = judge(own, shipped)
    assert verdict.use == use
    assert "\n" not in verdict.text
