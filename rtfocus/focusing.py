"""Focusing: autofocus joined to a microscope's core and to a processor of frames.

Here meet the packages that do not know each other: the core's engine asks for focus,
an image is read by an engine in this process or by the processor at the other end of
the sockets, and the policy decides.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import useq
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.core._sequencing import SequencedEvent

from rtfocus.autofocus.actions import FocusActions
from rtfocus.autofocus.devices import checked_core, choices_of, hand_back, take_over
from rtfocus.autofocus.estimator import (
    EstimatorSettings,
    estimator_settings,
    read_focus,
)
from rtfocus.autofocus.focuser import Focuser, FocusJournal
from rtfocus.autofocus.hold import Correction, Holder, Key, unread
from rtfocus.autofocus.plans import asking_for_focus, with_place
from rtfocus.autofocus.policy import Limits
from rtfocus.channel import OpticalSystem
from rtfocus.config import Config, load_config
from rtfocus.errors import ConfigError, TransportError
from rtfocus.frame import Act, Estimate, FocusReading
from rtfocus.machine import RUN_CLOCK
from rtfocus.microscope.engine import RecordingEngine, SequenceEngine
from rtfocus.offline import ImageProcessor

_NOTE_NS = 500_000_000
MOST_REQUESTS = 8
"""Requests of viewers that wait for their turn; further ones are refused."""


class LocalReader:
    """Reads images by the channel's engine in this process."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings: dict[str, EstimatorSettings] = {}
        self._processor = ImageProcessor(config.without_restoration())

    def read(
        self, pixels: NDArray[np.generic], channel: str, z_um: float
    ) -> FocusReading:
        """Read one image.

        Raises
        ------
        ConfigError
            If the channel has no optics or classifier.
        EngineError
            If the engine does not fit or fails.
        """
        del z_um
        settings = self._settings_of(channel, pixels)
        defocus = self._processor.classify(pixels, channel=channel).defocus
        assert defocus is not None
        return read_focus(defocus, pixels, settings)

    def close(self) -> None:
        """Close the engine."""
        self._processor.close()

    def _settings_of(
        self, channel: str, pixels: NDArray[np.generic]
    ) -> EstimatorSettings:
        if channel not in self._settings:
            depth = 8 * pixels.dtype.itemsize if pixels.dtype.kind == "u" else None
            settings = estimator_settings(self._config, channel, bit_depth=depth)
            if settings is None:
                raise no_optics(channel)
            self._settings[channel] = settings
        return self._settings[channel]


class EstimateInbox:
    """Microscope side: estimates as they come, and a wait for one of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.begin()

    def begin(self) -> None:
        """Forget what has come: a series begins, and counts its images from 0."""
        self._newest: Estimate | None = None
        self._newest_early = ("", -1)
        self.also: Callable[[Estimate], None] = lambda _: None
        """Called with the first reading of every frame that was not left out."""
        self.searched: set[int] = set()
        """Sequences of the images that searches asked for."""

    def take(self, estimate: Estimate) -> None:
        """Keep the newest; returns at once, from any thread."""
        series_uid, looked = self._newest_early
        if estimate.is_early:
            self._newest_early = estimate.series_uid, estimate.sequence
        else:
            with self._changed:
                self._newest = estimate
                self._changed.notify_all()
            if estimate.series_uid == series_uid and estimate.sequence <= looked:
                return
        if estimate.focus is None or estimate.focus.refusal != "left_out":
            self.also(estimate)

    def wait(self, sequence: int, timeout_s: float) -> Estimate:
        """Return the estimate of a frame.

        Raises
        ------
        TransportError
            If it does not come: the processor is gone, stalled, or estimates nothing.
        """
        self.searched.add(sequence)
        newest = self.wait_for(lambda one: one.sequence >= sequence, timeout_s)
        if newest is None or newest.sequence != sequence:
            msg = (
                f"the processor gave no estimate of focus image {sequence} within "
                f"{timeout_s:g} s; is it running, with a classifier for this channel? "
                "(autofocus.request_timeout_s)"
            )
            raise TransportError(msg)
        return newest

    def wait_for(
        self, is_wanted: Callable[[Estimate], bool], timeout_s: float
    ) -> Estimate | None:
        """Return the newest whole estimate once it is wanted; None: it never was."""

        def has_come() -> bool:
            return self._newest is not None and is_wanted(self._newest)

        with self._changed:
            return self._newest if self._changed.wait_for(has_come, timeout_s) else None

    def wake(self) -> None:
        """Let those who wait check again."""
        with self._changed:
            self._changed.notify_all()


class LoopActions(FocusActions):
    """Actions whose images a processor reads: holds focus, and obeys viewers."""

    _focusing: "Focusing"
    _asked_before: tuple[int | None, ...] | None = None
    _set_aside: Holder | None = None

    def setup_sequence(self, sequence: useq.MDASequence) -> Any:  # noqa: ANN401
        """Set the plan up; the drift of a plan before is forgotten."""
        names = [channel.config for channel in sequence.channels]
        self._focusing.inbox.begin()
        self.holder = self._focusing.holder(self.focuser, names)
        self._asked_before = self._set_aside = None
        self._focusing.requests.clear()  # of a plan before
        return super().setup_sequence(sequence)

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set an event up; what was asked for is done before the next stack."""
        if self.holder is not None and self.holder.unread is not None:
            raise unread(self.holder.unread)
        stack = tuple(with_place(event).index.get(axis) for axis in "tpg")
        if stack != self._asked_before:
            self._asked_before = stack
            while self._focusing.requests:
                self._answer(self._focusing.requests.popleft(), event)
        super().setup_event(event)

    def _answer(self, act: Act, event: useq.MDAEvent) -> None:
        self.focuser.journal.write("request", what=act)
        if act == "hold_off":
            self._set_aside, self.holder = self.holder or self._set_aside, None
        elif act == "hold_on":
            self.holder = self.holder or self._set_aside
        elif act == "autofocus" and event.z_pos is not None:
            first = event.events[0] if isinstance(event, SequencedEvent) else event
            focus_event = asking_for_focus(first)
            super().setup_event(focus_event)
            tuple(self.exec_event(focus_event))


class FocusingEngine(LoopActions, RecordingEngine):
    """The recording engine that answers ``rtfocus`` and holds focus."""

    def __init__(self, core: Any, *, focusing: "Focusing", **events: Any) -> None:  # noqa: ANN401 as of RecordingEngine
        super().__init__(core, **events)
        self._focusing = focusing
        self.focuser = focusing.focuser(core, lambda *i: self.send_focus_image(*i))

    def place(self, event: useq.MDAEvent) -> tuple[Key, float]:
        """Return the place in the store, and the slice in um."""
        site, slice_um = self.place_of(event)
        return (site, None), slice_um


class FocusEngine(FocusActions, SequenceEngine):
    """The stock engine of pymmcore-plus that answers ``rtfocus``.

    Parameters
    ----------
    core
        With its devices loaded.
    focuser
        Finds focus on it.
    on_close
        Frees what reads the images.
    """

    def __init__(
        self,
        core: CMMCorePlus,
        focuser: Focuser,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(core, **choices_of(core.mda.engine))
        self.focuser = focuser
        self._on_close = on_close

    def close(self) -> None:
        """Free the engine that reads images; called twice does nothing."""
        self._on_close()


class Focusing:
    """Microscope side of one acquisition: its engine and its inbox of estimates."""

    def __init__(
        self, config: Config, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self._config = config
        self._tell = tell
        self.inbox = EstimateInbox()
        self._is_late = False
        self._noted: dict[Key, tuple[int, str]] = {}
        self.requests: deque[Act] = deque()
        """What viewers of the run have asked for, from any thread."""

    def asked(self, act: Act, stop: Callable[[], None]) -> None:
        """Do what a viewer of the run asks for, where the config allows it.

        What was asked for last and waits still is not done twice.
        `stop` ends the acquisition. Returns at once, from any thread.
        """
        if self._config.transport.preview.control is None:
            self._tell(f"'{act}' was asked for; transport.preview.control allows none")
        elif act == "stop":
            stop()
        elif len(self.requests) >= MOST_REQUESTS:
            self._tell(f"'{act}' is refused: {MOST_REQUESTS} requests wait already")
        elif not self.requests or self.requests[-1] != act:
            self.requests.append(act)

    @property
    def make_engine(self) -> Callable[..., RecordingEngine]:
        """Makes the engine of the acquisition, as `RecordingEngine` does."""
        return partial(FocusingEngine, focusing=self)

    def focuser(
        self,
        core: CMMCorePlus,
        send: Callable[[NDArray[np.generic], str, float], int],
    ) -> Focuser:
        """Return a focuser whose images are read by the processor.

        Parameters
        ----------
        core
            With its devices loaded.
        send
            Sends an image of a channel and z to the processor; returns its sequence.
        """

        def read(pixels: NDArray[Any], channel: str, z_um: float) -> FocusReading:
            sequence = send(pixels, channel, z_um)
            timeout_s = self._config.autofocus.request_timeout_s
            reading = self.inbox.wait(sequence, timeout_s).focus
            if reading is None:
                raise no_optics(channel)
            return reading

        return Focuser(
            core,
            self._config.autofocus,
            optics_of(self._config),
            read,
            journal=FocusJournal(None),
            tell=self._tell,
        )

    @property
    def holds(self) -> bool:
        """Tell whether focus is to be held."""
        return self._config.autofocus.mode == "hold"

    def holder(self, focuser: Focuser, channels: Sequence[str]) -> Holder | None:
        """Return what holds focus in a series of these channels; None: nothing does.

        Raises
        ------
        ConfigError
            If the focus channel is not in the series, or tells no focus.
        """
        if not self.holds:
            return None
        names = list(channels)
        name = self._config.autofocus.focus_channel or (names or ["default"])[0]
        if names and name not in names:
            msg = (
                f"autofocus.focus_channel '{name}' is none of the plan's channels "
                f"({', '.join(names)}): held focus is told by planned images"
            )
            raise ConfigError(msg)
        models = focuser.models(name)
        holder = Holder(
            models,
            # Each place brings limits of its own; without them nothing may move.
            focuser.move_rule(models.unit_um, Limits(0.0, 0.0)),
            channel=names.index(name) if names else 0,
            on_correction=partial(self._note, focuser.journal),
            searched=self.inbox.searched,
        )
        self.inbox.also = holder.take
        return holder

    def _is_news(self, correction: Correction, now_ns: int) -> bool:
        """Tell moves, changes of mind, and of the rest one each half second."""
        since_ns, reason = self._noted.get(correction.key, (0, ""))
        is_known = reason == correction.reason and now_ns - since_ns < _NOTE_NS
        if is_known and not correction.step_um:
            return False
        self._noted[correction.key] = (now_ns, correction.reason)
        return True

    def _note(self, journal: FocusJournal, correction: Correction) -> None:
        """Write a decision down, and tell of it in one line if it moves the stage."""
        now_ns, newest_ns = RUN_CLOCK.now_ns(), correction.captured_ns
        if not self._is_news(correction, now_ns):
            return
        journal.write(
            "hold",
            p=correction.key[0],
            g=correction.key[1],
            step_um=correction.step_um,
            error_um=correction.error_um,
            z_um=correction.z_um,
            drift_um=correction.drift_um,
            reason=correction.reason,
            age_ms=round((now_ns - newest_ns) / 1e6, 1) if newest_ns else None,
        )
        place = correction.key[0]
        if correction.is_late and not self._is_late:
            self._is_late = True
            self._tell(
                f"focus at position {place} follows late: {correction.reason}; longer "
                "intervals or a faster classifier (processing.classifier) help"
            )
        if correction.step_um:
            self._tell(
                f"focus held at position {place}: {correction.step_um:+.2f} um to z "
                f"{correction.z_um:.2f} um ({correction.reason})"
            )


@contextmanager
def open_focuser(
    core: CMMCorePlus,
    config: Config,
    *,
    journal: FocusJournal | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Focuser]:
    """Make a focuser that reads images in this process, while the block runs."""
    reader = LocalReader(config)
    try:
        optics, journal = optics_of(config), journal or FocusJournal(None)
        yield Focuser(
            core, config.autofocus, optics, reader.read, journal=journal, tell=tell
        )
    finally:
        reader.close()


def focus(core: CMMCorePlus, config: Config | str | Path) -> FocusEngine:
    """Let a core carry out autofocus plans of device ``rtfocus``; one line in a script.

    Parameters
    ----------
    core
        A core with its devices loaded, e.g. of napari-micromanager.
    config
        A config, a path, or the name of a shipped config. Its sections ``autofocus``,
        ``channels``, ``processing`` and ``camera`` are used.

    Returns
    -------
    FocusEngine
        Registered with the core already; ``engine.focuser.focus()`` searches focus
        at once. Close it at the end: the core gets its earlier engine back.

    Raises
    ------
    ConfigError
        If `core` is not a core, or the config cannot be used. A channel without optics
        or classifier is refused when a search begins.

    Examples
    --------
    ::

        engine = rtfocus.focus(core, "my_microscope.yaml")
        core.run_mda(plan)  # with autofocus_plan of device "rtfocus"
    """
    settings = config if isinstance(config, Config) else load_config(config)
    checked_core(core)
    reader = LocalReader(settings)
    focuser = Focuser(core, settings.autofocus, optics_of(settings), reader.read)

    def close() -> None:
        reader.close()
        hand_back(engine)

    engine = FocusEngine(core, focuser, on_close=close)
    take_over(engine)
    return engine


def optics_of(config: Config) -> Mapping[str, OpticalSystem]:
    """Return the optics of every channel that has them."""
    return {c.name: c.optics for c in config.channels if c.optics is not None}


def no_optics(channel: str) -> ConfigError:
    """Say that a channel cannot focus."""
    msg = (
        f"channel '{channel}' has no optics or no classifier; autofocus needs both: "
        "give them in channels, or choose another autofocus.focus_channel"
    )
    return ConfigError(msg)
