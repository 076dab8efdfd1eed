"""Models of other people: admitted by what they do, and run as an engine is."""

import hashlib

import numpy as np
import pytest
import tifffile
import yaml
from foreign_kit import (
    SIDE,
    counts,
    described_04,
    described_05,
    file_of,
    network,
    npy,
    smoothed,
    zipped,
)
from loop_kit import command, succeeded
from onnx import TensorProto, helper

import rtfocus
from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config import parse_config
from rtfocus.engines.spec_steps import Values
from rtfocus.errors import EngineError, ExitCode
from rtfocus.frame import PROTOCOL_VERSION, Position, SeriesStart
from rtfocus.offline import ImageProcessor
from rtfocus.processing.channel_plan import plan_channel
from rtfocus.sharing.admission import add_model

X = counts()
MEAN, DEVIATION = X.mean(), X.std()
NORMAL = (X - MEAN) / (DEVIATION + 1e-6)
LOW, HIGH = np.percentile(X, (1, 99))
RANGED = ((X - LOW) / (HIGH - LOW + 1e-6)).astype(np.float32)
PER_IMAGE = {"axes": ["channel", "y", "x"]}
TO_NORMAL = {"id": "zero_mean_unit_variance", "kwargs": PER_IMAGE}
TO_RANGE = {
    "id": "scale_range",
    "kwargs": {"axes": ["y", "x"], "min_percentile": 1, "max_percentile": 99},
}
FIXED = {"mean": float(MEAN), "std": float(DEVIATION)}


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Adds the files of a model to the user's engines, in ``mine``."""
    monkeypatch.setenv("RTFOCUS_ENGINES", str(tmp_path / "mine"))

    def added(files, **options):
        return add_model(zipped(tmp_path / "model.zip", files), **options)

    return added


def _turned(image):
    return np.moveaxis(image, 1, -1)


CASES = {
    "plain": (lambda: described_05(X, smoothed(X), network()), "input"),
    "shown": (
        lambda: described_05(X, smoothed(NORMAL), network(), before=[TO_NORMAL]),
        "shown",
    ),
    "back by the spec": (
        lambda: described_05(
            X,
            (smoothed(NORMAL) - smoothed(NORMAL).mean())
            / (smoothed(NORMAL).std() + 1e-6)
            * (DEVIATION + 1e-6)
            + MEAN,
            network(),
            before=[TO_NORMAL],
            after=[
                {
                    "id": "scale_mean_variance",
                    "kwargs": {"reference_tensor": "raw", **PER_IMAGE},
                }
            ],
        ),
        "input",
    ),
    "clipped range": (
        lambda: described_05(
            X,
            smoothed(RANGED.clip(0, 1)),
            network(),
            before=[TO_RANGE, {"id": "clip", "kwargs": {"min": 0.0, "max": 1.0}}],
        ),
        "shown",
    ),
    "fixed and linear": (
        lambda: described_05(
            X,
            smoothed(NORMAL) * DEVIATION + MEAN,
            network(),
            before=[{"id": "fixed_zero_mean_unit_variance", "kwargs": FIXED}],
            after=[
                {
                    "id": "scale_linear",
                    "kwargs": {"gain": FIXED["std"], "offset": FIXED["mean"]},
                }
            ],
        ),
        "input",
    ),
    "weights in a file beside": (lambda: beside(), "input"),
    "mask": (
        lambda: described_05(
            X,
            (smoothed(X) > 700.05).astype(np.uint8),
            network(),
            after=[
                {"id": "binarize", "kwargs": {"threshold": 700.05}},
                {"id": "ensure_dtype", "kwargs": {"dtype": "uint8"}},
            ],
        ),
        "own",
    ),
    "channels last": (
        lambda: described_05(
            _turned(X), _turned(smoothed(X)), network(axes="byxc"), axes="byxc"
        ),
        "input",
    ),
    "of one size": (
        lambda: described_05(X, smoothed(X), network(side=SIDE), size=SIDE, halo=4),
        "input",
    ),
    "old": (
        lambda: described_04(
            X,
            smoothed(NORMAL),
            network(),
            before=[
                {
                    "name": "zero_mean_unit_variance",
                    "kwargs": {"mode": "per_sample", "axes": "yx"},
                }
            ],
        ),
        "shown",
    ),
    "old and fixed": (
        lambda: described_04(
            X,
            smoothed(NORMAL) * 2,
            network(),
            before=[
                {
                    "name": "zero_mean_unit_variance",
                    "kwargs": {
                        "mode": "fixed",
                        "axes": "yx",
                        "mean": [FIXED["mean"]],
                        "std": [FIXED["std"]],
                    },
                }
            ],
            after=[{"name": "scale_linear", "kwargs": {"axes": "yx", "gain": 2.0}}],
        ),
        "shown",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_model_restores_a_frame_larger_than_its_tiles(case, add):
    files, values = CASES[case]
    found = add(files())
    assert found.card.steps.values == values
    assert found.card.sees_image_alone
    frame = counts((1, 1, 270, 330))[0, 0]
    if values == "own":
        with pytest.raises(EngineError, match=r"store\.restored_dtype: float32"):
            rtfocus.restore(frame.astype(np.uint16), engine=found.name)
        kept = parse_config(
            {
                "camera": {"offset_counts": 100},
                "store": {"restored_dtype": "float32"},
                "processing": {
                    "classifier": None,
                    "restoration": {"method": found.name},
                },
            }
        )
        restored = rtfocus.restore(frame.astype(np.uint16), config=kept)
        np.testing.assert_array_equal(
            restored[9:-9, 9:-9], (smoothed(frame) > 800.05)[9:-9, 9:-9]
        )
        # Below 0 frames are lifted before they are seen; a mask is not.
        lifted = rtfocus.restore(frame - 900, config=kept)
        assert set(np.unique(lifted)) <= {0, 1}
        return
    restored = rtfocus.restore(frame.astype(np.uint16), engine=found.name)
    assert restored.dtype == np.uint16
    inside = (slice(9, -9), slice(9, -9))
    wanted = smoothed(frame)[inside]
    given = restored.astype(np.float32)[inside]
    if case == "clipped range":
        clipped = wanted < np.percentile(smoothed(frame), 60)
        assert np.abs(given - wanted)[clipped].mean() < 20
        return
    if case in ("back by the spec", "old and fixed"):
        # Stretched to the contrast of the input; doubled about a mean that was given.
        assert given.std() > 1.5 * wanted.std()
        assert np.corrcoef(given.ravel(), wanted.ravel())[0, 1] > 0.98
        return
    assert np.abs(given - wanted).max() < 2


def test_what_it_is_and_who_made_it_stays_with_it(add):
    files = described_05(X, smoothed(X), network(), id="affable-shark")
    found = add(files)
    assert found.name == "affable-shark"
    assert sorted(p.name for p in found.folder.iterdir()) == [
        "README.md",
        "description.yaml",
        "engine.yaml",
        "model.fp32.onnx",
    ]
    assert (found.folder / "description.yaml").read_bytes() == files["rdf.yaml"]
    assert found.card.trained["authors"] == "Jane Doe"
    assert found.card.trained["licence"] == "MIT"
    again = add_model(found.folder, name="its-copy")
    assert again.card.steps == found.card.steps


def test_which_values_it_gives_can_be_said(add):
    files = described_05(X, smoothed(NORMAL), network(), before=[TO_NORMAL])
    found = add(files, values=Values.input, name="theirs")
    assert found.card.steps.values is Values.input


def _rdf(files, change):
    rdf = yaml.safe_load(files["rdf.yaml"])
    change(rdf)
    return {**files, "rdf.yaml": yaml.safe_dump(rdf).encode()}


def _with(**parts):
    return lambda: _rdf(
        described_05(X, smoothed(X), network()), lambda rdf: rdf.update(parts)
    )


def _tensors(what, **parts):
    return lambda: _rdf(
        described_05(X, smoothed(X), network()), lambda rdf: rdf[what][0].update(parts)
    )


def _test_tensor(data):
    files = described_05(X, smoothed(X), network()) | {"out.npy": data}
    return _rdf(
        files,
        lambda rdf: rdf["outputs"][0].update(test_tensor=file_of("out.npy", files)),
    )


def _one_pixel_off():
    gives = smoothed(X)
    gives[0, 0, 7, 9] += 5
    return described_05(X, gives, network())


def _nan():
    log = [helper.make_node("Log", ["in"], ["out"])]
    return described_05(X - 2000, smoothed(X), network(nodes=log))


def _infinite():
    power = [helper.make_node("Exp", ["in"], ["out"])]
    return described_05(X, smoothed(X), network(nodes=power))


def _cropped():
    conv = [helper.make_node("Conv", ["in", "box"], ["out"])]
    return described_05(X, smoothed(X)[..., 1:-1, 1:-1], network(nodes=conv))


def _elsewhere():
    import onnx

    model = onnx.load_from_string(network())
    weights = model.graph.initializer[0]
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../secret")
    return described_05(X, smoothed(X), model.SerializeToString())


def beside(offset=4, length=None, sha256=None):
    """Return a model whose weights, in a folder, have a file of their own."""
    import onnx

    model = onnx.load_from_string(network())
    weights = model.graph.initializer[0]
    values = weights.raw_data
    assert values
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.onnx.data"), ("offset", offset)):
        weights.external_data.add(key=key, value=str(value))
    if length is not None:
        weights.external_data.add(key="length", value=str(length))
    files = described_05(X, smoothed(X), model.SerializeToString())
    rdf = yaml.safe_load(files["rdf.yaml"])
    data = b"\0" * 4 + values
    rdf["weights"]["onnx"] = {
        "source": "sub/weights.onnx",
        "external_data": {
            "source": "./sub/weights.onnx.data",
            "sha256": sha256 or hashlib.sha256(data).hexdigest(),
        },
    }
    files["sub/weights.onnx"] = files.pop("weights.onnx")
    files["sub/weights.onnx.data"] = data
    return files | {"rdf.yaml": yaml.safe_dump(rdf).encode()}


OTHERS = {"pytorch_state_dict": {"source": "a.pt"}, "torchscript": {"source": "b.pt"}}
ONNX = {"source": "weights.onnx"}
REFUSED = {
    "not what it says": (
        lambda: described_05(X, smoothed(X) + 1, network()),
        r"15\d\d of 1600 values differ by more than 0\.001 .* the largest by 1",
    ),
    "one pixel of it": (_one_pixel_off, r"1 of 1600 values .* the largest by 5"),
    "a tolerance without bounds": (
        lambda: _rdf(
            described_05(X, smoothed(X) + 500, network()),
            lambda rdf: rdf.update(
                config={
                    "bioimageio": {
                        "reproducibility_tolerance": [
                            {"absolute_tolerance": 1e9, "relative_tolerance": 1e9}
                        ]
                    }
                }
            ),
        ),
        "does not reproduce its own test tensor",
    ),
    "no numbers": (_nan, r"gives \d+ values of 1600 that are no number"),
    "infinite": (_infinite, r"gives \d+ values of 1600 that are no number"),
    "cropped": (_cropped, r"makes 1 x 38 x 38 pixels of 1 x 40 x 40"),
    "two weights, none of them ONNX": (
        _with(weights=OTHERS),
        "no ONNX weights but a state dict, .*, a TorchScript.*ask its authors",
    ),
    "dependencies": (
        _with(weights={"onnx": {**ONNX, "dependencies": "conda:env.yaml"}}),
        "which would run code",
    ),
    "weights elsewhere": (_elsewhere, "lie in other files"),
    "weights elsewhere than said": (
        lambda: beside(length=10_000),
        r"at bytes 4 to 10004 of 'weights.onnx.data', which has \d+",
    ),
    "weights at no place": (lambda: beside(offset="x"), "at no place of"),
    "other weights than described": (
        lambda: beside(sha256="0" * 64),
        "'sub/weights.onnx.data' .* damaged or was changed",
    ),
    "weights outside": (
        _with(weights={"onnx": {"source": "../weights.onnx"}}),
        "which is not in the package",
    ),
    "weights by an address": (
        _with(weights={"onnx": {"source": "https://example.org/weights.onnx"}}),
        "which is not in the package",
    ),
    "weights that are none": (
        lambda: described_05(X, smoothed(X), b"pickle"),
        "damaged",
    ),
    "other weights": (
        lambda: described_05(X, smoothed(X), network()) | {"weights.onnx": b""},
        "has sha256",
    ),
    "a step of its own": (
        _tensors("outputs", postprocessing=[{"id": "custom", "source": "a.py"}]),
        "asks for the step 'custom'; those that are done are binarize",
    ),
    "a step that is not understood": (
        _tensors("inputs", preprocessing=[{"id": "clip", "kwargs": {"least": 1}}]),
        r"steps\.before\.0\.clip\.kwargs",
    ),
    "an axis named twice": (
        _tensors(
            "inputs",
            preprocessing=[
                {"id": "zero_mean_unit_variance", "kwargs": {"axes": ["x", "x"]}}
            ],
        ),
        "name one twice",
    ),
    "steps that are none": (
        _tensors("inputs", preprocessing=[{"id": "clip", "kwargs": [1]}]),
        "is not described as",
    ),
    "another tensor": (
        _tensors(
            "outputs",
            postprocessing=[
                {
                    "id": "scale_mean_variance",
                    "kwargs": {"reference_tensor": "another"},
                }
            ],
        ),
        "refers to the tensor 'another'; its input is 'raw'",
    ),
    "no test tensor": (_tensors("inputs", test_tensor=None), "has no test tensor"),
    "a pickle": (
        lambda: _test_tensor(npy(np.array([{}], dtype=object))),
        "no plain numbers",
    ),
    "half a test tensor": (lambda: _test_tensor(npy(X)[:-8]), "that is damaged"),
    "no array": (lambda: _test_tensor(b"PK\x03\x04"), r"no \.npy file"),
    "a flat test tensor": (lambda: _test_tensor(npy(X[0])), r"for the axes 'bcyx'"),
    "three dimensions": (
        _tensors(
            "inputs",
            axes=[{"type": "batch"}]
            + [{"type": "space", "id": a, "size": 16} for a in "zyx"],
        ),
        "an axis 'z': only 2-D images",
    ),
    "two inputs": (_with(inputs=[{}, {}]), "has 2 inputs; only models with one"),
    "an old spec": (_with(format_version="0.3.2"), "models of spec 0.4 and 0.5"),
    "no model": (_with(type="notebook"), "is a notebook of spec"),
    "nothing": (lambda: {"rdf.yaml": b"name: theirs"}, "is not described as"),
    "integers": (
        lambda: described_05(
            X,
            X,
            network(
                elements=TensorProto.INT32,
                nodes=[helper.make_node("Identity", ["in"], ["out"])],
            ),
        ),
        "whose input is int32; float32",
    ),
    "numbers for other channels": (
        _tensors(
            "inputs",
            preprocessing=[
                {
                    "id": "scale_linear",
                    "kwargs": {"axis": "channel", "gain": [1.0, 2.0, 3.0]},
                }
            ],
        ),
        "numbers for 3 channels of 1",
    ),
    "values of 0 to 1": (
        _tensors("inputs", data={"type": "float32", "range": [0, 1]}),
        "does not say how those of a camera get there",
    ),
    "two channels of one": (
        _tensors(
            "outputs",
            axes=[
                {"type": "batch"},
                {"type": "channel", "channel_names": ["a", "b"]},
                *({"type": "space", "id": a, "size": 40} for a in "yx"),
            ],
        ),
        "makes 2 channels of 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trusted_or_served_is_refused(case, add, tmp_path):
    files, said = REFUSED[case]
    with pytest.raises(EngineError, match=said) as caught:
        add(files())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_a_name_that_is_taken_or_none_is_refused(add):
    files = described_05(X, smoothed(X), network(), id="rrdb")
    with pytest.raises(EngineError, match=r"there is an engine 'rrdb'.*--name"):
        add(files)
    with pytest.raises(EngineError, match="is no folder name on every system"):
        add(files, name="a/b")
    with pytest.raises(EngineError, match="is no folder name on every system"):
        add(files, name="con")
    named = described_05(X, smoothed(X), network(), name="../Über: A/B?")
    assert add(named).name == "über-a-b"


def test_beside_a_classifier_all_of_the_frame_is_restored(add, engine_folder):
    found = add(described_05(X, smoothed(X), network()))
    config = parse_config(
        {
            "processing": {
                "classifier": "sharpness",
                "engine_folders": [str(engine_folder)],
                "restoration": {"method": found.name},
                "precision": "f32",
            }
        }
    )
    frame = counts((1, 1, 200, 200))[0, 0].astype(np.uint16)
    with ImageProcessor(config, OpticalSystem(0.5, 451, 0.65)) as processor:
        result = processor.restore(frame)
        assert "openvino" in processor.backends()[found.name]
    assert result.defocus is not None
    assert set(result.engines) == {"classifier", "restorer"}
    changed = smoothed(frame.astype(np.float32))[9:-9, 9:-9]
    assert np.abs(result.restored[9:-9, 9:-9] - changed).max() <= 0.51


def test_colours_go_through_one_after_the_other_or_together(add):
    grey = add(described_05(X, smoothed(X), network()), name="grey")
    three = counts((1, 3, SIDE, SIDE))
    files = described_05(three, smoothed(three), network(channels=3))
    colour = add(files, name="colour")
    frame = np.moveaxis(counts((1, 3, 64, 90))[0], 0, -1)
    both = [rtfocus.restore(frame, engine=e.name) for e in (grey, colour)]
    wanted = np.moveaxis(smoothed(np.moveaxis(frame, -1, 0)), 0, -1)
    for restored in both:
        difference = np.abs(restored - wanted)[5:-5, 5:-5]
        assert difference.max() < 0.1


def test_a_series_without_optics_is_restored_and_not_classified(add):
    found = add(described_05(X, smoothed(X), network()))
    config = parse_config({"processing": {"restoration": {"method": found.name}}})
    series = SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid="s",
        name="s",
        started_ns=0,
        shape=(64, 64),
        dtype="<u2",
        sizes={"t": 1},
        channels=[Channel("DAPI", None)],
        positions=[Position("p")],
        pixel_size_um=0.65,
    )
    plan = plan_channel(config, series, series.channels[0])
    assert plan.classifier is None
    assert plan.skipped is None
    assert plan.restoration.way == "whole_image"
    assert plan.engines == {"restorer": plan.restoration.identity}


def test_the_commands_say_what_was_added_and_what_it_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("RTFOCUS_ENGINES", str(tmp_path / "mine"))
    files = described_05(X, smoothed(NORMAL), network(), before=[TO_NORMAL])
    package = zipped(tmp_path / "model.zip", files)
    said = succeeded(command("engines", "add", package, "--name", "theirs"))
    assert "added restorer 'theirs'" in said
    assert "its test tensors reproduce; its values: as those it is shown" in said
    said = " ".join(succeeded(command("engines", "info", "theirs")).split())
    assert "before it zero_mean_unit_variance after it nothing" in said
    assert "trained: licence MIT" in said
    card = tmp_path / "mine/theirs/engine.yaml"
    told = yaml.safe_load(card.read_text("utf-8"))
    told["trained"] |= {"by": "O'Hara [lab]", "seeds": [1, {"last": 2}]}
    card.write_text(yaml.safe_dump(told), "utf-8")
    more = " ".join(succeeded(command("engines", "info", "theirs")).split())
    assert "trained: by O'Hara [lab] " in more
    assert "trained: seeds 1, (last: 2) " in more
    shipped = " ".join(succeeded(command("engines", "info", "delpnet")).split())
    assert "trained: after (command: rtfocus train train_delpnet, seed: 1" in shipped
    assert "on a GPU no: steps around a network run on the CPU alone" in said
    image = counts((60, 70)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "image.tif", image)
    restored = tmp_path / "restored.tif"
    arguments = ("restore", tmp_path / "image.tif", "-o", restored)
    succeeded(command(*arguments, "--engine", "theirs"))
    change = tifffile.imread(restored) - smoothed(image.astype(np.float32))
    assert np.abs(change)[9:-9, 9:-9].max() < 1
    assert "removed" in succeeded(command("engines", "remove", "theirs"))
    again = command("engines", "remove", "theirs")
    assert again.code == ExitCode.ENGINE
    assert "there is no engine 'theirs' among your own" in again.err
