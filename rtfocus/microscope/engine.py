"""Engine: pymmcore-plus' acquisition engine with honest places for its frames."""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import useq
from numpy.typing import NDArray
from pymmcore_plus.core import Metadata
from pymmcore_plus.core._sequencing import SequencedEvent
from pymmcore_plus.experimental.unicore import UniMMCore
from pymmcore_plus.mda import MDAEngine
from pymmcore_plus.metadata import SummaryMetaV1

from rtfocus.microscope.metadata import image_number
from rtfocus.microscope.plan import takes_image

EVENT_INDEX = "rtfocus_event_index"
"""Key of an MDA event's metadata: its ordinal among the images of the plan."""

Payload = Any
"""Image, MDA event and metadata; None for an image that never came."""


class RecordingEngine(MDAEngine):
    """Numbers the planned images, finds them by ImageNumber, counts lost ones.

    In a hardware sequence pymmcore-plus pairs the n-th image it *gets* with the
    n-th event, so that one lost image shifts all that follow. Here the event is
    found by the image's own number.

    Parameters
    ----------
    core
        With its devices loaded.
    on_start
        Called with the summary metadata when everything is set up and before the
        clock of the plan starts.
    on_lost
        Called with the number of images that were planned and never came.
    """

    def __init__(
        self,
        core: UniMMCore,
        *,
        on_start: Callable[[SummaryMetaV1 | None], None],
        on_lost: Callable[[int], None],
    ) -> None:
        super().__init__(core)
        self._on_start = on_start
        self._on_lost = on_lost
        self._sequenced: SequencedEvent | None = None
        self.standing_z_um: float | None = None
        """z during the present hardware sequence; None: planned per image."""

    def setup_sequence(self, sequence: useq.MDASequence) -> SummaryMetaV1 | None:
        """Set up the hardware, then announce the series."""
        summary = super().setup_sequence(sequence)
        self._on_start(summary)
        return summary

    def event_iterator(self, events: Iterable[useq.MDAEvent]) -> Iterator[Any]:
        """Give every image its ordinal, then combine events where possible."""
        return super().event_iterator(_numbered(events))

    def exec_sequenced_event(
        self, event: SequencedEvent
    ) -> Generator[Payload, Any, None]:
        """Acquire a hardware sequence; images that did not come are counted."""
        self._sequenced = event
        # A z-stage that is not triggered stands still throughout the sequence.
        moves = bool(event.z_sequence) or not self.mmcore.getFocusDevice()
        self.standing_z_um = None if moves else self.mmcore.getPosition()
        images = super().exec_sequenced_event(event)
        signal = None
        while True:
            try:
                payload = images.send(signal)
            except StopIteration:
                return
            if payload is None:
                self._on_lost(1)
            signal = yield payload

    def exec_single_event(self, event: useq.MDAEvent) -> Iterator[Payload]:
        """Expose one image; an exposure that failed is counted."""
        came = False
        for payload in super().exec_single_event(event):
            came = True
            yield payload
        if not came:
            self._on_lost(1)

    def _create_seqimg_payload_from_popped(
        self,
        img: NDArray[Any],
        mm_meta: Metadata,
        event: useq.MDAEvent,
        channel: int,
        *,
        event_t0: float = 0.0,
        remaining: int = 0,
    ) -> Payload:
        number = image_number(dict(mm_meta))
        if number is not None and self._sequenced is not None:
            event = self._sequenced.events[number]
        return super()._create_seqimg_payload_from_popped(
            img, mm_meta, event, channel, event_t0=event_t0, remaining=remaining
        )


def _numbered(events: Iterable[useq.MDAEvent]) -> Iterator[useq.MDAEvent]:
    ordinal = 0
    for event in events:
        if not takes_image(event):
            yield event
            continue
        metadata = {**event.metadata, EVENT_INDEX: ordinal}
        yield event.model_copy(update={"metadata": metadata})
        ordinal += 1
