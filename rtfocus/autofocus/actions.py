"""Actions: an acquisition engine that answers autofocus events named ``rtfocus``.

A stock useq plan with ``autofocus_plan=AxesBasedAF(axes=("p",),
autofocus_device_name="rtfocus")`` gives such events, also after a way through JSON;
so does ``CustomAction(name="rtfocus_autofocus")``. Corrections add up per position
and grid tile and hold for hardware-sequenced z too, which pymmcore-plus leaves out.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import useq
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.core._sequencing import SequencedEvent
from pymmcore_plus.mda import MDAEngine, SkipEvent
from pymmcore_plus.metadata import FrameMetaV1, SummaryMetaV1
from pymmcore_plus.metadata.schema import PropertyValue

from rtfocus.autofocus.focuser import Focuser, Key
from rtfocus.autofocus.hold import Holder, Seen
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
        self._stack: tuple[Any, ...] | None = None
        self._not_before: dict[Key, int] = {}
        return super().setup_sequence(sequence)

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set up an event; raise SkipEvent where its position is not in focus.

        In ``hold`` the first event of every stack takes in the drift.
        """
        if is_autofocus(event):
            # Moving to the place is all there is to set up.
            self._set_event_xy_position(event)
            if event.z_pos is not None:
                self._set_event_z(event)
            if event.channel is not None:
                self._set_event_channel(event)
            self.mmcore.waitForSystem()
            return
        key = key_of(event)
        if key in self._unfocused and self.focuser.config.on_failure == "skip":
            number = len(event.events) if isinstance(event, SequencedEvent) else 1
            raise SkipEvent(num_frames=number)
        self._hold(event, key)
        super().setup_event(event)

    def exec_event(self, event: useq.MDAEvent) -> Iterable[Any]:
        """Acquire, or focus where the event asks for it."""
        if not is_autofocus(event):
            yield from super().exec_event(event)
            return
        key = key_of(event)
        retries = max(1, int(getattr(event.action, "max_retries", 1) or 1))
        verdict = self._focus(key, retries)
        if verdict is None or not verdict.focused:
            self._unfocused.add(key)
        else:
            self._unfocused.discard(key)
        if verdict is not None:
            before = self._corrections.get(key, 0.0)
            self._corrections[key] = before + verdict.correction_um
            self._verdicts[key] = verdict.summary()

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

    def _focus(self, key: Key, retries: int) -> Verdict | None:
        """Search up to `retries` times; None: it could not even be tried."""
        verdict: Verdict | None = None
        for _ in range(retries):
            try:
                verdict = self.focuser.focus(key)
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
        stack = (event.index.get("t"), *key)
        if holder is None or stack == self._stack or event.z_pos is None:
            return
        self._stack = stack
        first = event.events[0] if isinstance(event, SequencedEvent) else event
        place, slice_um = self.place(first)
        if not holder.knows(place) or holder.lost(place):
            self._find(first, key, place, slice_um)
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
        self._set_event_xy_position(event)
        reference = event.model_copy(
            update={"z_pos": cast("float", event.z_pos) - slice_um}
        )
        self._set_event_z(reference)
        self.mmcore.waitForSystem()
        verdict = self._focus(place, 1)
        if verdict is None or not verdict.focused:
            self._not_before[place] = visit + _TRY_AGAIN
            return
        self._verdicts[key] = verdict.summary()
        before = self._corrections.get(key, 0.0)
        self._corrections[key] = before + verdict.correction_um
        looks = [
            Seen(step.z_um, np.asarray(step.reading.spectrum), step.reading.noise)
            for step in verdict.steps
            if any(step.reading.spectrum)
        ]
        self.holder.begin(place, time.time(), verdict.end_um, looks)

    def _set_event_z(self, event: useq.MDAEvent) -> None:
        if not self.mmcore.getFocusDevice():
            super()._set_event_z(event)
            return
        self.mmcore.setZPosition(self._allowed(cast("float", event.z_pos), event))

    def _load_sequenced_event(self, event: SequencedEvent) -> None:
        """Load a hardware sequence with the correction in its z."""
        if event.z_sequence:
            moved = tuple(self._allowed(z, event) for z in event.z_sequence)
            event = event.model_copy(update={"z_sequence": moved})
        super()._load_sequenced_event(event)

    def _allowed(self, planned_um: float, event: useq.MDAEvent) -> float:
        """Return the corrected z; a correction never leads beyond the limits."""
        corrected = planned_um + self.correction_um(event)
        limits = self.focuser.limits
        if limits is None or corrected == planned_um or limits.holds(corrected):
            return corrected
        # What the plan itself asks for is the user's; a correction is ours.
        low, high = sorted((planned_um, limits.clip(corrected)))
        return min(max(corrected, low), high)


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

    def close(self) -> None:
        """Free the engine that reads images; called twice does nothing."""
        self._on_close()
