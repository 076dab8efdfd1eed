"""Own optics: from a user's folder of sharp images to an engine of their own."""

import numpy as np
import onnxruntime
import pytest
import yaml

from rtfocus.files import resource_folder
from rtfocus.training.commands import export_command, train_command

OPTICS = "NA=0.5,wavelength=520,pixel=0.5,spherical=-0.15"


def test_the_shipped_engine_is_trained_on_for_another_objective(tmp_path, shared_data):
    """Two steps on fly cells, under optics that are not those of the recipe."""
    recipe = {
        "base": str(resource_folder("configs") / "train_delpnet_own.yaml"),
        "checkpoints": str(tmp_path),
        "pool": {"entries": 3},
        "optimiser": {"steps": 2, "warmup_steps": 1, "batch_tiles": 16},
    }
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    checkpoint = train_command(
        path,
        resume=False,
        device="cpu",
        optics=OPTICS,
        images=shared_data / "in_focus" / "cellprofiler_fly",
        name="my_20x",
    )
    assert checkpoint == tmp_path / "my_20x" / "last.pt"
    card = yaml.safe_load(
        export_command(checkpoint, tmp_path / "my_20x_engine").read_text(
            encoding="utf-8"
        )
    )
    reference = card["optics"]["reference"]
    assert reference["numerical_aperture"] == 0.5
    assert reference["aberrations"]["spherical_waves"] == -0.15
    # Levels of 2.2 um at NA 0.36 and 451 nm: the same share of the defocus unit.
    wanted = 2.2 * (0.520 / 0.5**2) / (0.451 / 0.36**2)
    assert card["levels"]["step_um"] == pytest.approx(wanted)
    assert card["trained"]["data"] == ["own images"]
    assert card["trained"]["after"]["engine"].startswith("delpnet@")
    session = onnxruntime.InferenceSession(
        tmp_path / "my_20x_engine" / card["files"]["fp32"],
        providers=["CPUExecutionProvider"],
    )
    (logits,) = session.run(None, {"tiles": np.zeros((1, 1, 144, 192), np.float32)})
    assert logits.shape == (1, 12, 2, 3)
