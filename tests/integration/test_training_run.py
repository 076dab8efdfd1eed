"""Training runs: data, optimiser, checkpoints and export together."""

from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import tifffile
import torch
import yaml

from rtfocus.channel import OpticalSystem
from rtfocus.errors import ConfigError
from rtfocus.files import resource_folder
from rtfocus.training.commands import export_command, train_command, trained
from rtfocus.training.feed import load_checkpoint, save_checkpoint
from rtfocus.training.layers import fold_batch_norm
from rtfocus.training.level_tiles import (
    LABELS,
    Batches,
    BlurRecipe,
    Blurring,
    TileOptimiserRecipe,
)
from rtfocus.training.networks.delpnet import DelpNetRecipe
from rtfocus.training.recipe import PoolRecipe, SourceRecipe, load_recipe
from rtfocus.training.scenes import load_fields
from rtfocus.training.trainer import Trainer, train

OPTICS = OpticalSystem(0.5, 451.0, 0.65)


def small_recipe(folder: Path, **optimiser) -> DelpNetRecipe:
    """Specimens drawn, nothing read: runs anywhere."""
    return DelpNetRecipe(
        name="small",
        checkpoints=folder,
        blur=BlurRecipe(reference=OPTICS, reference_share=1.0, near_share=0.0),
        pool=PoolRecipe(entries=4, side_px=220, refresh_steps=4),
        optimiser=TileOptimiserRecipe(
            **{"batch_tiles": 8, "warmup_steps": 2, **optimiser}
        ),
    )


def write_recipe(recipe: DelpNetRecipe, path: Path) -> Path:
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """Checkpoint and engine folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(small_recipe(folder, steps=4), folder / "recipe.yaml")
    checkpoint = train_command(recipe, resume=False, device="cpu")
    export_command(checkpoint, folder / "engine")
    return checkpoint, folder / "engine"


def test_batches_depend_on_seed_and_number_alone(tmp_path):
    recipe = small_recipe(tmp_path)
    straight = Batches(recipe, Blurring(recipe, [], validation=False))
    batches = [straight.batch(step) for step in range(10)]
    jumping = Batches(recipe, Blurring(recipe, [], validation=False))
    for step in (9, 2, 5):
        again = jumping.batch(step)
        np.testing.assert_array_equal(again["crops"], batches[step]["crops"])
        np.testing.assert_array_equal(again["labels"], batches[step]["labels"])
    other = recipe.model_copy(update={"seed": 2})
    changed = Batches(other, Blurring(other, [], validation=False)).batch(2)
    assert changed["crops"].shape != batches[2]["crops"].shape or not np.array_equal(
        changed["crops"], batches[2]["crops"]
    )


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """Stopped after 3 of 6 steps without warning, then resumed by a new process."""
    whole = Trainer(small_recipe(tmp_path, steps=6))
    for _ in range(6):
        whole.train_step()
    recipe = small_recipe(tmp_path / "killed", steps=6)
    killed = Trainer(recipe)
    for _ in range(3):
        killed.train_step()
    folder = recipe.checkpoints / recipe.name
    save_checkpoint(folder / "last.pt", recipe, killed.state())
    killed.train_step()  # lost: happened after the checkpoint
    newest = train(recipe, resume=True, device="cpu", show_progress=False)
    _, state = load_checkpoint(newest)
    assert state["step"] == 6
    for name, value in whole.task.network.state_dict().items():
        assert torch.equal(state["modules"]["network"][name], value), name


def test_a_run_can_stop_while_its_rate_is_still_up(tmp_path):
    recipe = small_recipe(tmp_path, steps=100, stop_step=3)
    _, state = load_checkpoint(train(recipe, device="cpu", show_progress=False))
    assert state["step"] == 3
    curve = (tmp_path / "small" / "curve.csv").read_text(encoding="utf-8")
    rate = float(curve.splitlines()[-1].split(",")[2])
    assert rate > 0.99 * recipe.optimiser.rate


def test_a_checkpoint_of_another_recipe_is_not_gone_on_with(tmp_path):
    recipe = small_recipe(tmp_path, steps=1)
    train(recipe, device="cpu", show_progress=False)
    other = recipe.model_copy(update={"seed": 9})
    with pytest.raises(ConfigError, match=r"another recipe.*--no-resume"):
        train(other, device="cpu", show_progress=False)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(ConfigError, match="rtfocus train RECIPE"):
        load_checkpoint(path)
    path.write_bytes(b"not a checkpoint")
    others = [None, {"weight": torch.ones(3)}, [torch.ones(3)], torch.nn.Linear(2, 2)]
    for other in others:
        if other is not None:
            torch.save(other, path)
        with pytest.raises(ConfigError, match="no checkpoint of rtfocus") as caught:
            load_checkpoint(path)
        # torch advises to run what such a file holds.
        assert "weights_only" not in str(caught.value)


def test_a_checkpoint_of_a_later_version_says_what_is_unknown(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, small_recipe(tmp_path, steps=1), {})
    saved = torch.load(path, weights_only=True)
    saved["recipe"]["dreams"] = 3
    torch.save(saved, path)
    with pytest.raises(ConfigError, match=r"last\.pt.*version.*dreams"):
        load_checkpoint(path)


def test_a_missing_device_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="choose auto, cpu or cuda"):
        train(small_recipe(tmp_path, steps=1), device="abacus")


def test_the_network_can_learn_one_batch_by_heart(tmp_path):
    trainer = Trainer(small_recipe(tmp_path, steps=400, batch_tiles=24, rate=3e-3))
    first = trainer.train_step()
    batch = trainer.task.batch(0)
    trainer.task.batch = lambda step, draw=0: batch
    for _ in range(20):
        last = trainer.train_step()
    assert first["loss"] > 2.0
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] > 0.7


def test_fields_never_stand_on_both_sides(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("a01", "a02", "b01"):
        pixels = rng.integers(0, 4000, (240, 240)).astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels)
    source = SourceRecipe(kind="noise", files=["*.tif"], validation=["b*"])
    recipe = small_recipe(tmp_path).model_copy(
        update={"sources": (source,), "data_folder": tmp_path, "specimens": None}
    )
    fields = load_fields(recipe)
    sides = {
        side: {f.name for f in Blurring(recipe, fields, validation=side).fields}
        for side in (False, True)
    }
    assert {name[:3] for name in sides[False]} == {"a01", "a02"}
    assert {name[:3] for name in sides[True]} == {"b01"}
    wrong = source.model_copy(update={"files": ["*.png"]})
    with pytest.raises(ConfigError, match="no file matches"):
        load_fields(recipe.model_copy(update={"sources": (wrong,)}))


def test_the_shipped_recipe_splits_the_shared_images_by_field(shared_data):
    recipe = load_recipe(resource_folder("configs") / "train_delpnet.yaml")
    recipe = recipe.model_copy(update={"data_folder": shared_data})
    fields = load_fields(recipe)
    training = {f.name.split("_w1")[0] for f in fields if not f.validation}
    validation = {f.name.split("_w1")[0] for f in fields if f.validation}
    assert len(training) > 30
    assert len(validation) > 10
    # The same field under its two names, in 8 and in 16 bit, counts as one.
    stems = [{name.split(":")[0] for name in side} for side in (training, validation)]
    assert not stems[0] & stems[1]


def test_an_entry_is_sharp_at_level_0_and_blurs_from_level_to_level(tmp_path):
    recipe = small_recipe(tmp_path)
    entry = Blurring(recipe, [], validation=False).entry(3)
    assert entry.levels == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10)
    steepness = [np.abs(np.diff(p.astype(float), axis=1)).mean() for p in entry.planes]
    assert steepness[0] > 1.2 * steepness[3] > 1.2**2 * steepness[10]


@pytest.mark.parametrize("shape", [(1, 84, 84), (3, 96, 96), (1, 144, 192)])
def test_torch_onnx_runtime_and_openvino_agree(exported, shape):
    checkpoint, engine = exported
    _, network = trained(*load_checkpoint(checkpoint))
    number, height, width = shape
    rng = np.random.default_rng(2)
    tiles = rng.standard_normal((number, 1, height, width)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(tiles)).numpy()
        folded = fold_batch_norm(network)(torch.from_numpy(tiles)).numpy()
    np.testing.assert_allclose(folded, expected, atol=1e-4)
    path = engine / "model.fp32.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        session.run(["logits"], {"tiles": tiles})[0], expected, atol=1e-4
    )
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    np.testing.assert_allclose(compiled(tiles)[0], expected, atol=1e-4)


def test_an_exported_engine_can_be_loaded_by_the_processor(exported):
    from rtfocus.engines.card import read_card, verified_file

    _, folder = exported
    card = read_card(folder)
    assert card.name == folder.name
    assert card.output is not None
    assert tuple(card.output.labels) == LABELS
    assert verified_file(folder, card).name == "model.fp32.onnx"


def test_a_card_names_a_shipped_recipe_only_where_there_is_one(exported):
    card = yaml.safe_load((exported[1] / "engine.yaml").read_text(encoding="utf-8"))
    assert card["trained"]["run"] == "small"
    assert "command" not in card["trained"]
    recipe, state = load_checkpoint(exported[0])
    shipped = exported[0].with_name("shipped.pt")
    save_checkpoint(shipped, recipe.model_copy(update={"name": "delpnet"}), state)
    path = export_command(shipped, exported[1].with_name("shipped"))
    card = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert card["trained"]["command"] == "rtfocus train train_delpnet"
