"""One suite for every CPU backend of networks that this machine has."""

import subprocess
import sys

import numpy as np
import pytest
from engine_kit import ENTRIES, SIGNED_LABELS, write_brightness_joint
from network_kit import quantise, write_restorer

from rtfocus.engines.card import read_card, verified_file
from rtfocus.errors import EngineError
from rtfocus.runtimes.cpu_backends import BACKENDS, choose_backend
from rtfocus.runtimes.cpu_engine import CpuRequest, Inputs, adds_int8_exactly

SHAPE = (1, 1, 240, 288)


def request_for(folder, *, shape=SHAPE, outputs=("logits",), model=None, **changes):
    card = read_card(folder)
    condition = card.condition
    inputs = Inputs(
        card.name,
        card.input.name,
        shape,
        None if condition is None else condition.name,
        0 if condition is None else len(condition.entries),
    )
    values = {"precision": "f32"} | changes
    return CpuRequest(model or verified_file(folder, card), inputs, outputs, **values)


@pytest.fixture(params=[backend.name for backend in BACKENDS])
def backend(request):
    found = next(b for b in BACKENDS if b.name == request.param)
    if (why := found.why_unavailable()) is not None:
        pytest.skip(why)
    return found


@pytest.fixture
def sharpness(engine_folder):
    return engine_folder / "sharpness"


@pytest.fixture
def engine(backend, sharpness):
    opened = backend.open_engine(request_for(sharpness))
    yield opened
    opened.close()


@pytest.fixture
def tiles():
    rng = np.random.default_rng(4)
    # Detail grows downwards, so that the tiles get different labels.
    detail = rng.standard_normal(SHAPE) * np.geomspace(0.01, 0.4, 240)[:, None]
    return detail.astype(np.float32)


def test_output_has_one_logit_per_label_and_tile(engine, tiles):
    outputs = engine.infer(tiles)
    assert list(outputs) == ["logits"]
    logits = outputs["logits"]
    assert logits.shape == (1, 12, 4, 5)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert len(np.unique(logits.argmax(axis=1))) > 3


def test_results_are_deterministic_and_new_arrays(engine, tiles):
    first = engine.infer(tiles)["logits"]
    kept = first.copy()
    engine.infer(np.zeros_like(tiles))
    second = engine.infer(tiles)["logits"]
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, second)


def test_every_backend_agrees_with_the_reference(backend, sharpness, tiles):
    reference = next(b for b in BACKENDS if b.name == "onnxruntime")
    ours = backend.open_engine(request_for(sharpness))
    theirs = reference.open_engine(request_for(sharpness))
    a, b = (engine.infer(tiles)["logits"] for engine in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(a.argmax(axis=1), b.argmax(axis=1))
    ours.close()
    theirs.close()


def test_non_contiguous_tiles_are_taken_as_they_look(engine, tiles):
    flipped = tiles[..., ::-1]
    np.testing.assert_array_equal(
        engine.infer(flipped)["logits"],
        engine.infer(np.ascontiguousarray(flipped))["logits"],
    )


def test_wrong_shape_names_the_tensor_and_both_shapes(engine):
    wrong = np.zeros((1, 1, 96, 96), np.float32)
    with pytest.raises(EngineError, match=r"input 'tiles' has shape .*96.*\(1, 1, 240"):
        engine.infer(wrong)


def test_wrong_type_names_the_tensor(engine):
    with pytest.raises(EngineError, match="'tiles' must be float32"):
        engine.infer(np.zeros(SHAPE, np.float64))


def test_a_condition_is_refused(engine, tiles):
    with pytest.raises(EngineError, match="takes no condition"):
        engine.infer(tiles, np.zeros((1, 1), np.float32))


@pytest.fixture
def joint(backend, tmp_path):
    folder = write_brightness_joint(tmp_path / "brightness")
    outputs = ("restored", "logits")
    opened = backend.open_engine(
        request_for(folder, shape=(2, 1, 96, 144), outputs=outputs)
    )
    yield opened
    opened.close()


def test_every_output_that_is_asked_for_comes_back_by_its_name(joint):
    # The means of the two tiles that each image holds.
    tiles = np.zeros((2, 1, 96, 144), np.float32)
    tiles[0] += 0.5
    tiles[1, :, :, 48:] += 0.9
    condition = np.zeros((2, len(ENTRIES)), np.float32)
    condition[:, 0] = 3, 5
    outputs = joint.infer(tiles, condition)
    assert set(outputs) == {"restored", "logits"}
    logits = outputs["logits"]
    assert logits.shape == (2, len(SIGNED_LABELS), 1, 2)
    labels = np.array(SIGNED_LABELS[:-1])[logits.argmax(axis=1)]
    np.testing.assert_array_equal(labels[:, 0], [[0, 0], [-1, 8]])
    np.testing.assert_allclose(outputs["restored"][0], tiles[0] + 0.3, atol=1e-6)
    np.testing.assert_allclose(outputs["restored"][1], tiles[1] + 0.5, atol=1e-6)


def test_a_missing_or_wrong_condition_names_the_tensor_and_the_shape(joint):
    tiles = np.zeros((2, 1, 96, 144), np.float32)
    with pytest.raises(EngineError, match=r"needs its input 'condition' \(2, 5\)"):
        joint.infer(tiles)
    with pytest.raises(EngineError, match=r"'condition' must be .*\(2, 5\), got"):
        joint.infer(tiles, np.zeros((2, 4), np.float32))


@pytest.mark.parametrize(("precision", "largest"), [("fp16", 0.01), ("int8", 0.1)])
def test_fp16_and_int8_files_give_nearly_the_same(
    backend, tmp_path, precision, largest
):
    if (backend.name, precision) == ("openvino", "int8") and not adds_int8_exactly():
        pytest.skip("no VNNI: sums of int8 products are cut off here")
    full = write_restorer(tmp_path / "fp32.onnx")
    small = tmp_path / "small.onnx"
    if precision == "fp16":
        write_restorer(small, half=True)
    else:
        quantise(full, small)
    rng = np.random.default_rng(2)
    tiles = rng.random((1, 1, 32, 48), np.float32)
    condition = rng.random((1, 5), np.float32)
    inputs = Inputs("unet", "tiles", tiles.shape, "condition", 5)

    def restored(path):
        engine = backend.open_engine(CpuRequest(path, inputs, ("restored",), "f32"))
        result = engine.infer(tiles, condition)["restored"]
        engine.close()
        return result

    wanted = restored(full)
    error = np.sqrt(np.mean((restored(small) - wanted) ** 2))
    assert 0 < error < largest * wanted.std()


def test_close_twice_does_nothing_and_ends_inference(engine, tiles):
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.infer(tiles)


def test_a_file_that_is_no_network_names_the_file(backend, tmp_path, sharpness):
    broken = tmp_path / "model.fp32.onnx"
    broken.write_bytes(b"not an onnx file")
    with pytest.raises(EngineError, match=r"^.*cannot load .*model\.fp32\.onnx.*$"):
        backend.open_engine(request_for(sharpness, model=broken))


def test_a_tensor_the_file_does_not_have_is_named(backend, sharpness):
    with pytest.raises(EngineError, match="output 'nowhere'"):
        backend.open_engine(request_for(sharpness, outputs=("nowhere",)))


def test_bf16_gives_the_labels_of_the_reference(sharpness, tiles):
    openvino = choose_backend("openvino")
    try:
        engine = openvino.open_engine(request_for(sharpness, precision="bf16"))
    except EngineError as error:
        pytest.skip(str(error))
    reference = choose_backend("onnxruntime").open_engine(request_for(sharpness))
    ours = engine.infer(tiles)["logits"].argmax(axis=1)
    theirs = reference.infer(tiles)["logits"].argmax(axis=1)
    # Tiles between two levels may fall to either side: neighbours, and few.
    assert np.abs(ours - theirs).max() <= 1
    assert np.mean(ours == theirs) >= 0.8
    engine.close()
    reference.close()


def test_onnxruntime_refuses_bf16_with_the_remedy(sharpness):
    with pytest.raises(EngineError, match=r"set processing\.precision to f32"):
        choose_backend("onnxruntime").open_engine(
            request_for(sharpness, precision="bf16")
        )


def test_an_unknown_backend_lists_those_there_are():
    with pytest.raises(EngineError, match="known are openvino, onnxruntime"):
        choose_backend("abacus")


def test_auto_takes_the_first_available_backend_and_says_so(caplog):
    caplog.set_level("INFO")
    assert choose_backend("auto").name == BACKENDS[0].name
    assert f"network backend: {BACKENDS[0].name}" in caplog.text


def test_openvino_reports_nothing_to_its_maker():
    # In a process of its own: another test may have imported openvino before.
    code = (
        "import sys, threading\n"
        "from rtfocus.runtimes.cpu_engine import import_openvino\n"
        "import_openvino()\n"
        "assert not sys.modules.get('openvino_telemetry')\n"
        "print([t.name for t in threading.enumerate()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['MainThread']"
