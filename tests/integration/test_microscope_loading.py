"""Loading: what is missing is named, with where it was looked for and the remedy."""

import sys

import pytest
from microscope_kit import record
from pymmcore_plus import _discovery

from rtfocus.config.loading import parse_config
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.microscope.core import describe, open_core

adapters = pytest.importorskip("mm_test_adapters", reason="no adapters to load")

LIVE = {"live": {"frames": 2, "exposure_ms": 1}}
CAMERA_ONLY = """\
Property,Core,Initialize,0
Device,Eye,DemoCamera,DCam
Property,Core,Initialize,1
Property,Core,Camera,Eye
ConfigPixelSize,Res,Eye,Binning,1
PixelSize_um,Res,0.65
"""


def micromanager(tmp_path, text, **settings):
    (tmp_path / "my.cfg").write_text(text)
    folder = adapters.device_adapter_path()
    given = {"config_file": tmp_path / "my.cfg", "adapter_paths": [folder], **settings}
    return parse_config(
        {"microscope": {"source": "micromanager", **given}, "acquisition": LIVE}
    )


def test_a_configuration_of_ones_own(tmp_path):
    properties = {"Eye": {"OnCameraCCDXSize": 64, "OnCameraCCDYSize": 48}}
    config = micromanager(
        tmp_path, CAMERA_ONLY, properties=properties, sequence_buffer_mb=16
    )
    sink, report = record(config)
    assert report.frames == 2
    assert sink.series is not None
    assert sink.series.shape == (48, 64)
    assert sink.series.pixel_size_um == 0.65
    assert sink.series.channels[0].name == "default"
    # No z-stage, no z.
    assert sink.headers[0].z_um is None


def test_a_missing_adapter_is_named(tmp_path):
    text = CAMERA_ONLY.replace("DemoCamera,DCam", "HamamatsuHam,HamDCAM")
    config = micromanager(tmp_path, text)
    with pytest.raises(MicroscopeError) as caught, open_core(config):
        pass
    said = str(caught.value)
    assert "HamamatsuHam" in said
    assert "my.cfg" in said
    assert str(adapters.device_adapter_path()) in said
    assert "close its own window" in said


def test_a_missing_configuration_is_named(tmp_path):
    config = micromanager(tmp_path, "", config_file=tmp_path / "other.cfg")
    with pytest.raises(ConfigError, match=r"other\.cfg"), open_core(config):
        pass


def test_a_configuration_without_a_camera_is_refused(tmp_path):
    config = micromanager(tmp_path, "Property,Core,Initialize,1\n")
    with pytest.raises(MicroscopeError, match="no camera"), open_core(config):
        pass


@pytest.mark.parametrize(
    ("name", "said"), [("absent", "there is no folder"), (".", "no device adapter")]
)
def test_folders_without_adapters_are_named(tmp_path, name, said):
    config = micromanager(tmp_path, CAMERA_ONLY, adapter_paths=[tmp_path / name])
    with pytest.raises(MicroscopeError, match=said), open_core(config):
        pass


def test_adapters_of_another_interface_version_are_named(tmp_path, monkeypatch):
    # The adapters are real; the core claims to need others.
    monkeypatch.setattr(_discovery, "PYMMCORE_DIV", 71)
    config = micromanager(tmp_path, CAMERA_ONLY)
    version = _discovery.get_first_device_interface_version(
        adapters.device_adapter_path()
    )
    with (
        pytest.raises(MicroscopeError, match=f"version {version}.*needs 71"),
        open_core(config),
    ):
        pass


def test_a_property_that_does_not_exist_is_named(tmp_path):
    config = micromanager(tmp_path, CAMERA_ONLY, properties={"Eye": {"Colour": "red"}})
    with (
        pytest.raises(MicroscopeError, match=r"Eye\.Colour.*loaded devices: .*Eye"),
        open_core(config),
    ):
        pass


def test_the_democamera_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mm_test_adapters", None)
    config = parse_config({"microscope": {"source": "democamera"}, "acquisition": LIVE})
    with (
        pytest.raises(MicroscopeError, match="pip install mm-test-adapters"),
        open_core(config),
    ):
        pass


def test_the_diagnosis_names_core_adapters_and_democamera():
    findings = {finding.topic: finding for finding in describe()}
    assert "device interface" in findings["Micro-Manager core"].found
    assert findings["DemoCamera"].remedy is None
    assert "device interface" in findings["device adapters"].found


def test_the_diagnosis_tells_a_mismatch(monkeypatch):
    monkeypatch.setattr(_discovery, "PYMMCORE_DIV", 71)
    findings = {finding.topic: finding for finding in describe()}
    assert "mm-test-adapters==71" in str(findings["DemoCamera"].remedy)
