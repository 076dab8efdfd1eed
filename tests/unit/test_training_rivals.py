"""Rivals and ablations of DelpNet: sizes known from their papers, switches."""

import numpy as np
import pytest
import torch

from rtfocus.channel import OpticalSystem
from rtfocus.training.level_tiles import LABELS, BlurRecipe, TileOptimiserRecipe
from rtfocus.training.networks.delpnet import (
    DelpNetRecipe,
    DelpNetSection,
    DelpNetTask,
    MobileNetV2,
    ResNet18,
    RivalOptimiserRecipe,
    RivalRecipe,
    RivalTask,
)
from rtfocus.training.recipe import PoolRecipe, SpecimenRecipe
from rtfocus.training.trainer import Trainer

SHARED = {
    "blur": BlurRecipe(
        reference=OpticalSystem(0.5, 451.0, 0.65),
        reference_share=1.0,
        near_share=0.0,
        jitter_um=0.0,
    ),
    "specimens": SpecimenRecipe(kinds=("nuclei",)),
    "pool": PoolRecipe(entries=2, side_px=220, refresh_steps=1000),
}


@pytest.mark.parametrize(
    ("network", "published", "colours"),
    [(ResNet18, 11_689_512, 2 * 64 * 49), (MobileNetV2, 3_504_872, 2 * 32 * 9)],
)
def test_parameters_are_the_published_ones(network, published, colours):
    """With the thousand labels of the originals; two input channels fewer."""
    count = sum(p.numel() for p in network(labels=1000).parameters())
    assert count == published - colours


def test_mobilenet_for_twelve_labels_is_as_large_as_he_says():
    count = sum(p.numel() for p in MobileNetV2(labels=12).parameters())
    assert count == pytest.approx(2.3e6, rel=0.03)


@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2"])
def test_a_rival_judges_tile_by_tile(network, tmp_path):
    recipe = RivalRecipe(
        network=network,
        checkpoints=tmp_path,
        optimiser=RivalOptimiserRecipe(batch_tiles=4, steps=2, warmup_steps=1),
        **SHARED,
    )
    trainer = Trainer(recipe)
    assert np.isfinite(trainer.train_step()["loss"])
    task: RivalTask = trainer.task
    graph = task.graph(task.network)
    with torch.no_grad():
        logits = graph.module.eval()(torch.randn(2, 1, 200, 300))
    assert logits.shape == (2, len(LABELS), 2, 3)
    assert task.card()["output"]["labels"] == list(LABELS)


def test_without_background_every_tile_has_the_level_of_its_crop(tmp_path):
    def task(background: bool) -> DelpNetTask:
        section = DelpNetSection(background=background)
        sides = TileOptimiserRecipe(batch_tiles=64, crop_sides_px=(96,))
        return DelpNetTask(
            DelpNetRecipe(
                checkpoints=tmp_path, delpnet=section, optimiser=sides, **SHARED
            )
        )

    known, blind = task(True), task(False)
    with_label = known.batch(0)["labels"]
    without = blind.batch(0)["labels"]
    empty = with_label == LABELS.index("bg")
    assert without.max() < LABELS.index("bg")
    np.testing.assert_array_equal(with_label[~empty], without[~empty])
    assert blind.labels == LABELS[:-1]
    crops = torch.randn(2, 1, 96, 96)
    assert known.network(crops).shape == (2, 12, 1, 1)
    assert blind.network(crops).shape == (2, 11, 1, 1)
    tensors = {k: torch.from_numpy(v) for k, v in blind.batch(0).items()}
    assert torch.isfinite(blind.loss(tensors)[0])
