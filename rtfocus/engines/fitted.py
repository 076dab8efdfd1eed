"""Fitted: what a card says of its engine by small functions, fitted to known truth.

*Deviation*: how far off a defocus may be, as it is stated to people. The spread of a
network's label probabilities is not that: a defocus between two levels has a spread
though it is known well, and what is far out of focus, or seen by unknown optics, errs
by more than the labels say. The weighing of corrections and autofocus have calibrations
of their own and take the spread as it is.

*Evidence*: how much of a correction the image itself supports. A network that restores
images of a microscope nobody described cannot know what it has not seen: smooth
objects, finely sampled, look to it like blurred ones. What it made of them can be
looked at afterwards. Frame and correction are split into octaves (Haar details of 2, 4,
8 and 16 px) and compared around every cell of 16 px: where the frame's own power lies,
how much of it is noise (the diagonal details have next to no signal), by how much each
octave was raised, and whether the correction follows what is there or invents. Beside
these ratios, which know neither counts nor contrast nor kind of specimen, stands what
the labels say of themselves: on kinds never seen they scatter. From both follows the
share of the correction that is applied, between none and all.

*Expected error*: what a restoration is still off by. From the measures of evidence, the
share applied and how much that changed follows the squared error left around a place,
as it was where the sharp image is known. It is stated beside a restored frame.

*Scales*: a blur beyond the labels is among them in the frame of half the size, where a
defocus found stands for twice as much. And noise, which passes for the finest detail of
a dim image, is weaker there.

The functions are fitted by ``python -m bench.evidence``.
"""

from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rtfocus.config.sections import Section
from rtfocus.frame import BACKGROUND, DefocusMap, TileGrid
from rtfocus.optics.normalisation import (
    PercentileRange,
    around,
    haar,
    luminance,
    mean_product,
    pad_frame,
)

Share = Annotated[float, Field(ge=0)]


class LayerCard(Section):
    """One layer of a small fitted function; between layers negative values are 0."""

    weights: list[list[float]]
    """One row per output."""
    bias: list[float]
    """One per output."""


class EvidenceCard(Section):
    """How far corrections of a joint engine are trusted, its optics untold."""

    middle: list[float]
    """Mean of every measure where the function was fitted."""
    spread: list[Annotated[float, Field(gt=0)]]
    """Its deviation there."""
    layers: Annotated[list[LayerCard], Field(min_length=1)]
    """From the measures to one number, the log-odds of the share applied."""
    measures: ClassVar[int] = 25

    @model_validator(mode="after")
    def _fits_together(self) -> "EvidenceCard":
        width = len(self.middle)
        sound = len(self.spread) == width == self.measures
        for layer in self.layers:
            sound &= all(len(row) == width for row in layer.weights)
            width = len(layer.weights)
            sound &= len(layer.bias) == width
        if not sound or width != 1:
            msg = f"its layers do not lead from {self.measures} measures to one number"
            raise ValueError(msg)
        return self


class ErrorCard(EvidenceCard):
    """The squared error left by a restoration, its optics untold.

    From the measures, the share applied and the power of the change (`error_measures`)
    to the logarithm of the error, in squares of the frame's range.
    """

    measures: ClassVar[int] = EvidenceCard.measures + 2


class DeviationCard(Section):
    """Variance of the defocus, in squared levels: a sum of three parts."""

    spread: Share
    """Factor of the labels' variance beyond that of a place between two levels."""
    floor: Share
    """What is added everywhere."""
    distance: Share
    """Factor of the squared distance from focus, in levels."""


def stated_um(
    defocus: DefocusMap, fit: DeviationCard | None, step_um: float
) -> NDArray[np.float32] | None:
    """Return the standard deviation to state beside each tile's defocus.

    Parameters
    ----------
    defocus
        What the engine says, axes (tile_y, tile_x).
    fit
        Of its card; None: the spread of its labels is all there is.

    Returns
    -------
    NDArray
        In um, same axes, NaN = background; None: the engine gives no spread.
    """
    if fit is None or defocus.uncertainty_um is None:
        return defocus.uncertainty_um
    step = np.float32(step_um)
    mean, deviation = defocus.defocus_um / step, defocus.uncertainty_um / step
    stated = stated_variance(fit, mean, deviation)
    return np.asarray(np.sqrt(stated) * step_um, dtype=np.float32)


def stated_variance(
    fit: DeviationCard, level: NDArray[Any], spread: NDArray[Any]
) -> NDArray[Any]:
    """Return the variance to state, in squared levels.

    Parameters
    ----------
    level
        Defocus found, in levels; any shape.
    spread
        Standard deviation of its labels, in levels; same shape.
    """
    between = level - np.floor(level)
    beyond = np.maximum(np.square(spread) - between * (1 - between), 0)
    return np.asarray(fit.spread * beyond + fit.floor + fit.distance * np.square(level))


Image = NDArray[np.float32]

CELL_PX = 16
BLOCK_PX = 2 * CELL_PX
"""Side of the cells of an error, which is then averaged over the tiles of the map."""
OCTAVES = 4
# Least power, in squares of the frame's range: below it nothing is measured.
_LEAST = 1e-7
_NOISE_OCTAVES = 3
_LEAST_SPREAD = 0.1
FARTHEST = 3.0
"""In units of a measure's spread at fitting: what lies farther out counts as this."""


class Evidence:
    """Weighs the corrections of one engine; thread-safe.

    Parameters
    ----------
    normalisation
        Finds a frame's dark and bright value.
    step_um
        Defocus between two levels of the engine.
    error_card
        Of the error that is left; None: not known.
    """

    def __init__(
        self,
        card: EvidenceCard,
        normalisation: PercentileRange,
        step_um: float,
        error_card: ErrorCard | None = None,
    ) -> None:
        self.card, self.error_card = card, error_card
        self.normalisation = normalisation
        self.step_um = step_um
        self._log_odds = _Fitted(card)
        self._log_error = None if error_card is None else _Fitted(error_card)

    def weigh(self, signal: Image, defocus: DefocusMap, out: Image) -> Image | None:
        """Take back of a restored frame what nothing speaks for.

        Returns the root mean square error expected in each tile, in the signal's unit;
        None: not known.

        Parameters
        ----------
        signal
            Axes (y, x) or (y, x, colour).
        defocus
            Defocus by the engine that restored it.
        out
            Restored frame, changed in place: nearer to `signal`, never farther. Pixels
            that equal the signal's stay so.
        """
        grey = luminance(signal)
        dark, scale = self.normalisation.fit(grey)
        change = (luminance(out) - grey) / np.float32(scale)
        changed = bool(change.any())
        if not changed and self._log_error is None:
            return None
        normalised = (grey - np.float32(dark)) / np.float32(scale)
        measured = measures(normalised, change, defocus, self.step_um)
        share = self.shares(measured)
        if changed:
            rows, columns = (_to_pixels(side) for side in grey.shape)
            weight = rows @ share @ columns.T
            out -= signal
            out *= weight if signal.ndim == 2 else weight[..., None]
            out += signal
        if self._log_error is None:
            return None
        square = np.exp(self._log_error(error_measures(measured, share, change)))
        down, across = _overlaps(defocus.grid, grey.shape)
        error = np.sqrt(down @ square @ across.T) * np.float32(scale)
        return np.asarray(error, dtype=np.float32)

    def shares(self, measured: Image) -> Image:
        """Return the share of the correction per cell, 0 to 1, from its `measures`."""
        return np.asarray(1 / (1 + np.exp(-self._log_odds(measured))), np.float32)


class _Fitted:
    """A small function of measures, axes (measure, row, column)."""

    def __init__(self, card: EvidenceCard) -> None:
        self._middle = np.array(card.middle, np.float32)
        self._spread = np.array(card.spread, np.float32)
        self._layers = [
            (np.array(layer.weights, np.float32), np.array(layer.bias, np.float32))
            for layer in card.layers
        ]

    def __call__(self, measured: Image) -> Image:
        """Return its value, axes (row, column)."""
        value = (np.moveaxis(measured, 0, -1) - self._middle) / self._spread
        value = np.clip(value, -FARTHEST, FARTHEST)
        for number, (weights, bias) in enumerate(self._layers):
            value = (np.maximum(value, 0) if number else value) @ weights.T + bias
        return np.asarray(value[..., 0])


def error_measures(measured: Image, share: Image, change: Image) -> Image:
    """Return what the error of a block follows from, axes (measure, row, column).

    Of the `measures` of every cell, the share applied there, and the correction, axes
    (y, x), in units of the frame's range. There is a block for every 32 px begun.
    """
    whole = pad_frame(change, CELL_PX)[None]
    power = mean_product(whole, whole, CELL_PX)
    odd = [(0, side % 2) for side in power.shape]
    power = np.pad(power, odd, mode="edge").reshape(-(-power.shape[0] // 2), 2, -1, 2)
    first = share[::2, ::2]
    return with_applied(measured[:, ::2, ::2], first, power.mean(axis=(1, 3)))


def with_applied(measured: Image, share: Image, power: Image) -> Image:
    """Add the share applied and what it changed, a logarithm, to the measures."""
    applied = np.log(share**2 * power + np.float32(_LEAST)) / 4
    return np.concatenate([measured, share[None], applied[None]]).astype(np.float32)


def forget_unseen(error: Image, grid: TileGrid, pixels: NDArray[Any]) -> None:
    """Set to NaN what is said of tiles whose pixels are medians in place of NaN."""
    numbers = np.isfinite(pixels)
    if numbers.ndim == 3:  # all(axis=2) takes seven times as long
        numbers = numbers[..., 0] & numbers[..., 1] & numbers[..., 2]
    down, across = (share > 0 for share in _overlaps(grid, numbers.shape, block_px=1))
    rows = np.stack([numbers[tile].any(axis=0) for tile in down])
    error[~(rows @ across.T)] = np.nan


def _overlaps(
    grid: TileGrid, shape: tuple[int, ...], block_px: int = BLOCK_PX
) -> list[Image]:
    """Weights of a frame's blocks along y, and along x, for every tile: its shares."""
    overlaps = []
    for tiles, side_px in zip((grid.rows, grid.columns), shape, strict=True):
        begin = grid.centres_px(tiles)[:, None] + 0.5 - grid.tile_px / 2
        edges = np.minimum(block_px * np.arange(-(-side_px // block_px) + 1), side_px)
        end = np.minimum(begin + grid.tile_px, edges[1:])
        common = np.maximum(end - np.maximum(begin, edges[:-1]), 0)
        overlaps.append(common / common.sum(axis=1, keepdims=True))
    return [np.asarray(shares, np.float32) for shares in overlaps]


def measures(
    frame: Image, correction: Image, defocus: DefocusMap, step_um: float
) -> Image:
    """Return `ratios` and `certainty` together, axes (measure, row, column)."""
    shape = frame.shape[0], frame.shape[1]
    features = certainty(defocus, step_um, shape)
    return np.concatenate([ratios(frame, correction), features])


def ratios(frame: Image, correction: Image) -> Image:
    """Measure a correction against the frame it was made from.

    Parameters
    ----------
    frame
        Axes (y, x), normalised: 0 and 1 at its dark and bright percentile.
    correction
        What is to be added to it, same shape and unit.

    Returns
    -------
    Image
        Axes (ratio, row, column), a cell for every 16 px begun; 21 logarithms.
    """
    padded, raised = (pad_frame(image, CELL_PX) for image in (frame, correction))
    power, common, added, noise, noise_after = [], [], [], [], []
    for octave in range(OCTAVES):
        cells = CELL_PX >> (octave + 1)
        (padded, details), (raised, changes) = haar(padded), haar(raised)
        power.append(mean_product(details, details, cells))
        common.append(mean_product(details, changes, cells))
        added.append(mean_product(changes, changes, cells))
        noise.append(mean_product(details[2:], details[2:], cells))
        after = details[2:] + changes[2:]
        noise_after.append(mean_product(after, after, cells))
    p, b, c, d, e = (
        around(np.stack(one)) for one in (power, common, added, noise, noise_after)
    )
    total = p.sum(axis=0)
    logs = [
        *_log_ratio(p, total[None]),
        *_log_ratio(p + 2 * b + c, p),
        *_log_ratio(c, p),
        *(4 * b / (np.sqrt(p * c) + _LEAST)),
        *_log_ratio(d[:_NOISE_OCTAVES], p[:_NOISE_OCTAVES]),
        *_log_ratio(e[:1], d[:1]),
        np.log(total + _LEAST),
    ]
    return np.asarray(np.stack(logs) / 4, dtype=np.float32)


def certainty(defocus: DefocusMap, step_um: float, shape: tuple[int, int]) -> Image:
    """Spread what the labels say of themselves over the cells of a frame.

    Parameters
    ----------
    defocus
        Of the engine that made the correction.
    shape
        Height and width of the frame.

    Returns
    -------
    Image
        Confidence, deviation in levels (logarithm), distance in levels and share of
        background; axes (4, row, column).
    """
    empty = defocus.level == BACKGROUND
    spread_um = np.zeros_like(defocus.defocus_um)
    if defocus.uncertainty_um is not None:
        spread_um = np.where(empty, 0, defocus.uncertainty_um)
    levels = np.abs(np.where(empty, 0, defocus.defocus_um)) / step_um
    features = np.stack(
        [
            defocus.confidence,
            np.log(spread_um / step_um + _LEAST_SPREAD) / 2,
            levels / 5,
            empty.astype(np.float32),
        ]
    )
    grid, (height, width) = defocus.grid, shape
    rows = _linear(_cell_centres(height), grid.centres_px(grid.rows))
    columns = _linear(_cell_centres(width), grid.centres_px(grid.columns))
    return np.asarray(rows @ features @ columns.T, dtype=np.float32)


def _to_pixels(side_px: int) -> Image:
    """Weights of the cells for every pixel along one axis, linear between centres."""
    return _linear(np.arange(side_px), _cell_centres(side_px))


def _cell_centres(side_px: int) -> NDArray[Any]:
    return (np.arange(-(-side_px // CELL_PX)) + 0.5) * CELL_PX - 0.5


def _linear(places: NDArray[Any], centres: NDArray[Any]) -> Image:
    weights = [np.interp(places, centres, one) for one in np.eye(len(centres))]
    return np.stack(weights, axis=1).astype(np.float32)


def _log_ratio(above: Image, below: Image) -> Image:
    top = np.maximum(above, 0) + np.float32(_LEAST)
    return np.asarray(np.log(top / (below + np.float32(_LEAST))))


_FAR = 0.8
"""Share of the range from which on a defocus may lie beyond it."""
_DROWNED = 0.6
"""Share of the finest detail that may be noise; in sharp images a third looks so."""


def unsettled_um(
    defocus: DefocusMap, pixels: NDArray[Any], *, step_um: float, farthest: int
) -> Image:
    """Tell for every tile what the frame of half the size must exceed to be believed.

    Where the blur may be beyond the levels, that is the distance found. Where the
    finest detail is noise it is a level of that frame more, which is two of this one.

    Parameters
    ----------
    pixels
        The frame, axes (y, x) or (y, x, colour).

    Returns
    -------
    Image
        Distance from focus in um, axes (tile_y, tile_x); infinite where that frame need
        not be asked, NaN = background.
    """
    distance = np.abs(defocus.defocus_um)
    noisy = _noise_share(pixels, defocus.grid) > _DROWNED
    least = np.where(noisy, distance + 2 * step_um, np.inf)
    far = distance > _FAR * farthest * step_um
    return np.where(far, distance, least).astype(np.float32)


def _noise_share(pixels: NDArray[Any], grid: TileGrid) -> Image:
    """Return for every tile how much of its finest detail is noise, about 0 to 1.

    White noise is equal in all directions; detail has next to nothing in diagonals.
    """
    _, details = haar(pad_frame(luminance(pixels.astype(np.float32)), CELL_PX))
    power, noise = (
        around(mean_product(one, one, CELL_PX // 2)) for one in (details, details[2:])
    )
    share = 3 * noise / np.maximum(power, np.finfo(np.float32).tiny)
    rows = _cell_at(grid.centres_px(grid.rows), share.shape[0])
    columns = _cell_at(grid.centres_px(grid.columns), share.shape[1])
    return np.asarray(share[np.ix_(rows, columns)])


def _cell_at(centres: NDArray[Any], cells: int) -> NDArray[np.intp]:
    places = np.clip(centres // CELL_PX, 0, cells - 1)
    return np.asarray(places, dtype=np.intp)
