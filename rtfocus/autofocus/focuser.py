"""Focuser: autofocus on a Micro-Manager core, for one acquisition or script.

Knows every place it has been to: a search there begins with where focus was before.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymmcore_plus import CMMCorePlus

from rtfocus.autofocus.appearance import DefocusModels
from rtfocus.autofocus.belief import Belief, Mode
from rtfocus.autofocus.devices import (
    CoreStage,
    FocusLight,
    OffsetStage,
    expose,
    focus_stage,
    stopped_live,
)
from rtfocus.autofocus.execution import (
    OURS,
    FocusStage,
    Search,
    SearchTask,
    Step,
    Verdict,
    brought_search,
    find_brought,
    run_search,
)
from rtfocus.autofocus.hold import Key
from rtfocus.autofocus.planes import PlaneComparison, ZPlane
from rtfocus.autofocus.policy import (
    Limits,
    MoveRule,
    direction_of,
    is_calibrated,
    limits_at,
    move_rule,
    search_rule,
    way_um,
    with_measured_backlash,
)
from rtfocus.autofocus.search import FocusSearch
from rtfocus.channel import OpticalSystem
from rtfocus.config.model import AutofocusConfig
from rtfocus.errors import ConfigError, MicroscopeError
from rtfocus.frame import FocusReading
from rtfocus.machine import RUN_CLOCK

logger = logging.getLogger(__name__)

Read = Callable[[NDArray[np.generic], str, float], FocusReading]
"""Reads an image of a channel, exposed at a z."""


class FocusJournal:
    """``focus.ndjson``: one line per image of autofocus and per correction."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []

    def write(self, kind: str, **values: Any) -> None:  # noqa: ANN401 JSON values
        """Append one line; flushed at once."""
        line = {"kind": kind, "time_ns": RUN_CLOCK.now_ns(), **values}
        if self._path is None:
            self.lines.append(line)
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def drain(self) -> list[dict[str, Any]]:
        """Return the lines that no file took, once."""
        lines, self.lines = self.lines, []
        return lines


@dataclass
class Focuser:
    """Finds focus with a core's camera and stage.

    Parameters
    ----------
    core
        With its devices loaded.
    config
        Section ``autofocus``.
    optics
        By channel name; ``default`` for the others.
    read
        Turns an image into what it says of focus.
    journal
        Takes every decision.
    tell
        Called with one line per move, for a terminal.
    """

    core: CMMCorePlus
    config: AutofocusConfig
    optics: Mapping[str, OpticalSystem]
    read: Read
    journal: FocusJournal = field(default_factory=lambda: FocusJournal(None))
    tell: Callable[[str], None] = logger.info
    places: dict[Key, Mode] = field(default_factory=dict)
    """Where focus was found, by position and grid."""
    limits: Limits | None = None
    """Fixed by the first search, so that many small steps do not walk away."""
    _plan_thread: int | None = None
    """Acquires the plans that ask this focuser."""
    _models: dict[tuple[str, int], DefocusModels] = field(default_factory=dict)
    _comparisons: dict[tuple[str, int], PlaneComparison] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take over what the calibration measured; refuse a search there is not."""
        if self.config.search != OURS:
            find_brought(self.config.search)
        self.config = with_measured_backlash(self.config)

    def begin_plan(self) -> None:
        """Search for a plan in this thread; places of another are not known to it."""
        self.places.clear()
        self._plan_thread = threading.get_ident()

    def focus(
        self,
        key: Key = (None, None),
        *,
        channel: str | None = None,
        around_um: float | None = None,
        is_canceled: Callable[[], bool] = lambda: False,
        stage: FocusStage | None = None,
        look: Callable[[float], FocusReading] | None = None,
    ) -> Verdict:
        """Search focus from where the stage stands; it ends at the best z.

        Parameters
        ----------
        key
            The place, which remembers where its focus was.
        channel
            What is set up already and tells focus; None: `config.focus_channel` is
            set up while the search lasts, else the present one is used.
        around_um
            A plan's z, around which the limits lie; None: around where the stage
            stood at the first search.
        is_canceled
            Asked after every image; then it ends at the best z that was seen.
        stage
            Is moved; None: that of `config`.
        look
            Reads an image at the z it is given, in the light of `channel`, from a
            camera that runs freely; None: images are snapped, and live view stopped.

        Raises
        ------
        MicroscopeError
            If camera or stage fail, or hardware focus or a plan have the stage.
        ConfigError
            If the channel has no optics, or the stage stands outside its limits.
        RtfocusError
            What reading an image raises, a processor that does not answer too.
        """
        self._refuse_hardware_focus()
        if self.core.mda.is_running() and self._plan_thread != threading.get_ident():
            msg = "a plan has the stage; wait for its end, or ask in its autofocus_plan"
            raise MicroscopeError(msg)
        stage = stage or self.stage()
        pause = nullcontext() if look else stopped_live(self.core)
        with pause, self._focus_channel(channel) as light:
            search = self._search(light, key, self.limits_around(around_um))
            for stop_um in search.moves.settling(stage.position_um()):
                stage.go_to(stop_um)
            verdict = run_search(
                search,
                stage,
                look or (lambda z_um: self.look(light, z_um)),
                timeout_s=self.config.timeout_s,
                on_step=lambda step: self._note(key, light, step),
                is_canceled=is_canceled,
            )
        if verdict.focused:
            best = search.belief.best
            self.places[key] = Mode(1.0, verdict.end_um, max(best.sd_um, 1e-3))
        self.journal.write("verdict", p=key[0], g=key[1], **verdict.summary())
        self.tell(_line(key, verdict))
        return verdict

    def channel(self) -> str:
        """Return the channel whose images tell focus."""
        group = self.core.getChannelGroup()
        present = self.core.getCurrentConfig(group) if group else ""
        return self.config.focus_channel or present or "default"

    def look(self, channel: str, z_um: float) -> FocusReading:
        """Take an image in the present light and read it."""
        return self.read(expose(self.core), channel, z_um)

    def planes(
        self,
        way_um: NDArray[np.float64],
        run_up_um: float,
        show: Callable[[float], None],
    ) -> list[ZPlane]:
        """Take a stack one way, from where backlash is used up before its first plane.

        Parameters
        ----------
        way_um
            Stage z of the planes in their order; those beyond the limits are left out.
        run_up_um
            How far before the first one the way begins, with the way's sign.
        show
            Called with the share done after every plane.
        """
        channel, stage = self.channel(), CoreStage(self.core)
        limits = self.limits_around(None)
        heights = [float(z_um) for z_um in way_um if limits.holds(float(z_um))]
        stage.go_to(limits.clip(float(way_um[0]) - run_up_um))
        planes: list[ZPlane] = []
        for z_um in heights:
            stage.go_to(z_um)
            planes.append(ZPlane(z_um, self.look(channel, z_um)))
            show(len(planes) / len(heights))
        return planes

    def optics_of(self, channel: str) -> OpticalSystem:
        """Return the optics of a channel.

        Raises
        ------
        ConfigError
            If it has none.
        """
        optics = self.optics.get(channel) or self.optics.get("default")
        if optics is None:
            msg = (
                f"channel '{channel}' has no optics, which autofocus needs; give "
                "channels: [{name: ..., optics: ...}] or autofocus.focus_channel"
            )
            raise ConfigError(msg)
        return optics

    def comparison(self, channel: str) -> PlaneComparison:
        """Return the model of a channel's optics, made once.

        Raises
        ------
        ConfigError
            If the channel has no optics.
        """
        direction = self.direction()
        if (channel, direction) not in self._comparisons:
            self._comparisons[channel, direction] = PlaneComparison(
                self.optics_of(channel), direction, fine=is_calibrated(self.config)
            )
        return self._comparisons[channel, direction]

    def models(self, channel: str) -> DefocusModels:
        """Return what a channel's optics do to a held position, made once.

        Raises
        ------
        ConfigError
            If the channel has no optics.
        """
        direction = self.direction()
        if (channel, direction) not in self._models:
            self._models[channel, direction] = DefocusModels(
                self.optics_of(channel), direction
            )
        return self._models[channel, direction]

    def limits_around(self, planned_um: float | None) -> Limits:
        """Return where the stage may go; without a plan's z the first call fixes it.

        Raises
        ------
        ConfigError
            If the planned z, or the stage, is outside of the configured limits.
        """
        if planned_um is not None:
            return limits_at(self.config, planned_um)
        if self.limits is None:
            self.limits = limits_at(self.config, self.stage().position_um())
        return self.limits

    def move_rule(self, unit_um: float, limits: Limits) -> MoveRule:
        """Return how the stage may be moved within limits."""
        return move_rule(self.config, limits, unit_um)

    def corrected(self, planned_um: float, correction_um: float) -> float:
        """Return a planned z with its correction, which never leads beyond limits."""
        wanted_um = planned_um + correction_um
        low = planned_um - self.config.reach_um
        high = planned_um + self.config.reach_um
        # What the plan itself asks for is the user's; a correction is ours.
        if self.config.low_um is not None:
            low = max(low, min(self.config.low_um, planned_um))
        if self.config.high_um is not None:
            high = min(high, max(self.config.high_um, planned_um))
        return min(max(wanted_um, low), high)

    def way_to(self, z_um: float) -> tuple[float, ...]:
        """Return the stops of a way to a planned z, against backlash as configured."""
        side = {"up": 1, "down": -1}.get(self.config.approach, 0)
        beyond_um = z_um - side * self.config.backlash_um
        low, high = self.config.low_um, self.config.high_um
        is_inside = (low is None or beyond_um >= low) and (
            high is None or beyond_um <= high
        )
        from_wrong_side = side * (z_um - self.stage().position_um()) < 0
        return (beyond_um, z_um) if from_wrong_side and is_inside else (z_um,)

    @property
    def moves_offset(self) -> bool:
        """Tell whether a hardware focus device's offset is moved, and no z-stage."""
        return self.config.actuator == "offset"

    def stage(self) -> FocusStage:
        """Return what is moved, as configured.

        Raises
        ------
        MicroscopeError
            If the core does not have it.
        """
        if self.moves_offset:
            config = self.config
            return OffsetStage(
                self.core, config.offset_device, config.offset_um_per_unit
            )
        return CoreStage(self.core)

    def is_held_by_hardware(self) -> bool:
        """Tell whether a focus device (PFS, CRISP) is in continuous mode."""
        device = self.core.getAutoFocusDevice()
        try:
            return bool(device) and self.core.isContinuousFocusEnabled()
        except RuntimeError as error:
            msg = f"focus device '{device}' does not answer: {error}"
            raise MicroscopeError(msg) from error

    def direction(self) -> int:
        """Return what larger z does to the plane of focus: +1 towards, -1 away, 0."""
        if self.moves_offset:  # Micro-Manager does not know
            return direction_of(self.config, 0)
        stage = focus_stage(self.core)
        return direction_of(self.config, int(self.core.getFocusDirection(stage)))

    def _search(self, channel: str, key: Key, limits: Limits) -> Search:
        direction = self.direction()
        if self.config.search != OURS:
            optics = self.optics_of(channel)
            side = search_rule(self.config, direction, trusted=False).safe_side
            return brought_search(
                self.config.search,
                SearchTask(optics, limits, direction, side),
                self.move_rule(optics.defocus_unit_um, limits),
                most_images=self.config.most_images,
            )
        comparison = self.comparison(channel)
        return FocusSearch(
            comparison,
            self.move_rule(comparison.unit_um, limits),
            search_rule(self.config, direction, trusted=is_calibrated(self.config)),
            direction=direction,
            prior=self._prior(key, comparison.unit_um),
        )

    def _prior(self, key: Key, unit_um: float) -> Belief:
        """Return where focus was at this place before, loosely; empty: not known."""
        if key in self.places:
            before = self.places[key]
            return Belief.of([Mode(1.0, before.mean_um, 4 * unit_um)])
        return Belief(())

    def _note(self, key: Key, channel: str, step: Step) -> None:
        reading = step.reading
        self.journal.write(
            "look",
            p=key[0],
            g=key[1],
            channel=channel,
            z_um=step.z_um,
            defocus_um=reading.defocus_um,
            sd_um=reading.sd_um,
            refusal=reading.refusal,
            focus_um=step.belief_um,
            focus_sd_um=step.belief_sd_um,
            decision=type(step.decision).__name__,
            way_um=way_um(step.decision),
        )

    def _refuse_hardware_focus(self) -> None:
        device, is_held = self.core.getAutoFocusDevice(), self.is_held_by_hardware()
        if is_held and not self.moves_offset:
            msg = (
                f"'{device}' holds the focus in hardware, and rtfocus does not fight "
                "it: switch its continuous focus off, leave rtfocus out of the plan, "
                "or let it move the offset (autofocus.actuator: offset)"
            )
            raise MicroscopeError(msg)
        if device and self.moves_offset and not is_held:
            msg = (
                f"'{device}' does not hold the focus, so its offset moves nothing: "
                "switch its continuous focus on, or set autofocus.actuator: stage"
            )
            raise MicroscopeError(msg)

    def _focus_channel(self, ready: str | None) -> AbstractContextManager[str]:
        if ready is not None:
            return nullcontext(ready)
        return FocusLight(self.core, self.config.focus_channel)


def _line(key: Key, verdict: Verdict) -> str:
    place = "" if key[0] is None else f" at position {key[0]}"
    word = "focused" if verdict.focused else f"not focused ({verdict.reason})"
    text = (
        f"autofocus{place}: {word}, z {verdict.start_um:.2f} -> "
        f"{verdict.end_um:.2f} um, {verdict.images} images, {verdict.moves} moves, "
        f"{verdict.seconds:.1f} s"
    )
    return "; ".join((text, *verdict.notes))
