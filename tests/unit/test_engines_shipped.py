"""Every shipped engine: its card, its files and its tensors agree."""

from pathlib import Path

import onnxruntime
import pytest

from rtfocus.engines.card import read_card, verified_file
from rtfocus.files import resource_folder

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
