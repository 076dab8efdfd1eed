"""Fixtures that every test may use."""

import os

# Before numpy and torch are imported: small matrices on two threads took twice the
# CPU, and a worker of pytest-xdist has a core, not a machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml
from hypothesis import settings

if TYPE_CHECKING:
    from rtfocus.runtimes.tensorrt.library import TensorRt

DATA_VARIABLE = "RTFOCUS_DATA"

# Where the tests are a job in the background, Ctrl-C is ignored by them and by every
# process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test asserts a time, and every run tries the same examples.
settings.register_profile("rtfocus", deadline=None, derandomize=True)
settings.load_profile("rtfocus")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real microscopy images; skips where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(DATA_VARIABLE, beside))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set {DATA_VARIABLE}")
    return folder


@pytest.fixture(scope="session")
def rtx() -> "TensorRt":
    """TensorRT for RTX; skips where it is not installed."""
    from rtfocus.runtimes.tensorrt.library import import_tensorrt, why_not_importable

    why = why_not_importable("tensorrt_rtx")
    if why is not None:
        pytest.skip(why)
    return import_tensorrt("tensorrt_rtx")


@pytest.fixture(scope="session", autouse=True)
def nothing_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's engines out of the tests, and their logs and cache out of his."""
    home = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTFOCUS_ENGINES", str(home / "engines"))
        patch.setenv("RTFOCUS_CACHE", str(home / "cache"))
        patch.setenv("XDG_STATE_HOME", str(home / "state"))
        yield


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Every thread a test starts must have ended with it.

    A camera's, too, although it is a daemon: it writes into the buffer of a core that
    is gone by then, and whichever test runs at that time fails.
    """
    before = set(threading.enumerate())
    yield
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in before
        and (not thread.daemon or type(thread).__name__ == "AcquisitionThread")
    ]
    for thread in left:
        thread.join(timeout=30)
    alive = [t.name for t in left if t.is_alive()]
    assert not alive, f"threads left running: {alive}"


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one small real engine, ``sharpness``: fine detail to 11 levels.

    Absolute Laplacian, largest within tiles of 96 px at stride 48, and logits that
    peak at the level whose typical detail is nearest: the sharper, the lower.
    """
    folder = tmp_path_factory.mktemp("engines")
    write_sharpness_engine(folder / "sharpness")
    return folder


def write_sharpness_engine(folder: Path) -> None:
    """Build the ONNX file and the card of the engine ``sharpness``."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    laplacian = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]], np.float32)
    centres = np.geomspace(4.0, 0.2, 11).astype(np.float32)
    # -(x - c)^2 without x^2, which all labels share; the last label is "bg".
    weight = np.append(2 * centres, 0).astype(np.float32) * 4
    bias = np.append(-(centres**2), -1e3).astype(np.float32) * 4
    constants = {
        "laplacian": laplacian[None, None],
        "weight": weight[:, None, None, None],
        "bias": bias,
    }
    graph = helper.make_graph(
        [
            helper.make_node(
                "Conv", ["tiles", "laplacian"], ["detail"], pads=[1, 1, 1, 1]
            ),
            helper.make_node("Abs", ["detail"], ["size"]),
            helper.make_node(
                "MaxPool", ["size"], ["tile"], kernel_shape=[96, 96], strides=[48, 48]
            ),
            helper.make_node("Conv", ["tile", "weight", "bias"], ["logits"]),
        ],
        "sharpness",
        [
            helper.make_tensor_value_info(
                "tiles", TensorProto.FLOAT, ["n", 1, "height", "width"]
            )
        ],
        [
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, ["n", 12, "rows", "columns"]
            )
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    path = folder / "model.fp32.onnx"
    path.write_bytes(model.SerializeToString())
    card = {
        "name": "sharpness",
        "kind": "classifier",
        "implementation": "onnx",
        "files": {"fp32": path.name},
        "sha256": {"fp32": hashlib.sha256(path.read_bytes()).hexdigest()},
        "input": {
            "name": "tiles",
            "tile_px": 96,
            "stride_px": 48,
            "origin_px": 47.5,
            "multiple_px": 24,
        },
        "output": {"name": "logits", "labels": [*range(11), "bg"]},
        "levels": {"step_um": 2.0, "count": 11},
        "normalisation": {"name": "local_standardisation"},
        "background": {"name": "contrast_to_noise"},
        "optics": {
            "sampling_min": 0.3,
            "sampling_max": 1.5,
            "reference": {
                "numerical_aperture": 0.5,
                "wavelength_nm": 451,
                "pixel_size_um": 0.65,
            },
        },
    }
    (folder / "engine.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
