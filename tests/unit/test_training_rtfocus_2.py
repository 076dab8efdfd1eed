"""rtfocus-2: goes on from rtfocus-1, learns when to correct, may look twice."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.feed import save_checkpoint, start_from
from rtfocus.training.layers import found_level, in_the_mean, oriented, second_look
from rtfocus.training.networks.rtfocus import (
    CONDITION,
    LABELS,
    Rtfocus1,
    Rtfocus2,
    Rtfocus2Recipe,
    Rtfocus2Section,
    Rtfocus2Task,
)
from rtfocus.training.recipe import PairsRecipe, PoolRecipe, load_recipe

FOUND = CONDITION.index("defocus_levels"), CONDITION.index("defocus_known")


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


def small_task(start: Path | None = None, **section: Any) -> Rtfocus2Task:
    """Return a small task whose labels depend on what its patches show."""
    optics = OpticalSystem(
        0.36, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.38)
    )
    sizes = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
    small = Rtfocus2Section(**{**sizes, **section})
    recipe = Rtfocus2Recipe(
        pairs=PairsRecipe(reference=optics, patch_px=96, batch_patches=6, planes=3),
        pool=PoolRecipe(entries=1, side_px=216),
        rtfocus_2=small,
        start_from=start,
    )
    torch.manual_seed(3)
    task = Rtfocus2Task(recipe)
    torch.nn.init.normal_(task.network.label.weight, std=3)
    return task


def test_patches_seen_twice_are_told_the_level_of_their_own_labels():
    task = small_task(second_look_share=0.5)
    twice = torch.tensor([True, False, True, True, False])
    first = torch.rand(5, len(task.network.condition))
    tensors = {
        "blurred": torch.randn(5, 1, 96, 96),
        "sharp": torch.rand(5, 1, 96, 96),
        "levels": torch.zeros(5, 1, 1),
        "empty": torch.zeros(5, 1, 1, dtype=torch.bool),
        "condition": first,
        "twice": twice,
    }
    told = second_look(task.network, tensors, FOUND)
    with torch.no_grad():
        logits, _ = task.network(tensors["blurred"], first)
    for patch in range(len(twice)):
        wanted = first[patch].clone()
        if twice[patch]:
            level = found_level(logits[patch : patch + 1])
            wanted[list(FOUND)] = torch.cat([level.nan_to_num(), ~level.isnan()])
        torch.testing.assert_close(told[patch], wanted)
    assert len(told[twice][:, FOUND[0]].unique()) == 3
    # The loss is that of the second look.
    second = {**tensors, "condition": told, "twice": torch.zeros_like(twice)}
    losses = [task.loss(seen)[0].item() for seen in (tensors, second)]
    assert losses[0] == pytest.approx(losses[1])


def test_a_network_learned_from_looks_twice_where_no_defocus_is_told():
    network = small_task().network
    for modulation in network.modulate_down:
        for weights in modulation.parameters():
            torch.nn.init.normal_(weights, std=0.3)
    condition = torch.rand(4, len(network.condition))
    condition[:, FOUND[1]] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    tensors = {"blurred": torch.randn(4, 1, 96, 96), "condition": condition}
    once, twice = (
        in_the_mean([network], tensors, 8, found)["shares"] for found in (None, FOUND)
    )
    torch.testing.assert_close(twice[1::2], once[1::2])
    assert ((twice - once)[::2].abs().amax(dim=(1, 2, 3)) > 1e-4).all()
    told = {name: tensor[1::2] for name, tensor in tensors.items()}
    all_told = in_the_mean([network], told, 8, FOUND)["shares"]
    torch.testing.assert_close(all_told, once[1::2])


def test_a_network_learned_from_may_be_of_another_size(tmp_path):
    wider = small_task(widths=(16, 8, 16, 24), depths=(1, 2, 1, 1))
    torch.nn.init.constant_(wider.network.correction.bias, 0.1)
    state = {"average": wider.network.state_dict()}
    save_checkpoint(first := tmp_path / "first.pt", wider.recipe, state)
    task = small_task(orientations=8, learned_from=first)
    task.begin()
    tensors = torch.rand(2, 1, 144, 144), torch.zeros(2, 6)
    with torch.no_grad():
        for made, wanted in zip(
            task._known[0](*tensors), wider.network(*tensors), strict=True
        ):
            torch.testing.assert_close(made, wanted)
    # What learns keeps its size, and is not begun with weights of another.
    assert task.network.stem.out_channels != wider.network.stem.out_channels
    with pytest.raises(ConfigError, match="network 'rtfocus_2' as the recipe") as e:
        start_from(task, first)
    assert "size mismatch" in str(e.value)
    assert len(str(e.value)) < 450


@pytest.mark.parametrize("looks", [1, 2])
def test_networks_that_are_learned_from_take_turns(tmp_path, looks):
    names = tuple(tmp_path / f"{bias}.pt" for bias in (0.1, 0.3))
    for name in names:
        known = small_task()
        torch.nn.init.zeros_(
            known.network.label.weight
        )  # so the gate is alike anywhere
        torch.nn.init.constant_(known.network.correction.bias, float(name.stem))
        save_checkpoint(name, known.recipe, {"average": known.network.state_dict()})
    task = small_task(orientations=8, learned_from=names, learned_looks=looks)
    task.begin()
    tensors = {"blurred": torch.rand(2, 1, 144, 144), "condition": torch.zeros(2, 6)}
    with torch.no_grad():
        ends = [known(*tensors.values())[1] for known in task._known]
    truth = {"sharp": ends[0], "levels": torch.zeros(2, 2, 2), "empty": torch.ones(2)}
    with torch.no_grad():
        _, shown = task.loss({**tensors, **truth})
        _, restored = task.network(*tensors.values())
    image = task.image_loss(restored - (ends[0] + ends[1]) / 2)
    assert shown["image"].item() == pytest.approx(image.item(), rel=1e-4)
    one = in_the_mean(task._known, tensors, 1)["sharp"]
    assert sum(torch.allclose(one, end, atol=1e-5) for end in ends) == 1


def test_patches_that_are_told_their_optics_may_have_a_teacher_of_their_own(tmp_path):
    names = [tmp_path / f"{bias}.pt" for bias in (0.1, 0.3)]
    for name in names:
        known = small_task()
        torch.nn.init.constant_(known.network.correction.bias, float(name.stem))
        save_checkpoint(name, known.recipe, {"average": known.network.state_dict()})
    task = small_task(orientations=2, learned_from=names[0], told_from=(names[1],))
    task.begin()
    condition = torch.zeros(3, len(task.network.condition))
    condition[1, CONDITION.index("optics_known")] = 1
    blurred = torch.rand(3, 1, 144, 144)
    ends = [
        in_the_mean(known, {"blurred": blurred, "condition": condition}, 8)["sharp"]
        for known in (task._known, task._told)
    ]
    wanted = torch.stack([ends[0][0], ends[1][1], ends[0][2]])
    truth = {"sharp": blurred, "levels": torch.zeros(3, 2, 2), "empty": torch.ones(3)}
    with torch.no_grad():
        seen = {"blurred": blurred, "condition": condition, **truth}
        _, shown = task.loss(seen)
        _, restored = task.network(blurred, condition)
    assert (ends[0] - ends[1]).abs().amin(dim=(1, 2, 3)).min() > 0
    image = task.image_loss(restored - wanted)
    assert shown["image"].item() == pytest.approx(image.item(), rel=1e-3)


@pytest.mark.parametrize("named", ["start_from", "learned_from"])
def test_it_learns_what_weights_make_in_the_mean_over_orientations(tmp_path, named):
    first = tmp_path / "first.pt"
    if named == "start_from":
        task = small_task(first, orientations=8)
    else:
        task = small_task(orientations=8, learned_from=first)
    torch.nn.init.normal_(task.network.correction.weight, std=0.3)
    state = {"average": copy.deepcopy(task.network.state_dict())}
    save_checkpoint(first, task.recipe, state)
    task.begin()
    blurred = torch.rand(2, 1, 144, 144)
    tensors = {"blurred": blurred, "condition": torch.zeros(2, 6)}
    known = copy.deepcopy(task.network)
    wanted = in_the_mean([known], tensors, 8)
    for number in range(8):
        turned = oriented(blurred, number)
        torch.testing.assert_close(oriented(turned, number, back=True), blurred)
        seen = {**tensors, "blurred": turned}
        again = in_the_mean([known], seen, 8)
        for name, mean in again.items():
            back = oriented(mean, number, back=True)
            torch.testing.assert_close(back, wanted[name], atol=1e-4, rtol=1e-3)
    # The truth has no say, nor what was learned meanwhile.
    truth = {"sharp": blurred, "levels": torch.zeros(2, 2, 2), "empty": torch.ones(2)}
    with torch.no_grad():
        task.network.correction.bias += 0.1
        _, shown = task.loss({**tensors, **truth})
        logits, restored = task.network(*tensors.values())
    image = task.image_loss(restored - wanted["sharp"])
    labels = -(wanted["shares"] * logits.log_softmax(1)).sum(1).mean()
    assert shown["image"].item() == pytest.approx(image.item(), rel=1e-4)
    assert shown["labels"].item() == pytest.approx(labels.item(), rel=1e-4)


def test_learning_from_itself_needs_weights_to_begin_with():
    with pytest.raises(ConfigError, match="name them in start_from"):
        small_task(orientations=3).begin()


@pytest.mark.parametrize("trained", ["all", "gate", "image", "both"])
def test_labels_stay_where_gate_or_image_are_trained_alone(trained):
    task = small_task(trained=trained)
    torch.nn.init.normal_(task.network.correction.weight, std=0.3)
    blurred, condition = torch.rand(2, 1, 144, 144), torch.zeros(2, 6)
    with torch.no_grad():
        logits, restored = task.network(blurred, condition)
    after_logits, after = task.network(blurred, condition)
    (after_logits.square().mean() + after.square().mean()).backward()
    with torch.no_grad():
        for weights in task.network.parameters():
            if weights.grad is not None:
                weights -= 0.1 * weights.grad
        after_logits, after = task.network(blurred, condition)
    assert not torch.equal(after, restored)
    assert torch.equal(after_logits, logits) == (trained != "all")


def test_a_share_of_0_draws_what_it_drew_before_there_was_one():
    plain, some = (small_task(second_look_share=share).batch(3) for share in (0.0, 0.5))
    assert plain.keys() == some.keys() - {"twice"}
    for name, values in plain.items():
        np.testing.assert_array_equal(values, some[name], err_msg=name)


def test_the_level_of_a_patch_is_its_mean_distance_on_its_side_of_focus():
    shares = torch.full((3, len(LABELS), 1, 2), 1e-9)
    # Beyond focus, one tile farther than the other; both sides; hardly anything.
    shares[0, LABELS.index(2), 0, 0] = shares[0, LABELS.index(4), 0, 1] = 1
    shares[1, LABELS.index(-6)], shares[1, LABELS.index(4)] = 0.75, 0.25
    shares[2, -1], shares[2, LABELS.index(3)] = 0.9, 0.1
    level = found_level(shares.log())
    assert level[:2].tolist() == pytest.approx([3.0, -5.5], abs=1e-4)
    assert level[2].isnan()
