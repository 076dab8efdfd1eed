"""Autofocus config: when the stage may be moved, how far, and what happens then."""

from math import inf
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from rtfocus.config.form import Section

Um = Annotated[float, Field(gt=0, lt=inf)]
Place = Annotated[float, Field(gt=-inf, lt=inf)]


def _off_of_yaml(value: object) -> object:
    """Take the word ``off``, which YAML reads as a truth value, for itself."""
    return "off" if value is False else value


class AutofocusConfig(Section):
    """Focus found and held by the images themselves."""

    mode: Annotated[Literal["off", "hold"], BeforeValidator(_off_of_yaml)] = "off"
    """``hold``: keep every position in focus while a plan runs. An
    ``autofocus_plan`` of device ``rtfocus`` in the plan is answered in both."""
    search: str = "rtfocus"
    """What finds focus on demand: ``rtfocus``, or the name under which an installed
    package brings another (entry point in group ``rtfocus.autofocus``)."""
    low_um: Place | None = None
    """Lowest stage z autofocus may ever go to; None: `reach_um` below the start."""
    high_um: Place | None = None
    """Highest stage z; None: `reach_um` above the start."""
    reach_um: Um = 30.0
    """Farthest from where the stage stood at the start, whatever the limits say."""
    most_um: Um = 15.0
    """Longest step of a search; the way back to the best z may be longer."""
    deadband: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Smallest correction worth a move, in depths of field (n lambda / NA^2)."""
    direction: Literal["auto", "toward", "away", "unknown"] = "auto"
    """What larger z does to the plane of focus: ``toward`` the specimen or ``away``
    from it; ``auto``: as Micro-Manager's hardware wizard was told."""
    safe_side: Literal["auto", "down", "up"] = "auto"
    """Where the objective cannot touch the specimen; ``auto``: away from it."""
    approach: Literal["either", "up", "down"] = "either"
    """Direction of every last move, against backlash; ``either``: up where the
    calibration measured backlash."""
    backlash_um: Annotated[float, Field(ge=0, lt=inf)] = 0.0
    """How far to overshoot in order to arrive in the direction of `approach`; 0: half
    as far again as the calibration measured."""
    calibration: Path | None = None
    """File of ``rtfocus calibrate``; None: answers are checked by one more image."""
    focus_channel: str | None = None
    """Channel whose images tell focus; None: on demand the present one, held: the
    first of the plan."""
    channel_offsets_um: dict[str, Place] = {}
    """Focus of a channel minus that of the focus channel."""
    region: tuple[int, int, int, int] | None = None
    """x, y, width, height in pixels of what shall be in focus; None: the frame."""
    most_images: Annotated[int, Field(ge=2)] = 10
    """Images one search may take."""
    timeout_s: Um = 60.0
    """A search without progress for so long ends."""
    request_timeout_s: Um = 10.0
    """Longest wait for the estimate of one image."""
    on_failure: Literal["continue", "skip"] = "continue"
    """After a search that failed: acquire the position as it is, or skip its events."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> "AutofocusConfig":
        low, high = self.low_um, self.high_um
        if low is not None and high is not None and low >= high:
            msg = f"low_um {low:g} is not below high_um {high:g}; swap them"
            raise ValueError(msg)
        return self
