"""Own optics: a user's objective and images in place of a recipe's."""

import numpy as np
import pytest
import tifffile
import yaml

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.images.optics import read_optics
from rtfocus.training.commands import own_recipe, train_command
from rtfocus.training.level_tiles import draw_optics
from rtfocus.training.recipe import RecipeBase, load_recipe
from rtfocus.training.scenes import load_fields

OWN = "NA=0.75,wavelength=520,pixel=0.325,spherical=-0.2"


@pytest.fixture
def images(tmp_path):
    """Six sharp images, one of them in a subfolder."""
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "images" / ("more" if number == 5 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        field = rng.integers(0, 4000, (240, 260)).astype(np.uint16)
        tifffile.imwrite(folder / f"field{number}.tif", field)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def shipped() -> RecipeBase:
    return load_recipe(resource_folder("configs") / "train_delpnet_own.yaml")


def test_values_by_short_name_are_optics():
    optics = read_optics(OWN)
    assert optics.wavelength_nm == 520
    assert optics.pixel_size_um == 0.325
    assert optics.aberrations.spherical_waves == -0.2


@pytest.mark.parametrize("nested", [True, False])
def test_a_file_holds_one_channel_or_the_optics_alone(tmp_path, nested):
    optics = {"numerical_aperture": 0.4, "wavelength_nm": 600, "pixel_size_um": 0.5}
    data = {"channels": [{"name": "GFP", "optics": optics}]} if nested else optics
    path = tmp_path / "optics.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert read_optics(str(path)) == OpticalSystem(0.4, 600, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NA=0.75,zoom=3", "'zoom' is unknown"),
        ("NA=0.75,wavelength=520", "pixel_size_um"),
        ("NA=0.75,NA=0.8,wavelength=520,pixel=0.3", "'NA' is there twice"),
        ("NA=[,wavelength=520,pixel=0.3", "'numerical_aperture': .* number"),
        ("NA=1.2,wavelength=520,pixel=0.3", "refractive index"),
        ("nowhere.yaml", "cannot be read"),
    ],
)
def test_what_is_no_optics_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        read_optics(text)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "optics.yaml"
    path.write_text("channels: 3", encoding="utf-8")
    with pytest.raises(ConfigError, match="numerical_aperture"):
        read_optics(str(path))


def test_lengths_along_the_axis_keep_their_share_of_the_defocus_unit(shipped, images):
    optics = read_optics(OWN)
    recipe = own_recipe(shipped, optics, images, name="my_20x")
    unit = optics.defocus_unit_um
    before = shipped.blur.reference.defocus_unit_um
    assert recipe.blur.reference == optics
    for name in ("level_step_um", "farthest_um", "jitter_um"):
        wanted = getattr(shipped.blur, name) / before
        assert getattr(recipe.blur, name) / unit == pytest.approx(wanted)
    assert recipe.blur.reference_share == shipped.blur.reference_share
    assert recipe.name == "my_20x"
    assert recipe.start_from == shipped.start_from


@pytest.mark.parametrize("waves", [0.0, 0.3, -0.3])
def test_blur_is_drawn_about_the_spherical_aberration_that_is_stated(
    shipped, images, waves
):
    optics = f"NA=0.75,wavelength=520,pixel=0.325,spherical={waves}"
    recipe = own_recipe(shipped, read_optics(optics), images, name="my_40x")
    rng = np.random.default_rng(1)
    drawn = [draw_optics(recipe.blur, rng) for _ in range(300)]
    found = np.array([one.aberrations.spherical_waves for one in drawn])
    assert np.sum(found == waves) > 200  # of the optics themselves
    assert np.mean(found) == pytest.approx(waves, abs=0.05)
    # Some lie on the other side of a nominal PSF, beyond what is drawn near it.
    assert waves == 0 or min(found * np.sign(waves)) < -0.1 * abs(waves)


def test_every_fifth_image_is_held_out(shipped, images):
    recipe = own_recipe(shipped, read_optics(OWN), images, name="my_20x")
    fields = load_fields(recipe)
    assert len(fields) == 6
    assert [f.name.partition(":")[0] for f in fields if f.validation] == ["field4"]


def test_files_may_be_called_as_users_call_them(shipped, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / f"dish [{number}]"
        folder.mkdir()
        field = rng.integers(0, 4000, (240, 260)).astype(np.uint16)
        tifffile.imwrite(folder / "sharp.tif", field)
    recipe = own_recipe(shipped, read_optics(OWN), tmp_path, name="my_20x")
    assert [f.validation for f in load_fields(recipe)] == [n == 4 for n in range(6)]


def test_a_folder_without_images_is_refused(shipped, tmp_path):
    with pytest.raises(ConfigError, match="no images"):
        own_recipe(shipped, read_optics(OWN), tmp_path, name="none")


def test_optics_without_images_are_refused():
    path = resource_folder("configs") / "train_delpnet_own.yaml"
    with pytest.raises(ConfigError, match="both --optics and --images"):
        train_command(path, resume=False, device="cpu", optics=OWN)
