"""Kernel pairs: sharp patches blurred by a fixed set of kernels.

The two training sets of the EPFL cornea report (section 3.1): Gaussian kernels, and
kernels estimated from registered pairs. Batch number n is a pure function of
(recipe, n).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from rtfocus.optics.normalisation import PercentileRange
from rtfocus.training.data.exposure import draw_exposure
from rtfocus.training.data.fields import load_fields
from rtfocus.training.data.kernel_estimation import kernels_of_pair
from rtfocus.training.data.pair_recipe import PairRecipe
from rtfocus.training.data.real_pairs import Pair

Image = NDArray[np.float32]

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
        exposure = draw_exposure(rng, self._recipe.pairs.photons)
        low, scale = _RANGE.fit(exposure.counts(field.image))
        taken = exposure.take(light, rng)
        wanted = np.clip(exposure.counts(sharp), 0, exposure.full - 1)
        turn, flip = int(rng.integers(4)), bool(rng.random() < 0.5)
        turned = [np.rot90((p - low) / scale, turn) for p in (taken, wanted)]
        first, second = (patch[::-1] if flip else patch for patch in turned)
        return np.ascontiguousarray(first), np.ascontiguousarray(second)
