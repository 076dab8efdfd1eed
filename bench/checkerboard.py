"""Checkerboard bench: the lattice that trained restorers leave, and what they gain.

A network that doubles its maps by transposed convolutions weighs every second
pixel differently. Two doublings leave a pattern that repeats every 4 px: power at
the frequencies k/4 cycles per pixel, where an image has no reason to have more
than at their neighbours. Real pairs of the recipe's validation side go as whole
fields through the network of each checkpoint; the sharp and the blurred field say
what an image without lattice has.

Run: python -m bench.checkerboard CHECKPOINT [CHECKPOINT ...]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rtfocus.evaluation.scores import psnr
from rtfocus.training.commands import trained
from rtfocus.training.feed import load_checkpoint
from rtfocus.training.scenes import Pair, data_folder, load_real_pairs

_WINDOW_PX = 64
_FAR, _NEAR = 6, 3
_TINY = 1e-300  # an empty bin has no logarithm


def checkerboard_ratio(image: ArrayLike, *, period_px: int = 4) -> float:
    """Return the power at the upsampling's lattice, relative to its neighbours'.

    The power spectrum is averaged over Hann windows of 64 px, half overlapping, so
    that a pattern is found although its strength and sign vary over the image. Per
    lattice frequency the power of its own bin is compared with the geometric mean of
    the bins 3 to 6 away (the window spreads a frequency over its neighbours); powers
    are summed over the lattice before they are divided.

    Parameters
    ----------
    image
        Axes (y, x), at least 64 px along both; any unit.
    period_px
        Pixels after which the pattern repeats: 2 per doubling, 4 for two.

    Returns
    -------
    float
        About 1 for an image without pattern. On white noise of variance v, a
        checkerboard of amplitude a adds 121 a^2 / v: (64 * 2/3)^2 for the window,
        shared by the 15 lattice frequencies.

    Raises
    ------
    ValueError
        If the image is smaller than a window or the period does not divide it.
    """
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim != 2 or min(pixels.shape) < _WINDOW_PX or _WINDOW_PX % period_px:
        msg = (
            f"checkerboard of shape {pixels.shape} at period_px={period_px}: needs "
            f"axes (y, x) of at least {_WINDOW_PX} px and a period that divides them"
        )
        raise ValueError(msg)
    power = _mean_power(pixels)
    if not power.any():
        return 1.0  # a constant image has no pattern, and nothing to divide by
    step = _WINDOW_PX // period_px
    places = range(0, _WINDOW_PX, step)
    own = around = 0.0
    for row in places:
        for column in places:
            if row == 0 and column == 0:
                continue
            own += power[row, column]
            around += _surroundings(power, row, column)
    return own / around


def _mean_power(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average the windowed power spectrum over half overlapping windows."""
    taper = np.hanning(_WINDOW_PX + 1)[:-1]
    window = np.outer(taper, taper)
    views = np.lib.stride_tricks.sliding_window_view(pixels, (_WINDOW_PX, _WINDOW_PX))
    views = views[:: _WINDOW_PX // 2, :: _WINDOW_PX // 2]
    means = views.mean(axis=(2, 3), keepdims=True)
    spectra = np.fft.fft2((views - means) * window)
    return np.asarray((np.abs(spectra) ** 2).mean(axis=(0, 1)))


def _surroundings(power: NDArray[np.float64], row: int, column: int) -> float:
    """Return the geometric mean power of a square ring around a bin.

    On an axis (row or column 0) the ring would compare frequencies of other
    directions, of which images have far less: there it is a piece of the axis.
    """
    offsets = np.arange(-_FAR, _FAR + 1)
    rows = offsets if row else np.zeros(1, dtype=int)
    columns = offsets if column else np.zeros(1, dtype=int)
    distance = np.maximum(np.abs(rows)[:, None], np.abs(columns)[None, :])
    patch = power[np.ix_((row + rows) % _WINDOW_PX, (column + columns) % _WINDOW_PX)]
    return float(np.exp(np.log(patch[distance >= _NEAR] + _TINY).mean()))


Image = np.ndarray
# Sides that every network can halve as often as it does.
_MULTIPLE_PX = 16


def restored_by(network: torch.nn.Module) -> Callable[[Image], Image]:
    """Return a function that restores a whole field."""

    @torch.no_grad()
    def restore(blurred: Image) -> Image:
        return network(torch.from_numpy(blurred)[None, None])[0, 0].numpy()

    return restore


def cut(image: Image) -> Image:
    """Cut a field to sides that the network can halve."""
    height, width = (side - side % _MULTIPLE_PX for side in image.shape)
    return np.ascontiguousarray(image[:height, :width])


def report(name: str, pairs: list[Pair], restore: Callable[[Image], Image]) -> None:
    """Print the mean lattice at both periods and the mean PSNR."""
    ratios: dict[int, list[float]] = {2: [], 4: []}
    scores = []
    for blurred, sharp in pairs:
        image = restore(cut(blurred))
        for period_px, values in ratios.items():
            values.append(checkerboard_ratio(image, period_px=period_px))
        wanted = cut(sharp)
        scores.append(psnr(wanted, image, data_range=float(np.ptp(wanted))))
    print(
        f"{name:<24} period 2 px {np.mean(ratios[2]):6.3f}   "
        f"period 4 px {np.mean(ratios[4]):6.3f}   PSNR {np.mean(scores):6.2f} dB"
    )


def main() -> None:
    """Measure the sharp and blurred fields, then each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for place, path in enumerate(options.checkpoints):
        recipe: Any  # of a restorer: it names pairs
        recipe, state = load_checkpoint(path)
        _, network = trained(recipe, state)
        pairs = [
            pair
            for wanted in recipe.pairs.real
            for pair in load_real_pairs(wanted, data_folder(recipe), validation=True)
        ]
        if place == 0:
            print(f"{len(pairs)} pairs; lattice 1 = none; PSNR over the sharp range")
            report("sharp", [(sharp, sharp) for _, sharp in pairs], np.asarray)
            report("blurred", pairs, np.asarray)
        report(recipe.name, pairs, restored_by(network))


if __name__ == "__main__":
    main()
