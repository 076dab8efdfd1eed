"""Own images: from ten fields to an engine that configs find, over a kill."""

import numpy as np
import pytest
import tifffile

from rtfocus.errors import ConfigError
from rtfocus.evaluation import own, own_verdict
from rtfocus.evaluation.own import OwnWish, train_own
from rtfocus.processing.engines.registry import find_engine
from rtfocus.specimens import draw_specimen
from rtfocus.training.own_optics import refining_recipe
from rtfocus.training.recipe import PoolRecipe, RecipeBase


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
    monkeypatch.setattr(own_verdict, "LEVELS_SHOWN", (4,))
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


def test_from_images_to_an_engine_over_a_kill(wish):
    said: list[str] = []

    def killed_before_training(line: str) -> None:
        said.append(line)
        if "steps, about" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_own(wish, say=killed_before_training)
    assert not wish.output.exists()
    begun = wish.output.with_name("mine.training")
    cut = {p.name: p.stat().st_mtime_ns for p in (begun / "fields").iterdir()}

    engine, verdict = train_own(wish, say=said.append)
    assert cut == {p.name: p.stat().st_mtime_ns for p in (begun / "fields").iterdir()}
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

    # Called once more it says the same; with other options it does not go on.
    assert train_own(wish) == (engine, verdict)
    other = OwnWish(wish.images, wish.output, "NA=0.4,wavelength=451,pixel=0.65")
    with pytest.raises(ConfigError, match="begun with other optics"):
        train_own(other)
