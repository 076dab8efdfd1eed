"""Preflight: what a run would be refused for, found before the first exposure.

Everything is asked of those who decide in a run too: the microscope's core, the plan,
the engines' cards and weights, the device, the disk. Nothing is exposed, moved or
left on the disk.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rtfocus.autofocus.planes import load_calibration
from rtfocus.channel import Channel
from rtfocus.config import Config
from rtfocus.engines.card import verified_file
from rtfocus.engines.registry import FoundEngine, check_fit, find_engine
from rtfocus.errors import RtfocusError, WriterError
from rtfocus.frame import SeriesStart
from rtfocus.machine import check_space, free_bytes
from rtfocus.microscope.acquisition import foresee
from rtfocus.processing.channel_plan import plan_channel, restored_as_it_is
from rtfocus.processing.processor import open_processor
from rtfocus.writers.folder import planned_bytes, run_folder
from rtfocus.writers.header import RunHeader


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    topic: str
    said: str
    """What was found; where it fails, nothing."""
    error: RtfocusError | None = None
    """Why a run would end here; None: it would not."""


def preflight(config: Config) -> Iterator[Check]:
    """Check plan, channels, optics, engines, device, autofocus and disk.

    Yields
    ------
    Check
        One after the other; a fault in one does not keep the others from being looked
        at.
    """
    series: SeriesStart | None = None
    try:
        series = foresee(config)
    except RtfocusError as error:
        yield Check("plan", "", error)
    else:
        yield Check("plan", _describe(series))
    yield from _channels(config, series)
    yield _asked("device", partial(_device, config))
    if config.autofocus.calibration is not None:
        yield _asked("autofocus", partial(_calibration, config.autofocus.calibration))
    yield _asked("disk", partial(_disk, config, series))


def _asked(topic: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(topic, ask())
    except RtfocusError as error:
        return Check(topic, "", error)


def _describe(series: SeriesStart) -> str:
    words = {"t": "time points", "p": "positions", "c": "channels", "z": "slices"}
    sizes = [
        f"{'endless' if size is None else size} {words[axis]}"
        for axis, size in series.sizes.items()
        if size != 1
    ]
    images = "until it is stopped" if series.planned is None else series.planned
    shape = " x ".join(map(str, series.shape))
    text = f"{images} images of {shape} pixels, {series.pixel_size_um:g} um each"
    return ": ".join([text, ", ".join(sizes)]) if sizes else text


def _channels(config: Config, series: SeriesStart | None) -> Iterator[Check]:
    if series is None:
        # Which channels come is not known: those of the config are looked at.
        for settings in config.channels:
            ask = partial(_engine_of, config, settings.name)
            yield _asked(f"channel {settings.name}", ask)
        return
    for channel in series.channels:
        yield _asked(
            f"channel {channel.name}", partial(_work_of, config, series, channel)
        )


def _engine_of(config: Config, channel: str) -> str:
    settings = config.channel(channel)
    name = settings.classifier or config.processing.classifier
    if settings.optics is None or name is None:
        wanted = settings.restoration or config.processing.restoration
        as_it_is = restored_as_it_is(wanted, config.processing)
        if as_it_is is None:
            return "recorded, not restored"
        _verify(as_it_is.engine)
        return f"restored by {as_it_is.name}, defocus not estimated"
    found = find_engine(name, config.processing.engine_folders)
    check_fit(found.card, settings.optics, ignore=config.processing.ignore_optics)
    _verify(found)
    return f"{name} fits its optics"


def _work_of(config: Config, series: SeriesStart, channel: Channel) -> str:
    """Say what happens to a channel's frames; the weights are compared."""
    plan = plan_channel(config, series, channel)
    if plan.classifier is not None:
        _verify(plan.classifier.found)
        text = f"defocus by {plan.classifier.found.name}"
    elif plan.restoration is not None:
        text = "defocus not estimated"
    else:
        return f"recorded, not restored: {plan.skipped}"
    if plan.restoration is None:
        return f"{text}, not restored: {plan.skipped}"
    if plan.restoration.found is not None:
        _verify(plan.restoration.found)
    return f"{text}, restored by {plan.restoration.name}"


def _verify(found: FoundEngine) -> None:
    if "fp32" in found.card.files:
        verified_file(found.folder, found.card, "fp32")


def _device(config: Config) -> str:
    processor = open_processor(config)
    try:
        return ", or ".join(processor.devices)
    finally:
        processor.close()


def _calibration(path: Path) -> str:
    found = load_calibration(path)
    return "calibrated" if found.trusted else f"checked: {'; '.join(found.problems)}"


def _disk(config: Config, series: SeriesStart | None) -> str:
    if series is None:
        parent, planned = config.run.folder, None
        text = str(parent)
    else:
        folder = run_folder(config.run, config.store, series)
        parent, text = folder.parent, str(folder)
        header = RunHeader(series, config.store, None, config.store.restored, {})
        planned = planned_bytes(header)
    places = (parent.absolute(), *parent.absolute().parents)
    existing = next(place for place in places if place.exists())
    check_space(existing, planned or 0, int(config.store.min_free_mb * 1e6))
    _write_into(existing)
    free = f"{free_bytes(existing) / 1e9:.0f} GB free"
    size = "" if planned is None else f", {planned / 1e9:.2g} GB before compression"
    return f"{text}: {free}{size}"


def _write_into(folder: Path) -> None:
    """Try it: rights alone do not tell on every system."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = (
            f"run.folder: nothing can be written in '{folder}' ({error.strerror}); "
            "choose another run.folder"
        )
        raise WriterError(msg) from error
