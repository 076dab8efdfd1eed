"""Every shipped engine: its card, its files and its tensors agree."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml

import rtfocus
from rtfocus.engines.card import input_of, parse_card, read_card, verified_file
from rtfocus.engines.registry import fit_tiles
from rtfocus.errors import EngineError
from rtfocus.files import resource_folder
from rtfocus.optics.formation import blur
from rtfocus.processing.montage import FrameTiles
from rtfocus.specimens import draw_specimen

FOLDERS = sorted(p.parent for p in resource_folder("engines").glob("*/engine.yaml"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_and_files_agree(folder: Path) -> None:
    card = read_card(folder)
    assert card.name == folder.name
    assert (folder / "README.md").is_file()
    named = (card.output, card.restored, card.kernel_output)
    outputs = {part.name for part in named if part is not None}
    inputs = {part.name for part in (card.input, card.condition) if part is not None}
    for precision in card.files:
        path = verified_file(folder, card, precision)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert {tensor.name for tensor in session.get_inputs()} == inputs
        assert outputs <= {tensor.name for tensor in session.get_outputs()}
        assert b"stack_trace" not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "kind"), [("my_sharpener", "restorer"), ("my_classifier", "classifier")]
)
def test_the_cards_in_the_tutorial_are_whole(name: str, kind: str) -> None:
    text = (
        Path(rtfocus.__file__).parents[1] / "docs/tutorials/your-own-engine.md"
    ).read_text()
    (card,) = re.findall(rf"```yaml\n# {name}/engine.yaml\n(.*?)```", text, re.DOTALL)
    assert parse_card(yaml.safe_load(card), "tutorial").kind == kind


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"name": "mine"}, "'kind': Field required"),
        (
            {"name": "m", "kind": "restorer", "implementation": "onnx", "steps": {}},
            "engine.yaml: a restorer needs the sections input, output; an onnx engine",
        ),
        (
            {
                **{"name": "m", "kind": "restorer", "implementation": "onnx"},
                **{"files": {"fp32": "a.onnx"}, "steps": {}},
                **{"input": {"name": "x"}, "output": {"name": "y"}},
            },
            "sha256 lacks the files fp32; `sha256sum FILE` tells",
        ),
    ],
)
def test_what_a_card_lacks_is_said(card: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError) as error:
        parse_card(card, "engine.yaml")
    assert said in str(error.value)


ANY_SIZE = [folder for folder in FOLDERS if input_of(read_card(folder)).any_size]


@pytest.mark.parametrize("folder", ANY_SIZE, ids=lambda folder: folder.name)
def test_a_frame_as_one_tile_is_restored_as_by_tiles(folder: Path) -> None:
    card = read_card(folder)
    own_px = input_of(card).tile_px - 2 * input_of(card).halo_px
    frame = own_px + 30, 36
    tiles = FrameTiles(input_of(card), frame)
    one, sides = fit_tiles(input_of(card), frame, None, 10**6)
    assert one == 1
    whole = FrameTiles(input_of(card).model_copy(update={"tile_px": sides[0]}), frame)
    assert len(tiles.places) > len(whole.places) == 1
    sharp = draw_specimen("nuclei", frame, np.random.default_rng(5))
    box = np.full((7, 7), 1 / 49, np.float32)
    image = blur(sharp, box)[None].astype(np.float32)
    path = verified_file(folder, card, "fp32")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def restored(windows: FrameTiles) -> np.ndarray:
        pieces = windows.cut(image, windows.places)
        found = session.run(None, {input_of(card).name: pieces})[0]
        return windows.join(found, windows.places)

    by_tiles, at_once = restored(tiles), restored(whole)
    assert at_once.shape == (1, *frame)
    # The halo is all that counts, but for what tiles see of their own edges.
    error = np.linalg.norm(at_once - by_tiles) / np.linalg.norm(by_tiles)
    assert error < 2e-3
    assert np.linalg.norm(by_tiles - image) / np.linalg.norm(image) > 10 * error


def test_the_engines_that_take_a_frame_as_one_tile() -> None:
    assert {folder.name for folder in ANY_SIZE} == {"comi", "rrdb"}


CLASSIFIERS = [f for f in FOLDERS if read_card(f).kind in ("classifier", "joint")]


@pytest.mark.parametrize("folder", CLASSIFIERS, ids=lambda folder: folder.name)
def test_frames_need_not_be_whole_cells_or_tiles(folder: Path) -> None:
    image = 300 + 2000 * draw_specimen("nuclei", (101, 230), np.random.default_rng(1))
    found = rtfocus.classify(image.astype(np.uint16), engine=folder.name)
    assert np.isfinite(found.defocus_um).any()
