"""Following: delivers the frames of a plan that somebody else's script runs."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import useq
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.experimental.unicore import UniMMCore

from rtfocus.config import Config
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.frame import FrameHeader
from rtfocus.microscope.delivery import AcquisitionReport, FrameSink
from rtfocus.microscope.engine import EVENT_INDEX
from rtfocus.microscope.mda import PlannedAcquisition
from rtfocus.microscope.plan import takes_image
from rtfocus.microscope.setups import SetUps

Place = tuple[tuple[str, int], ...]


class FollowedAcquisition(PlannedAcquisition):
    """One plan on its way through the engine of somebody else.

    That engine says which frame belongs to which event; images that it never
    delivers are not acquired. Nothing here raises into it: the first failure is
    kept, cancels the plan and is raised by `finish`.

    Parameters
    ----------
    config
        As for `acquire`; its microscope and plan are not used.
    core
        Runs the plan.
    sequence
        The plan.
    sink
        Takes the frames.
    on_frame
        Called after each frame with its header.
    """

    def __init__(
        self,
        config: Config,
        core: CMMCorePlus,
        sequence: useq.MDASequence,
        sink: FrameSink,
        on_frame: Callable[[FrameHeader], None] = lambda _: None,
    ) -> None:
        # Only methods of its base class are called.
        super().__init__(config, cast("UniMMCore", core), sequence, sink, on_frame)
        self._seconds = 0.0
        self._ordinals: dict[Place, deque[int]] = defaultdict(deque)

    def begin(self, summary: Mapping[str, Any]) -> None:
        """Announce the series before the first event; waits for a recorder.

        Channel and camera of the first event are set up, as the engine does next:
        they decide what the frames are like.
        """
        try:
            if not isinstance(self._sequence, useq.MDASequence) or not any(
                takes_image(event) for event in self._sequence
            ):
                msg = (
                    "rtfocus can follow a plan that is known beforehand; give "
                    "core.mda.run a useq.MDASequence that takes images"
                )
                raise ConfigError(msg)
            images = filter(takes_image, self._sequence)
            for ordinal, event in enumerate(images):
                self._ordinals[_place(event)].append(ordinal)
            set_ups = SetUps(self._core)
            set_ups.require_one_geometry(self._sequence)
            set_ups.begin(self._sequence)
            self._begin(self._sequence, summary)
        except Exception as error:  # raised by finish()
            self._give_up(error)

    def take(
        self, pixels: NDArray[Any], event: useq.MDAEvent, meta: Mapping[str, Any]
    ) -> None:
        """Deliver one frame; blocks while the processor has no room for it."""
        if self._failure is not None:
            self._core.mda.cancel()
            return
        waiting = self._ordinals.get(_place(event))
        if not waiting:
            msg = f"a frame came of an event that the plan does not have: {event.index}"
            self._give_up(MicroscopeError(msg))
            return
        numbered = {**event.metadata, EVENT_INDEX: waiting.popleft()}
        runner = self._core.mda
        known = {
            "exposure_ms": event.exposure or self._core.getExposure(),
            "runner_time_ms": runner.seconds_elapsed() * 1e3,
        }
        self._seconds = runner.seconds_elapsed()
        self._take(
            pixels, event.model_copy(update={"metadata": numbered}), known | dict(meta)
        )

    def finish(self) -> AcquisitionReport:
        """End the series; returns once everything that was sent is durable.

        Raises
        ------
        RtfocusError
            What went wrong first, after the sink was told the end.
        """
        return self._finish(self._reason(self._core.mda), self._seconds)

    def _give_up(self, error: Exception) -> None:
        self._fail(error)
        self._core.mda.cancel()


def _place(event: useq.MDAEvent) -> Place:
    return tuple(sorted(event.index.items()))
