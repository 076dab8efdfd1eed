"""Pair data: pure by number, honest targets, split by field."""

import numpy as np
import pytest
import tifffile

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.optics.formation import blur
from rtfocus.training.pairs import PairBatches, PairScenes, draw_pair_optics
from rtfocus.training.recipe import (
    PairRecipe,
    PairsRecipe,
    PoolRecipe,
    RealPairsRecipe,
    SourceRecipe,
)
from rtfocus.training.scenes import (
    SceneSource,
    SharpScene,
    denoised,
    load_fields,
    load_real_pairs,
    mixed,
)

REFERENCE = OpticalSystem(
    0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
)


def small_recipe(**pairs) -> PairRecipe:
    """Specimens drawn, nothing read."""
    settings = {"batch_patches": 4, "planes": 4, "absorbing_share": 0, **pairs}
    return PairRecipe(
        name="small",
        network="rtfocus_1",
        pairs=PairsRecipe(reference=REFERENCE, **settings),
        pool=PoolRecipe(entries=3, side_px=220, refresh_steps=2),
    )


def test_batches_depend_on_seed_and_number_alone():
    recipe = small_recipe()
    straight = PairBatches(recipe)
    batches = [straight.batch(step) for step in range(7)]
    jumping = PairBatches(recipe)
    for step in (6, 1, 4):
        again = jumping.batch(step)
        for name, values in batches[step].items():
            np.testing.assert_array_equal(again[name], values, err_msg=name)
    other = PairBatches(recipe.model_copy(update={"seed": 2})).batch(4)
    assert not np.array_equal(other["blurred"], batches[4]["blurred"])
    held_out = PairBatches(recipe, validation=True).batch(4)
    assert not np.array_equal(held_out["blurred"], batches[4]["blurred"])


def test_in_focus_the_target_is_the_input_itself():
    batch = PairBatches(small_recipe(sharp_share=1.0)).batch(0)
    assert not batch["levels"].any()
    np.testing.assert_array_equal(batch["sharp"], batch["blurred"])


def test_away_from_focus_the_target_is_the_scene_without_noise():
    dim = {"sharp_share": 0.0, "varying_share": 0.0, "relief_share": 0.0}
    batch = PairBatches(small_recipe(**dim, photons=(20, 30))).batch(0)
    far = np.abs(batch["levels"]).mean(axis=(1, 2)) > 2
    assert far.any()
    for blurred, sharp in zip(batch["blurred"][far], batch["sharp"][far], strict=True):
        roughness = [np.abs(np.diff(image)).mean() for image in (blurred, sharp)]
        assert roughness[0] > 2 * roughness[1]


def test_a_plane_is_the_sharp_scene_under_its_psf():
    scenes = PairScenes(small_recipe(varying_share=0.0), [], validation=False)
    # Drawn scenes are half of the time blurred by the in-focus PSF as well, so
    # only the planes of the others are exactly sharp * PSF.
    errors = []
    for generation in range(6):
        entry = scenes.entry(generation)
        photographed = blur(entry.sharp, entry.psfs[1])
        errors.append(np.abs(photographed - entry.planes[1]).max())
    assert min(errors) < 1e-5
    assert max(errors) < 0.5


def test_dense_entries_lie_close_enough_to_interpolate():
    scenes = PairScenes(small_recipe(varying_share=1.0), [], validation=False)
    for generation in range(2):
        entry = scenes.entry(generation)
        assert entry.dense
        np.testing.assert_allclose(np.diff(entry.levels), 0.7, atol=1e-5)


def test_spherical_aberration_is_never_positive():
    pairs = small_recipe().pairs
    rng = np.random.default_rng(3)
    drawn = [draw_pair_optics(pairs, rng) for _ in range(300)]
    waves = [optics.aberrations.spherical_waves for optics in drawn]
    assert max(waves) <= 0
    assert min(waves) < -0.5
    samplings = [optics.sampling / REFERENCE.sampling for optics in drawn]
    assert min(samplings) < 0.7
    assert max(samplings) > 1.4


def write_pair(folder, name, shape=(160, 200)):
    rng = np.random.default_rng(len(name))
    for side in ("sharp", "blurred"):
        (folder / side).mkdir(exist_ok=True)
        pixels = rng.integers(0, 200, shape).astype(np.uint8)
        tifffile.imwrite(folder / side / name, pixels)


def test_real_pairs_are_split_by_field_and_share_one_scale(tmp_path):
    for name in ("a01.tif", "a02.tif", "b01.tif"):
        write_pair(tmp_path, name)
    wanted = RealPairsRecipe(sharp="sharp/*.tif", blurred="blurred", validation=("b*",))
    training = load_real_pairs(wanted, tmp_path, validation=False)
    validation = load_real_pairs(wanted, tmp_path, validation=True)
    assert (len(training), len(validation)) == (2, 1)
    blurred, sharp = validation[0]
    counts = [
        tifffile.imread(tmp_path / side / "b01.tif").astype(float)
        for side in ("blurred", "sharp")
    ]
    scale = np.ptp(counts[0]) / np.ptp(blurred)
    offset = counts[0].min() - blurred.min() * scale
    np.testing.assert_allclose(sharp * scale + offset, counts[1], atol=1e-3)
    recipe = small_recipe(real=(wanted,), real_share=1.0).model_copy(
        update={"data_folder": tmp_path}
    )
    batch = PairBatches(recipe).batch(0)
    assert batch["real"].all()
    assert np.isnan(batch["levels"]).all()


def test_a_real_pair_without_its_partner_is_refused(tmp_path):
    write_pair(tmp_path, "a01.tif")
    wanted = RealPairsRecipe(sharp="sharp/*.tif", blurred="blurred")
    (tmp_path / "blurred" / "a01.tif").unlink()
    with pytest.raises(ConfigError, match="no partner"):
        load_real_pairs(wanted, tmp_path, validation=False)
    tifffile.imwrite(tmp_path / "blurred" / "a01.tif", np.zeros((9, 9), np.uint8))
    with pytest.raises(ConfigError, match=r"register and cut"):
        load_real_pairs(wanted, tmp_path, validation=False)


def test_psfs_are_cut_to_the_side_that_is_asked_for():
    batch = PairBatches(small_recipe(psf_px=31)).batch(0)
    assert batch["psf"].shape == (4, 1, 31, 31)
    np.testing.assert_allclose(batch["psf"].sum(axis=(1, 2, 3)), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "in_focus",
    [{"sharp_share": 1.0}, {"sharp_share": 0.0, "farthest_level": 0.25}],
    ids=["never blurred", "hardly blurred"],
)
def test_where_the_target_is_the_input_the_psf_is_a_point(in_focus):
    recipe = small_recipe(psf_px=31, varying_share=0.0, **in_focus)
    batch = PairBatches(recipe).batch(0)
    np.testing.assert_array_equal(batch["sharp"], batch["blurred"])
    point = np.zeros((31, 31), np.float32)
    point[15, 15] = 1
    for psf in batch["psf"][:, 0]:
        np.testing.assert_array_equal(psf, point)


def test_away_from_focus_the_psf_is_no_point():
    recipe = small_recipe(psf_px=31, varying_share=0.0, sharp_share=0.0)
    batch = PairBatches(recipe).batch(0)
    blurred = np.abs(batch["levels"]).mean(axis=(1, 2)) > 1
    assert blurred.any()
    assert batch["psf"][blurred].max() < 0.5


def test_a_mixed_scene_shows_both_the_second_at_most_as_bright():
    left, right = np.zeros((30, 40), np.float32), np.zeros((32, 36), np.float32)
    left[:, 5], right[:, 30] = 1, 1
    scenes = SharpScene(left, ideal=True), SharpScene(right, ideal=False)
    for seed in range(20):
        made = mixed(*scenes, np.random.default_rng(seed))
        assert made.light.shape == (30, 36)
        assert made.light[:, 5].min() == made.light.max() == 1
        assert 0 <= made.light[:, 30].max() <= 1
        assert not made.light[:, 10:25].any()
        # The second has been through a microscope.
        assert not made.ideal


def test_contrasts_of_mixed_scenes_are_bent_either_way():
    scene = SharpScene(np.full((8, 8), 0.5, np.float32), ideal=True)
    scene.light[0] = 1
    greys = [
        mixed(scene, scene, np.random.default_rng(seed)).light[4, 4]
        for seed in range(40)
    ]
    assert min(greys) < 0.4
    assert max(greys) > 0.6


def test_a_recipe_mixes_the_share_it_asks_for_and_else_draws_as_before():
    recipe = small_recipe()

    def drawn(share: float) -> list[np.ndarray]:
        source = SceneSource(
            recipe.model_copy(update={"mixed_share": share}), [], validation=False
        )
        return [source.draw(np.random.default_rng(seed)).light for seed in range(6)]

    plain, some, all_mixed = drawn(0.0), drawn(0.5), drawn(1.0)
    same = [np.array_equal(a, b) for a, b in zip(plain, some, strict=True)]
    assert 0 < sum(same) < 6
    assert not any(map(np.array_equal, plain, all_mixed))


@pytest.fixture
def enlarged(tmp_path):
    """Return a recipe of one photograph, shown `zoom` times larger than taken."""
    pixels = np.random.default_rng(1).integers(0, 200, (240, 240)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "one.tif", pixels)

    def recipe(zoom: float, **pairs) -> PairRecipe:
        source = SourceRecipe(kind="one", files=["one.tif"], zoom=(zoom, zoom))
        changes = {"sources": (source,), "specimens": None, "data_folder": tmp_path}
        made = small_recipe(sampling_factors=(0.4, 1.6), sharp_share=0.0, **pairs)
        return made.model_copy(update=changes)

    return recipe


@pytest.mark.parametrize("zoom", [1.5, 2.0])
def test_optics_are_as_finely_sampled_as_a_scene_is_enlarged(enlarged, zoom):
    recipe = enlarged(zoom, enlarged_fine=True)
    scenes = PairScenes(recipe, load_fields(recipe), validation=False)
    for generation in range(4):
        entry = scenes.entry(generation)
        assert entry.enlarged
        # The aperture is drawn too, within a tenth.
        finer = REFERENCE.sampling / entry.sampling
        assert zoom / 1.15 / 1.1 <= finer <= zoom / 0.8 / 0.9


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_enlarged_scenes_have_a_share_in_focus_of_their_own(enlarged, share):
    recipe = enlarged(2.0, enlarged_fine=True, enlarged_sharp_share=share)
    levels = PairBatches(recipe).batch(0)["levels"]
    assert levels.any(axis=(1, 2)).all() == (share == 0)


@pytest.mark.parametrize(
    ("zoom", "fine"), [(2.0, False), (1.1, True)], ids=["not asked for", "not enlarged"]
)
def test_other_scenes_are_drawn_as_ever(enlarged, zoom, fine):
    wanted = PairBatches(enlarged(zoom)).batch(0)
    found = PairBatches(enlarged(zoom, enlarged_fine=fine)).batch(0)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_denoising_takes_the_noise_and_leaves_the_edges():
    rng = np.random.default_rng(3)
    clean = np.full((96, 96), 0.2, dtype=np.float32)
    clean[32:64, 32:64] = 0.8
    photons = 400
    noisy = (rng.poisson(clean * photons) / photons).astype(np.float32)
    left = denoised(noisy) - clean
    assert np.std(left) < 0.4 * np.std(noisy - clean)
    # Pixels on either side of an edge keep their side.
    assert np.abs(left[31:33, 34:62]).max() < 0.15


def test_a_share_of_draws_is_denoised(enlarged):
    recipe = enlarged(2.0)
    grains = []
    for share in (0.0, 1.0):
        source = recipe.sources[0].model_copy(update={"denoised_share": share})
        one = recipe.model_copy(update={"sources": (source,)})
        scenes = SceneSource(one, load_fields(one), validation=False)
        grains.append(scenes.draw(np.random.default_rng(0)).light.std())
    assert grains[1] < 0.5 * grains[0]
