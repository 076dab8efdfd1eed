"""Actions: an acquisition engine that answers autofocus events named ``rtfocus``.

A stock useq plan with ``autofocus_plan=AxesBasedAF(axes=("p",),
autofocus_device_name="rtfocus")`` gives such events, also after a way through JSON;
so does ``CustomAction(name="rtfocus_autofocus")``. Corrections add up per position
and grid tile and hold for hardware-sequenced z too, which pymmcore-plus leaves out.
"""

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import useq
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.core._sequencing import SequencedEvent
from pymmcore_plus.mda import MDAEngine, SkipEvent
from pymmcore_plus.metadata import FrameMetaV1, SummaryMetaV1
from pymmcore_plus.metadata.schema import PropertyValue

from rtfocus.autofocus.focuser import Focuser
from rtfocus.autofocus.hold import Holder, Key, seen_by
from rtfocus.autofocus.run import Verdict
from rtfocus.errors import RtfocusError

logger = logging.getLogger(__name__)

DEVICE = "rtfocus"
"""Name of an ``autofocus_device_name`` that this engine answers."""
_TRY_AGAIN = 10
"""Visits before a place where focus was not found is searched again."""
ACTION = "rtfocus_autofocus"
"""Name of a ``CustomAction`` that this engine answers."""


class FocusActions(MDAEngine):
    """Mixed into an engine; `focuser` does the work, `holder` is asked per stack."""

    focuser: Focuser
    holder: Holder | None = None

    def setup_sequence(self, sequence: useq.MDASequence) -> SummaryMetaV1 | None:
        """Forget the corrections of the plan before."""
        self._corrections: dict[Key, float] = {}
        self._verdicts: dict[Key, dict[str, Any]] = {}
        self._unfocused: set[Key] = set()
        self._sites: dict[Key, _Site] = {}
        self._begun: dict[Key, Hashable] = {}
        self._not_before: dict[Key, int] = {}
        core = self.mmcore
        self._found_at_um = core.getZPosition() if core.getFocusDevice() else None
        self._light = _focus_light(sequence, self.focuser.config.focus_channel)
        # Where planes are the outer loop, all time points of a place are one stack.
        order = "".join(sequence.axis_order)
        self._z_is_outer = "t" in order and -1 < order.find("z") < order.find("t")
        return super().setup_sequence(sequence)

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set up an event; raise SkipEvent where its position is not in focus.

        In ``hold`` the first event of every stack takes in the drift.
        """
        if is_autofocus(event):
            self._go_to_focus_image(event)
            return
        key = key_of(event)
        if key in self._unfocused and self.focuser.config.on_failure == "skip":
            number = len(event.events) if isinstance(event, SequencedEvent) else 1
            raise SkipEvent(num_frames=number)
        if self.holder is not None and event.z_pos is None:
            # What is held needs a z to be held at: where the stage was found.
            event = event.model_copy(update={"z_pos": self._found_at_um})
        self._hold(event, key)
        super().setup_event(event)

    def exec_event(self, event: useq.MDAEvent) -> Iterable[Any]:
        """Acquire, or focus where the event asks for it."""
        if not is_autofocus(event):
            yield from super().exec_event(event)
            return
        key = key_of(event)
        retries = max(1, int(getattr(event.action, "max_retries", 1) or 1))
        verdict = self._focus(key, retries, event)
        if verdict is None or not verdict.focused:
            self._unfocused.add(key)
        else:
            self._unfocused.discard(key)
        if verdict is not None:
            self._take_over(verdict, event, key)

    def correction_um(self, event: useq.MDAEvent) -> float:
        """Return what is added to the planned z of an event."""
        offsets = self.focuser.config.channel_offsets_um
        channel = event.channel.config if event.channel is not None else ""
        return self._corrections.get(key_of(event), 0.0) + offsets.get(channel, 0.0)

    def get_frame_metadata(
        self,
        event: useq.MDAEvent,
        prop_values: tuple[PropertyValue, ...] | None = None,
        runner_time_ms: float = 0.0,
        include_position: bool = True,
        camera_device: str | None = None,
    ) -> FrameMetaV1:
        """Return the frame's metadata with verdict and correction."""
        meta = super().get_frame_metadata(
            event, prop_values, runner_time_ms, include_position, camera_device
        )
        key = key_of(event)
        note: dict[str, Any] = {"correction_um": self.correction_um(event)}
        if key in self._verdicts:
            note["autofocus"] = self._verdicts[key]
        if lines := self.focuser.journal.drain():
            note["focus_log"] = lines
        extra: dict[str, Any] = {**meta.get("extra", {})}
        extra["rtfocus"] = {**extra.get("rtfocus", {}), **note}
        meta["extra"] = extra
        return meta

    def _go_to_focus_image(self, event: useq.MDAEvent) -> None:
        """Set up place, channel and exposure of the images that tell focus."""
        # A place that nobody has seen is likely to lie on the plate's surface.
        key = key_of(event)
        if key not in self._corrections and (known := self._heights(event)):
            self._corrections[key] = surface_at(
                [(site.x_um, site.y_um, site.off_um) for site in known],
                event.x_pos,
                event.y_pos,
            )
        if self._light is not None:
            channel = useq.EventChannel(
                config=self._light.config, group=self._light.group
            )
            exposure = self._light.exposure or event.exposure
            changes = {"channel": channel, "exposure": exposure}
            event = event.model_copy(update=changes)
        self._set_event_xy_position(event)
        if event.z_pos is not None:
            self._set_event_z(event)
        self._set_event_channel(event)
        if event.exposure is not None:
            self.mmcore.setExposure(event.exposure)
        self.mmcore.waitForSystem()

    def _heights(self, event: useq.MDAEvent) -> "list[_Site]":
        """Return what other places are off their planned z by now."""
        if event.z_pos is None:
            return []
        now = time.time()
        found = []
        for key, site in self._sites.items():
            off_um = self._corrections.get(key, 0.0)
            if self.holder is not None and self.holder.knows(site.place):
                off_um = self.holder.focus_um(site.place, now) - site.planned_um
            found.append(site._replace(off_um=off_um))
        return found

    def _take_over(self, verdict: Verdict, event: useq.MDAEvent, key: Key) -> None:
        """Add a search's way to the corrections of its place."""
        before = self._corrections.get(key, 0.0)
        self._corrections[key] = before + verdict.correction_um
        self._verdicts[key] = verdict.summary()
        if verdict.focused and event.z_pos is not None:
            place, _ = self.place(event)
            self._sites[key] = _Site(
                event.x_pos or 0.0, event.y_pos or 0.0, event.z_pos, 0.0, place
            )
            if self.holder is not None:
                limits = self.focuser.limits_around(event.z_pos)
                looks = seen_by(verdict)
                self.holder.begin(place, time.time(), verdict.end_um, looks, limits)

    def _focus(self, key: Key, retries: int, event: useq.MDAEvent) -> Verdict | None:
        """Search up to `retries` times; None: it could not even be tried."""
        verdict: Verdict | None = None
        channel = None if self._light is None else self._light.config
        for _ in range(retries):
            try:
                verdict = self.focuser.focus(
                    key, channel=channel, around_um=event.z_pos
                )
            except RtfocusError as error:
                logger.warning("autofocus failed: %s", error)
                self.focuser.journal.write(
                    "failure", p=key[0], g=key[1], reason=str(error)
                )
                self.focuser.tell(f"autofocus failed: {error}")
                return verdict
            if verdict.focused:
                break
        return verdict

    def place(self, event: useq.MDAEvent) -> tuple[Key, float]:
        """Return what `holder` calls an event's place, and its slice in um."""
        return key_of(event), 0.0

    def _hold(self, event: useq.MDAEvent, key: Key) -> None:
        """Take the drift in, once per stack and never inside one."""
        holder = self.holder
        stack = None if self._z_is_outer else event.index.get("t")
        if holder is None or event.z_pos is None:
            return
        if key in self._begun and self._begun[key] == stack:
            return
        self._begun[key] = stack
        first = event.events[0] if isinstance(event, SequencedEvent) else event
        place, slice_um = self.place(first)
        if not holder.knows(place) or holder.lost(place):
            self._find(first, key, place, slice_um)
            return
        if self.focuser.is_held_by_hardware():
            return
        step_um = holder.correction_um(place, time.time(), time.time_ns())
        if step_um:
            self._corrections[key] = self._corrections.get(key, 0.0) + step_um

    def _find(
        self, event: useq.MDAEvent, key: Key, place: Key, slice_um: float
    ) -> None:
        """Search a place that is held for the first time, or was lost."""
        assert self.holder is not None
        visit = event.index.get("t", 0)
        if visit < self._not_before.get(place, 0):
            return
        reference = event.model_copy(
            update={"z_pos": cast("float", event.z_pos) - slice_um}
        )
        self._go_to_focus_image(reference)
        verdict = self._focus(place, 1, reference)
        if verdict is not None:
            self._take_over(verdict, reference, key)
        if verdict is None or not verdict.focused:
            self._not_before[place] = visit + _TRY_AGAIN

    def stacks(
        self, events: Iterable[useq.MDAEvent]
    ) -> Iterator[Iterable[useq.MDAEvent]]:
        """Part events where the stage may be corrected: none is sequenced across."""
        if self.holder is None:
            yield events
            return
        for _, stack in groupby(events, lambda e: (e.index.get("t"), *key_of(e))):
            yield stack

    def _set_event_z(self, event: useq.MDAEvent) -> None:
        core = self.mmcore
        if not core.getFocusDevice():
            super()._set_event_z(event)
            return
        target_um = self._allowed(cast("float", event.z_pos), event)
        for stop_um in self.focuser.way_to(target_um):
            core.setZPosition(stop_um)
            if stop_um != target_um:
                core.waitForDevice(core.getFocusDevice())

    def _load_sequenced_event(self, event: SequencedEvent) -> None:
        """Load a hardware sequence with the correction in its z."""
        if event.z_sequence:
            moved = tuple(self._allowed(z, event) for z in event.z_sequence)
            event = event.model_copy(update={"z_sequence": moved})
        super()._load_sequenced_event(event)

    def _allowed(self, planned_um: float, event: useq.MDAEvent) -> float:
        """Return the corrected z; a correction never leads beyond the limits."""
        return self.focuser.corrected(planned_um, self.correction_um(event))


class _Site(NamedTuple):
    """A place that was focused: where it is, and how far from its planned z."""

    x_um: float
    y_um: float
    planned_um: float
    off_um: float
    place: Key


def surface_at(
    known: Sequence[tuple[float, float, float]], x_um: float | None, y_um: float | None
) -> float:
    """Return the height of the plane through known places, at another one.

    Parameters
    ----------
    known
        x, y and height of one place or more, in um.
    x_um, y_um
        None: 0.

    Examples
    --------
    >>> round(surface_at([(0, 0, 1.0), (100, 0, 2.0), (0, 100, 1.0)], 200, 50), 6)
    3.0
    """
    x, y, height = np.array(known, dtype=np.float64).T
    centre = np.array([x.mean(), y.mean()])
    # Of places on one line the slope across is not known: 0, as lstsq answers.
    places = np.column_stack([x, y]) - centre
    slope = np.linalg.lstsq(places, height - height.mean(), rcond=1e-6)[0]
    away = np.array([x_um or 0.0, y_um or 0.0]) - centre
    return float(height.mean() + away @ slope)


def _focus_light(sequence: useq.MDASequence, wanted: str | None) -> useq.Channel | None:
    """Return the plan's channel whose images tell focus; None: not of the plan."""
    named = [one for one in sequence.channels if wanted in (None, one.config)]
    return named[0] if named else None


def is_autofocus(event: useq.MDAEvent) -> bool:
    """Tell events that ask rtfocus for focus from all others."""
    action = event.action
    if isinstance(action, useq.HardwareAutofocus):
        return action.autofocus_device_name == DEVICE
    return isinstance(action, useq.CustomAction) and action.name == ACTION


def key_of(event: useq.MDAEvent) -> Key:
    """Return the place of an event: position and grid tile."""
    return event.index.get("p"), event.index.get("g")


class FocusEngine(FocusActions):
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
        super().__init__(core)
        self.focuser = focuser
        self._on_close = on_close

    def event_iterator(self, events: Iterable[useq.MDAEvent]) -> Iterator[Any]:
        """Combine events where possible, but none across a correction."""
        for stack in self.stacks(events):
            yield from super().event_iterator(stack)

    def close(self) -> None:
        """Free the engine that reads images; called twice does nothing."""
        self._on_close()
