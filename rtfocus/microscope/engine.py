"""Engine: pymmcore-plus' acquisition engine with honest places for its frames."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, cast

import numpy as np
import useq
from numpy.typing import NDArray
from pymmcore_plus.core._sequencing import SequencedEvent
from pymmcore_plus.experimental.unicore import UniMMCore
from pymmcore_plus.mda import MDAEngine, SkipEvent
from pymmcore_plus.metadata import SummaryMetaV1

from rtfocus.errors import MicroscopeError
from rtfocus.microscope.plan import takes_image, with_field_of_view
from rtfocus.microscope.series import image_number
from rtfocus.microscope.setups import SetUps

EVENT_INDEX = "rtfocus_event_index"
"""Key of an MDA event's metadata: its ordinal among the images of the plan."""

Payload = Any
"""Image, MDA event and metadata; None for an image that never came."""

_POLL_S = 0.001


class RecordingEngine(MDAEngine):
    """Numbers the planned images, finds them by ImageNumber, counts lost ones.

    In a hardware sequence pymmcore-plus pairs the n-th image it *gets* with the
    n-th event, so that one lost image shifts all that follow. Here the event is
    found by the image's own number. (One camera; several joined ones are
    refused by `camera_geometry`.)

    Parameters
    ----------
    core
        With its devices loaded.
    on_start
        Called with the plan and the summary metadata when the first event's channel
        and camera are set up and before the clock of the plan starts.
    on_lost
        Called with the number of images that were planned and never came.
    is_stopped
        Tells whether somebody wants the end, so that nobody waits for a camera
        that waits for its trigger.
    """

    def __init__(
        self,
        core: UniMMCore,
        *,
        on_start: Callable[[useq.MDASequence, SummaryMetaV1 | None], None],
        on_lost: Callable[[int], None],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(core)
        self._on_start = on_start
        self._on_lost = on_lost
        self._is_stopped = is_stopped
        self._planned: useq.MDASequence | None = None
        self.standing_z_um: float | None = None
        """z during the present hardware sequence; None: planned per image."""
        self.send_focus_image: Callable[[NDArray[np.generic], str, float], int]
        """Sends an image outside the plan, of a channel and z; returns its sequence."""
        self.failed_settings: Callable[[], int] = lambda: 0
        """Returns how many settings have failed so far; pymmcore-plus only logs it."""
        self.place_of: Callable[[useq.MDAEvent], tuple[int, float]]
        """Returns the index p in the store of a planned image's event, and its
        distance from the reference plane of its stack in um."""

    def setup_sequence(self, sequence: useq.MDASequence) -> SummaryMetaV1 | None:
        """Set up the hardware of the first event, then announce the series.

        Raises
        ------
        ConfigError, MicroscopeError
            If the planned events do not fit in one series, or cannot be set up;
            nothing is exposed or announced then.
        """
        super().setup_sequence(sequence)
        set_ups = SetUps(cast("UniMMCore", self.mmcore))
        set_ups.require_one_geometry(sequence)
        set_ups.begin(sequence)
        self._planned = self._with_field_of_view(sequence)
        summary = self.get_summary_metadata(mda_sequence=self._planned)
        self._on_start(self._planned, summary)
        return summary

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set up an event; raise SkipEvent where a device does not take it.

        Its image would be of another channel or place than it is stored as.
        """
        before = self.failed_settings()
        super().setup_event(event)
        if self.failed_settings() == before:
            return
        # Half of a preset may be set: the one before does not hold any more either.
        self.mmcore._last_config = ("", "")  # noqa: SLF001
        images = event.events if isinstance(event, SequencedEvent) else (event,)
        number = sum(map(takes_image, images))
        raise SkipEvent(num_frames=number)

    def z_um(self, event: useq.MDAEvent) -> float | None:
        """Return where the stage is sent for an event: here as planned."""
        return event.z_pos

    def focus_notes(self) -> list[dict[str, Any]]:
        """Return what autofocus did since it was asked last: here nothing."""
        return []

    def _update_grid_fov_sizes(
        self, px_size: float, sequence: useq.MDASequence
    ) -> None:
        """Leave the plan as it is: that of pymmcore-plus replaces the user's sizes."""

    def _with_field_of_view(self, sequence: useq.MDASequence) -> useq.MDASequence:
        """Give grids that name no field of view the camera's."""
        size_um = self.mmcore.getPixelSizeUm()
        *_, width_px, height_px = self.mmcore.getROI()
        if not size_um:
            return sequence
        return with_field_of_view(sequence, width_px * size_um, height_px * size_um)

    def event_iterator(self, events: Iterable[useq.MDAEvent]) -> Iterator[Any]:
        """Give every image its ordinal, then combine events where possible."""
        # Of a plan, what was made of it at its set-up is run.
        is_plan = isinstance(events, useq.MDASequence)
        planned = self._planned if is_plan and self._planned is not None else events
        for part in self.stacks(_numbered(planned)):
            yield from super().event_iterator(part)

    def stacks(
        self, events: Iterable[useq.MDAEvent]
    ) -> Iterator[Iterable[useq.MDAEvent]]:
        """Part the plan where nothing is hardware-sequenced across: here nowhere."""
        yield events

    def exec_sequenced_event(
        self, event: SequencedEvent
    ) -> Generator[Payload, Any, None]:
        """Acquire a hardware sequence."""
        # A z-stage that is not triggered stands still throughout the sequence.
        moves = bool(event.z_sequence) or not self.mmcore.getFocusDevice()
        self.standing_z_um = None if moves else self.mmcore.getPosition()
        yield from super().exec_sequenced_event(event)

    def exec_single_event(self, event: useq.MDAEvent) -> Iterator[Payload]:
        """Expose one image; an exposure that failed is counted."""
        came = False
        for payload in super().exec_single_event(event):
            came = True
            yield payload
        if not came:
            self._on_lost(1)

    def _exec_single_camera_sequence(
        self, event: SequencedEvent, t0_ms: float
    ) -> Generator[Payload, Any, None]:
        """Take the images of a running hardware sequence, each to its own event.

        That of pymmcore-plus asks whether images wait and then whether the camera
        runs; the last image, coming in between, was lost. Here it is asked the
        other way round. There a consumer that takes long for an image uses up the
        camera's time for the next one; here the camera's time begins when it is
        waited for.
        """
        core, count = self.mmcore, 0
        timeout_s = self._initial_timeout(event)
        waited_from_s = time.monotonic()
        while True:
            running = core.isSequenceRunning()
            if waiting := core.getRemainingImageCount():
                image, metadata = core.popNextImageAndMD()
                number = image_number(dict(metadata))
                signal = yield self._create_seqimg_payload_from_popped(
                    image,
                    metadata,
                    event=event.events[count if number is None else number],
                    channel=0,
                    event_t0=t0_ms,
                    remaining=waiting - 1,
                )
                count += 1
                # Only now: until here it was the consumer that took its time.
                timeout_s = self._frame_timeout(event)
                waited_from_s = time.monotonic()
                if signal == "cancel":
                    core.stopSequenceAcquisition()
                    return
            elif not running:
                break
            elif self._is_stopped():
                core.stopSequenceAcquisition()
                return
            elif time.monotonic() - waited_from_s > timeout_s:
                core.stopSequenceAcquisition()
                msg = (
                    f"camera '{core.getCameraDevice()}' gave no image for "
                    f"{timeout_s:g} s, after {count} of {len(event.events)} of a "
                    "hardware sequence; check its trigger and its connection"
                )
                raise MicroscopeError(msg)
            else:
                time.sleep(_POLL_S)
        if core.isBufferOverflowed():
            msg = "the core's image buffer overflowed"
            raise MemoryError(msg)
        for _ in range(len(event.events) - count):
            self._on_lost(1)
            yield None


def _numbered(events: Iterable[useq.MDAEvent]) -> Iterator[useq.MDAEvent]:
    """Give every event the ordinal of the image that it is, or that it is for."""
    ordinal = 0
    for event in events:
        metadata = {**event.metadata, EVENT_INDEX: ordinal}
        yield event.model_copy(update={"metadata": metadata})
        ordinal += takes_image(event)
