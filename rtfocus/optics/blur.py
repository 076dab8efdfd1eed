"""Blur: image formation ``B = I * K``, with one PSF or with one per depth.

Borders are reflected, so that a frame does not darken towards its edges; the
light that a real scene sends in from outside the frame is unknown either way.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft

from rtfocus.channel import OpticalSystem
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]


def blur(image: ArrayLike, psf: Image, *, workers: int = 1) -> Image:
    """Convolve an image with a PSF, borders reflected.

    Parameters
    ----------
    image
        Axes (y, x) or (y, x, colour); any number type.
    psf
        Axes (y, x), odd sides; the centre pixel is the origin.
    workers
        Threads of the Fourier transforms.

    Returns
    -------
    Image
        Shape of `image`; not clipped, so round-off may leave values of -1e-7.

    Raises
    ------
    ValueError
        If a side of the PSF is even or the image has neither 2 nor 3 axes.
    """
    return _convolve(_as_image(image), [psf], workers)[0]


def blur_stack(image: ArrayLike, psfs: Iterable[Image], *, workers: int = 1) -> Image:
    """Convolve one image with several PSFs; axes (psf, y, x[, colour]).

    All are padded for the largest PSF and share one transform of the image.
    """
    return np.stack(_convolve(_as_image(image), list(psfs), workers))


class BlurredPlanes:
    """One specimen seen at many defoci: planes made on demand, then interpolated.

    The planes lie at multiples of `step_um`; between two of them intensities are
    mixed linearly. A pixel takes the PSF of its own depth, which is right where
    the depth hardly changes over the width of one PSF: tilt and curvature.
    Planes stay in memory, at most `capacity` of them, least recently used first
    out, so a live camera pays for the Fourier transforms once.
    """

    def __init__(
        self,
        image: ArrayLike,
        system: OpticalSystem,
        *,
        step_um: float = 1.0,
        keep_focus: bool = False,
        capacity: int = 64,
        workers: int = 1,
    ) -> None:
        """Take the sharp image; see `blur_depth_variant` for the parameters."""
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
        self._workers = workers
        self._planes: OrderedDict[int, Image] = OrderedDict()

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
            plane = _convolve(self._image, [psf], self._workers)[0]
        self._planes[index] = plane
        if len(self._planes) > self._capacity:
            self._planes.popitem(last=False)
        return plane


def blur_depth_variant(
    image: ArrayLike,
    defocus_map_um: ArrayLike,
    system: OpticalSystem,
    *,
    step_um: float = 1.0,
    keep_focus: bool = False,
    workers: int = 1,
) -> Image:
    """Blur an image whose pixels lie at different depths.

    Parameters
    ----------
    image
        Sharp image, axes (y, x) or (y, x, colour).
    defocus_map_um
        Signed defocus per pixel in um, axes (y, x).
    system
        Optics that the PSFs are computed from.
    step_um
        Distance of the PSF-blurred planes that are interpolated, in um.
    keep_focus
        Take the image itself at defocus 0 (He: level 0 is not convolved). For
        images that already went through a microscope; else PSF(0) is applied.
    workers
        Threads of the Fourier transforms.

    Returns
    -------
    Image
        Shape of `image`.
    """
    planes = BlurredPlanes(
        image, system, step_um=step_um, keep_focus=keep_focus, workers=workers
    )
    return planes.at(defocus_map_um)


def _as_image(image: ArrayLike) -> Image:
    pixels = np.asarray(image, dtype=np.float32)
    if pixels.ndim not in (2, 3):
        msg = f"image of shape {pixels.shape}; need axes (y, x) or (y, x, colour)"
        raise ValueError(msg)
    return pixels


def _convolve(image: Image, psfs: Sequence[Image], workers: int) -> list[Image]:
    """Convolve one image with several PSFs; its transform is made once."""
    for psf in psfs:
        if psf.ndim != 2 or psf.shape[0] % 2 == 0 or psf.shape[1] % 2 == 0:
            msg = f"psf shape {psf.shape} has no centre pixel; need two odd sides"
            raise ValueError(msg)
    halves = [max(psf.shape[axis] // 2 for psf in psfs) for axis in (0, 1)]
    pads = [(half, half) for half in halves] + [(0, 0)] * (image.ndim - 2)
    padded = np.pad(image, pads, mode="reflect")
    sides = [fft.next_fast_len(side, real=True) for side in padded.shape[:2]]
    spectrum = fft.rfft2(padded, sides, axes=(0, 1), workers=workers)
    inner = tuple(
        slice(half, half + side)
        for half, side in zip(halves, image.shape[:2], strict=True)
    )
    results = []
    for psf in psfs:
        transfer = transfer_function(psf, sides, workers)
        if image.ndim == 3:
            transfer = transfer[..., None]
        product = spectrum * transfer
        whole = fft.irfft2(product, sides, axes=(0, 1), workers=workers)
        results.append(np.ascontiguousarray(whole[inner]))
    return results


def transfer_function(
    psf: Image, sides: Sequence[int], workers: int = 1
) -> NDArray[np.complex64]:
    """Transform a PSF whose centre pixel is the origin; half spectrum of `sides`."""
    rows, columns = psf.shape
    canvas = np.zeros(sides, dtype=np.float32)
    canvas[:rows, :columns] = psf
    canvas = np.roll(canvas, (-(rows // 2), -(columns // 2)), axis=(0, 1))
    return np.asarray(fft.rfft2(canvas, workers=workers))


def _span(wanted: NDArray[np.bool_]) -> slice:
    """Smallest slice that covers all that is wanted."""
    places = np.flatnonzero(wanted)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 0)
