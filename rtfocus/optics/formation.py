"""Formation: how an image comes about, ``B = I * K``, and what the camera makes of it.

By one PSF or by one per depth; borders are reflected, so that a frame does not darken
towards its edges: the light that a real scene sends in from outside the frame is
unknown either way. The camera: ``counts = offset + (Poisson(electrons) + Normal(0,
read noise)) / gain``, rounded and clipped at the full scale: electrons are what
arrives, counts what is stored, the gain is in electrons per count as in a data sheet.

Bands divide the frequencies of an image: what a learned filter says of a spectrum, it
says per band, in training and in the live loop alike.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from rtfocus.channel import OpticalSystem
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]

_NYQUIST = 0.5
# Power that crowds the centres at low frequencies, where images have their detail.
_CROWDING = 1.5


def band_centres(count: int) -> NDArray[np.float64]:
    """Return the centres of the bands in cycles per pixel, 0 to 0.5, ascending.

    Examples
    --------
    >>> band_centres(3).round(3).tolist()
    [0.0, 0.177, 0.5]
    """
    return np.asarray(_NYQUIST * np.linspace(0, 1, count) ** _CROWDING)


@lru_cache(maxsize=8)
def band_weights(shape: tuple[int, int], count: int) -> Image:
    """Compute how much every frequency belongs to every band.

    A frequency between two centres belongs to both, linearly; beyond the last
    centre (the corners of the spectrum) to the last. So a value per band becomes
    a continuous function of frequency.

    Parameters
    ----------
    shape
        Height and width of the image.
    count
        Bands, at least 2.

    Returns
    -------
    Image
        Axes (band, y frequency, x frequency) over the half spectrum of `rfft2`;
        sums to 1 over the bands; read-only.

    Raises
    ------
    ValueError
        If there are fewer than two bands.
    """
    if count < 2:
        msg = f"count={count} bands cover no range of frequencies; need >= 2"
        raise ValueError(msg)
    rows = np.fft.fftfreq(shape[0])[:, None]
    columns = np.fft.rfftfreq(shape[1])[None, :]
    place = np.interp(np.hypot(rows, columns), band_centres(count), np.arange(count))
    distance = np.abs(place - np.arange(count)[:, None, None])
    weights: Image = np.maximum(1 - distance, 0).astype(np.float32)
    weights.flags.writeable = False
    return weights


TAPER_PX = 16
"""Outer pixels of a tile of the learned Wiener filter that fade to its mean."""


@lru_cache(maxsize=8)
def edge_taper(shape: tuple[int, int], width_px: int) -> Image:
    """Return a window that is 1 inside and falls to 0 over the outer `width_px`.

    A tile's opposite edges meet in its Fourier transform; faded towards the tile's
    mean there is no step between them that a restoration would sharpen.

    Returns
    -------
    Image
        Axes (y, x), half a cosine along each axis; read-only.
    """
    down, across = (_axis_taper(side, width_px) for side in shape)
    window: Image = np.outer(down, across).astype(np.float32)
    window.flags.writeable = False
    return window


def _axis_taper(side: int, width_px: int) -> NDArray[np.float64]:
    inward = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
    rise = np.clip(inward / max(width_px, 1), 0, 1)
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * rise))


def blur(image: ArrayLike, psf: Image) -> Image:
    """Convolve an image with a PSF, borders reflected.

    Parameters
    ----------
    image
        Axes (y, x) or (y, x, colour); any number type.
    psf
        Axes (y, x), odd sides; the centre pixel is the origin.

    Returns
    -------
    Image
        Shape of `image`; not clipped, so round-off may leave values of -1e-7.

    Raises
    ------
    ValueError
        If a side of the PSF is even or the image has neither 2 nor 3 axes.
    """
    return _convolve(_as_image(image), [psf])[0]


def blur_stack(image: ArrayLike, psfs: Iterable[Image]) -> Image:
    """Convolve one image with several PSFs; axes (psf, y, x[, colour]).

    All are padded for the largest PSF and share one transform of the image.
    """
    return np.stack(_convolve(_as_image(image), list(psfs)))


class BlurredPlanes:
    """One specimen seen at many defoci: planes made on demand, then interpolated.

    The planes lie at multiples of `step_um`; between two of them intensities are
    mixed linearly. A pixel takes the PSF of its own depth, which is right where
    the depth hardly changes over the width of one PSF: tilt and curvature.
    Planes stay in memory, at most `capacity` of them, least recently used first
    out, so a live camera pays for the Fourier transforms once.

    Parameters
    ----------
    image
        Sharp image, axes (y, x) or (y, x, colour).
    system
        Optics that the PSFs are computed from.
    step_um
        Distance of the planes.
    keep_focus
        Take the image itself at defocus 0 (He: level 0 is not convolved). For
        images that already went through a microscope; else PSF(0) is applied.
    """

    def __init__(
        self,
        image: ArrayLike,
        system: OpticalSystem,
        *,
        step_um: float = 1.0,
        keep_focus: bool = False,
        capacity: int = 64,
    ) -> None:
        if step_um <= 0:
            msg = f"step_um={step_um} makes no planes; need step_um > 0"
            raise ValueError(msg)
        if capacity < 2:
            msg = f"capacity={capacity} cannot hold two neighbours; need >= 2"
            raise ValueError(msg)
        self._image = _as_image(image)
        self._system = system
        self._step_um = step_um
        self._keep_focus = keep_focus
        self._capacity = capacity
        self._planes: OrderedDict[int, Image] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Memory of the image and of the planes in it by now."""
        return self._image.nbytes * (1 + len(self._planes))

    def at(self, defocus_um: ArrayLike) -> Image:
        """Return the image at a defocus: one value, or a map with axes (y, x).

        Raises
        ------
        ValueError
            If the map is not finite or not of the image's height and width.
        """
        place = np.asarray(defocus_um, dtype=np.float32) / np.float32(self._step_um)
        if not np.isfinite(place).all():
            msg = "defocus_um holds values that are not finite; mask them first"
            raise ValueError(msg)
        if place.ndim == 0:
            return self._between_planes(float(place))
        if place.shape != self._image.shape[:2]:
            msg = (
                f"defocus map of shape {place.shape} does not cover an image of "
                f"{self._image.shape[:2]}; resample the map"
            )
            raise ValueError(msg)
        return self._along_surface(place)

    def _between_planes(self, place: float) -> Image:
        below = floor(place)
        share = np.float32(place - below)
        if share == 0.0:
            return self._plane(below).copy()
        return (1 - share) * self._plane(below) + share * self._plane(below + 1)

    def _along_surface(self, place: Image) -> Image:
        result = np.zeros_like(self._image)
        lowest = place.min(axis=1), place.min(axis=0)
        highest = place.max(axis=1), place.max(axis=0)
        for index in range(floor(place.min()), ceil(place.max()) + 1):
            # Only the rows and columns that a plane can touch.
            window = tuple(
                _span((low < index + 1) & (high > index - 1))
                for low, high in zip(lowest, highest, strict=True)
            )
            weight = 1 - np.abs(place[window] - np.float32(index))
            np.maximum(weight, 0, out=weight)
            if not weight.any():
                continue
            if result.ndim == 3:
                weight = weight[..., None]
            result[window] += weight * self._plane(index)[window]
        return result

    def _plane(self, index: int) -> Image:
        if index in self._planes:
            self._planes.move_to_end(index)
            return self._planes[index]
        if index == 0 and self._keep_focus:
            plane = self._image
        else:
            psf = compute_psf(self._system, index * self._step_um)
            plane = _convolve(self._image, [psf])[0]
        self._planes[index] = plane
        if len(self._planes) > self._capacity:
            self._planes.popitem(last=False)
        return plane


def _as_image(image: ArrayLike) -> Image:
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim not in (2, 3):
        msg = f"image of shape {pixels.shape}; need axes (y, x) or (y, x, colour)"
        raise ValueError(msg)
    return pixels


def _convolve(image: Image, psfs: Sequence[Image]) -> list[Image]:
    """Convolve one image with several PSFs; its transform is made once."""
    for psf in psfs:
        if psf.ndim != 2 or psf.shape[0] % 2 == 0 or psf.shape[1] % 2 == 0:
            msg = f"psf shape {psf.shape} has no centre pixel; need two odd sides"
            raise ValueError(msg)
    halves = [max(psf.shape[axis] // 2 for psf in psfs) for axis in (0, 1)]
    pads = [(half, half) for half in halves] + [(0, 0)] * (image.ndim - 2)
    padded = np.pad(image, pads, mode="reflect")
    sides = [fft.next_fast_len(side, real=True) for side in padded.shape[:2]]
    spectrum = fft.rfft2(padded, sides, axes=(0, 1))
    inner = tuple(
        slice(half, half + side)
        for half, side in zip(halves, image.shape[:2], strict=True)
    )
    results = []
    for psf in psfs:
        transfer = transfer_function(psf, sides)
        if image.ndim == 3:
            transfer = transfer[..., None]
        product = spectrum * transfer
        whole = fft.irfft2(product, sides, axes=(0, 1))
        results.append(np.ascontiguousarray(whole[inner]))
    return results


def transfer_function(psf: Image, sides: Sequence[int]) -> NDArray[np.complex64]:
    """Transform a PSF whose centre pixel is the origin; half spectrum of `sides`."""
    rows, columns = psf.shape
    canvas = np.zeros(sides, dtype=np.float32)
    canvas[:rows, :columns] = psf
    canvas = np.roll(canvas, (-(rows // 2), -(columns // 2)), axis=(0, 1))
    return np.asarray(fft.rfft2(canvas))


def _span(mask: NDArray[np.bool_]) -> slice:
    """Smallest slice that covers all that is wanted."""
    places = np.flatnonzero(mask)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 0)


Counts = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class CameraModel:
    """Noise and quantisation of one sensor; images come in as fractions, 0 to 1."""

    photons: float = 1000.0
    """Expected photo-electrons in a pixel of value 1.0."""
    gain_e_per_count: float = 0.5
    """Photo-electrons per count."""
    offset_counts: float = 100.0
    """Counts in the dark."""
    read_noise_e: float = 1.5
    """Standard deviation of the Gaussian read noise."""
    bit_depth: int = 16
    """Full scale is 2^bit_depth - 1; up to 8 bits are delivered as uint8."""

    def __post_init__(self) -> None:
        if self.photons <= 0 or self.gain_e_per_count <= 0:
            msg = (
                f"photons={self.photons}, gain_e_per_count={self.gain_e_per_count} "
                "give no signal; both must be > 0"
            )
            raise ValueError(msg)
        if self.read_noise_e < 0:
            msg = f"read_noise_e={self.read_noise_e} must be >= 0"
            raise ValueError(msg)
        if not 1 <= self.bit_depth <= 16:
            msg = f"bit_depth={self.bit_depth} fits no frame; choose 1 to 16"
            raise ValueError(msg)

    @property
    def full_scale_counts(self) -> int:
        """Largest count; a pixel that holds it is saturated."""
        return int(2**self.bit_depth - 1)

    def expected_electrons(self, image: ArrayLike) -> Image:
        """Return the mean electrons of an image; negative round-off becomes 0."""
        return np.maximum(np.asarray(image, np.float32), 0) * np.float32(self.photons)

    def expose(self, image: ArrayLike, rng: np.random.Generator) -> Counts:
        """Expose one frame with exact Poisson noise.

        Parameters
        ----------
        image
            Expected light, 1.0 = `photons` electrons; any shape.
        rng
            Source of the noise; the same state gives the same frame.

        Returns
        -------
        Counts
            Shape of `image`; uint8 up to 8 bits, else uint16.
        """
        electrons = rng.poisson(self.expected_electrons(image)).astype(np.float32)
        if self.read_noise_e > 0:
            noise = rng.standard_normal(electrons.shape, dtype=np.float32)
            electrons += noise * np.float32(self.read_noise_e)
        return self.digitise(electrons)

    def expose_without_noise(self, image: ArrayLike) -> Counts:
        """Return what the camera delivers on average: rounded and clipped only."""
        return self.digitise(self.expected_electrons(image))

    def digitise(self, electrons: Image) -> Counts:
        """Turn electrons into counts: gain, offset, rounding, clipping; in place."""
        electrons *= np.float32(1.0 / self.gain_e_per_count)
        # Half a count more makes the truncating cast round to the nearest.
        electrons += np.float32(self.offset_counts + 0.5)
        np.clip(electrons, 0, self.full_scale_counts, out=electrons)
        if self.bit_depth <= 8:
            return electrons.astype(np.uint8)
        return electrons.astype(np.uint16)


class NoisePool:
    """Pre-drawn noise for rate tests: about ten times cheaper than exact Poisson.

    The noise is normal with the right variance at every pixel, taken from a pool
    at a random place per frame. It is **not** exact: below some ten electrons
    the Poisson distribution is skewed and this is not, and frames whose places
    are close share shifted noise. Quality figures use `CameraModel.expose`.
    """

    def __init__(
        self, camera: CameraModel, rng: np.random.Generator, size: int = 1 << 22
    ) -> None:
        """Draw `size` standard normal values, 4 bytes each."""
        if size < 1:
            msg = f"size={size} holds no noise; need >= 1"
            raise ValueError(msg)
        self._camera = camera
        self._rng = rng
        self._pool = rng.standard_normal(size, dtype=np.float32)

    def expose(self, image: ArrayLike) -> Counts:
        """Expose one frame with noise from the pool; see `CameraModel.expose`."""
        electrons = self._camera.expected_electrons(image)
        noise = self._take(electrons.size).reshape(electrons.shape)
        spread = electrons + np.float32(self._camera.read_noise_e**2)
        np.sqrt(spread, out=spread)
        spread *= noise
        electrons += spread
        return self._camera.digitise(electrons)

    def _take(self, count: int) -> Image:
        """Return `count` values from a random place on; the pool is a ring."""
        start = int(self._rng.integers(self._pool.size))
        if start + count <= self._pool.size:
            return self._pool[start : start + count]
        return np.take(self._pool, np.arange(start, start + count), mode="wrap")
