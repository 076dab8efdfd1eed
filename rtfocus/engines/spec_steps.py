"""Spec steps: what a model of bioimage.io does to an image around its network.

The steps of spec 0.5 as its text defines them, each on one whole image, axes (channel,
y, x): the frame is the sample whose statistics count, and stands for the data set
where a model asks for that. Those that are straight lines can be undone: a network
that is shown normalised images, and says of no step back, gives normalised ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rtfocus.config.sections import Section
from rtfocus.errors import EngineError

Image = NDArray[np.float32]
"""Axes (channel, y, x)."""

Axis = Literal["batch", "channel", "y", "x"]
Axes = Annotated[list[Axis], Field(min_length=1)] | None
"""Axes that a statistic is taken over; None: all of them."""
Eps = Annotated[float, Field(gt=0, le=0.1)]
PerChannel = float | Annotated[list[float], Field(min_length=1)]
Deviation = Annotated[float, Field(ge=1e-6)]
Low = Annotated[float, Field(ge=0, lt=100)]
High = Annotated[float, Field(gt=1, le=100)]


@dataclass(frozen=True, slots=True)
class Line:
    """``(image - centre) * gain + shift``, each a number or one per channel."""

    centre: Any
    gain: Any
    shift: Any

    def apply(self, image: Image) -> Image:
        """Return a new image on the line."""
        # Not in place: numbers for more channels than there are would not fit.
        result = np.subtract(image, self.centre, dtype=np.float32)
        result = result * np.asarray(self.gain, np.float32)
        return np.asarray(result + np.asarray(self.shift, np.float32))

    def undo(self, image: Image) -> Image:
        """Return the image that `apply` would take to this one."""
        result = np.subtract(image, self.shift, dtype=np.float32)
        result = result / np.asarray(self.gain, np.float32)
        return np.asarray(result + np.asarray(self.centre, np.float32))


class _AlongChannels(Section):
    """Numbers for the whole image, or one for every channel."""

    axis: Literal["channel"] | None = None
    """None: one number for all."""

    @model_validator(mode="after")
    def _a_list_has_an_axis(self) -> "_AlongChannels":
        lists = [v for v in dict(self).values() if isinstance(v, list)]
        if self.axis is None and any(len(one) > 1 for one in lists):
            msg = "has several values and names no axis"
            raise ValueError(msg)
        if len({len(one) for one in lists}) > 1:
            msg = "has lists of different lengths"
            raise ValueError(msg)
        return self

    def along(self, values: PerChannel) -> Any:  # noqa: ANN401
        """Return a value as it multiplies an image."""
        return np.asarray(values, np.float64).reshape(-1, 1, 1)


class _OverAxes(Section):
    """Statistics over some axes."""

    axes: Axes = None

    @model_validator(mode="after")
    def _over_pixels(self) -> "_OverAxes":
        if self.axes is not None and not set(self.axes) - {"batch"}:
            msg = f"axes {self.axes} leave nothing of an image to take a statistic of"
            raise ValueError(msg)
        if self.axes is not None and len(set(self.axes)) < len(self.axes):
            msg = f"axes {self.axes} name one twice"
            raise ValueError(msg)
        return self

    def over(self) -> tuple[int, ...] | None:
        """Return the axes as NumPy counts them; None: all."""
        if self.axes is None:
            return None
        return tuple(
            {"channel": 0, "y": 1, "x": 2}[a] for a in self.axes if a != "batch"
        )

    def percentile(self, image: Image, percent: float, method: Any) -> Any:  # noqa: ANN401
        """Return a percentile of the image."""
        return np.percentile(
            image, percent, axis=self.over(), keepdims=True, method=method
        )

    def mean_and_deviation(self, image: Image) -> tuple[Any, Any]:
        """Return mean and standard deviation of the image."""
        over, exact = self.over(), np.float64
        mean = np.mean(image, axis=over, keepdims=True, dtype=exact)
        return mean, np.std(image, axis=over, keepdims=True, dtype=exact)


class ClipKwargs(_OverAxes):
    """Bounds, or the percentiles that are taken for them."""

    min: float | None = None
    max: float | None = None
    min_percentile: Low | None = None
    max_percentile: High | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "ClipKwargs":
        low = (self.min, self.min_percentile).count(None)
        high = (self.max, self.max_percentile).count(None)
        if 0 in (low, high) or low == high == 2:
            msg = "needs one of min and min_percentile, or of max and max_percentile"
            raise ValueError(msg)
        return self


class Clip(Section):
    """Values beyond the bounds become the bounds."""

    id: Literal["clip"]
    kwargs: ClipKwargs

    def apply(self, image: Image) -> Image:
        """Return a new image."""
        given = self.kwargs
        low: Any = -np.inf if given.min is None else given.min
        high: Any = np.inf if given.max is None else given.max
        # The spec's reference takes a value of the image, not one between two.
        if given.min_percentile is not None:
            low = given.percentile(image, given.min_percentile, "inverted_cdf")
        if given.max_percentile is not None:
            high = given.percentile(image, given.max_percentile, "inverted_cdf")
        return np.asarray(np.clip(image, low, high), np.float32)


class BinarizeKwargs(_AlongChannels):
    """What a value has to exceed."""

    threshold: PerChannel


class Binarize(Section):
    """1 above the threshold, 0 elsewhere."""

    id: Literal["binarize"]
    kwargs: BinarizeKwargs

    def apply(self, image: Image) -> Image:
        """Return a new image."""
        above = image > self.kwargs.along(self.kwargs.threshold)
        return np.asarray(above, np.float32)


class Sigmoid(Section):
    """The logistic function."""

    id: Literal["sigmoid"]
    kwargs: dict[str, Any] = Field(default={}, max_length=0)

    def apply(self, image: Image) -> Image:
        """Return a new image."""
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * image), np.float32)


class EnsureDtypeKwargs(Section):
    """Element type."""

    dtype: Literal[
        "float32", "float64", "uint8", "int8", "uint16", "int16", "uint32", "int32",
        "uint64", "int64", "bool",
    ]  # fmt: skip


class EnsureDtype(Section):
    """Values as an element type holds them; they stay float32 here.

    What an integer type cannot hold becomes the nearest it can: a cast would wrap.
    """

    id: Literal["ensure_dtype"]
    kwargs: EnsureDtypeKwargs

    def apply(self, image: Image) -> Image:
        """Return a new image."""
        dtype = np.dtype(self.kwargs.dtype)
        if dtype.kind == "f":
            return image
        if dtype.kind == "b":
            return np.asarray(image != 0, np.float32)
        bounds = np.iinfo(dtype)
        return np.clip(np.trunc(image), bounds.min, bounds.max).astype(np.float32)


class ScaleLinearKwargs(_AlongChannels):
    """``image * gain + offset``."""

    gain: PerChannel = 1.0
    offset: PerChannel = 0.0


class ScaleLinear(Section):
    """A straight line that is always the same."""

    id: Literal["scale_linear"]
    kwargs: ScaleLinearKwargs

    def line(self, image: Image, raw: Image) -> Line:
        """Return the line."""
        given = self.kwargs
        return Line(0.0, given.along(given.gain), given.along(given.offset))

    @property
    def is_flat(self) -> bool:
        """Whether nothing is left of an image."""
        return not np.all(self.kwargs.along(self.kwargs.gain))


class FixedZeroMeanUnitVarianceKwargs(_AlongChannels):
    """Mean and deviation of what the network was trained on."""

    mean: PerChannel
    std: Deviation | Annotated[list[Deviation], Field(min_length=1)]


class FixedZeroMeanUnitVariance(Section):
    """``(image - mean) / std`` with given numbers."""

    id: Literal["fixed_zero_mean_unit_variance"]
    kwargs: FixedZeroMeanUnitVarianceKwargs

    def line(self, image: Image, raw: Image) -> Line:
        """Return the line."""
        given = self.kwargs
        return Line(given.along(given.mean), 1 / given.along(given.std), 0.0)


class ZeroMeanUnitVarianceKwargs(_OverAxes):
    """What mean and deviation are taken over."""

    eps: Eps = 1e-6


class ZeroMeanUnitVariance(Section):
    """``(image - mean) / (std + eps)`` with the image's own."""

    id: Literal["zero_mean_unit_variance"]
    kwargs: ZeroMeanUnitVarianceKwargs = ZeroMeanUnitVarianceKwargs()

    def line(self, image: Image, raw: Image) -> Line:
        """Return the line of an image."""
        mean, deviation = self.kwargs.mean_and_deviation(image)
        return Line(mean, 1 / (deviation + self.kwargs.eps), 0.0)


class ScaleRangeKwargs(_OverAxes):
    """Percentiles that become 0 and 1."""

    min_percentile: Low = 0.0
    max_percentile: High = 100.0
    eps: Eps = 1e-6
    reference_tensor: str | None = None
    """The input; None: the image itself."""

    @model_validator(mode="after")
    def _in_order(self) -> "ScaleRangeKwargs":
        if self.min_percentile >= self.max_percentile:
            msg = f"min_percentile {self.min_percentile:g} is not below max_percentile"
            raise ValueError(msg)
        return self


class ScaleRange(Section):
    """Two percentiles become 0 and 1."""

    id: Literal["scale_range"]
    kwargs: ScaleRangeKwargs = ScaleRangeKwargs()

    def line(self, image: Image, raw: Image) -> Line:
        """Return the line of an image."""
        given = self.kwargs
        of = image if given.reference_tensor is None else raw
        low = given.percentile(of, given.min_percentile, "linear")
        high = given.percentile(of, given.max_percentile, "linear")
        return Line(low, 1 / (high.astype(np.float64) - low + given.eps), 0.0)


class ScaleMeanVarianceKwargs(_OverAxes):
    """What mean and deviation are taken over, and whose they become."""

    reference_tensor: str
    eps: Eps = 1e-6


class ScaleMeanVariance(Section):
    """The image gets mean and deviation of the raw input."""

    id: Literal["scale_mean_variance"]
    kwargs: ScaleMeanVarianceKwargs

    def line(self, image: Image, raw: Image) -> Line:
        """Return the line of an image."""
        eps = self.kwargs.eps
        mean, deviation = self.kwargs.mean_and_deviation(image)
        target, spread = self.kwargs.mean_and_deviation(raw)
        return Line(mean, (spread + eps) / (deviation + eps), target)


Bent = Clip | Binarize | Sigmoid | EnsureDtype
Straight = (
    ScaleLinear
    | FixedZeroMeanUnitVariance
    | ZeroMeanUnitVariance
    | ScaleRange
    | ScaleMeanVariance
)
Step = Annotated[Bent | Straight, Field(discriminator="id")]
KNOWN_STEPS = (
    "binarize", "clip", "ensure_dtype", "fixed_zero_mean_unit_variance", "scale_linear",
    "scale_mean_variance", "scale_range", "sigmoid", "zero_mean_unit_variance",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShownImage:
    """An image as the network sees it."""

    image: Image
    lines: tuple[Line, ...]
    """The straight steps that made it, in their order."""


class Values(StrEnum):
    """Which values a network gives, once the steps after it are done."""

    input = "input"
    """Those of the camera, as it got them."""
    shown = "shown"
    """Those that it was shown: the straight steps before it are undone."""
    own = "own"
    """On a scale of its own, which only float images can hold."""


class StepsCard(Section):
    """A model of bioimage.io: what it does around its network.

    It knows neither levels nor optics and restores an image as it is, all of it.
    """

    input_axes: str = "bcyx"
    """Order of the network's input; batch and channel may be missing."""
    output_axes: str = "bcyx"
    before: list[Step] = Field(default_factory=list)
    after: list[Step] = Field(default_factory=list)
    values: Values = Values.input
    """What its values are once `after` is done."""

    @model_validator(mode="after")
    def _can_be_ordered(self) -> "StepsCard":
        for axes in (self.input_axes, self.output_axes):
            if len(set(axes)) < len(axes) or not {"y", "x"} <= set(axes) <= set("bcyx"):
                msg = (
                    f"axes '{axes}' are none of an image: y and x, and perhaps b and c"
                )
                raise ValueError(msg)
        flat = any(
            step.is_flat for step in self.before if isinstance(step, ScaleLinear)
        )
        if self.values is Values.shown and flat:
            msg = "a gain of 0 cannot be undone: values cannot be 'shown'"
            raise ValueError(msg)
        return self

    def show(self, raw: Image) -> ShownImage:
        """Return an image as the network sees it."""
        image, lines = _after(self.before, raw, raw)
        return ShownImage(image, lines)

    def give(self, restored: Image, shown: ShownImage, raw: Image) -> Image:
        """Return what the network made of an image, on the scale of `values`.

        Raises
        ------
        EngineError
            If some of it is no number.
        """
        image, _ = _after(self.after, restored, raw)
        if self.values is Values.shown:
            for line in reversed(shown.lines):
                image = line.undo(image)
        strange = image.size - int(np.isfinite(image).sum())
        if strange:
            msg = (
                f"its network gives {strange} values of {image.size} that are no number"
            )
            raise EngineError(msg)
        return image


def _after(
    steps: Sequence[Bent | Straight], image: Image, raw: Image
) -> tuple[Image, tuple[Line, ...]]:
    """Apply steps to an image; `raw` is the input as it came."""
    lines = []
    # What becomes too large is no number then, and is refused as such.
    with np.errstate(over="ignore", invalid="ignore"):
        for step in steps:
            shape = image.shape
            if isinstance(step, Bent):
                image = step.apply(image)
            else:
                line = step.line(image, raw)
                lines.append(line)
                image = line.apply(image)
            if image.shape != shape:
                msg = (
                    f"step '{step.id}' has numbers for {len(image)} channels of "
                    f"{shape[0]}"
                )
                raise EngineError(msg)
    return image, tuple(lines)
