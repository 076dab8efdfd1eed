"""Stages: the virtual microscope's z-stage and xy-stage."""

from pymmcore_plus import FocusDirection
from pymmcore_plus.experimental.unicore import StageDevice, XYStageDevice


class VirtualZStage(StageDevice):
    """z-stage that carries the objective; up is towards the specimen."""

    def __init__(self) -> None:
        super().__init__()
        self._z_um = 0.0
        self._origin_um = 0.0

    @property
    def objective_um(self) -> float:
        """Where the plane of focus lies, whatever was called the origin."""
        return self._z_um

    def set_position_um(self, val: float) -> None:
        """Move the objective; the move is over when this returns."""
        self._z_um = val + self._origin_um
        self.core.events.stagePositionChanged.emit(self.get_label(), val)

    def get_position_um(self) -> float:
        """Return the position relative to the origin."""
        return self._z_um - self._origin_um

    def get_focus_direction(self) -> FocusDirection:
        """Larger z brings the objective closer to the specimen."""
        return FocusDirection.TowardSample

    def home(self) -> None:
        """Go back to the origin."""
        self.set_position_um(0.0)

    def stop(self) -> None:
        """Do nothing: moves are over at once."""

    def set_origin(self) -> None:
        """Call the present position 0."""
        self._origin_um = self._z_um


class VirtualXYStage(XYStageDevice):
    """xy-stage that carries the specimen's frame of reference."""

    def __init__(self) -> None:
        super().__init__()
        self._x_um = self._y_um = 0.0
        self._origin_um = (0.0, 0.0)

    @property
    def centre_um(self) -> tuple[float, float]:
        """Where the frame lies on the specimen, whatever was called the origin."""
        return self._x_um, self._y_um

    def set_position_um(self, x: float, y: float) -> None:
        """Move to a place on the specimen; over when this returns."""
        self._x_um = x + self._origin_um[0]
        self._y_um = y + self._origin_um[1]
        self.core.events.XYStagePositionChanged.emit(self.get_label(), x, y)

    def get_position_um(self) -> tuple[float, float]:
        """Return the position relative to the origin."""
        return self._x_um - self._origin_um[0], self._y_um - self._origin_um[1]

    def home(self) -> None:
        """Go back to the origin."""
        self.set_position_um(0.0, 0.0)

    def stop(self) -> None:
        """Do nothing: moves are over at once."""

    def set_origin_x(self) -> None:
        """Call the present x 0."""
        self._origin_um = (self._x_um, self._origin_um[1])

    def set_origin_y(self) -> None:
        """Call the present y 0."""
        self._origin_um = (self._origin_um[0], self._y_um)
