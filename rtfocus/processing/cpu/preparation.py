"""Preparation: counts to signal, signal to what a network sees, and the ways back."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import EngineCard
from rtfocus.frame import TileGrid
from rtfocus.optics.normalisation import CELL_PX, PercentileRange
from rtfocus.processing.camera import CameraCorrection, write_counts
from rtfocus.processing.classify import background_of, normalisation_of

Image = NDArray[np.float32]

# Share of a float frame's range that is taken for one step.
_INVISIBLE = 1e-4


class Preparation:
    """Normalisation and background rule of one engine.

    Parameters
    ----------
    card
        Of the engine; a card without a background rule leaves it to the network.
    quantum
        Step between the camera's values; 0 for float frames.

    Raises
    ------
    EngineError
        If the card names a rule or a parameter that does not exist.
    """

    def __init__(self, card: EngineCard, quantum: float) -> None:
        self._normalisation = normalisation_of(card)
        self._background = background_of(card)
        self._quantum = quantum

    def normalise(
        self, frame: Image, *, of: Image | None = None
    ) -> tuple[Image, tuple[tuple[float, float], ...]]:
        """Return the network's view of a padded frame (y, x), and the way back.

        Parameters
        ----------
        frame
            Padded.
        of
            The same frame without padding, which a range is read from; None: it
            has none.

        Returns
        -------
        Image
            New array.
        tuple
            One (offset, scale) that was subtracted and divided by; empty where the
            normalisation has no inverse.
        """
        rule = self._normalisation
        if not isinstance(rule, PercentileRange):
            return rule.apply(frame), ()
        offset, scale = rule.fit(frame if of is None else of)
        return normalised(frame, offset, scale), ((offset, scale),)

    def background(self, frame: Image, grid: TileGrid) -> NDArray[np.bool_]:
        """Return True for tiles of a padded frame in which nothing stands out."""
        empty = np.zeros((grid.rows, grid.columns), dtype=np.bool_)
        if self._background is None:
            return empty
        # Float frames have no smallest step: what cannot be seen counts as none.
        span = float(frame.max()) - float(frame.min())
        quantum = self._quantum or max(
            _INVISIBLE * span, float(np.finfo(np.float32).tiny)
        )
        start = grid.origin_px - (grid.tile_px - 1) / 2
        found = replace(self._background, quantum=quantum).tiles(
            frame,
            tile_px=_cells(grid.tile_px),
            stride_px=_cells(grid.stride_px),
            start_px=_cells(start),
        )
        found = found[: grid.rows, : grid.columns]
        empty[: found.shape[0], : found.shape[1]] = found
        return empty


def normalised(frame: Image, offset: float, scale: float) -> Image:
    """Return ``(frame - offset) / scale``, a new float32 array."""
    result = np.subtract(frame, np.float32(offset), dtype=np.float32)
    result *= np.float32(1.0 / scale)
    return result


def _cells(length_px: float) -> int:
    """Return the nearest multiple of a cell."""
    return round(length_px / CELL_PX) * CELL_PX


@dataclass(frozen=True, slots=True)
class Marks:
    """What is wrong with the pixels of one frame."""

    flags: tuple[str, ...]
    """``nan``, ``saturated``."""
    invalid: NDArray[np.bool_] | None
    """Pixels that are NaN or infinite, shape of the frame; None: none."""


class Correction:
    """Corrects frames of one shape and dtype.

    Parameters
    ----------
    camera
        What its config says.
    """

    def __init__(self, camera: CameraCorrection) -> None:
        self._camera = camera
        self._offset = np.float32(camera.offset_counts)

    def mark(self, pixels: NDArray[np.generic]) -> Marks:
        """Say what is wrong with a frame."""
        invalid = self._camera.find_invalid(pixels)
        if invalid is None:
            flags, highest = [], pixels.max()
        else:
            flags, highest = ["nan"], np.max(pixels, where=~invalid, initial=-np.inf)
        # Rounded as the signal is.
        if float(np.float32(highest)) >= self._camera.saturation_counts:
            flags.append("saturated")
        return Marks(tuple(flags), invalid)

    def to_signal(self, pixels: NDArray[np.generic], out: Image) -> Marks:
        """Write the corrected frame to `out` (float32) and say what is wrong with it.

        Pixels that are no number take the median of the others.
        """
        marks = self.mark(pixels)
        invalid = marks.invalid
        np.copyto(out, pixels, casting="unsafe")
        if invalid is not None:
            out[invalid] = 0.0 if invalid.all() else np.median(out[~invalid])
        if self._offset:
            out -= self._offset
        if self._camera.divisor is not None:
            out /= self._camera.divisor
        return marks

    def to_counts(
        self, signal: Image, out: NDArray[np.generic], invalid: NDArray[np.bool_] | None
    ) -> None:
        """Write a restored signal on the camera's scale, see `write_counts`."""
        if self._offset:
            signal += self._offset
        write_counts(signal, out, invalid)
