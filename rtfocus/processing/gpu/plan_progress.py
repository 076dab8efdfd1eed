"""Plan progress: TensorRT's build phases told to whoever waits, who may cancel."""

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], bool]
"""Called with the phase's name, steps done and steps of the phase; False cancels.
TensorRT calls from threads of its own."""


def make_monitor(api: Any, progress: Progress) -> Any:
    """Return a progress monitor of a TensorRT library.

    Its ``cancelled`` says whether `progress` asked to stop.
    """

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """Phases nest; each is told by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self._steps: dict[str, int] = {}
            self._failure: BaseException | None = None

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: int
        ) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.cancelled

        def _tell(self, phase: str, done: int) -> None:
            # An exception must not unwind through TensorRT: kept, raised after.
            try:
                if not progress(phase, done, self._steps.get(phase, done)):
                    self.cancelled = True
            except BaseException as error:
                self._failure, self.cancelled = error, True

        def raise_failure(self) -> None:
            """Raise what `progress` raised, if it did."""
            if self._failure is not None:
                raise self._failure

    return Monitor()
