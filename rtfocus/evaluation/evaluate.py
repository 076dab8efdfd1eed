"""Evaluate: one contender over one data set, frame by frame through the loop's code.

The live loop keeps the chosen label alone; to count how many labels an engine found
likelier than the right one, it sees each frame once more here, prepared by the same
code.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel
from rtfocus.config import Config
from rtfocus.evaluation.contenders import Contender, restore_exactly
from rtfocus.evaluation.samples import DataSet, Sample
from rtfocus.evaluation.scores import (
    LevelScore,
    mse,
    pearson,
    psnr,
    specimen_tiles,
    ssim,
)
from rtfocus.frame import (
    BACKGROUND,
    PROTOCOL_VERSION,
    DefocusMap,
    FrameResult,
    Position,
    SeriesStart,
)
from rtfocus.processing.camera import luminance
from rtfocus.processing.channel_plan import plan_channel
from rtfocus.processing.classify import is_mirrored
from rtfocus.processing.cpu.channel import OpenChannel, open_channel
from rtfocus.processing.engines.card import BACKGROUND_LABEL, OutputCard
from rtfocus.processing.engines.registry import parts, step_um
from rtfocus.processing.offline import ImageProcessor

_UID = "ranking"


class Ranking:
    """Ranks the labels of one engine on the frames of one data set.

    A context manager: networks stay open for frames of one size in a row.
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        processing = config.processing.restoration.model_copy(update={"method": "none"})
        self._config = config.model_copy(
            update={
                "processing": config.processing.model_copy(
                    update={"restoration": processing}
                )
            }
        )
        self._data = data
        self._channel: OpenChannel | None = None
        self._kind: object = None

    def ranks(
        self, sample: Sample, right: tuple[int, int], wanted: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Return how many labels are likelier than the likeliest right one.

        Parameters
        ----------
        sample
            The frame.
        right
            Lowest and highest level that count as right.
        wanted
            Tiles that are asked for, axes (tile_y, tile_x).

        Returns
        -------
        NDArray[np.int64]
            One per wanted tile; 0: no label is likelier than a right one.
        """
        opened = self._open_for(sample)
        classifier = opened.classifier
        if classifier is None or classifier.card.output is None:
            return np.zeros(0, dtype=np.int64)
        signal = np.empty(sample.pixels.shape, np.float32)
        opened.correction.to_signal(sample.pixels, signal)
        likely = classifier.probabilities(classifier.prepare(signal))
        levels = classifier.card.levels
        turned = levels is not None and levels.signed and is_mirrored(self._data.optics)
        lowest, highest = (-right[1], -right[0]) if turned else right
        names = classifier.card.output.labels
        rows = [
            row
            for row, name in enumerate(names)
            if name != BACKGROUND_LABEL and lowest <= int(name) <= highest
        ]
        chosen = likely[rows].max(axis=0)
        return np.asarray((likely > chosen).sum(axis=0)[wanted], dtype=np.int64)

    def close(self) -> None:
        """Free the networks; called twice does nothing."""
        if self._channel is not None:
            self._channel.close()
        self._channel, self._kind = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_for(self, sample: Sample) -> OpenChannel:
        kind = (sample.pixels.shape, sample.pixels.dtype.str)
        if self._channel is not None and kind == self._kind:
            return self._channel
        self.close()
        channel = Channel("default", self._data.optics)
        series = SeriesStart(
            version=PROTOCOL_VERSION,
            series_uid=_UID,
            name=_UID,
            started_ns=0,
            shape=sample.pixels.shape,
            dtype=sample.pixels.dtype.str,
            sizes={"t": None},
            channels=[channel],
            positions=[Position("image")],
            pixel_size_um=self._data.optics.pixel_size_um,
        )
        threads = self._config.processing.threads or 1
        plan = plan_channel(self._config, series, channel)
        self._channel, self._kind = open_channel(plan, threads), kind
        return self._channel


Image = NDArray[np.float32]

# PSNR of images that are equal: a number, so that tables and means stay finite.
EQUAL_DB = 100.0
SHOWN = 4
"""Frames of a data set that are kept for the picture."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How close one image is to the sharp one."""

    psnr_db: float
    ssim: float
    pcc: float
    mse: float


@dataclass(frozen=True, slots=True)
class Scored:
    """One frame before and after."""

    name: str
    group: str
    before: Figures
    after: Figures


@dataclass
class Outcome:
    """Everything about one contender on one data set."""

    contender: Contender
    data: DataSet
    frames: list[Scored] = field(default_factory=list)
    """Restored ones whose sharp image is known."""
    levels: LevelScore | None = None
    """None: nothing that an engine found itself could be compared."""
    levels_by_group: dict[str, LevelScore] = field(default_factory=dict)
    ms_per_megapixel: float | None = None
    """Median over the frames, the first one of every size left out."""
    cpu_ms_per_megapixel: float | None = None
    """The same in processor time of all threads: holds on a busy machine too."""
    images: dict[str, Image] = field(default_factory=dict)
    """Restored frames for the picture, by name."""

    def groups(self) -> dict[str, dict[str, Any]]:
        """Return the mean figures by group.

        ``all`` comes first: every frame but those that are the sharp image itself,
        unless there are no others.
        """
        if not self.frames:
            return {}
        changed = [one for one in self.frames if one.before.psnr_db < EQUAL_DB]
        groups = {"all": changed or self.frames}
        for one in self.frames:
            groups.setdefault(one.group, []).append(one)
        return {name: mean_figures(frames) for name, frames in groups.items()}


def evaluate(
    one: Contender,
    data: DataSet,
    config: Config,
    *,
    on_frame: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run one contender over one data set.

    Parameters
    ----------
    one
        The contender.
    data
        The frames.
    config
        From `Contender.config`.
    on_frame
        Called after every frame.

    Raises
    ------
    EngineError
        If the engine cannot run.
    InputError
        If a frame cannot be read.
    """
    outcome = Outcome(one, data)
    if one.is_told_the_defocus:
        for sample in data.samples():
            _score_image(outcome, sample, restore_exactly(one.method, data, sample))
            on_frame()
        return outcome
    times = _Times()
    with ImageProcessor(config) as processor, Ranking(config, data) as ranking:
        for sample in data.samples():
            with times.of(sample):
                result = (
                    processor.restore(sample.pixels)
                    if one.restores
                    else processor.classify(sample.pixels)
                )
            if result.restored is not None:
                _score_image(outcome, sample, result.restored)
            if one.estimates:
                _score_levels(outcome, sample, result, ranking)
            on_frame()
    outcome.ms_per_megapixel, outcome.cpu_ms_per_megapixel = times.medians()
    return outcome


class _Times:
    """Milliseconds per megapixel, by the clock and by what the process computed."""

    def __init__(self) -> None:
        self._seen: set[object] = set()
        self._clock: list[float] = []
        self._process: list[float] = []

    @contextmanager
    def of(self, sample: Sample) -> Iterator[None]:
        """Time one frame; the first of a size compiles the networks."""
        begun = time.perf_counter(), time.process_time()
        yield
        taken = time.perf_counter() - begun[0], time.process_time() - begun[1]
        kind = (sample.pixels.shape, sample.pixels.dtype)
        if kind in self._seen:
            rows, columns = sample.pixels.shape[:2]
            scale = 1e3 / (rows * columns * 1e-6)
            self._clock.append(scale * taken[0])
            self._process.append(scale * taken[1])
        self._seen.add(kind)

    def medians(self) -> tuple[float | None, float | None]:
        """Return both medians; None where no size came twice."""
        if not self._clock:
            return None, None
        clock, process = map(np.median, (self._clock, self._process))
        return round(float(clock), 1), round(float(process), 1)


def mean_figures(frames: list[Scored]) -> dict[str, Any]:
    """Return the mean figures of some frames as plain numbers."""

    def mean(side: str, name: str) -> float:
        return float(np.mean([getattr(getattr(one, side), name) for one in frames]))

    figures: dict[str, Any] = {"frames": len(frames)}
    for side in ("before", "after"):
        figures[side] = {
            "psnr_db": round(mean(side, "psnr_db"), 3),
            "ssim": round(mean(side, "ssim"), 4),
            "pcc": round(mean(side, "pcc"), 4),
            "mse": float(f"{mean(side, 'mse'):.5g}"),
        }
    gains = [one.after.psnr_db - one.before.psnr_db for one in frames]
    figures["gain_db"] = round(float(np.mean(gains)), 3)
    figures["worst_gain_db"] = round(min(gains), 3)
    figures["worst_frame"] = frames[int(np.argmin(gains))].name
    return figures


def _score_image(outcome: Outcome, sample: Sample, restored: NDArray[Any]) -> None:
    restored = _within_full_scale(restored, sample.pixels.dtype)
    if len(outcome.images) < SHOWN:
        outcome.images[sample.name] = restored.astype(np.float32)
    if sample.sharp is None:
        return
    outcome.frames.append(
        Scored(
            sample.name,
            sample.group,
            before=_figures(sample.sharp, sample.pixels, sample.data_range),
            after=_figures(sample.sharp, restored, sample.data_range),
        )
    )


def _within_full_scale(restored: NDArray[Any], camera: np.dtype[Any]) -> NDArray[Any]:
    """Cut what no camera of this type could have delivered, as the run folder does.

    A bright cell that is saturated in the sharp image is not in the defocused one:
    restored without the cut it would count as wrong for being right.
    """
    if not np.issubdtype(camera, np.integer):
        return restored
    return np.asarray(np.clip(restored, 0, np.iinfo(camera).max))


def _figures(truth: NDArray[Any], image: NDArray[Any], span: float) -> Figures:
    correlation = pearson(truth, image)
    return Figures(
        psnr_db=min(psnr(truth, image, data_range=span), EQUAL_DB),
        ssim=ssim(truth, image, data_range=span),
        pcc=0.0 if np.isnan(correlation) else correlation,
        mse=mse(truth, image),
    )


def _score_levels(
    outcome: Outcome, sample: Sample, result: FrameResult, ranking: Ranking
) -> None:
    """Compare the tiles that hold a specimen with the known defocus."""
    engine, found = outcome.contender.engine, result.defocus
    if engine is None or found is None or sample.defocus_um is None:
        return
    levels, _ = parts(engine.card)
    blind = outcome.contender.blind
    step = step_um(engine.card, outcome.data.optics, blind=blind)
    lowest, highest = _comparable(sample, signed=levels.signed)
    wanted = _wanted_tiles(sample, found)
    if outcome.levels is None:
        outcome.levels = LevelScore(_labels(engine.card.output))
    group = outcome.levels_by_group.setdefault(
        sample.group, LevelScore(outcome.levels.levels)
    )
    error_um, stated_um = np.zeros(0), None
    if lowest == highest:
        defocus = found.defocus_um[wanted].astype(np.float64)
        error_um = defocus - lowest
        if found.uncertainty_um is not None:
            stated_um = found.uncertainty_um[wanted]
    true = (lowest / step, highest / step)
    ranks = ranking.ranks(sample, group.right_range(true), wanted)
    for score in (outcome.levels, group):
        score.add_ranks(ranks)
        score.add(
            true,
            found.level[wanted].astype(np.int64),
            found.confidence[wanted],
            background=BACKGROUND,
            sided=levels.signed and sample.sided,
        )
        score.add_errors(error_um, stated_um)


def _labels(output: OutputCard | None) -> tuple[int, ...]:
    """Return the levels an engine can name, ascending."""
    labels = [] if output is None else output.labels
    return tuple(sorted(int(one) for one in labels if one != BACKGROUND_LABEL))


def _comparable(sample: Sample, *, signed: bool) -> tuple[float, float]:
    """Return the known range of defocus, or of the distance for unsigned engines."""
    lowest, highest = sample.defocus_um or (0.0, 0.0)
    if signed:
        return lowest, highest
    sizes = sorted((abs(lowest), abs(highest)))
    return (0.0 if lowest < 0.0 < highest else sizes[0]), sizes[1]


def _wanted_tiles(sample: Sample, found: DefocusMap) -> NDArray[np.bool_]:
    grey = luminance(sample.pixels.astype(np.float32))
    quantum = 1.0 if np.issubdtype(sample.pixels.dtype, np.integer) else 0.0
    return specimen_tiles(grey, found.grid, quantum)
