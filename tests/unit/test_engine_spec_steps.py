"""Steps of bioimage.io's spec: what each makes of an image, and how it is undone."""

import numpy as np
import pytest
from pydantic import ValidationError

from rtfocus.engines.spec_steps import StepsCard, Values
from rtfocus.errors import EngineError
from rtfocus.runtimes.cpu_engine import arrange, arranged_shape, straighten

IMAGE = np.random.default_rng(2).gamma(2, 300, (3, 12, 15)).astype(np.float32)
RAW = (IMAGE * 3 + 50).astype(np.float32)
PIXELS = ["y", "x"]


def _over(statistic, *args, **options):
    return statistic(IMAGE, *args, axis=(1, 2), keepdims=True, **options)


def _ranged(of=IMAGE):
    low, high = np.percentile(of, (2, 98))
    return (IMAGE - low) / (high - low + 1e-6)


STEPS = {
    "binarize": ({"threshold": 500}, IMAGE > 500),
    "binarize each channel": (
        {"threshold": [100, 500, 900], "axis": "channel"},
        np.array([100, 500, 900])[:, None, None] < IMAGE,
    ),
    "clip": ({"min": 200, "max": 700}, IMAGE.clip(200, 700)),
    "clip above": ({"max": 700}, IMAGE.clip(None, 700)),
    "clip percentiles": (
        {"min_percentile": 10, "max_percentile": 90, "axes": PIXELS},
        IMAGE.clip(
            _over(np.percentile, 10, method="inverted_cdf"),
            _over(np.percentile, 90, method="inverted_cdf"),
        ),
    ),
    "scale_linear": ({"gain": 2.0, "offset": -7.5}, IMAGE * 2 - 7.5),
    "scale_linear each channel": (
        {"gain": [1.0, 2.0, 3.0], "axis": "channel"},
        IMAGE * np.array([1, 2, 3])[:, None, None],
    ),
    "sigmoid": ({}, 1 / (1 + np.exp(-IMAGE.astype(np.float64)))),
    "zero_mean_unit_variance": ({}, (IMAGE - IMAGE.mean()) / (IMAGE.std() + 1e-6)),
    "zero_mean_unit_variance each": (
        {"axes": ["batch", *PIXELS], "eps": 0.1},
        (IMAGE - _over(np.mean)) / (_over(np.std) + 0.1),
    ),
    "fixed_zero_mean_unit_variance": ({"mean": 60, "std": 4}, (IMAGE - 60) / 4),
    "scale_range": ({"min_percentile": 2, "max_percentile": 98}, _ranged()),
    "scale_range of the input": (
        {"min_percentile": 2, "max_percentile": 98, "reference_tensor": "raw"},
        _ranged(RAW),
    ),
    "scale_mean_variance": ({"reference_tensor": "raw"}, RAW),
    "ensure_dtype": ({"dtype": "uint8"}, np.trunc(IMAGE).clip(0, 255)),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_does_what_the_spec_says(case):
    kwargs, wanted = STEPS[case]
    step = {"id": case.split()[0], "kwargs": kwargs}
    card = StepsCard.model_validate({"after": [step]})
    given = card.give(IMAGE, card.show(RAW), RAW)
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, wanted, rtol=2e-5, atol=2e-4)


def test_straight_steps_are_undone_and_others_left():
    steps = ["clip", "scale_linear each channel", "zero_mean_unit_variance each"]
    before = [{"id": s.split()[0], "kwargs": STEPS[s][0]} for s in steps]
    card = StepsCard.model_validate({"before": before, "values": "shown"})
    shown = card.show(IMAGE)
    assert np.abs(shown.image).max() < 10
    np.testing.assert_allclose(
        card.give(shown.image, shown, IMAGE), IMAGE.clip(200, 700), rtol=1e-5
    )


def test_an_even_image_stays_even_and_finite():
    even = np.full((1, 8, 8), 900, np.float32)
    for name in ("zero_mean_unit_variance", "scale_range"):
        card = StepsCard.model_validate(
            {"before": [{"id": name}], "values": Values.shown}
        )
        shown = card.show(even)
        assert np.array_equal(shown.image, np.zeros_like(even))
        assert np.array_equal(card.give(shown.image, shown, even), even)


def test_what_is_no_number_is_refused():
    card = StepsCard()
    spoilt = IMAGE.copy()
    spoilt[1, 2, 3:6] = np.nan
    with pytest.raises(EngineError, match="3 values of 540 that are no number"):
        card.give(spoilt, card.show(IMAGE), IMAGE)


@pytest.mark.parametrize(
    "said",
    [
        {"before": [{"id": "softmax"}]},
        {"before": [{"id": "clip", "kwargs": {}}]},
        {"before": [{"id": "clip", "kwargs": {"min": 1, "min_percentile": 2}}]},
        {"before": [{"id": "clip", "kwargs": {"min": float("nan")}}]},
        {"before": [{"id": "scale_linear", "kwargs": {"gain": [1.0, 2.0]}}]},
        {"before": [{"id": "sigmoid", "kwargs": {"slope": 2}}]},
        {"before": [{"id": "scale_range", "kwargs": {"axes": ["batch"]}}]},
        {
            "before": [
                {
                    "id": "scale_range",
                    "kwargs": {"min_percentile": 99.9, "max_percentile": 99},
                }
            ]
        },
        {
            "before": [{"id": "scale_linear", "kwargs": {"gain": 0.0}}],
            "values": "shown",
        },
        {"input_axes": "bcx"},
        {"output_axes": "byxx"},
        {"values": "camera"},
    ],
)
def test_steps_that_are_not_understood_are_refused(said):
    with pytest.raises(ValidationError):
        StepsCard.model_validate(said)


@pytest.mark.parametrize("axes", ["bcyx", "byxc", "bxyc", "cyx", "yxb", "yx", "xy"])
def test_tensors_are_put_in_a_network_s_order_and_back(axes):
    tensor = np.arange(3 * 4 * 5).reshape(1, 3, 4, 5)
    if "c" not in axes:
        tensor = tensor[:, :1]
    there = arrange(tensor, axes)
    assert there.shape == arranged_shape(tensor.shape, axes)
    assert there.shape[axes.index("x")] == 5
    assert np.array_equal(straighten(there, axes, "theirs"), tensor)
    with pytest.raises(EngineError, match="its card names the axes"):
        straighten(there[..., None], axes, "theirs")
