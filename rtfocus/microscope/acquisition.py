"""Acquisition: one series from a configured source into a sink."""

import threading
from collections.abc import Callable

from pymmcore_plus.experimental.unicore import UniMMCore
from useq import MDASequence

from rtfocus.config import Config
from rtfocus.config.microscope import ReplayConfig
from rtfocus.errors import ConfigError
from rtfocus.frame import FrameHeader
from rtfocus.microscope.core import open_core
from rtfocus.microscope.delivery import AcquisitionReport, FrameSink
from rtfocus.microscope.engine import RecordingEngine
from rtfocus.microscope.live import LiveAcquisition
from rtfocus.microscope.mda import PlannedAcquisition
from rtfocus.microscope.plan import anchored, read_sequence
from rtfocus.microscope.replay import Replay

__all__ = ["AcquisitionReport", "acquire", "acquire_with"]


def acquire(
    config: Config,
    sink: FrameSink,
    *,
    stop: threading.Event,
    on_frame: Callable[[FrameHeader], None] = lambda _: None,
    make_engine: Callable[..., RecordingEngine] = RecordingEngine,
) -> AcquisitionReport:
    """Acquire one series from the configured source.

    Parameters
    ----------
    config
        Its `microscope`, `acquisition` and `channels` sections are read.
    sink
        Takes the frames; its end is told in every case once it was started.
    stop
        Ends the series when set, also from another thread.
    on_frame
        Called with each frame's header after it was handed over.
    make_engine
        Makes the engine that runs a plan, with the arguments of `RecordingEngine`.

    Raises
    ------
    ConfigError, MicroscopeError, InputError
        If the source cannot be opened or fails.
    TransportError
        And whatever else the sink raises; the run is cancelled first.
    """
    if isinstance(config.microscope, ReplayConfig):
        return Replay(config, config.microscope, sink, on_frame).run(stop)
    with open_core(config) as core:
        return acquire_with(
            core, config, sink, stop=stop, on_frame=on_frame, make_engine=make_engine
        )


def acquire_with(
    core: UniMMCore,
    config: Config,
    sink: FrameSink,
    *,
    stop: threading.Event,
    on_frame: Callable[[FrameHeader], None] = lambda _: None,
    make_engine: Callable[..., RecordingEngine] = RecordingEngine,
) -> AcquisitionReport:
    """Acquire one series on a core that is already loaded; see `acquire`."""
    acquisition = config.acquisition
    if acquisition.live is not None:
        live = LiveAcquisition(config, acquisition.live, core, sink, on_frame)
        return live.run(stop)
    if acquisition.mda is None:
        msg = (
            "acquisition has neither 'mda' (a useq plan) nor 'live'; give one of them, "
            "e.g. acquisition: {live: {frames: 100}}"
        )
        raise ConfigError(msg)
    sequence = read_sequence(acquisition.mda)
    _check_presets(core, sequence)
    z_um = core.getPosition() if core.getFocusDevice() else None
    planned = anchored(sequence, z_um)
    return PlannedAcquisition(config, core, planned, sink, on_frame, make_engine).run(
        stop
    )


def _check_presets(core: UniMMCore, sequence: MDASequence) -> None:
    """Refuse a plan with unknown channels before the series begins."""
    for channel in sequence.channels:
        groups = core.getAvailableConfigGroups()
        if channel.group not in groups:
            msg = (
                f"acquisition.mda: there is no channel group '{channel.group}'; groups "
                f"of this configuration: {', '.join(groups) or 'none'}"
            )
            raise ConfigError(msg)
        presets = core.getAvailableConfigs(channel.group)
        if channel.config not in presets:
            msg = (
                f"acquisition.mda: there is no channel '{channel.config}'; presets of "
                f"group '{channel.group}': {', '.join(presets) or 'none'}"
            )
            raise ConfigError(msg)
