"""Offline: images from anywhere through the very processor of the live loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.model import Config
from rtfocus.errors import EngineError, InputError
from rtfocus.frame import (
    BACKGROUND,
    PROTOCOL_VERSION,
    DefocusMap,
    FrameHeader,
    FrameResult,
    Position,
    SeriesStart,
)
from rtfocus.images.series import native_dtype
from rtfocus.processing.device import Ticket
from rtfocus.processing.engines.registry import find_engine, parts
from rtfocus.processing.processor import FrameProcessor, open_processor
from rtfocus.slots import SlotPool

_UID = "offline"


class ImageProcessor:
    """Classifies and restores single images; a context manager.

    Images of equal shape and type in a row, such as the planes of a stack, share
    one start of the processor.

    Parameters
    ----------
    config
        As for the live loop.
    optics
        Of the images; None: those of the config's channel, or where that has none,
        the optics the classifier was calibrated for.
    """

    def __init__(self, config: Config, optics: OpticalSystem | None = None) -> None:
        self._config = config
        self._optics = optics
        self._processor: FrameProcessor = open_processor(_as_known(config, optics))
        self._started: tuple[object, ...] | None = None
        self._pool = SlotPool(1, 1)
        self._sequence = 0

    def classify(
        self, image: NDArray[np.generic], *, channel: str = "default"
    ) -> FrameResult:
        """Estimate the defocus of an image (y, x) or (y, x, 3), tile by tile.

        Raises
        ------
        EngineError
            If there is no engine, it does not fit the optics or fails.
        InputError
            If the array is not an image.
        """
        return self._process(image, channel, restore=False)

    def restore(
        self, image: NDArray[np.generic], *, channel: str = "default"
    ) -> FrameResult:
        """Restore an image (y, x) or (y, x, 3); `FrameResult.restored` is new memory.

        Raises
        ------
        EngineError
            As `classify`, and if the config restores nothing.
        InputError
            If the array is not an image.
        """
        result = self._process(image, channel, restore=True)
        if result.restored is None:
            msg = f"nothing was restored: {result.skipped}"
            raise EngineError(msg)
        return result

    def backends(self) -> dict[str, str]:
        """Tell what each network of the last image ran on."""
        return self._processor.backends()

    def close(self) -> None:
        """Stop the processor; called twice does nothing."""
        self._processor.close()
        self._started = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _process(
        self, image: NDArray[np.generic], channel: str, *, restore: bool
    ) -> FrameResult:
        pixels = _as_image(image)
        self._start_for(pixels, channel)
        header = FrameHeader(
            version=PROTOCOL_VERSION,
            series_uid=_UID,
            sequence=self._sequence,
            shape=pixels.shape,
            dtype=pixels.dtype.str,
            captured_ns=0,
            exposure_ms=0.0,
            index={"t": self._sequence, "c": 0},
        )
        self._sequence += 1
        unrestored = None if restore else "classified only"
        with self._slot(header, pixels, unrestored) as result:
            return result if restore else replace(result, skipped=None)

    @contextmanager
    def _slot(
        self, header: FrameHeader, pixels: NDArray[np.generic], unrestored: str | None
    ) -> Iterator[FrameResult]:
        slot = self._pool.acquire(timeout_s=0)
        if slot is None:
            msg = "an ImageProcessor takes one image at a time"
            raise EngineError(msg)
        try:
            slot.prepare(header)[...] = pixels
            ticket = self._processor.submit(slot, unrestored=unrestored)
            result = _result_of(ticket)
            # The slot's buffers are used again by the next image.
            restored = None if result.restored is None else result.restored.copy()
            yield replace(result, restored=restored)
        finally:
            self._pool.release(slot)

    def _start_for(self, pixels: NDArray[np.generic], channel: str) -> None:
        """Start the processor for this kind of image unless it already runs."""
        kind = (pixels.shape, pixels.dtype.str, channel)
        if kind == self._started:
            return
        self._started = None
        optics = self._optics_of(channel)
        series = SeriesStart(
            version=PROTOCOL_VERSION,
            series_uid=_UID,
            name=_UID,
            started_ns=0,
            shape=pixels.shape,
            dtype=pixels.dtype.str,
            sizes={"t": None},
            channels=[Channel(channel, optics)],
            positions=[Position("image")],
            pixel_size_um=optics.pixel_size_um,
        )
        self._pool = SlotPool(1, pixels.nbytes)
        self._processor.start(series, 1)
        self._started = kind

    def _optics_of(self, channel: str) -> OpticalSystem:
        """Return the optics that are given, configured, or the engine's own."""
        settings = self._config.channel(channel)
        given = self._optics or settings.optics
        if given is not None:
            return given
        name = settings.classifier or self._config.processing.classifier
        if name is None:
            msg = "no classifier is configured; set processing.classifier or --engine"
            raise EngineError(msg)
        found = find_engine(name, self._config.processing.engine_folders)
        _, optics = parts(found.card)
        return optics.reference


def _as_known(config: Config, optics: OpticalSystem | None) -> Config:
    """Tell engines no aberrations where nobody has said what the optics are."""
    if optics is not None or any(channel.optics for channel in config.channels):
        return config
    processing = config.processing.model_copy(update={"blind": True})
    return config.model_copy(update={"processing": processing})


def tile_rows(result: FrameResult) -> list[dict[str, float | int | str | None]]:
    """List the tiles of a result as plain values, row by row.

    ``y`` and ``x`` are the upper left corner of the tile in frame pixels, cut at
    the frame's edge; ``level`` and ``defocus_um`` are None for background.
    """
    if result.defocus is None:
        return []
    return list(_tile_rows(result.defocus))


def _tile_rows(found: DefocusMap) -> Iterator[dict[str, float | int | str | None]]:
    grid = found.grid
    first = grid.origin_px - (grid.tile_px - 1) / 2
    for row, column in np.ndindex(found.level.shape):
        level = int(found.level[row, column])
        empty = level == BACKGROUND
        yield {
            "y": max(0, round(first + row * grid.stride_px)),
            "x": max(0, round(first + column * grid.stride_px)),
            "level": None if empty else level,
            "label": "bg" if empty else str(level),
            "probability": float(found.confidence[row, column]),
            "defocus_um": None if empty else float(found.defocus_um[row, column]),
            "uncertainty_um": None
            if empty or found.uncertainty_um is None
            else float(found.uncertainty_um[row, column]),
        }


def _result_of(ticket: Ticket) -> FrameResult:
    """Wait for a result; what is wrong with the image is told as such."""
    try:
        return ticket.result.result()
    except EngineError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


def _as_image(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return the array in a type that frames have, checked for shape."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        msg = f"an image has axes (y, x) or (y, x, 3), this array is {image.shape}"
        raise InputError(msg)
    if 0 in image.shape:
        msg = f"the image of shape {image.shape} has no pixels"
        raise InputError(msg)
    return np.ascontiguousarray(image, dtype=native_dtype(image.dtype))
