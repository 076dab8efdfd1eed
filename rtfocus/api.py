"""Api: one call for an image, one for a series, one for a calibration."""

import logging
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem as Optics
from rtfocus.config import Config, load_config
from rtfocus.config.loading import restoring_in, with_engine
from rtfocus.engines.registry import find_engine
from rtfocus.errors import ConfigError, EngineError, InputError, number_of
from rtfocus.files import path_given
from rtfocus.frame import DefocusMap, FrameResult
from rtfocus.image_set import BLIND_ENGINE, restoring_with, why_no_error
from rtfocus.images.optics import checked_optics
from rtfocus.images.series import nothing_shown, pixels_of, shows_nothing
from rtfocus.offline import ImageProcessor
from rtfocus.optics.normalisation import told_below
from rtfocus.processing.channel_plan import restored_as_it_is
from rtfocus.processing.restore import BLIND, METHODS
from rtfocus.runs import Run, open_run

__all__ = ["Optics", "acquire", "classify", "fit_psf", "process", "restore", "run"]

AnyConfig = Config | Path | str
"""A config, a YAML file, or the name of a shipped config such as ``demo``."""

Image = NDArray[Any]

logger = logging.getLogger(__name__)


@overload
def restore(
    image: Image,
    *,
    optics: Optics | None = ...,
    engine: str | None = ...,
    orientations: int | None = ...,
    config: AnyConfig | None = ...,
    channel: str | None = ...,
    expected_error: Literal[False] = ...,
) -> Image: ...
@overload
def restore(
    image: Image,
    *,
    optics: Optics | None = ...,
    engine: str | None = ...,
    orientations: int | None = ...,
    config: AnyConfig | None = ...,
    channel: str | None = ...,
    expected_error: Literal[True],
) -> tuple[Image, Image]: ...
def restore(
    image: Image,
    *,
    optics: Optics | None = None,
    engine: str | None = None,
    orientations: int | None = None,
    config: AnyConfig | None = None,
    channel: str | None = None,
    expected_error: bool = False,
) -> Image | tuple[Image, Image]:
    """Restore an image, or every plane of a stack of them.

    Every call starts a processor; for many images keep an `ImageProcessor`.

    Parameters
    ----------
    image
        Axes (y, x) or (y, x, 3), or a stack (..., y, x), whose planes are restored
        one by one. uint8 and uint16 are counts; everything else is computed as
        float32.
    optics
        How the image was made. None: the optics of `config`. Without any, only
        engines that run blind can be used, and a warning is logged.
    engine
        ``wiener``, ``richardson_lucy``, ``richardson_lucy_accelerated``, or the name
        of an engine that restores. None: as `config` says; without a config Wiener,
        or, if the optics are unknown, an engine that runs blind.
    orientations
        2, 4 or 8: networks restore this many turned and mirrored copies and take
        their mean, which is better and as many times slower. None: as `config` says;
        without a config 1.
    config
        Camera, optics and engines; None: the defaults.
    channel
        A channel of `config`; None: its only one, or its ``default``.
    expected_error
        Also return the error that is expected to be left.

    Returns
    -------
    array
        A new array of the shape of `image`: uint8, uint16 or float32. With
        `expected_error` also that error, root mean square of each tile, (..., y, x).

    Raises
    ------
    InputError
        If the array is not an image.
    EngineError
        If an engine is not found, does not fit the optics, or fails.
    ConfigError
        If `config` cannot be used or states no optics for `channel`, the engine
        computes with unknown optics, or `expected_error` is not stated.

    Examples
    --------
    >>> import numpy as np, rtfocus
    >>> optics = rtfocus.Optics(0.5, wavelength_nm=520, pixel_size_um=0.65)
    >>> blurred = np.full((96, 96), 1000, np.uint16)
    >>> rtfocus.restore(blurred, optics=optics, engine="richardson_lucy").dtype
    dtype('uint16')
    """
    settings = _settings(config)
    is_blind = not _optics_known(settings, optics)
    if engine is None and config is None and is_blind:
        engine = BLIND_ENGINE
    if engine is not None:
        settings = restoring_with(settings, engine, whole=config is None)
    if orientations is not None:
        settings = restoring_in(settings, orientations)
    if is_blind:
        _refuse_method_without_optics(settings)
        processing = settings.processing
        if restored_as_it_is(processing.restoration, processing) is None:
            _tell_blind(processing.restoration.method)
    if expected_error:
        source = None if is_blind else "optics or the config"
        _refuse_unstated_error(settings, channel, source)
    errors: list[Image] = []
    with ImageProcessor(settings, optics) as processor:

        def restore_plane(plane: Image) -> FrameResult:
            of_stack = np.ndim(plane) < np.ndim(image)
            result = processor.restore(plane, channel=channel, of_stack=of_stack)
            errors.append(np.asarray(result.expected_error))
            return result

        restored = _plane_by_plane(image, restore_plane, settings)
    if not expected_error:
        return restored
    outer = restored.shape[: -3 if _is_colour(restored) else -2]
    return restored, np.reshape(errors, outer + errors[0].shape)


def classify(
    image: Image,
    *,
    optics: Optics | None = None,
    engine: str | None = None,
    config: AnyConfig | None = None,
    channel: str | None = None,
) -> DefocusMap:
    """Find the defocus of an image, tile by tile.

    Parameters
    ----------
    image
        Axes (y, x) or (y, x, 3).
    optics, config, channel
        As for `restore`.
    engine
        Name of an engine that finds the defocus; None: as `config` says, else DelpNet.

    Returns
    -------
    DefocusMap
        ``defocus_um``, ``confidence`` and ``level``, each with axes (tile_y, tile_x);
        NaN where there is no specimen; ``grid`` says where. With unknown optics
        a blur beyond the engine's levels is measured in the image of half the size, and
        so on: ``defocus_um`` goes on, ``level`` stays the last one.

    Raises
    ------
    InputError, EngineError, ConfigError
        As `restore`.
    """
    settings = _settings(config)
    if engine is not None:
        settings = with_engine(settings, "classifier", engine)
    if not _optics_known(settings, optics):
        _tell_blind(settings.processing.classifier)
    with ImageProcessor(settings, optics) as processor:
        defocus = processor.classify(image, channel=channel).defocus
    _tell_below_offset([pixels_of(image)], settings)
    if defocus is None:
        msg = "the config has no classifier; give one with engine"
        raise EngineError(msg)
    return defocus


def acquire(config: AnyConfig, *, stop: threading.Event | None = None) -> Any:  # noqa: ANN401
    """Run the microscope side: acquire one series and send it to a processor.

    Returns when everything that was sent is durable on the processor's disk.

    Parameters
    ----------
    config
        Its microscope, acquisition, channels and transport are used.
    stop
        Set it from another thread to end the acquisition.

    Returns
    -------
    AcquisitionReport
        ``frames`` sent of ``planned``, and why it ended; ``print`` it.

    Raises
    ------
    RtfocusError
        What went wrong first.
    """
    from rtfocus import app

    return app.acquire(_settings(config), stop=stop or threading.Event())


def process(config: AnyConfig, *, stop: threading.Event | None = None) -> Run | None:
    """Run the processor side for one series: receive, estimate, restore, write.

    Parameters
    ----------
    config
        Everything but its microscope and acquisition is used.
    stop
        Set it from another thread to end the series; the run folder is finished.

    Returns
    -------
    Run
        What was recorded; None: stopped before a series came.

    Raises
    ------
    RtfocusError
        What went wrong first; the run folder is finished before.
    """
    from rtfocus import app

    folder = app.process(_settings(config), stop=stop or threading.Event())
    return None if folder is None else open_run(folder)


def run(config: AnyConfig, *, stop: threading.Event | None = None) -> Run | None:
    """Run both sides on this machine, in two processes, for one series.

    Parameters
    ----------
    config
        The whole config; its endpoints are replaced by free ports.
    stop
        Set it from another thread to end the acquisition; what was acquired is still
        processed and written.

    Returns
    -------
    Run
        What was recorded; None: stopped before the first frame.

    Raises
    ------
    RtfocusError
        What went wrong first; the run folder is finished before.
    """
    from rtfocus import app

    folder = app.run(
        _settings(config), stop=stop or threading.Event(), abandon=threading.Event()
    )
    return None if folder is None else open_run(folder)


def fit_psf(
    images: Path | str | tuple[Path | str, Path | str],
    *,
    kind: Literal["beads", "stack", "pairs"],
    optics: Optics,
    step_um: float | None = None,
    defocus_um: float | None = None,
    bead_diameter_um: float = 0.0,
    fit_aperture: bool = True,
    fit_astigmatism: bool = False,
) -> Any:  # noqa: ANN401 (`Calibration`, which takes long to import)
    """Fit NA, defocus and aberrations to images of your own microscope.

    Parameters
    ----------
    images
        A z-stack (a file, or a folder of planes) of ``beads`` or of a flat specimen
        (``stack``), or (sharp, defocused) files or folders (``pairs``).
    kind
        What they show.
    optics
        Nominal optics to start from.
    step_um, bead_diameter_um
        Stacks: distance of planes, None: what the file says; beads: size, 0: points.
    defocus_um
        Pairs: nominal defocus, positive = specimen too far from the objective.
    fit_aperture, fit_astigmatism
        What to fit besides defocus and spherical aberration.

    Returns
    -------
    Calibration
        ``system`` are the fitted `Optics`; ``statement`` and ``warnings`` say how far
        to trust them.

    Raises
    ------
    InputError
        If the images cannot be read or nothing can be fitted to them.
    ConfigError
        If what `kind` needs is not given.
    """
    if kind not in ("beads", "stack", "pairs"):
        msg = f"kind {kind!r} is none; choose 'beads', 'stack' or 'pairs'"
        raise ConfigError(msg)
    optics = checked_optics(optics)
    free = {"fit_aperture": fit_aperture, "fit_astigmatism": fit_astigmatism}
    if kind == "pairs":
        from rtfocus.calibration.pair_fit import calibrate_from_pairs
        from rtfocus.calibration.pairs import read_pairs

        if not isinstance(images, tuple) or not defocus_um:
            msg = "kind 'pairs' needs images=(sharp, defocused) and defocus_um, not 0"
            raise ConfigError(msg)
        try:
            sharp, defocused = (path_given(path, "images") for path in images)
        except ValueError as error:
            msg = f"images are {images!r}; kind 'pairs' needs (sharp, defocused)"
            raise ConfigError(msg) from error
        pairs = read_pairs(sharp, defocused, most=6)
        return calibrate_from_pairs(
            pairs, optics, nominal_defocus_um=defocus_um, **free
        )
    if isinstance(images, tuple):
        msg = f"kind '{kind}' needs one file or folder, not a pair"
        raise ConfigError(msg)
    from rtfocus.calibration.stack_fit import calibrate_from_stack, read_stack

    planes = read_stack(path_given(images, "images"), step_um=step_um)
    if kind == "beads":
        from rtfocus.calibration.bead_fit import calibrate_from_beads

        return calibrate_from_beads(
            planes, optics, bead_diameter_um=bead_diameter_um, **free
        )
    return calibrate_from_stack(planes, optics, **free)


def _settings(config: AnyConfig | None) -> Config:
    if config is None:
        return Config()
    return config if isinstance(config, Config) else load_config(config)


def _optics_known(settings: Config, optics: Optics | None) -> bool:
    return optics is not None or any(c.optics is not None for c in settings.channels)


def _refuse_method_without_optics(settings: Config) -> None:
    """Refuse what computes with the optics where they are unknown."""
    method = settings.processing.restoration.method
    if method == BLIND:
        return
    if method not in METHODS:
        named = find_engine(method, settings.processing.engine_folders, METHODS)
        if not named.card.implementation.startswith("builtin:"):
            return
    msg = (
        f"the optics are unknown and '{method}' computes with them: give "
        "optics=rtfocus.Optics(numerical_aperture, wavelength_nm, pixel_size_um), or "
        f"an engine that runs blind: engine='{BLIND_ENGINE}'"
    )
    raise ConfigError(msg)


def _refuse_unstated_error(
    settings: Config, channel: str | None, source: str | None
) -> None:
    find = partial(find_engine, folders=settings.processing.engine_folders)
    if why := why_no_error(settings, channel, find, optics=source):
        msg = f"no expected error: {why}"
        raise ConfigError(msg)


def _is_colour(image: Image) -> bool:
    return image.ndim > 2 and image.shape[-1] == 3


def _tell_blind(engine: str | None) -> None:
    logger.warning(
        "no optics are given: '%s' runs blind, as if they were those it was made for; "
        "give optics=rtfocus.Optics(numerical_aperture, wavelength_nm, pixel_size_um)",
        engine,
    )


def _tell_below_offset(planes: Iterable[Image], settings: Config) -> None:
    offset = settings.camera.offset_counts
    if faults := [text for plane in planes if (text := told_below(plane, offset))]:
        logger.warning("%s: %s", number_of(len(faults), "plane"), faults[0])


def _plane_by_plane(
    image: Image, restore: Callable[[Image], FrameResult], settings: Config
) -> Image:
    """Restore the planes of a stack and put them together again."""
    image = pixels_of(image)
    is_colour = _is_colour(image)
    plane_axes = 3 if is_colour else 2
    if 0 in image.shape:
        msg = f"an array of {image.shape} has no pixels; give some along all its axes"
        raise InputError(msg)
    if image.ndim < plane_axes:
        msg = f"an image has axes (y, x) or (y, x, 3), this array is {image.shape}"
        raise InputError(msg)
    if image.ndim > 2 and not is_colour and image.shape[-1] < 5 <= image.shape[-2]:
        # A stack of planes so thin is a picture whose last axis is something else.
        msg = (
            f"the last axis of this array of {image.shape} is neither x nor 3 colours; "
            "give image[..., :3] of one with alpha, image[..., 0] of one with a "
            "single channel"
        )
        raise InputError(msg)
    shape = image.shape[: image.ndim - plane_axes]
    if all(shows_nothing(image[place]) for place in np.ndindex(shape)):
        raise InputError(nothing_shown("the image"))
    _tell_below_offset((image[place] for place in np.ndindex(shape)), settings)
    first, *others = np.ndindex(shape)
    plane = np.asarray(restore(image[first]).restored)
    try:  # Into its place at once: a list of planes would need the memory twice.
        result = np.empty(image.shape, plane.dtype)
    except MemoryError as error:
        msg = f"the memory does not suffice for {image.shape}; give fewer planes"
        raise InputError(msg) from error
    result[first] = plane
    for place in others:
        result[place] = restore(image[place]).restored
    return result
