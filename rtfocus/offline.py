"""Offline: images from anywhere through the very processor of the live loop.

And the blur kernels that a network with such an output saw in every tile of one.
"""

import os
import threading
import weakref
from concurrent.futures import wait
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from typing import cast

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config.model import Config
from rtfocus.engines.card import input_of
from rtfocus.engines.fitted import unsettled_um
from rtfocus.engines.registry import (
    find_engine,
    list_engines,
    parts,
    step_um,
    why_too_small,
)
from rtfocus.errors import ConfigError, EngineError, InputError
from rtfocus.frame import (
    PROTOCOL_VERSION,
    DefocusMap,
    FrameHeader,
    FrameResult,
    Position,
    SeriesStart,
    Slot,
)
from rtfocus.images.optics import checked_optics
from rtfocus.images.series import checked_image
from rtfocus.machine import memory
from rtfocus.optics.normalisation import halved, normalised
from rtfocus.processing.camera import fill
from rtfocus.processing.channel_plan import find_classifier, restored_as_it_is
from rtfocus.processing.classify import (
    Conditions,
    estimate_frame,
    invertible_normalisation,
)
from rtfocus.processing.cpu.classifier import TileNetwork
from rtfocus.processing.device import Ticket
from rtfocus.processing.montage import FrameTiles, to_planes
from rtfocus.processing.processor import FrameProcessor, open_processor
from rtfocus.workers import Closing, in_steps

_UID = "offline"
_LEAST_PX = 48
"""Least side of an image that is looked at once more at half the size of another."""
_BYTES_PER_PX = 50
"""Memory that an image takes, measured: 46 (`wiener`, 2000 to 6000 pixels a side).
Where it is not there some systems end the process without a word."""

Image = NDArray[np.float32]
Pixels = NDArray[np.generic]
Scale = tuple[float, int]
"""A level in um, and the highest."""

ORIENTATIONS = tuple((turns, flip) for flip in (0, 1) for turns in (0, 2, 1, 3))
"""In which an image is restored: quarter turns, and whether it is mirrored before."""


class ImageProcessor(Closing):
    """Finds the defocus of single images and restores them; a context manager.

    Images of equal shape and type in a row, such as the planes of a stack, share
    one start of the processor. Threads may share it, in turns; forks may not.

    Parameters
    ----------
    config
        As for the live loop.
    optics
        How the images were made. None: the optics of the config's channel or, if it
        has none, those that the classifier was calibrated for. A restorer that uses
        neither levels nor optics, without a classifier, needs none.
    """

    def __init__(self, config: Config, optics: OpticalSystem | None = None) -> None:
        given: object = config
        if not isinstance(given, Config):
            msg = (
                f"config is of type {type(given).__name__}; give what "
                "rtfocus.load_config returns"
            )
            raise ConfigError(msg)
        if optics is not None:
            optics = checked_optics(optics)
        self._config = config
        self._optics = optics
        as_known = config.as_known(optics)
        self._blind = as_known.processing.blind
        self._processor: FrameProcessor = open_processor(as_known)
        # A program that forgets to close it still ends.
        weakref.finalize(self, self._processor.close)
        self._scale: Scale | None = None
        self._started: tuple[object, ...] | None = None
        self._numbers = count()
        self._one_at_a_time = threading.Lock()
        self._coarser: ImageProcessor | None = None
        self._sideways: ImageProcessor | None = None
        self._open_in: int | None = os.getpid()

    def classify(
        self, image: Pixels, *, channel: str | None = None, of_stack: bool = False
    ) -> FrameResult:
        """Find the defocus of an image, tile by tile.

        Parameters
        ----------
        image
            Axes (y, x) or (y, x, 3); uint8 and uint16 are counts, everything else is
            computed as float32.
        channel
            Of the config's ``channels``; None: the only one, or its ``default``.
        of_stack
            It is a plane of a stack that shows something elsewhere: no pixel of it
            need be a number.

        Returns
        -------
        FrameResult
            ``estimate``, with unknown optics a distance, and ``defocus``; ``restored``
            is None.

        Raises
        ------
        EngineError
            If there is no engine, it does not fit the optics or fails.
        InputError
            If the array is not an image, shows nothing, or is too small to tell.
        """
        return self._process(image, channel, restore=False, of_stack=of_stack)

    def restore(
        self, image: Pixels, *, channel: str | None = None, of_stack: bool = False
    ) -> FrameResult:
        """Restore an image; `FrameResult.restored` is new memory of the same shape.

        Parameters
        ----------
        image, channel, of_stack
            As for `classify`.

        Raises
        ------
        EngineError
            As `classify`, and if the config restores nothing.
        InputError
            If the array is not an image, or shows nothing.
        """
        result = self._process(image, channel, restore=True, of_stack=of_stack)
        if result.restored is None:
            msg = f"nothing was restored: {result.skipped}"
            raise EngineError(msg)
        return result

    def backends(self) -> dict[str, str]:
        """Tell what each network of the last image ran on."""
        return self._processor.backends()

    def close(self) -> None:
        """Stop the processor; called twice does nothing."""
        with self._one_at_a_time:
            self._processor.close()
            self._open_in = None
            for other in filter(None, (self._coarser, self._sideways)):
                other.close()

    def _process(
        self, image: Pixels, channel: str | None, *, restore: bool, of_stack: bool
    ) -> FrameResult:
        try:
            pixels = checked_image(image, of_stack=of_stack)
            if not restore and (why := why_too_small(pixels.shape)):
                msg = f"the image {why}"
                raise InputError(msg)
            with self._one_at_a_time:
                if self._open_in != os.getpid():
                    # Threads do not cross a fork: what is asked there stays unanswered.
                    why = "of the process that forked" if self._open_in else "closed"
                    msg = f"the ImageProcessor is {why}; open a new one here"
                    raise EngineError(msg)
                name = self._config.channel(channel).name
                return self._process_one(pixels, name, restore=restore)
        except MemoryError as error:
            shape = np.shape(image)
            msg = f"the memory does not suffice for an image of {shape}; give a part"
            raise InputError(msg) from error

    def _process_one(
        self, pixels: Pixels, channel: str, *, restore: bool
    ) -> FrameResult:
        if restore:
            return self._in_the_mean(pixels, channel)
        self._start_for(pixels, channel)
        header = self._header(pixels)
        result = self._run_through(header, pixels, "classified only")
        if self._blind and result.defocus is not None:
            defocus = self._looked_coarser(pixels, channel, result.defocus)
            estimate = estimate_frame(header, defocus.distances())
            result = replace(result, defocus=defocus, estimate=estimate)
        return replace(result, skipped=None)

    def _header(self, pixels: Pixels) -> FrameHeader:
        """Return the header of the next frame."""
        number = next(self._numbers)
        return FrameHeader(
            version=PROTOCOL_VERSION,
            series_uid=_UID,
            sequence=number,
            shape=pixels.shape,
            dtype=pixels.dtype.str,
            captured_ns=0,
            exposure_ms=0.0,
            index={"t": number, "c": 0},
        )

    def as_it_lies(self, pixels: Pixels, channel: str) -> FrameResult:
        """Restore an image, checked before, in this orientation alone."""
        self._start_for(pixels, channel)
        return self._run_through(self._header(pixels), pixels, None)

    def _in_the_mean(self, pixels: Pixels, channel: str) -> FrameResult:
        """Restore an image in the mean over the orientations that are asked for.

        What a network makes of an image that is turned differs by its error (Timofte
        2016, *Seven ways to improve example-based single image super resolution*).
        """
        first = self.as_it_lies(pixels, channel)
        ways = ORIENTATIONS[: self._config.engines_of(channel)[1].orientations]
        if first.restored is None or len(ways) == 1:
            return first
        mean = first.restored / len(ways)
        for turns, flip in ways[1:]:
            one = np.rot90(pixels[:, ::-1] if flip else pixels, turns)
            by = self
            if one.shape != pixels.shape:  # each stays started for the next plane
                by = self._sideways or ImageProcessor(self._config, self._optics)
                self._sideways = by
            restored = cast("Image", by.as_it_lies(one, channel).restored)
            back = np.rot90(restored, -turns)
            mean += (back[:, ::-1] if flip else back) / len(ways)
        if np.issubdtype(first.restored.dtype, np.integer):
            np.rint(mean, out=mean)
        mean = mean.astype(first.restored.dtype)
        # The error stated for one orientation is not that of the mean.
        return replace(first, restored=mean, expected_error=None)

    def _looked_coarser(
        self, pixels: Pixels, channel: str, fine: DefocusMap
    ) -> DefocusMap:
        """Look at what is unsettled in the image of half the size too, and so on."""
        if self._scale is None or min(pixels.shape[:2]) < 2 * _LEAST_PX:
            return fine
        step, farthest = self._scale
        if pixels.dtype.kind == "f" and (invalid := ~np.isfinite(pixels)).any():
            # As the processor did: one such pixel would make all means around NaN.
            fill(pixels := pixels.astype(np.float32), invalid)
        least_um = unsettled_um(fine, pixels, step_um=step, farthest=farthest)
        if not np.isfinite(least_um).any():
            return fine
        if self._coarser is None:
            self._coarser = ImageProcessor(self._config, self._optics)
        coarser = self._coarser.classify(
            halved(pixels), channel=channel, of_stack=True
        ).defocus
        if coarser is None:
            return fine
        return fine.with_coarser(coarser, least_um, step_um=step, farthest=farthest)

    def _run_through(
        self, header: FrameHeader, pixels: Pixels, unrestored: str | None
    ) -> FrameResult:
        """Send an image through the processor; the result is new memory."""
        self._slot.prepare(header)[...] = pixels
        ticket = self._processor.submit(self._slot, unrestored=unrestored)
        try:
            result = _result_of(ticket)
        finally:
            if not ticket.result.done():
                # Interrupted: the processor has the slot still, the next image gets
                # a new one.
                self._started = None
        # The slot's buffers are used again by the next image.
        restored = None if result.restored is None else result.restored.copy()
        return replace(result, restored=restored)

    def _start_for(self, pixels: Pixels, channel: str) -> None:
        """Start the processor for this kind of image unless it already runs."""
        kind = (pixels.shape, pixels.dtype.str, channel)
        if kind == self._started:
            return
        _refuse_too_large(pixels)
        self._started = None
        optics, self._scale = self._choose_optics(channel)
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
            # Nothing that needs no optics looks at it.
            pixel_size_um=1.0 if optics is None else optics.pixel_size_um,
        )
        self._slot = Slot(0, np.empty(pixels.nbytes, np.uint8))
        self._processor.start(series, 1, any_size=True)
        self._started = kind

    def _choose_optics(self, channel: str) -> tuple[OpticalSystem | None, Scale | None]:
        """Return the optics that are given, configured, or the engine's own, and scale.

        None: nothing needs any; no levels are looked for.
        """
        name, engines = self._config.engines_of(channel)
        processing = self._config.processing
        optics = self._optics or self._config.channel(channel).optics
        if name is None:
            if optics is None and restored_as_it_is(engines, processing) is None:
                msg = (
                    "no classifier is configured; set processing.classifier or --engine"
                )
                raise EngineError(msg)
            return optics, None
        if optics is None and not self._blind:
            # Where others are stated the engine's would be a guess: refused.
            self._config.optics_of(channel)
        card = find_classifier(name, processing.engine_folders).card
        levels, of_card = parts(card)
        optics = optics or of_card.reference
        step = step_um(card, optics, blind=self._blind)
        return optics, (step, levels.count - 1)


def _refuse_too_large(pixels: Pixels) -> None:
    needed = _BYTES_PER_PX * pixels.size
    if needed > (free := memory().free):
        msg = (
            f"an image of shape {pixels.shape} takes {needed / 1e9:.1f} GB of memory "
            f"to process, {free / 1e9:.1f} GB are free; give parts of it, or close "
            "other programs"
        )
        raise InputError(msg)


def _result_of(ticket: Ticket) -> FrameResult:
    """Wait for a result; faults of the image are raised as such."""
    in_steps(lambda step_s: wait([ticket.result], step_s).done)
    try:
        return ticket.result.result()
    except EngineError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one image, tile by tile."""

    kernels: Image
    """Axes (row, column, y, x)."""
    own_px: int
    """Side of the part of the image that a kernel speaks for."""
    defocus_um: Image
    """Of these tiles by the classifier, (row, column); NaN: in focus, background."""


def extract_kernels(
    config: Config, engine: str, image: Pixels, *, channel: str | None
) -> Kernels:
    """Extract the kernel of every tile of an image with an engine that gives them.

    Parameters
    ----------
    config
        Its classifier says which level the engine gets.
    engine
        Name or folder.
    image
        Axes (y, x) or (y, x, 3); of colours an engine for one channel sees the mean.
    channel
        Of the config, as for `ImageProcessor.classify`.

    Raises
    ------
    EngineError
        If the engine gives no kernels, cannot be opened or makes something else.
    """
    folders = config.processing.engine_folders
    opened = find_engine(engine, folders)
    card = opened.card
    if (output := card.kernel_output) is None:
        able = [e.name for e in list_engines(folders) if e.card.kernel_output]
        those = ", ".join(able) or "none"
        msg = f"engine '{card.name}' extracts no kernels; those that do: {those}"
        raise EngineError(msg)
    with ImageProcessor(config.without_restoration()) as images:
        defocus = images.classify(image, channel=channel).defocus
    signal = np.asarray(image, np.float32)
    tiles_card = input_of(card)
    if signal.ndim == 3 and tiles_card.channels == 1:
        signal = signal.mean(axis=2)
    plane = to_planes(signal, tiles_card.channels)[0]
    normalisation = invertible_normalisation(card)
    scaled = [normalised(p, *normalisation.fit(p)) for p in plane]
    tiles = FrameTiles(tiles_card, (signal.shape[0], signal.shape[1]))
    places = tiles.places
    defocus_um, signed = np.full(len(places), np.nan, np.float32), False
    if defocus is not None:
        defocus_um, signed = tiles.defocus_um(defocus, places), defocus.grid.signed
    given = config.channel(channel).optics
    conditions = Conditions(
        card,
        given or parts(card)[1].reference,
        blind=given is None or config.processing.blind,
        signed=signed,
    )
    threads = config.processing.threads or 1
    with closing(
        TileNetwork(opened, config.processing, output=output.name, threads=threads)
    ) as network:
        condition = conditions.rows(defocus_um)
        kernels = network.run(tiles.cut(np.stack(scaled), places), condition)
    side = output.size_px
    if kernels.shape[1:] != (side, side) or not np.isfinite(kernels).all():
        msg = (
            f"engine '{card.name}': its output '{output.name}' is "
            f"{kernels.shape}, the card says (N, {side}, {side}) numbers"
        )
        raise EngineError(msg)
    grid = places[-1][0] + 1, places[-1][1] + 1
    return Kernels(
        kernels.reshape(*grid, side, side),
        tiles_card.tile_px - 2 * tiles_card.halo_px,
        defocus_um.reshape(grid),
    )
