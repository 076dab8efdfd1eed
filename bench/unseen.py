"""Unseen: what images of other microscopes allow, and how far what ships falls short.

Three tables. *Ceilings*: the set ``unseen`` restored by filters that are told what
nobody can know: the true PSF and the best noise level (Wiener), the best Gaussian with
its noise level, or the sharp image (the best gain of each of eight bands). An engine
that finds out for itself can hardly gain more.
*Parts*: the network of rtfocus-2 by itself, its corrections not weighed: told nothing,
the best share of that correction for each frame, told how wide the true blur is (the
level, nothing else), and told it with the wrong side of focus. Which part loses?
*Stacks*: recorded z-stacks classified plane by plane, blind: how well the defocus found
ranks the planes (Spearman), and by how many planes the one called sharpest misses the
true one. Beside the engines stands the mean wavelength of a plane's detail, which is no
defocus but was never trained.

``nice python -m bench.unseen --data FOLDER``
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from scipy import fft
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from bench.autofocus_stacks import STACKS, RecordedStack, read_planes
from rtfocus.autofocus.appearance import FREQUENCIES, amplitude_spectrum
from rtfocus.engines.card import input_of, verified_file
from rtfocus.engines.registry import find_engine
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.samples import (
    BBBC006,
    IN_FOCUS,
    STEP_UM,
    DataSet,
    Sample,
    unseen,
)
from rtfocus.evaluation.scores import psnr
from rtfocus.offline import ImageProcessor
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.restore import transfer_function

Image = NDArray[np.float32]
Floats = NDArray[np.float64]
Plane = NDArray[np.generic]

_PAD_PX = 32
_NOISE = np.geomspace(1e-5, 30, 14)
_SIGMAS_PX = (0.7, 1.0, 1.41, 2.0, 2.83, 4.0, 5.66, 8.0)
_RIDGE = 1e-6
_WIDTHS_PX = (0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
_GAUSSIAN_NOISE = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
_SHARES = np.linspace(0, 1.5, 16)
_CONTEXT_PX = 24
ENGINES = ("delpnet", "rtfocus-1", "rtfocus-2")


def told_the_blur(sample: Sample) -> float:
    """Return the gain of a Wiener filter with the true PSF, in dB.

    Signal is expected to fall with the square of frequency; of fourteen noise levels
    the one counts that comes nearest to the sharp image.
    """
    psf = sample.psf
    if psf is None or sample.sharp is None:
        msg = f"'{sample.name}' was not blurred on purpose"
        raise ValueError(msg)

    def filters(shape: tuple[int, int], falling: Floats) -> Iterator[Plane]:
        transfer = transfer_function(psf, shape)
        for noise in _NOISE:
            yield np.conj(transfer) / (np.abs(transfer) ** 2 + noise * falling)

    return _best_gain(sample, filters)


def told_a_gaussian(sample: Sample) -> float:
    """Return the gain of the best Wiener filter of a Gaussian, in dB."""

    def filters(_shape: tuple[int, int], falling: Floats) -> Iterator[Plane]:
        for sigma_px, noise in product(_WIDTHS_PX, _GAUSSIAN_NOISE):
            transfer = np.exp(-((np.pi * sigma_px) ** 2) / 2 * falling)
            yield transfer / (transfer**2 + noise * falling)

    return _best_gain(sample, filters)


def _best_gain(
    sample: Sample, filters: Callable[[tuple[int, int], Floats], Iterable[Plane]]
) -> float:
    """Return what the best of some filters gains in dB.

    They are made of the padded frame's shape and four times its squared frequencies.
    """
    frame = sample.pixels.astype(np.float32)
    padded = np.pad(frame, _PAD_PX, mode="symmetric")
    rows, columns = padded.shape
    square = fft.fftfreq(rows)[:, None] ** 2 + fft.rfftfreq(columns)[None] ** 2
    spectrum, inside = fft.rfft2(padded), slice(_PAD_PX, -_PAD_PX)
    after = [
        _quality(sample, fft.irfft2(spectrum * gain, s=(rows, columns))[inside, inside])
        for gain in filters((rows, columns), 4 * square)
    ]
    return max(after) - _quality(sample, frame)


def told_the_gains(sample: Sample) -> float:
    """Return the gain of the frame's own bands, each raised as suits best, in dB."""
    frame, truth = (
        np.asarray(one, np.float64) for one in (sample.pixels, sample.sharp)
    )
    bands, before = [], frame
    for sigma_px in _SIGMAS_PX:
        smooth = gaussian_filter(frame, sigma_px, mode="reflect")
        bands.append((before - smooth).ravel())
        before = smooth
    basis = np.stack(bands)
    products = basis @ basis.T
    products += _RIDGE * np.trace(products) * np.eye(len(basis))
    gains = np.linalg.solve(products, basis @ (truth - frame).ravel())
    restored = frame + (gains @ basis).reshape(frame.shape)
    return _quality(sample, restored) - _quality(sample, frame)


class BareNetwork:
    """The network of a joint engine that may be told nothing, and what tells it.

    Parameters
    ----------
    name
        Of the engine.
    """

    def __init__(self, name: str) -> None:
        found = find_engine(name)
        self._card = found.card
        self._session = InferenceSession(
            verified_file(found.folder, found.card), providers=["CPUExecutionProvider"]
        )
        options = {k: v for k, v in found.card.normalisation.items() if k != "name"}
        self._range = PercentileRange(**options)

    def restored(self, frame: Image, level: float | None) -> Image:
        """Restore a grey frame, told its level or nothing."""
        card = self._card
        assert card.condition is not None
        assert card.restored is not None
        told = {} if level is None else {"defocus_levels": level, "defocus_known": 1.0}
        condition = [[told.get(entry, 0.0) for entry in card.condition.entries]]
        multiple = input_of(card).multiple_px
        sides = [
            (_CONTEXT_PX, _CONTEXT_PX + -(side + 2 * _CONTEXT_PX) % multiple)
            for side in frame.shape
        ]
        offset, scale = (np.float32(value) for value in self._range.fit(frame))
        tiles = (np.pad(frame, sides, mode="symmetric") - offset) / scale
        (found,) = self._session.run(
            [card.restored.name],
            {
                input_of(card).name: tiles[None, None].astype(np.float32),
                card.condition.name: np.array(condition, np.float32),
            },
        )
        rows, columns = (slice(_CONTEXT_PX, _CONTEXT_PX + n) for n in frame.shape)
        return np.asarray(found[0, 0, rows, columns] * scale + offset, np.float32)

    def gains(self, sample: Sample) -> tuple[float, float, float, float]:
        """Return what a frame gains in dB: untold, best share, told, told wrongly."""
        frame = sample.pixels.astype(np.float32)
        before = _quality(sample, frame)
        untold = self.restored(frame, None)
        shares = [frame + share * (untold - frame) for share in _SHARES]
        told = [
            _quality(sample, self.restored(frame, side * level_of(sample))) - before
            for side in (1, -1)
        ]
        best = max(_quality(sample, one) for one in shares)
        return _quality(sample, untold) - before, best - before, told[0], told[1]


def level_of(sample: Sample) -> float:
    """Return the level of a frame blurred on purpose; of a Gaussian, of equal width."""
    if sample.defocus_um is not None:
        return sample.defocus_um[0] / STEP_UM
    assert sample.psf is not None
    place = np.arange(len(sample.psf)) - len(sample.psf) // 2
    # A disc of radius R has the deviation R / 2 along each axis.
    radius_px = 2 * float(np.sqrt(sample.psf.sum(axis=0) @ place**2))
    return radius_px * BBBC006.pixel_size_um / BBBC006.numerical_aperture / STEP_UM


def _quality(sample: Sample, image: NDArray[np.floating]) -> float:
    full = np.iinfo(sample.pixels.dtype).max  # type: ignore[type-var]
    assert sample.sharp is not None
    return psnr(sample.sharp, np.clip(image, 0, full), data_range=sample.data_range)


def by_kind(
    folder: Path, measure: Callable[[Sample], tuple[float, ...]]
) -> dict[str, list[float]]:
    """Return the mean of what is measured on the blurred frames of each kind.

    Frames blurred by a Gaussian, which is no defocus, are a kind of their own.
    """
    found = defaultdict(list)
    for sample in unseen(folder).samples():
        if IN_FOCUS not in sample.name:
            kind = "Gaussian blur" if sample.defocus_um is None else sample.group
            found[kind].append(measure(sample))
    found["all"] = [one for gains in found.values() for one in gains]
    return {kind: [*np.mean(gains, axis=0)] for kind, gains in found.items()}


def ceilings(sample: Sample) -> tuple[float, float, float]:
    """Return the gains of a frame told the blur, a Gaussian and the gains, in dB."""
    return told_the_blur(sample), told_a_gaussian(sample), told_the_gains(sample)


def ranking(
    distance: Iterable[float], z_um: Iterable[float], planes: Iterable[int]
) -> tuple[float, int]:
    """Compare a distance from focus with the true one.

    Parameters
    ----------
    distance
        Of every plane, whatever its unit; NaN: nothing was found.
    z_um
        Of every plane.
    planes
        Those in focus.

    Returns
    -------
    tuple
        Spearman's correlation over planes where something was found, and how many
        planes lie between the least distance and the nearest plane in focus.
    """
    found, heights, right = np.array([*distance]), np.array([*z_um]), [*planes]
    true = np.abs(heights - heights[right].mean())
    seen = ~np.isnan(found)
    least = int(np.nanargmin(found))
    rank = float(spearmanr(found[seen], true[seen]).statistic)
    return rank, min(abs(least - plane) for plane in right)


def mean_wavelength(plane: Plane) -> float:
    """Return the negative mean frequency of a plane's power: grows with blur."""
    amplitude, _ = amplitude_spectrum(plane)
    power = (amplitude * FREQUENCIES) ** 2
    return -float((power * FREQUENCIES).sum() / max(power.sum(), 1e-30))


def found_by(processor: ImageProcessor) -> Callable[[Plane], float]:
    """Return what measures the distance of a plane from focus by an engine."""

    def distance(plane: Plane) -> float:
        estimate = processor.classify(np.ascontiguousarray(plane)).estimate
        if estimate is None or estimate.defocus_um is None:
            return float("nan")
        return abs(estimate.defocus_um)

    return distance


def stacks() -> dict[str, RecordedStack]:
    """Return the recorded stacks as they were taken, the confocal channel too."""
    taken = {name: replace(stack, binning=1) for name, stack in STACKS.items()}
    widefield = taken["neubias widefield"]
    return taken | {"neubias confocal": replace(widefield, channel=0)}


def main() -> None:
    """Print the three tables, or the last alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stacks", action="store_true", help="the third table alone")
    options = parser.parse_args()
    folder = options.data
    if not options.stacks:
        for head, measure in (
            ("told the blur | best Gaussian | told the gains", ceilings),
            ("untold | best share | told | wrong side", BareNetwork("rtfocus-2").gains),
        ):
            print(f"\n| kind | {head} |\n|---{'|---' * (head.count('|') + 1)}|")
            for kind, gains in by_kind(folder, measure).items():
                print(f"| {kind} | {' | '.join(f'{gain:+.2f}' for gain in gains)} |")
    planes = {name: read_planes(folder, one) for name, one in stacks().items()}
    print(f"\n| | {' | '.join(planes)} |\n|---{'|---' * len(planes)}|")
    _print_row("mean wavelength", mean_wavelength, planes)
    for name in ENGINES:
        engine = contender(name, classifier=name, blind=True)
        config = replace(engine, method="none").config(
            DataSet("stacks", "", BBBC006, 0.0, ()), threads=1
        )
        with ImageProcessor(config) as processor:
            _print_row(name, found_by(processor), planes)


def _print_row(
    name: str,
    distance: Callable[[Plane], float],
    planes: dict[str, tuple[Plane, list[float]]],
) -> None:
    cells = []
    for stack, (images, z_um) in planes.items():
        found = [distance(plane) for plane in images]
        rank, off = ranking(found, z_um, stacks()[stack].reference)
        cells.append(f"{rank:.2f}, {off} off")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
