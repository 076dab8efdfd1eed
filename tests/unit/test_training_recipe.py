"""Recipes, cameras and scores."""

import numpy as np
import pytest

from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.level_tiles import BACKGROUND, label_crop
from rtfocus.training.recipe import OptimiserRecipe, load_recipe
from rtfocus.training.scenes import draw_camera
from rtfocus.training.trainer import learning_rate

SHIPPED = resource_folder("configs") / "train_delpnet.yaml"


def test_the_shipped_recipe_is_valid_and_holds_fields_out():
    recipe = load_recipe(SHIPPED)
    assert recipe.name == "delpnet"
    assert any(source.validation for source in recipe.sources)


def test_a_wrong_key_is_named_with_its_path(tmp_path):
    text = SHIPPED.read_text(encoding="utf-8").replace("  steps:", "  stepz:")
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'optimiser\.stepz'"):
        load_recipe(path)


def test_a_wrong_value_is_told_with_key_and_rule(tmp_path):
    text = SHIPPED.read_text(encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("  steps:", "  steps: yes #"), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"'optimiser\.steps': a number is needed; .*"
    ):
        load_recipe(path)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml.*give a YAML file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"name: \xb5m", "is no UTF-8 text"),
        (b"\x00\x01", "is no text but a binary file"),
        (b"a: [", "is not valid YAML: line 1"),
        (b"a: 1\na: 2", "'a' is given twice"),
    ],
)
def test_a_recipe_that_is_no_text_is_told_as_a_config_is(tmp_path, data, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"recipe '.*recipe\.yaml' .*{said}"):
        load_recipe(path)


def test_a_config_of_a_run_is_no_recipe():
    with pytest.raises(ConfigError, match=r"demo\.yaml' is no recipe: it names no net"):
        load_recipe(resource_folder("configs") / "demo.yaml")


@pytest.mark.parametrize("bases", [{"a": "a"}, {"a": "b", "b": "a"}])
def test_a_recipe_that_is_its_own_base_is_refused(tmp_path, bases):
    for name, base in bases.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a\.yaml' is its own base"):
        load_recipe(tmp_path / "a.yaml")


def test_levels_that_do_not_differ_are_refused(tmp_path):
    base = resource_folder("configs") / "train_delpnet.yaml"
    recipe = tmp_path / "zero.yaml"
    text = f"base: '{base.as_posix()}'\nblur: {{level_step_um: 0}}\n"
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"blur\.level_step_um': .* greater than 0"):
        load_recipe(recipe)


def test_the_rate_rises_linearly_and_falls_to_zero():
    recipe = OptimiserRecipe(steps=1000, rate=1.0, warmup_steps=100)
    assert learning_rate(recipe, 49) == pytest.approx(0.5)
    assert learning_rate(recipe, 100) == pytest.approx(1.0)
    assert learning_rate(recipe, 550) == pytest.approx(0.5)
    assert learning_rate(recipe, 1000) == pytest.approx(0.0)


@pytest.mark.parametrize(("step", "rate"), [(0, 1), (500, 1), (750, 0.5), (1000, 0)])
def test_linear_decay_starts_in_the_middle(step, rate):
    recipe = OptimiserRecipe(steps=1000, rate=1.0, warmup_steps=1, decay="linear")
    assert learning_rate(recipe, step) == pytest.approx(rate)


def test_the_noise_of_a_photograph_is_what_it_says():
    """The deviation in the dark against pictures of nothing."""
    ratios = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        camera = draw_camera(rng)
        counts = camera.take(np.zeros((96, 96), np.float32), rng)
        dark = camera.dark_noise()
        assert counts.min() >= 0
        # The camera cuts a glow near zero and rounds noise below one count away.
        if counts.min() > 0 and dark > 1:
            ratios.append(counts.std() / dark)
    assert len(ratios) > 10
    np.testing.assert_allclose(ratios, 1, atol=0.08)


def test_a_crop_of_nothing_is_background_and_a_bright_one_its_level():
    rng = np.random.default_rng(5)
    counts = (100 + 3 * rng.standard_normal((144, 144))).astype(np.float32)
    crop, labels = label_crop(counts, 3.0, 4)
    assert crop.shape == (144, 144)
    assert labels.shape == (3, 3)
    assert (labels == BACKGROUND).all()
    counts[30:50, 30:50] += 500
    # Tiles start at -12, 12 and 36 px: all reach the square, which ends at 50.
    assert (label_crop(counts, 3.0, 4)[1] == 4).all()
