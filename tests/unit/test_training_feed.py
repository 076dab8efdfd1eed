"""Feed: workers change when batches are made, never what is in them."""

import signal
from contextlib import closing
from multiprocessing import Pipe
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.feed import BatchFeed, answer_requests
from rtfocus.training.networks.delpnet import DelpNet
from rtfocus.training.networks.rtfocus import Rtfocus1Recipe, Rtfocus1Section
from rtfocus.training.recipe import (
    OptimiserRecipe,
    PairsRecipe,
    PoolRecipe,
    SourceRecipe,
    load_recipe,
)
from rtfocus.training.scenes import Pool
from rtfocus.training.task import make_task
from rtfocus.training.trainer import StepParts, Trainer


def small_recipe(folder: Path) -> Rtfocus1Recipe:
    """Specimens drawn, nothing read, few maps: runs anywhere."""
    return Rtfocus1Recipe(
        name="small",
        checkpoints=folder,
        checkpoint_steps=2,
        pairs=PairsRecipe(
            reference=OpticalSystem(0.5, 451.0, 0.65),
            patch_px=96,
            batch_patches=3,
            planes=2,
            reference_share=1.0,
        ),
        pool=PoolRecipe(entries=2, side_px=220, refresh_steps=4, shards=2),
        optimiser=OptimiserRecipe(warmup_steps=2, steps=4),
        rtfocus_1=Rtfocus1Section(widths=(8, 8, 8, 8), depths=(1, 1, 1, 1)),
    )


def test_weights_are_the_same_to_the_bit_with_workers(tmp_path):
    states = []
    for workers in (0, 4):
        with Trainer(small_recipe(tmp_path), workers=workers) as trainer:
            for _ in range(2):
                trainer.train_step()
            # Batches of other draws between the steps, as at every checkpoint.
            with torch.no_grad():
                trainer.finish_average()
            trainer.train_step()
            # Statistics of BatchNorm are among them.
            states.append(trainer.state()["modules"]["network"])
            assert trainer.feed.waited_s > 0
    alone, with_workers = states
    assert all(torch.equal(alone[name], with_workers[name]) for name in alone)


def test_chance_belongs_to_a_part_however_many_run_at_a_time():
    recipe = load_recipe(resource_folder("configs") / "train_delpnet.yaml")
    torch.manual_seed(0)
    task = make_task(recipe.model_copy(update={"parts": 4}))
    task.network = DelpNet(dropout=0.4)
    crops = torch.rand(1, 1, 96, 96).expand(4, -1, -1, -1)
    tensors = {"crops": crops, "labels": torch.full((4, 1, 1), 3)}
    found = []
    for workers in (0, 2, 2):
        with closing(StepParts(task, workers)) as parts:
            found.append(parts.gradients(5, tensors))
            *_, other = (parts.gradients(step, tensors) for step in (5, 6))
    one, *others = found
    for two in others:
        assert two[1] == one[1]
        assert all(map(torch.equal, one[0], two[0]))
    assert other[1] != one[1]


def test_parts_of_a_step_add_up_to_what_the_whole_batch_asks_for(monkeypatch):
    # Where the processor multiplies bf16, its rounding would hide a wrong share.
    monkeypatch.setattr("rtfocus.training.task.multiplies_bf16", lambda: False)
    torch.manual_seed(0)
    task = make_task(load_recipe(resource_folder("configs") / "train_rtfocus_2.yaml"))
    task.network.requires_grad_(True)
    torch.nn.init.normal_(task.network.correction.weight, std=0.1)
    tensors = {
        "blurred": torch.rand(3, 1, 96, 96),
        "sharp": torch.rand(3, 1, 96, 96),
        "levels": torch.zeros(3, 1, 1),
        "empty": torch.zeros(3, 1, 1, dtype=torch.bool),
        "condition": torch.zeros(3, 6),
    }
    whole, shown = task.gradients(tensors)
    with closing(StepParts(task, workers=2)) as parts:
        summed, measured = parts.gradients(0, tensors)
    learned = [(a, b) for a, b in zip(whole, summed, strict=True) if a is not None]
    assert len(learned) > 50
    for one, other in learned:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert measured["loss"] == pytest.approx(shown["loss"], rel=1e-4)
    for parameter, gradient in zip(task.learning(), summed, strict=True):
        assert gradient is None or gradient.stride() == parameter.stride()


def test_a_part_is_not_rounded_otherwise_when_another_ends_meanwhile(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("rtfocus.training.task.multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    task = make_task(small_recipe(tmp_path))
    torch.nn.init.normal_(task.network.correction.weight, std=0.1)
    tensors = {
        "blurred": torch.rand(2, 1, 96, 96),
        "sharp": torch.rand(2, 1, 96, 96),
        "levels": torch.zeros(2, 1, 1),
        "empty": torch.zeros(2, 1, 1, dtype=torch.bool),
        "condition": torch.zeros(2, 5),
    }
    alone, _ = task.gradients(tensors)

    def another_ends(*_: object) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            pass

    def run_another(*_: object) -> None:
        thread = Thread(target=another_ends)
        thread.start()
        thread.join()

    # Its weights serve twice: for the labels and for the gate.
    task.network.label.register_forward_hook(run_another)
    beside, _ = task.gradients(tensors)
    assert all(map(torch.equal, alone, beside))


def test_a_worker_tells_what_keeps_it_from_making_batches(tmp_path):
    source = SourceRecipe(kind="none", files=["no-such-*.tif"])
    recipe = small_recipe(tmp_path).model_copy(
        update={"sources": (source,), "data_folder": tmp_path}
    )
    ours, theirs = Pipe()
    worker = Thread(target=answer_requests, args=(make_task(recipe), theirs))
    worker.start()
    ours.send((0, 0))
    answer = ours.recv()
    ours.close()
    worker.join()
    assert isinstance(answer, ConfigError)
    assert "no file matches" in str(answer)


def test_workers_that_are_still_starting_do_not_hold_up_the_end(tmp_path):
    """They take many seconds to start, and Ctrl-C would wait for them."""
    with BatchFeed(make_task(small_recipe(tmp_path)), workers=1) as feed:
        (worker,) = feed._processes
    assert worker.exitcode == -signal.SIGTERM


def test_a_worker_makes_the_next_batch_before_the_last_is_taken(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path)
    pairs = recipe.pairs.model_copy(update={"batch_patches": 16})
    task = make_task(recipe.model_copy(update={"pairs": pairs}))
    made, both = [], Event()
    make = task.batch

    def batch(step: int, draw: int) -> dict[str, np.ndarray]:
        made.append(make(step, draw))
        if len(made) == 2:
            both.set()
        return made[-1]

    monkeypatch.setattr(task, "batch", batch)
    ours, theirs = Pipe()
    worker = Thread(target=answer_requests, args=(task, theirs))
    worker.start()
    for draw in (0, 1):
        ours.send((0, draw))
    assert both.wait(60)
    for one in made:
        # No pipe holds so much unread.
        assert one["blurred"].nbytes > 500_000
        taken = ours.recv()
        assert all(np.array_equal(taken[name], one[name]) for name in one)
    ours.close()
    worker.join()


def test_scenes_of_a_step_depend_on_its_number_alone():
    made = []
    pool = Pool(PoolRecipe(entries=4, refresh_steps=2), lambda n: made.append(n) or n)
    assert [pool.at(step) for step in (0, 1, 2)] == [[0, 1, 2, 3]] * 2 + [[1, 2, 3, 4]]
    assert made == [0, 1, 2, 3, 4]
    assert pool.at(0) == [0, 1, 2, 3]


def test_shards_share_the_scenes_between_the_steps():
    recipe = PoolRecipe(entries=4, refresh_steps=4, shards=2)
    made: list[list[int]] = [[], []]
    for worker in (0, 1):
        pool = Pool(recipe, lambda n, mine=made[worker]: mine.append(n) or n)
        for step in range(worker, 24, 2):
            assert np.array_equal(np.array(pool.at(step)) % 2, [worker, worker])
    assert not set(made[0]) & set(made[1])
    with pytest.raises(ValidationError, match="entries=5 do not go into shards=2"):
        PoolRecipe(entries=5, shards=2)
