"""Tasks: what the trainer may rely on, for every network it can train."""

import pytest
import torch

from rtfocus.files import resource_folder
from rtfocus.training.onnx_forms import calibration_inputs
from rtfocus.training.recipe import (
    RecipeBase,
    load_recipe,
    network_names,
    validate_recipe,
)
from rtfocus.training.task import make_task
from rtfocus.training.trainer import Trainer

# A shipped recipe of each network; the rivals have none of their own.
SHIPPED = {
    "comi": "train_comi_short",
    "mobilenet_v2": "train_delpnet",
    "resnet18": "train_delpnet",
    "wei_unet": "train_wei_kernel",
}
STEPS = 2
# The same networks with fewer maps and blocks; the others are as their papers say.
NARROW = {
    "comi": {"width": 4, "residual_blocks": 1, "discriminator_width": 4},
    "multiscale": {"fine": 8, "coarse": 16, "blocks": 1},
    "rrdb": {"blocks": 1, "width": 8},
    "rtfocus_1": {"widths": (8, 16, 16, 16), "depths": (1, 1, 1, 1)},
    "wei_kernel": {"width": 8, "correlated": 3, "rebuilt": 8},
    "wei_unet": {"widths": (16, 16, 16), "hidden": 8},
}


def small_recipe(network: str) -> RecipeBase:
    """Return a shipped recipe on drawn specimens alone, a few small patches a step."""
    name = SHIPPED.get(network, f"train_{network}")
    data = load_recipe(resource_folder("configs") / f"{name}.yaml").model_dump()
    data |= {"network": network, "sources": (), "seed": 5, "start_from": None}
    data["pool"] |= {"entries": 2, "refresh_steps": 1}
    data["optimiser"] |= {"steps": STEPS, "stop_step": None, "warmup_steps": 1}
    if "pairs" in data:
        data["pairs"] |= {"real": (), "batch_patches": 2, "planes": 3, "patch_px": 96}
    for section in NARROW.keys() & data.keys():
        data[section] |= NARROW[section]
    if "delpnet" in data and network != "delpnet":
        del data["delpnet"]
    for size in ("batch_tiles", "batch_patches"):
        if size in data["optimiser"]:
            data["optimiser"][size] = 4
    if "crop_sides_px" in data["optimiser"]:
        data["optimiser"]["crop_sides_px"] = (96,)
    return validate_recipe(data)


def run(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    return [trainer.train_step() for _ in range(steps)]


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    for name, module in one.task.modules().items():
        theirs = other.task.modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, theirs[key]), f"{name}: {key}"


@pytest.mark.parametrize("network", network_names())
def test_the_same_seed_gives_the_same_weights_also_after_a_kill(network):
    recipe = small_recipe(network)
    whole, again = Trainer(recipe), Trainer(recipe)
    measured = run(whole, STEPS)
    assert run(again, STEPS - 1) == measured[:-1]
    resumed = Trainer(recipe)
    resumed.load_state(again.state())
    assert run(resumed, 1) == measured[-1:]
    assert_same_weights(whole, resumed)
    other = Trainer(recipe.model_copy(update={"seed": 6}))
    assert run(other, 1) != measured[:1]


@pytest.mark.parametrize("network", network_names())
def test_training_batches_set_the_ranges_of_every_exported_network(network):
    task = make_task(small_recipe(network))
    graph = task.graph(task.network)
    batch = next(calibration_inputs(task, tuple(graph.inputs)))
    assert list(batch) == list(graph.inputs)
    for name, values in batch.items():
        assert values.dtype == "float32"
        assert values.shape[1] == graph.inputs[name].shape[1]
