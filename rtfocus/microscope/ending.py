"""Ending: how a series ends when things went well, and when they did not."""

from pymmcore_plus.experimental.unicore import UniMMCore

from rtfocus.errors import MicroscopeError
from rtfocus.microscope.report import AcquisitionReport
from rtfocus.microscope.sink import FrameSink


def end_series(
    sink: FrameSink, report: AcquisitionReport, failure: Exception | None
) -> None:
    """Tell the sink the end; its own failure counts unless there was one before."""
    try:
        sink.end(
            report.reason,
            camera_lost=report.camera_lost,
            not_acquired=report.not_acquired,
            warnings=report.warnings,
        )
    except Exception as error:
        if failure is None:
            raise
        # Most often the same cause: the recorder is gone.
        failure.add_note(f"ending the series failed too: {error}")


def overflow_error(core: UniMMCore) -> MicroscopeError:
    """Say that Micro-Manager's buffer ran over, and what helps."""
    size_mb = core.getCircularBufferMemoryFootprint()
    msg = (
        f"Micro-Manager's buffer of {size_mb} MB overflowed: frames came faster than "
        "they were processed. Lower the frame rate, make the processing faster "
        "(processing.restoration.method: none), or set a larger "
        "microscope.sequence_buffer_mb"
    )
    return MicroscopeError(msg)


def camera_lost_images(core: UniMMCore, fault: str | None) -> str:
    """Return the reason of a series that ran to its end with images missing."""
    why = "" if fault is None else f": {fault}"
    return f"camera '{core.getCameraDevice()}' gave fewer images than asked for{why}"
