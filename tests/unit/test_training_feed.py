"""Feed: workers change when batches are made, never what is in them."""

from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.training.feed import answer_requests
from rtfocus.training.level_tiles import BlurRecipe, TileOptimiserRecipe
from rtfocus.training.networks.delpnet import DelpNetRecipe
from rtfocus.training.recipe import PoolRecipe, SourceRecipe
from rtfocus.training.scenes import Pool
from rtfocus.training.task import make_task
from rtfocus.training.trainer import Trainer


def small_recipe(folder: Path) -> DelpNetRecipe:
    """Specimens drawn, nothing read: runs anywhere."""
    return DelpNetRecipe(
        name="small",
        checkpoints=folder,
        checkpoint_steps=2,
        blur=BlurRecipe(
            reference=OpticalSystem(0.5, 451.0, 0.65),
            reference_share=1.0,
            near_share=0.0,
        ),
        pool=PoolRecipe(entries=4, side_px=220, refresh_steps=4, shards=2),
        optimiser=TileOptimiserRecipe(batch_tiles=8, warmup_steps=2, steps=4),
    )


def test_weights_are_the_same_to_the_bit_with_workers(tmp_path):
    states = []
    for workers in (0, 2):
        with Trainer(small_recipe(tmp_path), workers=workers) as trainer:
            for _ in range(2):
                trainer.train_step()
            # Batches of other draws between the steps, as at every checkpoint.
            with torch.no_grad():
                trainer.finish_average()
            trainer.train_step()
            states.append(trainer.state()["modules"]["network"])
            assert trainer.feed.waited_s > 0
    alone, with_workers = states
    assert all(torch.equal(alone[name], with_workers[name]) for name in alone)


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
