"""Packages of bioimage.io: whole, checked, and an engine folder once unpacked."""

import hashlib
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from rtfocus.engines.registry import find_engine
from rtfocus.errors import EngineError, OutputError
from rtfocus.sharing.export import export_bioimageio

SAID = {
    "authors": ["Jane Doe"],
    "cite": "https://example.org/paper",
    "licence": "BSD-3-Clause",
}


def test_package_is_whole_and_its_tensors_are_what_the_network_gives(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = find_engine("rrdb")
    target = export_bioimageio(found, tmp_path / "rrdb.zip", **SAID)
    with zipfile.ZipFile(target) as package:
        files = {name: package.read(name) for name in package.namelist()}
        package.extractall(tmp_path / "rrdb")
    rdf = yaml.safe_load(files["rdf.yaml"])
    (given,), (gives,) = rdf["inputs"], rdf["outputs"]
    sources = [given["test_tensor"], gives["test_tensor"], rdf["weights"]["onnx"]]
    for part in sources + rdf["attachments"]:
        assert hashlib.sha256(files[part["source"]]).hexdigest() == part["sha256"]
    image, wanted = (
        np.load(io.BytesIO(files[part["test_tensor"]["source"]]))
        for part in (given, gives)
    )
    rule = given["preprocessing"][1]["kwargs"]
    low, high = np.percentile(image, (rule["min_percentile"], rule["max_percentile"]))
    seen = ((image - low) / (high - low + rule["eps"])).astype(np.float32)
    session = onnxruntime.InferenceSession(files["model.fp32.onnx"])
    (restored,) = session.run(["restored"], {"tiles": seen})
    np.testing.assert_allclose(wanted, restored, rtol=1e-3, atol=1e-4)
    assert b"## Validation" in files["README.md"]
    assert find_engine(str(tmp_path / "rrdb")).card == found.card
    with pytest.raises(OutputError, match=r"rrdb\.zip"):
        export_bioimageio(found, target, **SAID)


@pytest.mark.parametrize("name", ["delpnet", "learned_wiener"])
def test_what_the_spec_cannot_say_is_refused(name, tmp_path):
    with pytest.raises(EngineError, match="export one that restores"):
        export_bioimageio(find_engine(name), tmp_path / "model.zip", **SAID)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rtfocus-2", "wei_unet"])
def test_bioimage_io_reads_and_runs_what_is_told_more_than_pixels(name, tmp_path):
    pytest.importorskip("bioimageio.core", reason="needs bioimageio.core")
    target = export_bioimageio(find_engine(name), tmp_path / "model.zip", **SAID)
    command = [Path(sys.executable).with_name("bioimageio"), "test", target]
    tried = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert re.search(r"status +passed", tried.stdout), tried.stdout
