"""Microscope kit: a sink that keeps what it is given, and configs to acquire with."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rtfocus.config import Config
from rtfocus.config.loading import parse_config
from rtfocus.frame import FrameHeader, SeriesStart, Slot, SlotPool
from rtfocus.microscope import virtual_devices
from rtfocus.microscope.acquisition import AcquisitionReport, acquire

OPTICS = {
    "numerical_aperture": 0.36,
    "wavelength_nm": 451,
    "pixel_size_um": 0.65,
    "aberrations": {"spherical_waves": -0.2},
}


def clock_of_images(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let virtual devices live by the waits of their camera, which are returned.

    Specimens drift by images then, however long a busy machine takes for them.
    """
    waits: list[float] = []
    clock = SimpleNamespace(perf_counter=lambda: sum(waits), sleep=waits.append)
    monkeypatch.setattr(virtual_devices, "time", clock)
    return waits


def let_last_image_come_late(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a hardware sequence end right after somebody looked at it.

    The image arrives, and the camera stops, after it was asked whether it runs or
    whether an image waits: whichever is asked first gets the older answer.
    """
    waiting, running = core.getRemainingImageCount, core.isSequenceRunning

    def end() -> None:
        wait_for(lambda: not running())

    def count() -> int:
        seen: int = waiting()
        if not seen:
            end()
        return seen

    def runs() -> bool:
        seen: bool = running()
        end()
        return seen

    monkeypatch.setattr(core, "getRemainingImageCount", count)
    monkeypatch.setattr(core, "isSequenceRunning", runs)


class RecordingSink:
    """Keeps headers and pixels of a series; every slot is free again at once."""

    def __init__(
        self,
        *,
        fail_at: int | None = None,
        before_acquire: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.series: SeriesStart | None = None
        self.headers: list[FrameHeader] = []
        self.pixels: list[NDArray[Any]] = []
        self.reasons: list[str] = []
        self.ends: list[dict[str, Any]] = []
        self._fail_at = fail_at
        self._before_acquire = before_acquire
        self._pool: SlotPool | None = None

    def start(self, series: SeriesStart) -> None:
        assert self.series is None, "started twice"
        self.series = series
        size = int(np.prod(series.shape)) * np.dtype(series.dtype).itemsize
        self._pool = SlotPool(3, size)

    def acquire(self) -> Slot:
        assert self._pool is not None
        assert not self.reasons, "a frame after the end"
        self._before_acquire(len(self.headers))
        if len(self.headers) == self._fail_at:
            msg = "the recorder is gone"
            raise ConnectionError(msg)
        slot = self._pool.acquire(timeout_s=60)
        assert slot is not None
        return slot

    def publish(self, slot: Slot) -> None:
        assert self._pool is not None
        self.headers.append(slot.frame())
        self.pixels.append(slot.pixels.copy())
        self._pool.release(slot)

    def end(self, reason: str, **missed: Any) -> None:
        self.reasons.append(reason)
        self.ends.append(missed)

    def by_index(self) -> dict[tuple[int, ...], NDArray[Any]]:
        """Pixels by (t, p, c, z)."""
        return {
            tuple(header.index[axis] for axis in "tpcz"): pixels
            for header, pixels in zip(self.headers, self.pixels, strict=True)
        }


def record(
    config: Config | dict[str, Any],
    sink: RecordingSink | None = None,
    *,
    stop: threading.Event | None = None,
    on_frame: Callable[[FrameHeader], None] = lambda _: None,
) -> tuple[RecordingSink, AcquisitionReport]:
    """Acquire a config into a sink."""
    if isinstance(config, dict):
        config = parse_config(config)
    sink = sink or RecordingSink()
    stop = stop or threading.Event()
    return sink, acquire(config, sink, stop=stop, on_frame=on_frame)


def virtual(acquisition: dict[str, Any], **microscope: Any) -> Config:
    """Config of a small virtual microscope with one channel, DAPI."""
    settings: dict[str, Any] = {"height_px": 96, "width_px": 128, "noise": "none"}
    return parse_config(
        {
            "microscope": {"source": "virtual", **settings, **microscope},
            "channels": [{"name": "DAPI", "optics": OPTICS}],
            "acquisition": acquisition,
        }
    )


def democamera(acquisition: dict[str, Any], **microscope: Any) -> Config:
    """Config of Micro-Manager's DemoCamera."""
    return parse_config(
        {
            "microscope": {"source": "democamera", **microscope},
            "acquisition": acquisition,
        }
    )


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return once `condition` holds; fail when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
