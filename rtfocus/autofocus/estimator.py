"""Estimator: what a frame and its defocus map say of focus.

A frame's defocus map becomes one estimate with a deviation, or a refusal with its
reason: a refused move costs a second, a wrong one an objective. Tiles speak with the
weight of their content and of the engine's certainty, a robust fit takes the tilt of
the specimen out, and what is left over decides how sure the estimate is.
"""

from collections import Counter, deque
from dataclasses import dataclass
from math import ceil, isfinite

import msgspec
import numpy as np
from numpy.typing import NDArray

from rtfocus.autofocus.appearance import amplitude_spectrum
from rtfocus.config import Config
from rtfocus.engines.registry import check_region, find_engine, parts, step_um
from rtfocus.frame import (
    DefocusMap,
    Estimate,
    FocusReading,
    FrameHeader,
    Role,
    SeriesStart,
    TileGrid,
)
from rtfocus.machine import RUN_CLOCK
from rtfocus.workers import TimeShare

Floats = NDArray[np.float64]
FocusRegion = tuple[int, int, int, int]

# Of the frame; saturated pixels have lost the detail that tells focus.
_MOST_SATURATED = 0.02
_EDGE = 0.93
_FEW_TILES = 3
# Tiles whose own deviation is this share of the range do not know.
_FLAT = 0.30
# Two groups of tiles.
_GROUP_SHARE = 0.25  # of the weight, at least, in each
_GROUP_DEVIATIONS = 3.5  # apart, of their own
_GROUP_UNITS = 1.5  # apart, in depths of field
_TILT_TILES = 8
_HUBER = 1.345


@dataclass(frozen=True, slots=True)
class EstimatorSettings:
    """What the estimator must know beside a frame."""

    unit_um: float
    """Depth of field n lambda / NA^2."""
    range_um: float
    """Highest level of the engine."""
    base_sd: float = 1.05
    """Deviation of an engine in focus, in depths of field: as DelpNet was seen to read
    on drawn specimens of `bench.autofocus --seed 11`; others were not looked at."""
    relative_sd: float = 0.17
    """Its growth with the defocus."""
    dark_counts: float = 0.0
    """Camera offset."""
    saturation_counts: float | None = None
    """None: no pixel counts as saturated."""
    region: FocusRegion | None = None
    """x, y, width, height in pixels; None: the whole frame."""


def estimator_settings(
    config: Config, channel: str, *, bit_depth: int | None
) -> EstimatorSettings | None:
    """Return what the estimator must know of a channel; None: it cannot focus.

    A channel without optics or classifier cannot.
    """
    name, _ = config.engines_of(channel)
    optics = config.channel(channel).optics
    if optics is None or name is None:
        return None
    card = find_engine(name, config.processing.engine_folders).card
    check_region(card, config.autofocus.region)
    levels, _ = parts(card)
    saturation = config.camera.saturation_counts
    if saturation is None and bit_depth is not None:
        saturation = float(2**bit_depth - 1)
    return EstimatorSettings(
        unit_um=optics.defocus_unit_um,
        range_um=(levels.count - 1)
        * step_um(card, optics, blind=config.processing.blind),
        dark_counts=config.camera.offset_counts,
        saturation_counts=saturation,
        region=config.autofocus.region,
    )


def look_at(pixels: NDArray[np.generic], settings: EstimatorSettings) -> FocusReading:
    """Read what a frame alone shows of focus, before a classifier has seen it.

    Parameters
    ----------
    pixels
        The frame, axes (y, x) or (y, x, rgb), counts.
    settings
        Region, dark and saturated counts.

    Returns
    -------
    FocusReading
        Early: with a spectrum, without an estimate.
    """
    spectrum, noise = amplitude_spectrum(
        pixels, settings.region, dark_counts=settings.dark_counts
    )
    level, region = settings.saturation_counts, _region(pixels, settings.region)
    saturated = 0.0
    if level is not None:
        counts = pixels[region]
        # Whole numbers are compared as such, which is the same and much faster.
        whole = counts.dtype.kind in "iu" and isfinite(level)
        least = ceil(level) if whole else level
        over = np.greater_equal(counts, least)
        saturated = float(np.count_nonzero(over) / over.size)
    is_saturated = saturated > _MOST_SATURATED
    share = f"{100 * saturated:.1f} % of the pixels are saturated"
    return FocusReading(
        defocus_um=None,
        sd_um=None,
        signed=False,
        refusal="saturated" if is_saturated else None,
        detail=share if is_saturated else "",
        spectrum=[round(float(value), 7) for value in spectrum],
        noise=noise,
        saturated=round(saturated, 4),
        early=True,
    )


def read_focus(
    defocus: DefocusMap,
    pixels: NDArray[np.generic],
    settings: EstimatorSettings,
    look: FocusReading | None = None,
) -> FocusReading:
    """Estimate the defocus of a frame.

    Parameters
    ----------
    defocus
        Of the frame, tile by tile.
    pixels
        The frame, axes (y, x) or (y, x, rgb), counts.
    settings
        Unit, range and region.
    look
        What `look_at` found in this frame; None: it is done here.

    Returns
    -------
    FocusReading
        With an estimate or with a refusal; the spectrum is there in both cases.
    """
    look = look or look_at(pixels, settings)
    tiles = _tiles(defocus, pixels, settings)
    estimate, refusal, detail = _judge(tiles, defocus.grid, settings)
    if look.refusal:
        refusal, detail = look.refusal, look.detail
    return msgspec.structs.replace(
        look,
        defocus_um=None if refusal else estimate.value_um,
        sd_um=None if refusal else estimate.sd_um,
        signed=defocus.grid.signed,
        refusal=refusal,
        detail=detail,
        tilt_um=estimate.tilt_um,
        tiles=len(tiles.value_um),
        early=False,
    )


_HOLD_SHARE, _HOLD_MOST_S = 0.2, 0.5
"""Of the receiving thread's time that hold may take, and seconds saved for bursts."""
_MOST_LOOKS = 1024
_LEFT_OUT = FocusReading(None, None, signed=False, refusal="left_out")


class FocusReader:
    """Processor side: adds to an estimate what autofocus must know of a frame.

    Focus probes are always read. Where autofocus holds focus so are planned frames of
    its channel, as many as a share of the receiving thread's time allows: as soon as
    they have arrived, and again with their classifier's estimate.

    Parameters
    ----------
    config, series
        What is recorded, and how.
    held
        Where frames are counted as ``looked_at`` or ``left_out``.
    """

    def __init__(self, config: Config, series: SeriesStart, held: Counter[str]) -> None:
        self._holds = config.autofocus.mode == "hold"
        names = [channel.name for channel in series.channels]
        focus_channel = config.autofocus.focus_channel
        self._channel = names.index(focus_channel) if focus_channel in names else 0
        self._share, self._held = TimeShare(_HOLD_SHARE, _HOLD_MOST_S), held
        self._settings = [
            estimator_settings(config, channel.name, bit_depth=series.bit_depth)
            for channel in series.channels
        ]
        self._looks: deque[tuple[int, FocusReading]] = deque(maxlen=_MOST_LOOKS)
        """Of frames that are to be read, in order, with their sequence."""

    def look(self, frame: FrameHeader, pixels: NDArray[np.generic]) -> Estimate | None:
        """Return what hold goes by in a frame, without waiting for its classifier.

        None: focus is not held by this frame. A classifier that takes longer than the
        frames' interval would let hold fall behind.
        """
        settings = self._settings_of(frame)
        if settings is None or frame.role is Role.FOCUS:
            return None
        if not self._share.allows():
            self._held["left_out"] += 1
            self._looks.append((frame.sequence, _LEFT_OUT))
            return None
        with self._share.spending():
            look = look_at(pixels, settings)
        self._looks.append((frame.sequence, look))
        self._held["looked_at"] += 1
        return Estimate(
            series_uid=frame.series_uid,
            sequence=frame.sequence,
            level=None,
            defocus_um=None,
            signed=False,
            confidence=0.0,
            foreground=0.0,
            z_um=frame.z_um,
            z_offset_um=frame.z_offset_um,
            index=frame.index,
            captured_ns=frame.captured_ns,
            estimated_ns=RUN_CLOCK.now_ns(),
            focus=look,
        )

    def read(
        self,
        frame: FrameHeader,
        pixels: NDArray[np.generic],
        estimate: Estimate,
        defocus: DefocusMap,
    ) -> Estimate:
        """Return the estimate of a frame with its focus reading, or as it is."""
        settings = self._settings_of(frame)
        if settings is None:
            return estimate
        look = self._look_of(frame.sequence)
        if look is not _LEFT_OUT:
            look = read_focus(defocus, pixels, settings, look)
        return msgspec.structs.replace(estimate, focus=look)

    def _look_of(self, sequence: int) -> FocusReading | None:
        """Return the look at a frame, if there was one; those before it are done."""
        # Frames come in order: one that was not read before has failed.
        while self._looks and self._looks[0][0] <= sequence:
            number, look = self._looks.popleft()
            if number == sequence:
                return look
        return None

    def _settings_of(self, frame: FrameHeader) -> EstimatorSettings | None:
        """Return what is needed to read a frame; None: it is not read for autofocus."""
        channel = frame.index.get("c", 0)
        is_held = self._holds and channel == self._channel
        return self._settings[channel] if is_held or frame.role is Role.FOCUS else None


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles that show something; arrays of shape (tile,)."""

    value_um: Floats
    sd_um: Floats
    weight: Floats
    x: Floats
    """Place across the frame, -0.5 to 0.5, from the middle of the region."""
    y: Floats
    total: int
    """Tiles of the region, background too."""


@dataclass(frozen=True, slots=True)
class _Fit:
    value_um: float
    sd_um: float
    tilt_um: tuple[float, float]
    residual_um: Floats


def _judge(
    tiles: _Tiles, grid: TileGrid, settings: EstimatorSettings
) -> tuple[_Fit, str | None, str]:
    number, unit = len(tiles.value_um), settings.unit_um
    if number == 0:
        nothing = _Fit(0.0, 0.0, (0.0, 0.0), np.zeros(0))
        return nothing, "blank", f"none of {tiles.total} tiles shows a specimen"
    fit = _fit(tiles, signed=grid.signed, settings=settings)
    if number < min(_FEW_TILES, tiles.total):
        return fit, "few_tiles", f"{number} of {tiles.total} tiles show a specimen"
    own_sd = _weighted_median(tiles.sd_um, tiles.weight)
    magnitude = _weighted_median(np.abs(tiles.value_um), tiles.weight)
    if magnitude > _EDGE * settings.range_um:
        text = f"{magnitude:.1f} um is the end of the range of {settings.range_um:.1f}"
        return fit, "edge", text
    if own_sd > _FLAT * settings.range_um:
        return fit, "flat", f"tiles are unsure by {own_sd:.1f} um"
    gap_um = _gap_um(fit.residual_um, tiles.weight)
    if gap_um > _GROUP_UNITS * unit:
        return fit, "two_peaks", f"two groups of tiles, {gap_um:.1f} um apart"
    return fit, None, ""


def _tiles(
    defocus: DefocusMap, pixels: NDArray[np.generic], settings: EstimatorSettings
) -> _Tiles:
    grid = defocus.grid
    height, width = pixels.shape[:2]
    shape = defocus.defocus_um.shape
    y_px, x_px = np.meshgrid(*map(grid.centres_px, shape), indexing="ij")
    left, top, wide, high = settings.region or (0, 0, width, height)
    inside = (x_px >= left) & (x_px < left + wide)
    inside &= (y_px >= top) & (y_px < top + high)
    used = inside & np.isfinite(defocus.defocus_um)
    uncertainty = defocus.uncertainty_um
    sd_um = (
        np.zeros(shape) if uncertainty is None else np.nan_to_num(uncertainty)
    ).astype(np.float64)
    content = tile_content(pixels, grid, shape)[used]
    typical = float(np.median(content)) if content.size else 1.0
    share = np.clip(content / max(typical, 1e-9), 0.25, 4.0)
    certainty = defocus.confidence[used].astype(np.float64)
    certainty /= sd_um[used] ** 2 + (0.25 * settings.unit_um) ** 2
    return _Tiles(
        value_um=defocus.defocus_um[used].astype(np.float64),
        sd_um=sd_um[used],
        weight=share * np.maximum(certainty, 1e-12),
        x=(x_px[used] - (left + wide / 2)) / width,
        y=(y_px[used] - (top + high / 2)) / height,
        total=int(inside.sum()),
    )


def tile_content(
    pixels: NDArray[np.generic], grid: TileGrid, shape: tuple[int, ...]
) -> Floats:
    """Return how much each tile varies by every second pixel, in counts."""
    grey = pixels.mean(axis=2) if pixels.ndim == 3 else pixels
    middles, half = [*map(grid.centres_px, shape)], int(grid.tile_px / 2)
    top, left = (np.maximum(middle.astype(int) - half, 0) for middle in middles)
    bottom, right = (middle.astype(int) + half for middle in middles)
    content = np.zeros(shape)
    # A row of tiles is summed at once: those on even columns, then those on odd ones.
    for parity in np.unique(left % 2):
        tiles = np.flatnonzero(left % 2 == parity)
        used = slice(left[tiles[0]], right[tiles[-1]], 2)
        columns = np.arange(grey.shape[1])[used, None]
        inside = ((columns >= left[tiles]) & (columns < right[tiles])).astype(float)
        wide = inside.sum(axis=0)
        for row in range(shape[0]):
            band = grey[top[row] : bottom[row] : 2, used].astype(np.float64)
            sums = np.stack([band.sum(axis=0), np.einsum("yx,yx->x", band, band)])
            mean, square = sums @ inside / np.maximum(len(band) * wide, 1)
            content[row, tiles] = np.sqrt(np.maximum(square - mean**2, 0.0))
    return content


def _fit(tiles: _Tiles, *, signed: bool, settings: EstimatorSettings) -> _Fit:
    """Fit a plane where there are tiles enough, else a median."""
    value, weight = tiles.value_um, tiles.weight
    middle = _weighted_median(value, weight)
    residual, tilt = value - middle, (0.0, 0.0)
    # Distances rise on both sides of focus: a plane fits them only away from it.
    far = signed or middle > 2.0 * settings.unit_um
    if len(value) >= _TILT_TILES and far:
        fitted = _plane(tiles)
        if fitted is not None and (weight @ np.abs(fitted[1])) < (
            weight @ np.abs(residual)
        ):
            (middle, *slopes), residual = fitted
            tilt = (float(slopes[0]), float(slopes[1]))
    spread = 1.4826 * _weighted_median(np.abs(residual), weight)
    effective = float(weight.sum() ** 2 / (weight**2).sum())
    of_engine = settings.base_sd * settings.unit_um
    of_engine += settings.relative_sd * abs(middle)
    sd_um = float(np.hypot(spread / np.sqrt(effective), of_engine))
    return _Fit(float(middle), sd_um, tilt, residual)


def _plane(tiles: _Tiles) -> tuple[tuple[float, float, float], Floats] | None:
    """Fit value = a + b x + c y robustly; None where the tiles lie on a line."""
    terms = np.stack([np.ones_like(tiles.x), tiles.x, tiles.y], axis=1)
    if np.linalg.cond(terms.T @ terms) > 1e6:
        return None
    weight = tiles.weight
    for _ in range(5):
        root = np.sqrt(weight)
        solution, *_ = np.linalg.lstsq(
            terms * root[:, None], tiles.value_um * root, rcond=None
        )
        residual = tiles.value_um - terms @ solution
        scale = 1.4826 * _weighted_median(np.abs(residual), tiles.weight) + 1e-9
        far = np.maximum(np.abs(residual) / (_HUBER * scale), 1.0)
        weight = tiles.weight / far
    return (float(solution[0]), float(solution[1]), float(solution[2])), residual


def _gap_um(residual: Floats, weight: Floats) -> float:
    """Return how far two groups of tiles lie apart; 0 where there is one group."""
    order = np.argsort(residual)
    value, share = residual[order], weight[order] / weight.sum()
    below = np.cumsum(share)[:-1]
    cuts = np.flatnonzero((below > _GROUP_SHARE) & (below < 1 - _GROUP_SHARE))
    if cuts.size == 0:
        return 0.0
    cut = cuts[int(np.argmax(np.diff(value)[cuts]))] + 1
    low, high = value[:cut], value[cut:]
    gap = float(np.median(high) - np.median(low))
    # Groups differ from a spread by the empty room between them.
    within = float(np.std(low) + np.std(high)) / 2
    apart = gap > _GROUP_DEVIATIONS * within
    return gap if apart else 0.0


def _weighted_median(values: Floats, weights: Floats) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    place = int(np.searchsorted(total, 0.5 * total[-1]))
    return float(values[order][min(place, len(values) - 1)])


def _region(
    pixels: NDArray[np.generic], region: FocusRegion | None
) -> tuple[slice, slice]:
    x, y, width, height = region or (0, 0, pixels.shape[1], pixels.shape[0])
    return slice(y, y + height), slice(x, x + width)
