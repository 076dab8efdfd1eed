"""Kernel pairs: sharp patches blurred by a fixed set of kernels.

The two training sets of the EPFL cornea report (section 3.1): Gaussian kernels, and
kernels estimated from registered pairs. To estimate one: register the pair, take the
noise off the blurred image, cut both into patches, and solve for the kernel that turns
one into the other, for every size; keep the best ones (section 3.2). Batch number n is
a pure function of (recipe, n).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, linalg, ndimage, signal

from rtfocus.optics.normalisation import PercentileRange
from rtfocus.training.recipe import PairRecipe
from rtfocus.training.scenes import Pair, draw_camera, load_fields

Image = NDArray[np.float32]

SIZES_PX = tuple(range(3, 36, 2))
"""Odd sides of kernels that are tried."""

SIZE_CLASSES_PX = ((11, 20), (21, 35))
"""Kernels of up to 10 px are not kept; of these classes the best are."""

_PATCH_PX = 128
_KEPT = 5
"""Of each class of sizes."""
# Part of the mean power of the sharp patch: without it, frequencies that the patch
# lacks are filled with magnified noise.
_DAMPING = 1e-3
# Deviation in frequency, cycles per pixel, of the band that decides the shift: the
# transfer function of a defocused lens changes its sign further out.
_REGISTRATION_BAND = 0.03


@dataclass(frozen=True, slots=True)
class KernelEstimate:
    """One kernel and how well it explains its pair of patches."""

    kernel: Image
    """Shape (m, m), not negative, sums to 1."""
    error: float
    """Mean squared error on the half of the patch it was not fitted to, relative to
    the variance of the blurred patch: else dim patches would always win."""

    @property
    def size_px(self) -> int:
        """Side m of the kernel."""
        return int(self.kernel.shape[0])


def register(sharp: ArrayLike, blurred: ArrayLike) -> tuple[Image, tuple[float, float]]:
    """Move the blurred image onto the sharp one, by phase correlation.

    Parameters
    ----------
    sharp, blurred
        Same shape, axes (y, x).

    Returns
    -------
    tuple
        The moved blurred image, and the shift (y, x) in px that was applied.
    """
    first, second = (np.asarray(image, dtype=np.float32) for image in (sharp, blurred))
    spectra = [_tapered_spectrum(image) for image in (first, second)]
    cross = spectra[0] * spectra[1].conj()
    height, width = first.shape
    squared = fft.fftfreq(height)[:, None] ** 2 + fft.fftfreq(width)[None, :] ** 2
    band = np.exp(-squared / (2 * _REGISTRATION_BAND**2))
    surface = fft.ifft2(band * cross / (np.abs(cross) + 1e-12)).real
    peak = [int(n) for n in np.unravel_index(int(surface.argmax()), surface.shape)]
    shift = tuple(
        _signed(float(place + _vertex(surface, peak, axis)), length)
        for axis, (place, length) in enumerate(zip(peak, first.shape, strict=True))
    )
    moved = ndimage.shift(second, shift, order=3, mode="nearest")
    return np.asarray(moved, dtype=np.float32), (shift[0], shift[1])


def estimate_kernel(
    sharp: ArrayLike, blurred: ArrayLike, sizes_px: Sequence[int] = SIZES_PX
) -> KernelEstimate:
    """Return the kernel that best turns a sharp patch into its blurred partner.

    Least squares for each size, all on the same pixels. A larger kernel always fits
    those better, so sizes are compared on the half of the patch that was left out;
    the winner is then fitted to the whole.

    Parameters
    ----------
    sharp, blurred
        Registered patches of one shape, axes (y, x), wider than the largest kernel
        by at least its size.
    sizes_px
        Odd sides to try.

    Raises
    ------
    ValueError
        If the shapes differ or the patches are too small.
    """
    source, wanted = (np.asarray(patch, dtype=np.float64) for patch in (sharp, blurred))
    largest = max(sizes_px)
    if source.shape != wanted.shape or min(source.shape) < 2 * largest:
        msg = (
            f"patches of {source.shape} and {wanted.shape} for kernels up to {largest} "
            f"px: need one shape of at least {2 * largest} px a side"
        )
        raise ValueError(msg)
    # Gain and offset between the two are no part of the kernel.
    source, wanted = source - source.mean(), wanted - wanted.mean()
    half = largest // 2
    inner = wanted[half : wanted.shape[0] - half, half : wanted.shape[1] - half]
    views = np.lib.stride_tricks.sliding_window_view(source, (largest, largest))
    middle = inner.shape[0] // 2
    fitted = _Equations.of(views[:middle], inner[:middle])
    judged = _Equations.of(views[middle:], inner[middle:])
    damping = _DAMPING * float(np.mean(source**2))
    errors = {
        size: judged.error(size, fitted.solve(size, damping)) for size in sizes_px
    }
    best = min(errors, key=errors.__getitem__)
    solved = fitted.joined(judged).solve(best, damping)
    # Views hold the pixel at the offset of each tap: a correlation; a PSF convolves.
    kernel = np.maximum(solved.reshape(best, best)[::-1, ::-1], 0)
    error = errors[best] / float(np.mean(inner**2))
    return KernelEstimate((kernel / kernel.sum()).astype(np.float32), error)


def kernels_of_pair(sharp: ArrayLike, blurred: ArrayLike) -> list[KernelEstimate]:
    """Register a pair, estimate a kernel per patch, and keep the best ones.

    Parameters
    ----------
    sharp, blurred
        Images of one field, axes (y, x); patches of it that are empty are passed over.
    """
    source = np.asarray(sharp, dtype=np.float32)
    moved, _ = register(source, blurred)
    calm = signal.wiener(moved.astype(np.float64), 3)
    spread = source.std()
    estimates = [
        estimate_kernel(source[window], calm[window])
        for window in _windows(source.shape, _PATCH_PX)
        if source[window].std() > 0.5 * spread
    ]
    return keep_best(estimates, _KEPT)


def keep_best(estimates: Iterable[KernelEstimate], keep: int) -> list[KernelEstimate]:
    """Keep the kernels of least error of each class of sizes; small ones go."""
    ranked = sorted(estimates, key=lambda estimate: estimate.error)
    best: list[KernelEstimate] = []
    for smallest, largest in SIZE_CLASSES_PX:
        members = [e for e in ranked if smallest <= e.size_px <= largest]
        best += members[:keep]
    return best


@dataclass(frozen=True, slots=True)
class _Equations:
    """Normal equations of the largest kernel; smaller ones are parts of them."""

    products: NDArray[np.float64]
    """Sums of tap i times tap j, (m m, m m)."""
    aims: NDArray[np.float64]
    """Sums of tap i times wanted pixel, (m m,)."""
    power: float
    """Sum of squares of the wanted pixels."""
    pixels: int
    """How many pixels the sums are over."""

    @classmethod
    def of(
        cls, views: NDArray[np.float64], target: NDArray[np.float64]
    ) -> "_Equations":
        taps = views.reshape(target.size, -1)
        flat = target.ravel()
        return cls(taps.T @ taps, taps.T @ flat, float(flat @ flat), target.size)

    def joined(self, other: "_Equations") -> "_Equations":
        return _Equations(
            self.products + other.products,
            self.aims + other.aims,
            self.power + other.power,
            self.pixels + other.pixels,
        )

    def _part(self, size: int) -> NDArray[np.intp]:
        """Return the places of a centred smaller kernel's taps."""
        largest = round(np.sqrt(self.aims.size))
        border = (largest - size) // 2
        grid = np.arange(self.aims.size).reshape(largest, largest)
        return grid[border : border + size, border : border + size].ravel()

    def solve(self, size: int, damping: float) -> NDArray[np.float64]:
        part = self._part(size)
        products = self.products[np.ix_(part, part)]
        products[np.diag_indices_from(products)] += damping * self.pixels
        return np.asarray(linalg.solve(products, self.aims[part], assume_a="pos"))

    def error(self, size: int, kernel: NDArray[np.float64]) -> float:
        part = self._part(size)
        squares = kernel @ self.products[np.ix_(part, part)] @ kernel
        return float(self.power - 2 * kernel @ self.aims[part] + squares) / self.pixels


def _windows(shape: tuple[int, ...], side: int) -> list[tuple[slice, slice]]:
    """Return the places of patches side by side."""
    return [
        (slice(top, top + side), slice(left, left + side))
        for top in range(0, shape[0] - side + 1, side)
        for left in range(0, shape[1] - side + 1, side)
    ]


def _tapered_spectrum(image: Image) -> NDArray[np.complex128]:
    """Transform an image faded out towards its border, which would correlate."""
    fade = np.outer(np.hanning(image.shape[0]), np.hanning(image.shape[1]))
    return np.asarray(fft.fft2((image - image.mean()) * fade))


def _vertex(surface: NDArray[np.float64], peak: Sequence[int], axis: int) -> float:
    """Return where between pixels the parabola through a peak is highest."""
    line = np.take(surface, peak[1 - axis], axis=1 - axis)
    place = peak[axis]
    before, top, after = (float(line[(place + k) % line.size]) for k in (-1, 0, 1))
    curvature = before - 2 * top + after
    return 0.5 * (before - after) / curvature if curvature else 0.0


def _signed(shift: float, length: int) -> float:
    """Return a circular shift as the shorter of both ways."""
    return shift - length if shift > length / 2 else shift


_RANGE = PercentileRange()
# Deviations after which a Gaussian is cut off: 1 % of its peak.
_TAIL = 3


def gaussian_kernels(sigma_px: tuple[float, float], count: int) -> list[Image]:
    """Return isotropic Gaussians of evenly spaced deviations.

    Parameters
    ----------
    sigma_px
        Smallest and largest deviation; 1 and 25 in the report.
    count
        How many; 50 in the report.
    """
    kernels = []
    for sigma in np.linspace(*sigma_px, count):
        along = np.arange(-round(_TAIL * sigma), round(_TAIL * sigma) + 1)
        line = np.exp(-(along**2) / (2 * sigma**2))
        kernel = np.outer(line, line)
        kernels.append((kernel / kernel.sum()).astype(np.float32))
    return kernels


def estimated_kernels(pairs: Sequence[Pair]) -> list[Image]:
    """Return the best kernels of each (blurred, sharp) pair, at most ten."""
    return [
        estimate.kernel
        for blurred, sharp in pairs
        for estimate in kernels_of_pair(sharp, blurred)
    ]


class KernelPairs:
    """Batches of one-channel patches, each blurred by a kernel of the set.

    Parameters
    ----------
    recipe
        Sharp fields, patches per batch and their side; its drawn specimens are not
        used.
    kernels
        Shape (m, m) each, m odd, sum 1.
    """

    def __init__(self, recipe: PairRecipe, kernels: Sequence[Image]) -> None:
        self._recipe = recipe
        self._kernels = kernels
        self._fields = [f for f in load_fields(recipe) if not f.validation]
        shares = np.array([field.source.share for field in self._fields])
        self._shares = shares / shares.sum()

    def batch(self, step: int, draw: int = 0) -> dict[str, Image]:
        """Make batch number `step`: ``blurred`` and ``sharp``, (N, 1, y, x)."""
        rng = np.random.default_rng([self._recipe.seed, 8, step, draw])
        number = self._recipe.pairs.batch_patches
        patches = [self._patch(rng) for _ in range(number)]
        return {
            "blurred": np.stack([blurred for blurred, _ in patches])[:, None],
            "sharp": np.stack([sharp for _, sharp in patches])[:, None],
        }

    def _patch(self, rng: np.random.Generator) -> tuple[Image, Image]:
        field = self._fields[int(rng.choice(len(self._fields), p=self._shares))]
        kernel = self._kernels[int(rng.integers(len(self._kernels)))]
        side, half = self._recipe.pairs.patch_px, kernel.shape[0] // 2
        # Fields smaller than patch and kernel together are continued by reflection.
        image = np.pad(field.image, half, mode="reflect")
        top, left = (int(rng.integers(n - side - 2 * half + 1)) for n in image.shape)
        reach = image[top : top + side + 2 * half, left : left + side + 2 * half]
        sharp = reach[half : half + side, half : half + side]
        light = signal.fftconvolve(reach, kernel, mode="valid").astype(np.float32)
        camera = draw_camera(rng, self._recipe.pairs.photons)
        low, scale = _RANGE.fit(camera.counts(field.image))
        taken = camera.take(light, rng)
        target = np.clip(camera.counts(sharp), 0, camera.full - 1)
        turn, flip = int(rng.integers(4)), bool(rng.random() < 0.5)
        turned = [np.rot90((p - low) / scale, turn) for p in (taken, target)]
        first, second = (patch[::-1] if flip else patch for patch in turned)
        return np.ascontiguousarray(first), np.ascontiguousarray(second)
