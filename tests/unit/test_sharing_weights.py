"""Weights of an ONNX file that lie in other files come back as they were."""

from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rtfocus.errors import EngineError
from rtfocus.sharing.admission import read_network, with_weights_inside

PARTS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
GAPS = st.lists(st.integers(0, 9), min_size=5, max_size=5)


def scattered(lengths, gaps, *, in_branch):
    """Return an ONNX file whose weights lie elsewhere, the files, and the weights."""
    files, tensors, weights = {"a.data": b"", "b.data": b""}, [], {}
    for number, (length, gap) in enumerate(zip(lengths, gaps, strict=False)):
        name, place = f"w{number}", "ab"[number % 2] + ".data"
        weights[name] = np.arange(length, dtype=np.float32) + 100 * number
        tensor = numpy_helper.from_array(weights[name], name)
        start = len(files[place]) + gap
        files[place] += b"\xff" * gap + tensor.raw_data
        said = {"location": place, "offset": start, "length": len(tensor.raw_data)}
        for key, value in said.items():
            tensor.external_data.add(key=key, value=str(value))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensors.append(tensor)
    if in_branch:
        constants = [
            helper.make_node("Constant", [], [one.name], value=one) for one in tensors
        ]
        branch = helper.make_graph(constants, "branch", [], [])
        node = helper.make_node("If", ["b"], ["d"], then_branch=branch)
        graph = helper.make_graph([node], "theirs", [], [])
    else:
        graph = helper.make_graph([], "theirs", [], [], tensors)
    return helper.make_model(graph).SerializeToString(), files, weights


def held(model: bytes) -> dict[str, np.ndarray]:
    """Return the weights that an ONNX file holds itself."""
    graph = onnx.load_model_from_string(model).graph
    tensors = list(graph.initializer)
    for node in graph.node:
        tensors += [inner.attribute[0].t for inner in node.attribute[0].g.node]
    return {one.name: numpy_helper.to_array(one) for one in tensors}


@given(PARTS, GAPS, st.booleans())
def test_weights_elsewhere_come_back_as_they_were(lengths, gaps, in_branch):
    model, files, weights = scattered(lengths, gaps, in_branch=in_branch)
    whole = with_weights_inside(model, files.__getitem__, 1 << 20)
    found = held(whole)
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(found[name], values)
    # What is whole is asked for nothing, and left as it is.
    assert with_weights_inside(whole, {}.__getitem__, 1 << 20) is whole


@given(PARTS, GAPS, st.data())
def test_a_file_cut_off_anywhere_is_refused(lengths, gaps, data):
    model, files, _ = scattered(lengths, gaps, in_branch=False)
    last = "ab"[(len(lengths) - 1) % 2] + ".data"
    cut = data.draw(st.integers(1, len(files[last])))
    files[last] = files[last][:-cut]
    with pytest.raises(EngineError, match="get the whole package again"):
        with_weights_inside(model, files.__getitem__, 1 << 20)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_network_never_escape_as_another_error(data):
    with suppress(EngineError):
        assert read_network(data).HasField("graph")
