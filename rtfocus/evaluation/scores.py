"""Scores: how close an image is to the truth, how often labels are right, who wins.

One implementation for all figures. PSNR and SSIM depend on the data range, which
therefore is never guessed. Which tiles of a frame hold something to find the defocus of
is one rule for all engines, whatever their own: else an engine that calls difficult
tiles background would look better than one that dares.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from rtfocus.frame import TileGrid
from rtfocus.optics.normalisation import CELL_PX, ContrastToNoise, pad_frame

Image = NDArray[np.float32]


def specimen_tiles(frame: Image, grid: TileGrid, quantum: float) -> NDArray[np.bool_]:
    """Return True for tiles in which something stands out of the noise.

    Parameters
    ----------
    frame
        Axes (y, x), counts.
    grid
        Of the tiles.
    quantum
        Step between the camera's values; 0: real numbers.

    Returns
    -------
    NDArray[np.bool_]
        Axes (tile row, tile column).
    """
    rule = ContrastToNoise(quantum=quantum)
    padded = pad_frame(frame, CELL_PX, CELL_PX)
    sigma = max(rule.noise(padded), 1e-6 * float(np.ptp(frame)), 1e-12)
    rows, columns = (side // CELL_PX for side in padded.shape)
    down, across = _spans(grid.rows, rows, grid), _spans(grid.columns, columns, grid)
    return ~rule.empty(padded, sigma, down, across)


def _spans(count: int, cells: int, grid: TileGrid) -> list[slice]:
    """Cells that each tile of one axis covers, at least one."""
    first = grid.origin_px - (grid.tile_px - 1) / 2
    spans = []
    for index in range(count):
        begin = (first + index * grid.stride_px) / CELL_PX
        start = min(max(round(begin), 0), cells - 1)
        stop = max(round(begin + grid.tile_px / CELL_PX), start + 1)
        spans.append(slice(start, stop))
    return spans


Labels = NDArray[np.int64]

_BINS = 15
# Below it the uncertainty counts as this: certain labels round to none.
_LEAST_SIGMA_UM = 0.01
# Ranks of the cumulative match that are reported.
_TOP = 5
_FEWEST = 9
"""Places that are ranked."""


@dataclass
class LevelScore:
    """Tiles of many frames, counted; tiles without a specimen are left out.

    Parameters
    ----------
    levels
        Labels an engine can give, ascending, background apart.
    """

    levels: tuple[int, ...]
    confusion: Labels = field(init=False)
    """Tiles by true level (row) and found label (column); background is last."""
    right: int = field(init=False, default=0)
    """Tiles with a level within the true range."""
    close: int = field(init=False, default=0)
    """Tiles at most one level outside it."""
    sided: int = field(init=False, default=0)
    """Tiles whose true and found levels both have a sign that can be compared."""
    right_side: int = field(init=False, default=0)
    """Those of them with the right sign."""

    def __post_init__(self) -> None:
        count = len(self.levels)
        self.confusion = np.zeros((count, count + 1), dtype=np.int64)
        self._bins = np.zeros((_BINS, 3))
        self._errors_um: list[NDArray[np.float64]] = []
        self._deviations: list[NDArray[np.float64]] = []
        self._ranks = np.zeros(len(self.levels) + 1, dtype=np.int64)

    def add(
        self,
        true: tuple[float, float],
        predicted: Labels,
        confidence: NDArray[np.float32],
        *,
        background: int,
        sided: bool = False,
    ) -> None:
        """Count the tiles of one frame.

        Parameters
        ----------
        true
            Lowest and highest defocus in levels; equal where it is exact.
        predicted
            Label of every tile with a specimen; any shape.
        confidence
            Probability of that label.
        background
            The label that means no specimen.
        sided
            Whether the sign of the truth counts.
        """
        known = np.array(self.levels)
        lowest, highest = self.right_range(true)
        empty = predicted == background
        off = np.maximum(np.maximum(lowest - predicted, predicted - highest), 0)
        right = ~empty & (off == 0)
        self.right += int(right.sum())
        self.close += int((~empty & (off <= 1)).sum())
        in_focus = true[0] <= 0.0 <= true[1]
        nominal = 0.0 if in_focus else sum(true) / 2
        row = int(np.searchsorted(known, self._nearest(nominal)))
        column = np.where(empty, len(known), np.searchsorted(known, predicted))
        np.add.at(self.confusion[row], column.ravel(), 1)
        if true[0] == true[1]:
            # Against a range of levels every confidence would look too small.
            self._count_confidence(confidence.ravel(), right.ravel())
        if sided:
            with_sign = ~empty & (predicted != 0)
            side = 1 if sum(true) > 0 else -1
            self.sided += int(with_sign.sum())
            self.right_side += int((with_sign & (np.sign(predicted) == side)).sum())

    def add_errors(
        self,
        error_um: NDArray[np.float64],
        uncertainty_um: NDArray[np.floating] | None = None,
    ) -> None:
        """Count how far the found defocus of tiles lies from the true one.

        Parameters
        ----------
        error_um
            Found minus true; NaN: none was found.
        uncertainty_um
            Standard deviation that the engine states; None: it states none.
        """
        known = np.isfinite(error_um)
        error_um = np.abs(error_um[known])
        self._errors_um.append(error_um)
        if uncertainty_um is not None:
            sigma = np.maximum(uncertainty_um[known], _LEAST_SIGMA_UM)
            self._deviations.append(error_um / sigma)

    def add_ranks(self, ranks: Labels) -> None:
        """Count how many labels were likelier than the right one."""
        self._ranks += np.bincount(ranks, minlength=len(self._ranks))

    def right_range(self, true: tuple[float, float]) -> tuple[int, int]:
        """Return the lowest and highest level that are right."""
        return self._nearest(true[0]), self._nearest(true[1])

    @property
    def tiles(self) -> int:
        """Tiles with a specimen."""
        return int(self.confusion.sum())

    def summary(self) -> dict[str, Any]:
        """Return the shares as plain numbers; None where nothing was counted."""
        errors = np.concatenate([*self._errors_um, np.zeros(0)])
        return {
            "tiles": self.tiles,
            "accuracy": share(self.right, self.tiles),
            "within_one": share(self.close, self.tiles),
            "sign_right": share(self.right_side, self.sided),
            "called_background": share(int(self.confusion[:, -1].sum()), self.tiles),
            "top_k": self._cumulative_match(),
            "calibration_error": self._calibration_error(),
            "mean_error_um": round(float(errors.mean()), 3) if errors.size else None,
            "within_one_sigma": self._within(1.0),
            "within_two_sigma": self._within(2.0),
            "levels": list(self.levels),
            "confusion": self.confusion.tolist(),
        }

    def _nearest(self, level: float) -> int:
        """Return the label nearest to a defocus in levels; halves go up."""
        known = np.array(self.levels)
        return int(known[np.argmin(np.abs(known - np.floor(level + 0.5)))])

    def _within(self, sigmas: float) -> float | None:
        """Return the share of errors that the stated uncertainty covers.

        An honest Gaussian one covers 0.68 of them once, 0.95 twice.
        """
        deviations = np.concatenate([*self._deviations, np.zeros(0)])
        return share(int((deviations <= sigmas).sum()), deviations.size)

    def _cumulative_match(self) -> list[float] | None:
        """Return the share of tiles whose right label is among the k likeliest."""
        total = int(self._ranks.sum())
        if not total:
            return None
        shares = np.cumsum(self._ranks)[:_TOP] / total
        return [round(float(one), 4) for one in shares]

    def _count_confidence(
        self, confidence: NDArray[np.float32], right: NDArray[np.bool_]
    ) -> None:
        places = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
        np.add.at(self._bins[:, 0], places, 1)
        np.add.at(self._bins[:, 1], places, confidence)
        np.add.at(self._bins[:, 2], places, right)

    def _calibration_error(self) -> float | None:
        """Return the expected gap between confidence and share right."""
        count, confidence, right = self._bins.T
        if not count.sum():
            return None
        return round(float(np.abs(confidence - right).sum() / count.sum()), 4)


def share(part: int, whole: int) -> float | None:
    """Return part / whole to four digits; None where there is nothing."""
    return round(part / whole, 4) if whole else None


Floats = NDArray[np.float64]


@dataclass
class ErrorScore:
    """What the errors that an engine states of restored frames are worth."""

    _frames: list[tuple[Floats, Floats]] = field(default_factory=list)
    _in_focus: list[float] = field(default_factory=list)

    def add(self, stated: Floats, true: Floats, *, in_focus: bool = False) -> None:
        """Take the places of one frame: roots of mean squares, shares of its range."""
        if in_focus:
            self._in_focus.append(100 * _root(stated))
        else:
            self._frames.append((stated.ravel(), true.ravel()))

    def summary(self) -> dict[str, Any]:
        """Return rank correlations and factors of frames out of focus; and in focus."""
        none = np.zeros(0), np.zeros(0)
        stated, true = map(np.concatenate, zip(none, *self._frames, strict=True))
        correlations = [rank_correlation(*pair) for pair in self._frames]
        inner = [one for one in correlations if one is not None]
        wholes = np.array([[_root(one) for one in pair] for pair in self._frames])
        whole, truth = np.maximum(wholes.reshape(-1, 2).T, np.finfo(float).tiny)
        within = int((np.abs(np.log2(whole / truth)) <= 1).sum())
        return {
            "frames": len(self._frames),
            "places": stated.size,
            "rank": rank_correlation(stated, true),
            "rank_in_frame": _middle(inner, np.mean),
            "rank_of_frames": rank_correlation(whole, truth),
            "within_factor_two": share(within, whole.size),
            "factor": _middle(whole / truth, np.median),
            "in_focus_percent": _middle(self._in_focus, np.median),
        }


def _middle(values: Sequence[float] | Floats, of: Callable[..., Any]) -> float | None:
    return round(float(of(values)), 3) if len(values) else None


def _root(values: Floats) -> float:
    return float(np.sqrt(np.square(values).mean()))


def rank_correlation(first: Floats, other: Floats) -> float | None:
    """Return Spearman's coefficient; None of few, or where all are alike."""
    if first.size < _FEWEST or not (np.ptp(first) and np.ptp(other)):
        return None
    return round(pearson(_ranks(first), _ranks(other)), 3)


def _ranks(values: Floats) -> Floats:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place])


# Window of Wang et al. 2004: Gaussian, sigma 1.5, cut to 11 x 11 pixels.
_SIGMA_PX = 1.5
_TRUNCATE = 3.5
_BORDER_PX = 5
LEAST_SIDE_PX = 2 * _BORDER_PX + 1
"""Of images that have an SSIM."""


def mse(truth: ArrayLike, image: ArrayLike) -> float:
    """Return the mean squared error."""
    return float(np.mean((_floats(truth) - _floats(image)) ** 2))


def psnr(truth: ArrayLike, image: ArrayLike, *, data_range: float) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite for equal images."""
    error = mse(truth, image)
    return float("inf") if error == 0 else 10.0 * np.log10(data_range**2 / error)


def ssim(truth: ArrayLike, image: ArrayLike, *, data_range: float) -> float:
    """Return the mean structural similarity; colour: the mean over channels.

    Gaussian window 11 x 11, sigma 1.5, population covariance, K1 0.01, K2 0.03.

    Raises
    ------
    ValueError
        If a side is shorter than the window.

    References
    ----------
    .. [1] Z. Wang et al., "Image quality assessment", IEEE TIP 13, 2004.
    """
    a, b = _floats(truth), _floats(image)
    if a.ndim == 3:
        per_channel = [
            ssim(a[..., c], b[..., c], data_range=data_range)
            for c in range(a.shape[-1])
        ]
        return float(np.mean(per_channel))
    if min(a.shape) < LEAST_SIDE_PX:
        msg = f"image of {a.shape} is smaller than the 11 px window of SSIM"
        raise ValueError(msg)
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a = _window_mean(a * a) - mean_a**2
    var_b = _window_mean(b * b) - mean_b**2
    cov = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    inner = slice(_BORDER_PX, -_BORDER_PX)
    return float(np.mean((luminance * structure)[inner, inner]))


def pearson(truth: ArrayLike, image: ArrayLike) -> float:
    """Return Pearson's correlation coefficient; NaN where an image is constant."""
    a = _floats(truth).ravel()
    b = _floats(image).ravel()
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b) / spread) if spread > 0 else float("nan")


def match_intensity(truth: ArrayLike, image: ArrayLike) -> Floats:
    """Return gain * image + offset, the least-squares fit to the truth.

    Figures computed after it must say so: it hides a wrong brightness.
    """
    a, b = _floats(truth), _floats(image)
    spread = float(np.mean((b - b.mean()) ** 2))
    if spread == 0:
        return np.full_like(b, a.mean())
    gain = float(np.mean((a - a.mean()) * (b - b.mean()))) / spread
    return np.asarray(gain * (b - b.mean()) + a.mean())


def _floats(image: ArrayLike) -> Floats:
    return np.asarray(image, dtype=np.float64)


def _window_mean(image: Floats) -> Floats:
    return np.asarray(gaussian_filter(image, _SIGMA_PX, truncate=_TRUNCATE))


# Another engine must be better by this to be worth a change.
_WORTH_DB = 0.1
# In focus an engine is sharp enough from here on, whatever others do.
_SHARP_DB = 42.0
_SHARP_LOSS_DB = 1.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How one contender did on fields that nothing was learned from."""

    name: str
    gain_db: float
    """Mean over fields blurred on purpose, of PSNR."""
    worst_db: float
    """Of one frame."""
    in_focus_db: float
    """PSNR of frames in focus against what went in."""
    own_planes_db: float | None
    """Mean gain on the stacks' own planes out of focus; None: there are none."""


@dataclass(frozen=True, slots=True)
class EngineAdvice:
    """Which engine to use."""

    use: str
    text: str
    """In one line, with the reason."""


def judge(own: Standing, shipped: Sequence[Standing]) -> EngineAdvice:
    """Say which engine to use: one's own only where it is better and spoils nothing.

    Parameters
    ----------
    own
        The engine that was trained.
    shipped
        The others, at least one.
    """
    best = max(shipped, key=lambda one: one.gain_db)
    against = []
    if own.gain_db < best.gain_db + _WORTH_DB:
        against.append(f"'{own.name}' gains {own.gain_db:+.2f} dB")
    if own.in_focus_db < min(best.in_focus_db - _SHARP_LOSS_DB, _SHARP_DB):
        against.append(
            f"'{own.name}' changes what is in focus ({own.in_focus_db:.1f} dB against "
            f"{best.in_focus_db:.1f})"
        )
    if (
        own.own_planes_db is not None
        and best.own_planes_db is not None
        and own.own_planes_db < best.own_planes_db - _WORTH_DB
    ):
        against.append(
            f"on the stacks' own planes '{own.name}' gains {own.own_planes_db:+.2f} dB "
            f"against {best.own_planes_db:+.2f}"
        )
    if against:
        text = f"use the shipped '{best.name}': {best.gain_db:+.2f} dB; "
        return EngineAdvice(best.name, text + ", ".join(against))
    text = (
        f"use '{own.name}': {own.gain_db:+.2f} dB on held-out fields, the best shipped"
    )
    return EngineAdvice(own.name, f"{text} one '{best.name}' {best.gain_db:+.2f} dB")
