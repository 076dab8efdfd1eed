"""rtfocus-2: goes on from rtfocus-1, hides the sampling, learns when to correct."""

import numpy as np
import pytest
import torch

from rtfocus.files import resource_folder
from rtfocus.training.networks.rtfocus import (
    LABELS,
    Rtfocus1,
    Rtfocus2,
    Rtfocus2Task,
)
from rtfocus.training.recipe import load_recipe


@pytest.fixture(scope="module")
def task() -> Rtfocus2Task:
    recipe = load_recipe(resource_folder("configs") / "train_rtfocus_2.yaml")
    return Rtfocus2Task(recipe)


def test_it_begins_as_rtfocus_1_and_takes_hidden_sampling_for_the_references(task):
    torch.manual_seed(1)
    earlier = Rtfocus1().eval()
    # Weights of the last layer are zero before training, which would hide the rest.
    torch.nn.init.normal_(earlier.correction.weight, std=0.1)
    task.take_state(earlier.state_dict())
    network = task.network.eval()
    reference = task.recipe.pairs.reference.sampling
    tiles = torch.rand(1, 1, 96, 96)
    with torch.no_grad():
        for old, new in (
            ([0.7, -0.3, 1, 0, 0], [0.7, -0.3, 1, 0, 0, 1]),
            ([reference, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
        ):
            wanted = earlier(tiles, torch.tensor([old], dtype=torch.float32))
            found = network(tiles, torch.tensor([new], dtype=torch.float32))
            for one, other in zip(wanted, found, strict=True):
                assert torch.allclose(one, other, atol=1e-4)


def test_hidden_sampling_hides_all_and_counts_levels_by_pixels(task):
    reference = task.recipe.pairs.reference.sampling
    optics = np.tile([2 * reference, -0.4], (200, 1))
    levels = np.full((200, 2, 2), 4.0, np.float32)
    told, wanted = task.told(optics, levels, np.random.default_rng(1))
    hidden = told[:, -1] == 0
    assert 0.5 < hidden.mean() < 0.7
    assert not told[hidden].any()
    assert np.allclose(told[~hidden, 0], 2 * reference)
    assert np.allclose(wanted[hidden], 2.0)
    assert np.allclose(wanted[~hidden], 4.0)


def test_only_the_gate_learns(task):
    learns = {
        n.split(".")[0] for n, p in task.network.named_parameters() if p.requires_grad
    }
    assert learns == {"trust", "look", "doubt"}


def test_sure_labels_leave_finite_gradients_in_bfloat16(task):
    torch.manual_seed(2)
    network = Rtfocus2()
    torch.nn.init.normal_(network.correction.weight, std=0.1)
    with torch.no_grad():
        network.label.bias[LABELS.index(5)] = 30.0
    with torch.autocast("cpu", torch.bfloat16):
        _, restored = network(torch.rand(1, 1, 96, 96), torch.zeros(1, 6))
        loss = task.image_loss(restored.float())
    loss.backward()
    assert all(
        bool(parameter.grad.isfinite().all())
        for parameter in network.parameters()
        if parameter.grad is not None
    )
    assert network.trust.grad.abs() > 0
