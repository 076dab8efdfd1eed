"""Own images: from ten fields to an engine that configs find, over a kill."""

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from rtfocus.engines.registry import find_engine
from rtfocus.errors import ConfigError
from rtfocus.evaluation import own, samples
from rtfocus.evaluation.own import OwnWish, train_own
from rtfocus.specimens import draw_specimen
from rtfocus.training.commands import refining_recipe
from rtfocus.training.recipe import PoolRecipe, RecipeBase

LONG = "RTFOCUS_LONG"


def small_recipe(*given, **options) -> RecipeBase:
    """Return the recipe with few scenes at a time."""
    recipe = refining_recipe(*given, **options)
    return recipe.model_copy(update={"pool": PoolRecipe(entries=1, side_px=224)})


@pytest.fixture
def wish(tmp_path, monkeypatch) -> OwnWish:
    """Five small fields, one step, two of the shipped to compare with."""
    monkeypatch.setenv("RTFOCUS_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr(own, "SHIPPED", ("multiscale", "wiener"))
    monkeypatch.setattr(own, "_LEAST_STEPS", 1)
    monkeypatch.setattr(own, "_seconds_per_step", lambda *_: 1e9)
    monkeypatch.setattr(own, "refining_recipe", small_recipe)
    monkeypatch.setattr(samples, "LEVELS_SHOWN", (4,))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        rng = np.random.default_rng(number)
        light = draw_specimen("filaments", (224, 224), rng)
        counts = rng.poisson(3000 * light / light.max() + 100).astype(np.uint16)
        tifffile.imwrite(images / f"field{number}.tif", counts)
    return OwnWish(
        images, tmp_path / "mine", "NA=0.5,wavelength=451,pixel=0.65", device="cpu"
    )


def killed_at(word: str) -> Callable[[str], None]:
    """Return what ends the work when it says a word."""

    def say(line: str) -> None:
        if word in line:
            raise KeyboardInterrupt

    return say


def state(wish: OwnWish) -> dict[str, int]:
    """Return the fields that are cut, and when they were."""
    folder = wish.output.with_name("mine.training") / "fields"
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_was_chosen_outlives_a_kill_and_what_is_refused_leaves_nothing(wish):
    unknown = replace(wish, optics=None)
    with pytest.raises(ConfigError, match=r"optics of .* are unknown"):
        train_own(unknown)
    assert [path.name for path in wish.output.parent.iterdir()] == ["images"]
    cuts = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_own(wish, say=killed_at("fields: 3 training, 1 validation, 1 test"))
        cuts.append(state(wish))
    cut = cuts[0]
    assert len(cut) == 5
    assert cuts[1] == cut
    with pytest.raises(ConfigError, match="begun with other optics"):
        train_own(replace(wish, optics="NA=0.4,wavelength=451,pixel=0.65"))
    tifffile.imwrite(wish.images / "more.tif", np.eye(224, dtype=np.uint16))
    with pytest.raises(ConfigError, match="begun with other images"):
        train_own(wish)
    assert state(wish) == cut


@pytest.mark.slow
@pytest.mark.skipif(LONG not in os.environ, reason=f"a minute of a core; set {LONG}")
def test_from_images_to_an_engine_over_a_kill(wish):
    with pytest.raises(KeyboardInterrupt):
        train_own(wish, say=killed_at("steps, about"))
    assert not wish.output.exists()
    cut = state(wish)
    engine, verdict = train_own(wish)
    assert state(wish) == cut
    found = find_engine("mine")
    assert found.card.optics.reference.numerical_aperture == 0.5
    assert found.card.trained["after"]["engine"].startswith("multiscale@")
    standings = {one["name"]: one for one in found.card.figures["held_out"]}
    assert set(standings) == {"mine", "multiscale", "wiener"}
    # One step at a tenth of the rate changes next to nothing.
    gained = standings["mine"]["gain_db"] - standings["multiscale"]["gain_db"]
    assert abs(gained) < 0.5
    assert verdict.text in (engine / "README.md").read_text(encoding="utf-8")
    assert (engine / "before_after.png").stat().st_size > 10_000
    assert (found.folder / "before_after.png").is_file()

    # Called once more it says the same.
    assert train_own(wish) == (engine, verdict)
