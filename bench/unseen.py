"""Unseen: what images of other microscopes allow, and how far what ships falls short.

Two tables. *Ceilings*: the set ``unseen`` restored by filters that are told what nobody
can know: the true PSF and the best noise level (Wiener), or the sharp image (the best
gain of each of eight bands). An engine that finds out for itself can hardly gain more.
*Stacks*: recorded z-stacks classified plane by plane, blind: how well the defocus found
ranks the planes (Spearman), and by how many planes the one called sharpest misses the
true one. Beside the engines stands the mean wavelength of a plane's detail, which is no
defocus but was never trained.

``nice python -m bench.unseen --data FOLDER``
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from bench.autofocus_stacks import STACKS, RecordedStack, read_planes
from rtfocus.autofocus.appearance import FREQUENCIES, amplitude_spectrum
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.samples import BBBC006, IN_FOCUS, DataSet, Sample, unseen
from rtfocus.evaluation.scores import psnr
from rtfocus.offline import ImageProcessor
from rtfocus.processing.restore import transfer_function

Image = NDArray[np.float32]
Plane = NDArray[np.generic]

_PAD_PX = 32
_NOISE = np.geomspace(1e-5, 30, 14)
_SIGMAS_PX = (0.7, 1.0, 1.41, 2.0, 2.83, 4.0, 5.66, 8.0)
_RIDGE = 1e-6
ENGINES = ("delpnet", "rtfocus-1", "rtfocus-2")


def told_the_blur(sample: Sample) -> float:
    """Return the gain of a Wiener filter with the true PSF, in dB.

    Signal is expected to fall with the square of frequency; of fourteen noise levels
    the one counts that comes nearest to the sharp image.
    """
    if sample.psf is None or sample.sharp is None:
        msg = f"'{sample.name}' was not blurred on purpose"
        raise ValueError(msg)
    frame = sample.pixels.astype(np.float32)
    padded = np.pad(frame, _PAD_PX, mode="symmetric")
    shape = padded.shape[0], padded.shape[1]
    transfer, spectrum = transfer_function(sample.psf, shape), fft.rfft2(padded)
    rows, columns = fft.fftfreq(shape[0])[:, None], fft.rfftfreq(shape[1])[None]
    falling = 4 * (rows**2 + columns**2)
    inside = slice(_PAD_PX, -_PAD_PX)
    after = []
    for noise in _NOISE:
        gain = np.conj(transfer) / (np.abs(transfer) ** 2 + noise * falling)
        restored = fft.irfft2(spectrum * gain, s=shape)[inside, inside]
        after.append(_quality(sample, restored))
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


def _quality(sample: Sample, image: NDArray[np.floating]) -> float:
    full = np.iinfo(sample.pixels.dtype).max  # type: ignore[type-var]
    assert sample.sharp is not None
    return psnr(sample.sharp, np.clip(image, 0, full), data_range=sample.data_range)


def ceilings(folder: Path) -> dict[str, tuple[float, float]]:
    """Return the mean gains per kind, told the blur and told the gains, in dB."""
    found = defaultdict(list)
    for sample in unseen(folder).samples():
        if IN_FOCUS not in sample.name:
            gains = told_the_blur(sample), told_the_gains(sample)
            found[sample.group].append(gains)
    found["all"] = [one for gains in found.values() for one in gains]
    return {kind: tuple(np.mean(gains, axis=0)) for kind, gains in found.items()}


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
    """Print both tables, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stacks", action="store_true", help="the second table alone")
    options = parser.parse_args()
    folder = options.data
    if not options.stacks:
        print("| kind | told the blur | told the gains |\n|---|---|---|")
        for kind, (blur, gains) in ceilings(folder).items():
            print(f"| {kind} | {blur:+.2f} | {gains:+.2f} |")
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
