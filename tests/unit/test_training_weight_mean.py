"""Weight mean: between checkpoints of one network."""

import pytest
import torch

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.training.feed import mean_state, save_checkpoint
from rtfocus.training.networks.blind_restorers import RrdbRecipe
from rtfocus.training.recipe import PairsRecipe

RECIPE = RrdbRecipe(pairs=PairsRecipe(reference=OpticalSystem(0.36, 451.0, 0.65)))


def write(path, values):
    save_checkpoint(path, RECIPE, {"step": 1, "average": {"w": torch.tensor(values)}})


def test_mean_is_of_all_and_keeps_the_runs_recipe(tmp_path):
    values = {"a": [1.0, 2.0], "b": [3.0, -2.0], "c": [2.0, 3.0]}
    paths = [tmp_path / f"{name}.pt" for name in values]
    for path, weights in zip(paths, values.values(), strict=True):
        write(path, weights)
    recipe, state = mean_state(paths[:1], paths[1])
    assert recipe == RECIPE
    assert state["average"]["w"].tolist() == [2.0, 0.0]
    assert mean_state(paths[:2], paths[2])[1]["average"]["w"].tolist() == [2.0, 1.0]
    assert mean_state([], paths[0])[1]["average"]["w"].tolist() == [1.0, 2.0]


def test_whole_numbers_are_those_of_the_run(tmp_path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    write(first, 7)
    write(second, 12)
    assert mean_state([first], second)[1]["average"]["w"].item() == 12


def test_a_checkpoint_without_weights_is_none(tmp_path):
    path = tmp_path / "a.pt"
    for state in ({}, {"average": 3}):
        save_checkpoint(path, RECIPE, state)
        with pytest.raises(ConfigError, match="is damaged, or no checkpoint"):
            mean_state([], path)


def test_different_networks_have_no_mean(tmp_path):
    write(tmp_path / "a.pt", [1.0])
    write(tmp_path / "b.pt", [1.0, 2.0])
    with pytest.raises(ConfigError, match="different networks"):
        mean_state([tmp_path / "a.pt"], tmp_path / "b.pt")
