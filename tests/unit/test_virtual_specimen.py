"""Virtual specimen: geometry, blur, noise and scenes are what the config says."""

import numpy as np
import pytest
import tifffile

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config import load_config
from rtfocus.config.sections import VirtualMicroscopeConfig
from rtfocus.files import resource_folder
from rtfocus.microscope import virtual_specimen
from rtfocus.microscope.virtual_devices import Sensor
from rtfocus.microscope.virtual_specimen import VirtualSpecimen
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf, round_pupil

OPTICS = OpticalSystem(0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.2))


def make(**settings):
    size = {"height_px": 96, "width_px": 128}
    return VirtualMicroscopeConfig.model_validate({**size, **settings})


def test_defocus_is_height_minus_stage():
    surface = {"z_um": 5.0, "tilt_x_um": 8.0, "tilt_y_um": 2.0}
    specimen = VirtualSpecimen(make(surface=surface), OPTICS)
    defocus = specimen.truth(3.0).defocus_um
    assert defocus.shape == (96, 128)
    # 5 - 3 in the middle; the right edge is 8 um farther away than the left one.
    assert defocus.mean() == pytest.approx(2.0, abs=1e-5)
    assert defocus[:, -1] - defocus[:, 0] == pytest.approx(8.0, abs=1e-5)
    assert defocus[-1] - defocus[0] == pytest.approx(2.0, abs=1e-5)
    # Positive = too far from the objective: the stage, which carries it, must go up.
    higher = specimen.defocus_um(4.0)
    assert (defocus - higher) == pytest.approx(1.0, abs=1e-5)


def test_bow_is_the_height_of_the_middle_over_the_corners():
    specimen = VirtualSpecimen(make(surface={"bow_um": 3.0}), OPTICS)
    defocus = specimen.defocus_um(0.0)
    assert defocus[48, 64] - defocus[0, 0] == pytest.approx(3.0, abs=0.01)


def test_drift_moves_the_surface_away_from_the_objective():
    specimen = VirtualSpecimen(make(surface={"drift_um_per_min": 6.0}), OPTICS)
    assert specimen.defocus_um(0.0, time_s=30.0) == pytest.approx(3.0, abs=1e-5)
    drifted = specimen.image(0.0, time_s=30.0)
    np.testing.assert_array_equal(drifted, specimen.image(-3.0))


def test_tilt_goes_on_beyond_the_frame():
    specimen = VirtualSpecimen(make(surface={"tilt_x_um": 4.0}), OPTICS)
    beside = specimen.defocus_um(0.0, x_um=128 * 0.65)
    assert beside - specimen.defocus_um(0.0) == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("defocus_um", [4.0, 0.0, -6.0])
def test_an_image_is_the_scene_through_the_psf_in_focus_too(defocus_um):
    specimen = VirtualSpecimen(make(), OPTICS)
    truth = specimen.truth(-defocus_um)
    assert truth.defocus_um == pytest.approx(defocus_um)
    wanted = blur(truth.sharp, compute_psf(OPTICS, defocus_um))
    np.testing.assert_allclose(specimen.image(-defocus_um), wanted, atol=1e-5)


def detail(image):
    """Energy of the gradient, as searches for focus score sharpness."""
    down, across = np.gradient(image)
    return float((down**2 + across**2).mean())


@pytest.mark.parametrize("kind", ["nuclei", "filaments", "tissue", "beads"])
def test_images_are_sharpest_in_focus(kind):
    """No spike: half a step from focus an image is nearly as sharp as in it."""
    specimen = VirtualSpecimen(make(specimen={"kind": kind}), OPTICS)
    unit_um = OPTICS.defocus_unit_um
    places = np.arange(-12, 13) / 8
    sharp = [detail(specimen.image(float(place) * unit_um)) for place in places]
    assert abs(places[np.argmax(sharp)]) <= 0.25
    assert min(sharp[11], sharp[13]) > 0.9 * sharp[12]


@pytest.mark.parametrize("config", ["demo", "virtual_hold", "virtual_tilt"])
def test_zero_is_where_the_shipped_optics_have_their_largest_strehl_ratio(config):
    optics = (
        load_config(resource_folder("configs") / f"{config}.yaml").channels[0].optics
    )
    # Points of the pupil that stand for equal areas.
    radius = np.sqrt((np.arange(2000) + 0.5) / 2000)
    places = np.arange(-20, 21) / 20
    strehl = [
        abs(round_pupil(optics, place * optics.defocus_unit_um, radius).mean()) ** 2
        for place in places
    ]
    assert abs(places[np.argmax(strehl)]) <= 0.05
    # One peak: an objective that has two has no focus to find.
    assert (np.diff(strehl)[:18] > 0).all()
    assert (np.diff(strehl)[-18:] < 0).all()


def test_a_tilted_frame_blurs_where_it_is_out_of_focus():
    surface = {"z_um": 6.0, "tilt_x_um": 12.0}
    specimen = VirtualSpecimen(make(width_px=384, surface=surface), OPTICS)
    image, sharp = specimen.image(0.0), specimen.truth(0.0).sharp
    error = np.abs(image - sharp).reshape(96, 12, 32).mean(axis=(0, 2))
    assert error[0] < 0.3 * error[6:].mean()


def test_blurred_planes_of_many_sites_take_bounded_memory(monkeypatch):
    specimen = VirtualSpecimen(make(surface={"tilt_x_um": 8.0}), OPTICS)
    first = specimen.image(0.0)
    of_one = sum(site.nbytes for site in specimen._sites.values())
    monkeypatch.setattr(virtual_specimen, "_SITES_BYTES", 3 * of_one)
    for number in range(1, 8):
        specimen.image(0.0, x_um=10.0 * number)
        held = sum(site.nbytes for site in specimen._sites.values())
        assert of_one < held <= 3 * of_one
    # One that takes more than all of them may is still kept, or every frame would
    # blur it anew.
    monkeypatch.setattr(virtual_specimen, "_SITES_BYTES", of_one // 2)
    again = specimen.image(0.1)
    assert len(specimen._sites) == 1
    assert again is specimen.image(0.1)
    np.testing.assert_array_equal(first, specimen.image(0.0))


def test_the_same_seed_draws_the_same_specimen_and_no_other():
    first, again = (VirtualSpecimen(make(), OPTICS).image(1.0) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = VirtualSpecimen(make(specimen={"seed": 2}), OPTICS).image(1.0)
    channel = VirtualSpecimen(make(), OPTICS, channel=1).image(1.0)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - channel).max() > 0.1


def test_the_xy_stage_moves_over_one_connected_scene():
    specimen = VirtualSpecimen(make(), OPTICS)
    here = specimen.truth(0.0).sharp
    there = specimen.truth(0.0, x_um=20 * 0.65, y_um=-10 * 0.65).sharp
    np.testing.assert_array_equal(there[10:, :-20], here[:-10, 20:])
    # Light from beyond the frame comes in at its edges, where it is mirrored.
    inside = slice(24, -24)
    np.testing.assert_allclose(
        specimen.image(0.0, x_um=20 * 0.65)[inside, 24:-44],
        specimen.image(0.0)[inside, 44:-24],
        atol=2e-3,
    )


@pytest.mark.parametrize("kind", ["nuclei", "tissue"])
def test_colour_cameras_see_three_colours(kind):
    config = make(rgb=True, specimen={"kind": kind})
    image = VirtualSpecimen(config, OPTICS).image(3.0)
    assert image.shape == (96, 128, 3)
    assert np.abs(image[..., 0] - image[..., 1]).max() > 0.05


def test_any_sharp_image_can_be_the_specimen(tmp_path):
    rng = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "field.tif", rng.integers(0, 4000, (200, 150), "u2"))
    specimen = {"kind": "image", "path": tmp_path / "field.tif"}
    sharp = VirtualSpecimen(make(specimen=specimen), OPTICS).truth(0.0).sharp
    assert sharp.shape == (96, 128)
    # Cut from the middle, stretched to [0, 1].
    original = tifffile.imread(tmp_path / "field.tif")[52:148, 11:139]
    assert np.corrcoef(sharp.ravel(), original.ravel())[0, 1] > 0.999


def test_a_recorded_stack_shows_its_real_planes(tmp_path):
    rng = np.random.default_rng(0)
    planes = rng.uniform(0, 1, (5, 96, 128)).astype(np.float32)
    planes[3] *= 0.5
    path = tmp_path / "stack.ome.tif"
    tifffile.imwrite(path, planes, metadata={"axes": "ZYX"})
    config = make(
        specimen={"kind": "stack", "path": path, "z_step_um": 2.0},
        surface={"z_um": 10.0},
    )
    specimen = VirtualSpecimen(config, OPTICS)
    for number, plane in enumerate(planes):
        image = specimen.image(10.0 + 2.0 * number + 0.3)
        assert np.corrcoef(image.ravel(), plane.ravel())[0, 1] > 0.999
    # A dim plane stays dim, and beyond the ends the last planes are seen.
    dim, bright = specimen.image(16.0), specimen.image(14.0)
    assert dim.mean() == pytest.approx(0.5 * bright.mean(), rel=0.05)
    np.testing.assert_array_equal(specimen.image(99.0), specimen.image(18.0))
    with pytest.raises(ValueError, match="no known truth"):
        specimen.truth(0.0)


@pytest.mark.parametrize("rgb", [False, True])
def test_a_recorded_stack_has_the_shape_of_the_camera_however_fine(tmp_path, rgb):
    planes = np.random.default_rng(0).uniform(0, 1, (5, 96, 128)).astype(np.float32)
    path = tmp_path / "stack.ome.tif"
    tifffile.imwrite(path, planes, metadata={"axes": "ZYX"})
    step_um = 0.01  # finer than heights of a drawing are told apart
    stack = {"kind": "stack", "path": path, "z_step_um": step_um}
    config = make(specimen=stack, surface={"z_um": 0.0}, rgb=rgb, bit_depth=8)
    specimen = VirtualSpecimen(config, OPTICS)
    for number, plane in enumerate(planes):
        image = specimen.image(step_um * number)
        assert image.shape == (*plane.shape, 3)[: 3 if rgb else 2]
        grey = image[..., 2] if rgb else image
        assert np.corrcoef(grey.ravel(), plane.ravel())[0, 1] > 0.999
        assert Sensor(config).expose(image, 10.0).shape == image.shape


def flat(level: float) -> np.ndarray:
    return np.full((256, 256), level, dtype=np.float32)


@pytest.mark.parametrize("noise", ["poisson", "pool"])
def test_noise_has_the_mean_and_variance_of_photons(noise):
    config = make(noise=noise, photons=500, background_photons=0, bit_depth=16)
    frame = Sensor(config).expose(flat(0.8), 10.0).astype(np.float64)
    gain, mean_e = config.gain_e_per_count, 400.0
    assert (frame.mean() - 100) * gain == pytest.approx(mean_e, rel=0.005)
    # Shot noise, read noise and the rounding to counts, in electrons.
    variance = mean_e + 1.6**2 + gain**2 / 12
    assert frame.var() * gain**2 == pytest.approx(variance, rel=0.03)


def test_the_pool_is_close_to_poisson_in_its_whole_distribution():
    settings = {"photons": 200, "background_photons": 0, "bit_depth": 16}
    exact, pooled = (
        np.sort(Sensor(make(noise=noise, **settings)).expose(flat(1.0), 10.0), None)
        for noise in ("poisson", "pool")
    )
    # Quantiles of 200 electrons (14 sd) differ by the skew of Poisson, under 1 sd/8.
    spread = exact.std()
    inner = slice(len(exact) // 100, -len(exact) // 100)
    gap = np.abs(exact[inner].astype(float) - pooled[inner].astype(float))
    assert gap.max() < spread / 8


def test_exposure_scales_the_light():
    config = make(noise="none", photons=1000, background_photons=0, bit_depth=16)
    short, long = (Sensor(config).expose(flat(0.5), t).mean() for t in (5.0, 20.0))
    assert (long - 100) == pytest.approx(4 * (short - 100), rel=0.01)


@pytest.mark.parametrize(("bits", "full"), [(8, 255), (12, 4095), (16, 65535)])
def test_too_much_light_saturates(bits, full):
    sensor = Sensor(make(bit_depth=bits, photons=1e6))
    frame = sensor.expose(flat(1.0), 10.0)
    assert frame.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert (frame == full).all()


def test_noise_repeats_with_its_seed():
    frames = [Sensor(make(seed=s)).expose(flat(0.5), 10.0) for s in (1, 1, 2)]
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0] != frames[2]).any()


def test_a_real_stack_is_shown_plane_by_plane(shared_data):
    path = shared_data / "dfnn_mitochondria" / "stack_zyx.tif"
    planes = tifffile.imread(path)
    config = make(
        height_px=512,
        width_px=512,
        specimen={"kind": "stack", "path": path, "z_step_um": 0.1},
    )
    specimen = VirtualSpecimen(config, OPTICS)
    # The percentiles that stretch the stack clip 0.2 % of it.
    for number in (0, 8, 16):
        image = specimen.image(number * 0.1)
        alike = np.corrcoef(image.ravel(), planes[number].ravel())[0, 1]
        assert alike > 0.98
        others = [n for n in (0, 8, 16) if n != number]
        for other in others:
            unlike = np.corrcoef(image.ravel(), planes[other].ravel())[0, 1]
            assert unlike < alike
