"""Actions: an acquisition engine that answers autofocus events named ``rtfocus``.

A stock useq plan with ``autofocus_plan=AxesBasedAF(axes=("p",),
autofocus_device_name="rtfocus")`` gives such events, also after a way through JSON;
so does ``CustomAction(name="rtfocus_autofocus")``. A correction holds for the tile it
was found at, else for its position, and for hardware-sequenced z too.
"""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from typing import Any, cast

import useq
from pymmcore_plus._logger import logger as core_logger
from pymmcore_plus.core._sequencing import SequencedEvent
from pymmcore_plus.mda import MDAEngine, SkipEvent
from pymmcore_plus.metadata import FrameMetaV1, SummaryMetaV1
from pymmcore_plus.metadata.schema import PropertyValue

from rtfocus.autofocus.devices import interrupt_at_end, set_back_light
from rtfocus.autofocus.execution import Verdict
from rtfocus.autofocus.focuser import Focuser
from rtfocus.autofocus.hold import Holder, Key, seen_by
from rtfocus.autofocus.plans import (
    PlacesFound,
    Site,
    autofocus_plan,
    begin_anew,
    beside_held,
    channel_offset_um,
    focus_light,
    focus_plans,
    image_count,
    is_autofocus,
    key_of,
    reference_um,
    surface_at,
    unfocused,
    with_place,
)
from rtfocus.errors import ConfigError, MicroscopeError, RtfocusError
from rtfocus.machine import RUN_CLOCK

_TRY_AGAIN = 10
"""Visits before a place where focus was not found is searched again."""


class FocusActions(MDAEngine):
    """Mixed into an engine; `focuser` does the work, `holder` is asked per stack."""

    focuser: Focuser
    holder: Holder | None = None

    def setup_sequence(self, sequence: useq.MDASequence) -> SummaryMetaV1 | None:
        """Forget the corrections of the plan before."""
        self._found = PlacesFound()
        self._begun: dict[Key, Hashable] = {}
        self._not_before: dict[Key, int] = {}
        self.focuser.begin_plan()
        core, self._found_at_um = self.mmcore, None
        if self.focuser.moves_offset or core.getFocusDevice():
            self._found_at_um = self.focuser.stage().position_um()
        sent_um = None if sequence.setup is None else sequence.setup.z_pos
        if sent_um is not None and not self.focuser.moves_offset:
            # The plan's own set-up is still to send the stage there.
            self._found_at_um = sent_um
        self._light = focus_light(sequence, self.focuser.config.focus_channel)
        self._plans = focus_plans(sequence)
        has_offset = any(plan.autofocus_motor_offset for plan in self._plans)
        if self.holder is not None and has_offset:
            msg = (
                "autofocus_plan.autofocus_motor_offset and autofocus.mode 'hold' "
                "contradict each other: what is held is in focus; use "
                "autofocus.channel_offsets_um, or mode: off"
            )
            raise ConfigError(msg)
        # Where planes are the outer loop, all time points of a place are one stack.
        order = "".join(sequence.axis_order)
        self._z_is_outer = "t" in order and -1 < order.find("z") < order.find("t")
        return super().setup_sequence(sequence)

    def teardown_sequence(self, sequence: useq.MDASequence) -> None:
        """Set everything back, the offset of a hardware focus device too."""
        if self.focuser.moves_offset and self._found_at_um is not None:
            # What the hardware holds is not moved at the end of the plan either.
            settings, self._initial_state = self._initial_state, {}
            set_back_light(self.mmcore, settings)
            try:
                self.focuser.stage().go_to(self._found_at_um)
            except MicroscopeError as error:  # the rest of the plan's end follows
                core_logger.warning("%s", error)
        super().teardown_sequence(sequence)

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set up an event; raise SkipEvent where its position is not in focus.

        In ``hold`` the first event of every stack takes in the drift.
        """
        if is_autofocus(event):
            self._go_to_focus_image(self._focus_image(event))
            return
        event = with_place(event)
        found_by = self._found.holding_for(event)
        skips = self.focuser.config.on_failure == "skip"
        if found_by is not None and skips and found_by in self._found.unfocused:
            reason = self._found.verdicts.get(found_by, {}).get("reason", "canceled")
            core_logger.warning(
                "Failed to set focus, images are skipped (autofocus.on_failure): %s",
                unfocused(found_by, reason),
            )
            raise SkipEvent(num_frames=image_count(event))
        if self.focuser.moves_offset:
            event = beside_held(event, self._found_at_um)
        elif event.z_pos is None and (self.holder is not None or found_by is not None):
            # What is corrected needs a z to begin with: where the stage was found.
            event = event.model_copy(update={"z_pos": self._found_at_um})
        self._hold(event, key_of(event))
        super().setup_event(event)

    def exec_event(self, event: useq.MDAEvent) -> Iterable[Any]:
        """Acquire, or focus where the event asks for it."""
        if not is_autofocus(event):
            yield from super().exec_event(event)
            return
        key = self._found.search(event)
        event = self._focus_image(event)
        try:
            verdict = self._focus(key, self._most_searches(event), event)
        except KeyboardInterrupt:
            interrupt_at_end(self.mmcore.mda)
            return
        self._found.unfocused.add(key)
        if verdict is not None:
            if verdict.focused:
                self._found.unfocused.discard(key)
            self._take_over(verdict, event, key)

    def _added_um(self, event: useq.MDAEvent) -> float:
        """Return what is added to the planned z of an event."""
        offsets = self.focuser.config.channel_offsets_um
        channel = event.channel.config if event.channel is not None else ""
        return self._found.found_um(event) + offsets.get(channel, 0.0)

    def z_um(self, event: useq.MDAEvent) -> float | None:
        """Return where the stage is sent for an event; None: nowhere."""
        if event.z_pos is None:
            return None
        planned_um = event.z_pos + self._others_um(event)
        added_um = self._added_um(event)
        return self.focuser.corrected(planned_um, added_um)

    def _others_um(self, event: useq.MDAEvent) -> float:
        """Return the correction of another focus device, asked by the stock engine."""
        return self._z_correction.get(event.index.get("p"), 0.0)

    def _most_searches(self, event: useq.MDAEvent) -> int:
        """Return how often a search that failed is tried in all."""
        retries = self.focuser.config.max_retries
        if retries is None:
            retries = getattr(event.action, "max_retries", 1) or 1
        return max(1, int(retries))

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
        note: dict[str, Any] = {"correction_um": self._added_um(event)}
        found_by = self._found.holding_for(event)
        if found_by is not None and found_by in self._found.verdicts:
            note["autofocus"] = self._found.verdicts[found_by]
        if lines := self.focus_notes():
            note["focus_log"] = lines
        extra: dict[str, Any] = {**meta.get("extra", {})}
        extra["rtfocus"] = {**extra.get("rtfocus", {}), **note}
        meta["extra"] = extra
        return meta

    def focus_notes(self) -> list[dict[str, Any]]:
        """Return the lines of the journal since the last call."""
        return self.focuser.journal.drain()

    def _focus_image(self, event: useq.MDAEvent) -> useq.MDAEvent:
        """Return the event of the images that tell focus: their light and planned z."""
        channel, exposure = event.channel, event.exposure
        plan, name = autofocus_plan(event), self.focuser.config.focus_channel
        for_each = name is None and plan is not None and "c" in plan.axes
        if self._light is not None and not (for_each and channel is not None):
            light = self._light
            channel = useq.EventChannel(config=light.config, group=light.group)
            exposure = light.exposure or exposure
        z_um = None if self.focuser.moves_offset else reference_um(event)
        if z_um is None:
            z_um = self._found_at_um
        else:
            z_um += channel_offset_um(event, channel)
        changes = {"channel": channel, "exposure": exposure, "z_pos": z_um}
        return event.model_copy(update=changes)

    def _go_to_focus_image(self, event: useq.MDAEvent) -> None:
        """Set up what the images that tell focus need, as an image of the plan is."""
        # A place without an image is likely to lie on the plate's surface.
        key = key_of(event)
        if key not in self._found.off_um:
            known = [(s.x_um, s.y_um, s.off_um) for s in self._heights(event)]
            if known:
                off_um = surface_at(known, event.x_pos, event.y_pos)
            else:
                off_um = self._found.found_um(event)
            self._found.off_um[key] = off_um
        super().setup_event(event)

    def _heights(self, event: useq.MDAEvent) -> list[Site]:
        """Return what other places are off their planned z by now."""
        if event.z_pos is None:
            return []
        now_s = RUN_CLOCK.now_s()
        sites = []
        for key, site in self._found.sites.items():
            off_um = self._found.off_um.get(key, 0.0)
            if self.holder is not None and self.holder.knows(site.place):
                off_um = self.holder.focus_um(site.place, now_s) - site.planned_um
            sites.append(site._replace(off_um=off_um))
        return sites

    def _take_over(self, verdict: Verdict, event: useq.MDAEvent, key: Key) -> None:
        """Take over what a search found; `event` is that of its images."""
        self._correct_to(verdict.end_um, event, key)
        self._found.verdicts[key] = verdict.summary()
        if verdict.focused and event.z_pos is not None:
            place, _ = self.place(event)
            self._found.sites[key] = Site(
                event.x_pos or 0.0, event.y_pos or 0.0, event.z_pos, 0.0, place
            )
            if self.holder is not None:
                limits = self.focuser.limits_around(event.z_pos)
                looks, now_s = seen_by(verdict), RUN_CLOCK.now_s()
                self.holder.begin(place, now_s, verdict.end_um, looks, limits)

    def _correct_to(self, z_um: float, event: useq.MDAEvent, key: Key) -> None:
        """Let a place's correction lead to where the stage stands now."""
        if event.z_pos is None:
            return
        # What is added by now may be another tile's: this one has had no search before.
        planned_um = event.z_pos + self._others_um(event)
        planned_um += self._added_um(event) - self._found.found_um(event)
        self._found.off_um[key] = z_um - planned_um

    def _focus(self, key: Key, searches: int, event: useq.MDAEvent) -> Verdict | None:
        """Search up to so many times; None: it could not even be tried."""
        verdict: Verdict | None = None
        z_um = event.z_pos
        around_um = None if z_um is None else z_um + self._others_um(event)
        for _ in range(searches):
            try:
                verdict = self.focuser.focus(
                    key,
                    channel=self._ready_channel(event),
                    around_um=around_um,
                    is_canceled=self._is_canceled,
                )
            except RtfocusError as error:
                self._note_failure(error, key, event)
                return verdict
            if verdict.focused or self._is_canceled():
                break
        if verdict is not None and not verdict.focused:
            self._warn(key, verdict.reason)
        return verdict

    def _warn(self, key: Key, reason: str) -> None:
        if self.focuser.config.on_failure != "skip":  # what is skipped tells it
            core_logger.warning("%s", unfocused(key, reason))

    def _note_failure(
        self, error: RtfocusError, place: Key, event: useq.MDAEvent
    ) -> None:
        """Tell of a search that broke off; its place is where the stage was left."""
        key = key_of(event)
        self._warn(place, str(error))
        self.focuser.journal.write("failure", p=place[0], g=place[1], reason=str(error))
        self.focuser.tell(f"autofocus failed: {error}")
        self._found.verdicts[key] = {"focused": False, "reason": str(error)}
        with suppress(MicroscopeError):  # a stage that does not even answer
            self._correct_to(self.focuser.stage().position_um(), event, key)

    def _ready_channel(self, event: useq.MDAEvent) -> str | None:
        """Return the channel that is set up and tells focus; None: it is not."""
        channel = self.focuser.config.focus_channel
        present = None if event.channel is None else event.channel.config
        return present if channel in (None, present) else None

    def _is_canceled(self) -> bool:
        """Tell whether the plan is to end."""
        return self.mmcore.mda.status.cancel_requested

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
        place, _ = self.place(first)
        if self.focuser.is_held_by_hardware() and holder.gives_way(place):
            return
        if not holder.knows(place) or holder.lost(place):
            self._find(first, key, place)
            return
        now_ns = RUN_CLOCK.now_ns()
        step_um = holder.correction_um(place, now_ns / 1e9, now_ns)
        if step_um:
            self._found.add(key, step_um)

    def _find(self, event: useq.MDAEvent, key: Key, place: Key) -> None:
        """Search a place that is held for the first time, or was lost."""
        visit = event.index.get("t", 0)
        if visit < self._not_before.get(place, 0):
            return
        reference = self._focus_image(event)
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
        for plan in self._plans:
            begin_anew(plan)
        offsets = self.focuser.config.channel_offsets_um

        def stack_of(event: useq.MDAEvent) -> Hashable:
            name = "" if event.channel is None else event.channel.config
            place = key_of(event) if self.holder is not None or self._plans else ()
            time_point = event.index.get("t") if self.holder is not None else None
            if self.focuser.moves_offset:  # no hardware sequences it
                place = (*place, event.z_pos)
            return time_point, place, offsets.get(name, 0.0)

        for _, stack in groupby(events, stack_of):
            yield stack

    def _set_event_z(self, event: useq.MDAEvent) -> None:
        core = self.mmcore
        if self.focuser.moves_offset:
            target_um = cast("float", self.z_um(event))
            for stop_um in self.focuser.way_to(target_um):
                self.focuser.stage().go_to(stop_um)
            return
        if not core.getFocusDevice():
            super()._set_event_z(event)
            return
        target_um = cast("float", self.z_um(event))
        try:
            for stop_um in self.focuser.way_to(target_um):
                core.setZPosition(stop_um)
                if stop_um != target_um:
                    core.waitForDevice(core.getFocusDevice())
        except RuntimeError as error:
            if target_um == event.z_pos:
                raise
            # The plan itself would have gone well: the others of its images do.
            core_logger.warning(
                "Failed to set Z position: '%s' does not go to %g um, planned as %g um "
                "and corrected by autofocus. %s",
                *(core.getFocusDevice(), target_um, event.z_pos, error),
            )
            raise SkipEvent(num_frames=image_count(event)) from error

    def _load_sequenced_event(self, event: SequencedEvent) -> None:
        """Load a hardware sequence with the corrections in its z."""
        if event.z_sequence:
            moved = tuple(self.z_um(part) for part in event.events)
            event = event.model_copy(update={"z_sequence": moved})
        super()._load_sequenced_event(event)
