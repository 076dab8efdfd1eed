"""Evaluate: one contender over one data set, frame by frame through the loop's code."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rtfocus.config import Config
from rtfocus.engines.card import BACKGROUND_LABEL, OutputCard
from rtfocus.engines.registry import parts, step_um
from rtfocus.evaluation.contenders import Contender, Ranking, restore_exactly
from rtfocus.evaluation.samples import OWN_PLANES, SHARP_GROUP, DataSet, Sample
from rtfocus.evaluation.scores import (
    ErrorScore,
    LevelScore,
    Standing,
    mse,
    pearson,
    psnr,
    specimen_tiles,
    ssim,
)
from rtfocus.frame import (
    BACKGROUND,
    DefocusMap,
    FrameResult,
)
from rtfocus.offline import ImageProcessor
from rtfocus.optics.normalisation import luminance
from rtfocus.workers import Closing

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


@dataclass(frozen=True, slots=True)
class FoundTiles:
    """What an engine found in the tiles of one frame that hold a specimen."""

    labels: tuple[int, ...]
    """Levels that it can name, ascending."""
    true: tuple[float, float]
    """Lowest and highest defocus in levels."""
    level: NDArray[np.int64]
    confidence: NDArray[np.float32]
    ranks: NDArray[np.int64]
    """As of `Ranking.ranks`."""
    error_um: NDArray[np.float64]
    """Found minus true; empty where the truth is a range."""
    stated_um: NDArray[np.floating] | None
    """Uncertainty of the defocus; None: the engine states none."""
    sided: bool
    """Whether the sign of the truth counts."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One frame through one contender: what its row is made of."""

    name: str
    group: str
    scored: Scored | None = None
    """None: not restored, or its sharp image is not known."""
    image: Image | None = None
    """Restored; None: it is not, or is not shown."""
    tiles: FoundTiles | None = None
    errors: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    """Stated and true, of restored tiles, as shares of the range; None: not known."""
    ms_per_megapixel: tuple[float, float] | None = None
    """By the clock and in processor time; None: the first of its size."""


@dataclass
class ScoreSheet:
    """Everything about one contender on one data set."""

    contender: Contender
    data: DataSet
    frames: list[Scored] = field(default_factory=list)
    """Restored ones whose sharp image is known."""
    levels: LevelScore | None = None
    """None: nothing that an engine found itself could be compared."""
    levels_by_group: dict[str, LevelScore] = field(default_factory=dict)
    errors: ErrorScore | None = None
    """Of what the engine states of the error that it leaves; None: nothing."""
    ms_per_megapixel: float | None = None
    """Median over the frames, the first one of every size left out."""
    cpu_ms_per_megapixel: float | None = None
    """The same in processor time of all threads: holds on a busy machine too."""
    images: dict[str, Image] = field(default_factory=dict)
    """Restored frames for the picture, by name."""
    measured: int = 0
    """Frames that it was given."""
    _times: list[tuple[float, float]] = field(default_factory=list)

    def take(self, measured: Measured) -> None:
        """Add the next frame of the data set."""
        self.measured += 1
        if measured.image is not None and len(self.images) < SHOWN:
            self.images[measured.name] = measured.image
        if measured.scored is not None:
            self.frames.append(measured.scored)
        if measured.errors is not None:
            unchanged = (
                measured.scored is not None
                and measured.scored.before.psnr_db == EQUAL_DB
            )
            self.errors = self.errors or ErrorScore()
            self.errors.add(*measured.errors, in_focus=unchanged)
        if measured.tiles is not None:
            self._take_tiles(measured.group, measured.tiles)
        if measured.ms_per_megapixel is not None:
            self._times.append(measured.ms_per_megapixel)

    def finish(self) -> Self:
        """Find the medians once all frames are there."""
        if self._times:
            clock, process = (
                float(np.median(ms)) for ms in zip(*self._times, strict=True)
            )
            self.ms_per_megapixel = round(clock, 1)
            self.cpu_ms_per_megapixel = round(process, 1)
        return self

    def nothing_found(self) -> str | None:
        """Say why it stands in no table; None: it stands in one."""
        if self.frames or self.levels is not None or not self.measured:
            return None
        truth = "the defocus" if self.contender.method == "none" else "the sharp image"
        return (
            f"{self.contender.title} is in no table of {self.data.name}: {truth} of "
            "its images is not known, so there is nothing to compare"
        )

    def _take_tiles(self, group: str, tiles: FoundTiles) -> None:
        if self.levels is None:
            self.levels = LevelScore(tiles.labels)
        of_group = self.levels_by_group.setdefault(group, LevelScore(tiles.labels))
        for score in (self.levels, of_group):
            score.add_ranks(tiles.ranks)
            score.add(
                tiles.true,
                tiles.level,
                tiles.confidence,
                background=BACKGROUND,
                sided=tiles.sided,
            )
            score.add_errors(tiles.error_um, tiles.stated_um)

    def groups(self) -> dict[str, dict[str, Any]]:
        """Return the mean figures by group.

        ``all`` comes first: every frame but those that are the sharp image itself,
        unless there are no others.
        """
        if not self.frames:
            return {}
        changed = [frame for frame in self.frames if frame.before.psnr_db < EQUAL_DB]
        groups = {"all": changed or self.frames}
        for frame in self.frames:
            groups.setdefault(frame.group, []).append(frame)
        return {name: mean_figures(frames) for name, frames in groups.items()}


def evaluate(
    contender: Contender,
    data: DataSet,
    config: Config,
    *,
    on_frame: Callable[[], None] = lambda: None,
) -> ScoreSheet:
    """Run one contender over one data set.

    Parameters
    ----------
    contender
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
    sheet = ScoreSheet(contender, data)
    with Measuring(contender, data, config) as measuring:
        for sample in data.samples():
            sheet.take(measuring.measure(sample))
            on_frame()
    return sheet.finish()


class Measuring(Closing):
    """One contender, open for the frames of one data set; a context manager.

    Parameters
    ----------
    one, data, config
        As of `evaluate`.
    """

    def __init__(self, contender: Contender, data: DataSet, config: Config) -> None:
        self._one, self._data = contender, data
        self._processor: ImageProcessor | None = None
        if not contender.is_told_the_defocus:
            self._processor = ImageProcessor(config)
        self._ranking = Ranking(config, data)
        self._seen: set[object] = set()

    def measure(self, sample: Sample) -> Measured:
        """Send one frame through the contender.

        Raises
        ------
        EngineError
            If the engine cannot run.
        """
        contender, processor = self._one, self._processor
        if processor is None:
            restored = restore_exactly(contender.method, self._data, sample)
            return _measured(sample, restored)
        start = time.perf_counter(), time.process_time()
        result = (processor.restore if contender.restores else processor.classify)(
            sample.pixels
        )
        elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
        tiles = None
        if contender.estimates:
            tiles = _compare_tiles(contender, self._data, sample, result, self._ranking)
        return replace(
            _measured(sample, result.restored),
            tiles=tiles,
            errors=_errors(sample, result),
            ms_per_megapixel=self._per_megapixel(sample, elapsed),
        )

    def close(self) -> None:
        """Free the networks; called twice does nothing."""
        self._ranking.close()
        if self._processor is not None:
            self._processor.close()

    def _per_megapixel(
        self, sample: Sample, taken_s: tuple[float, float]
    ) -> tuple[float, float] | None:
        """Return milliseconds; the first frame of a size compiles the networks."""
        kind = (sample.pixels.shape, sample.pixels.dtype)
        if kind not in self._seen:
            self._seen.add(kind)
            return None
        rows, columns = sample.pixels.shape[:2]
        scale = 1e3 / (rows * columns * 1e-6)
        return scale * taken_s[0], scale * taken_s[1]


def mean_figures(frames: list[Scored]) -> dict[str, Any]:
    """Return the mean figures of some frames as plain numbers."""

    def mean(side: str, name: str) -> float:
        return float(np.mean([getattr(getattr(frame, side), name) for frame in frames]))

    figures: dict[str, Any] = {"frames": len(frames)}
    for side in ("before", "after"):
        figures[side] = {
            "psnr_db": round(mean(side, "psnr_db"), 3),
            "ssim": round(mean(side, "ssim"), 4),
            "pcc": round(mean(side, "pcc"), 4),
            "mse": float(f"{mean(side, 'mse'):.5g}"),
        }
    gains = [frame.after.psnr_db - frame.before.psnr_db for frame in frames]
    figures["gain_db"] = round(float(np.mean(gains)), 3)
    figures["worst_gain_db"] = round(min(gains), 3)
    figures["worst_frame"] = frames[int(np.argmin(gains))].name
    return figures


def _measured(sample: Sample, restored: NDArray[Any] | None) -> Measured:
    if restored is None:
        return Measured(sample.name, sample.group)
    restored = _within_full_scale(restored, sample.pixels.dtype)
    scored = None
    if sample.sharp is not None:
        scored = Scored(
            sample.name,
            sample.group,
            before=_figures(sample.sharp, sample.pixels, sample.data_range),
            after=_figures(sample.sharp, restored, sample.data_range),
        )
    image = restored.astype(np.float32)
    return Measured(sample.name, sample.group, scored, image)


def _errors(
    sample: Sample, result: FrameResult
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Compare what is stated of the tiles of a restored frame with the truth."""
    stated, defocus, after = result.expected_error, result.defocus, result.restored
    if stated is None or defocus is None or after is None or sample.sharp is None:
        return None
    after = _within_full_scale(after, sample.pixels.dtype)
    left = luminance(after.astype(np.float32)) - luminance(sample.sharp.astype("f4"))
    side = defocus.grid.tile_px
    down, across = (
        [slice(max(0, round(one)), round(one) + side) for one in first]
        for tiles in stated.shape
        for first in [defocus.grid.centres_px(tiles) - (side - 1) / 2]
    )
    true = np.array([[np.mean(left[y, x] ** 2) for x in across] for y in down])
    span = np.float64(sample.data_range)
    return np.asarray(stated / span), np.asarray(np.sqrt(true) / span)


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


def _compare_tiles(
    contender: Contender,
    data: DataSet,
    sample: Sample,
    result: FrameResult,
    ranking: Ranking,
) -> FoundTiles | None:
    """Compare the tiles that hold a specimen with the known defocus."""
    engine, tiles = contender.engine, result.defocus
    if engine is None or tiles is None or sample.defocus_um is None:
        return None
    levels, _ = parts(engine.card)
    step = step_um(engine.card, data.optics, blind=contender.blind)
    lowest, highest = _comparable(sample, signed=levels.signed and not sample.even)
    used = _specimen_tiles(sample, tiles)
    error_um, stated_um = np.zeros(0), None
    level, defocus = tiles.level[used], tiles.defocus_um[used].astype(np.float64)
    if sample.even:
        level, defocus = np.where(level == BACKGROUND, level, abs(level)), abs(defocus)
    if lowest == highest:
        error_um = defocus - lowest
        if tiles.stated_um is not None:
            stated_um = tiles.stated_um[used]
    true = (lowest / step, highest / step)
    labels = _labels(engine.card.output)
    right = {LevelScore(labels).right_range(true)}
    if sample.even and levels.signed:
        right.add(LevelScore(labels).right_range((-true[1], -true[0])))
    return FoundTiles(
        labels=labels,
        true=true,
        level=level.astype(np.int64),
        confidence=tiles.confidence[used],
        ranks=np.min([ranking.ranks(sample, own, used) for own in right], axis=0),
        error_um=error_um,
        stated_um=stated_um,
        sided=levels.signed and sample.sided,
    )


def _labels(output: OutputCard | None) -> tuple[int, ...]:
    """Return the levels an engine can name, ascending."""
    labels = [] if output is None else output.labels
    return tuple(sorted(int(label) for label in labels if label != BACKGROUND_LABEL))


def _comparable(sample: Sample, *, signed: bool) -> tuple[float, float]:
    """Return the known range of defocus, or of the distance for unsigned engines."""
    lowest, highest = sample.defocus_um or (0.0, 0.0)
    if signed:
        return lowest, highest
    sizes = sorted((abs(lowest), abs(highest)))
    return (0.0 if lowest < 0.0 < highest else sizes[0]), sizes[1]


def _specimen_tiles(sample: Sample, defocus: DefocusMap) -> NDArray[np.bool_]:
    grey = luminance(sample.pixels.astype(np.float32))
    quantum = 1.0 if np.issubdtype(sample.pixels.dtype, np.integer) else 0.0
    return specimen_tiles(grey, defocus.grid, quantum)


def standing(sheet: ScoreSheet) -> Standing:
    """Sum up how a contender did."""

    def gains(frames: Sequence[Scored]) -> list[float]:
        return [one.after.psnr_db - one.before.psnr_db for one in frames]

    by_group: dict[str, list[Scored]] = {}
    for frame in sheet.frames:
        group = frame.group if frame.group in (SHARP_GROUP, OWN_PLANES) else ""
        by_group.setdefault(group, []).append(frame)
    blurred = gains(by_group[""])
    own_planes = gains(by_group.get(OWN_PLANES, []))
    in_focus = [one.after.psnr_db for one in by_group[SHARP_GROUP]]
    return Standing(
        sheet.contender.name,
        round(float(np.mean(blurred)), 2),
        round(float(min(blurred)), 2),
        round(float(np.mean(in_focus)), 1),
        round(float(np.mean(own_planes)), 2) if own_planes else None,
    )
