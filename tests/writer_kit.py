"""Writer kit: records series whose frames carry their sequence in the pixels."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel
from rtfocus.config.sections import StoreConfig
from rtfocus.frame import (
    DefocusMap,
    Estimate,
    FrameHeader,
    FrameResult,
    Position,
    Role,
    SeriesEnd,
    SeriesStart,
    Slot,
    SlotPool,
    TileGrid,
)
from rtfocus.metrics import Accounting
from rtfocus.writers.run import RunWriter, open_writer

GRID = TileGrid(
    rows=3, columns=4, tile_px=16, stride_px=8.0, origin_px=7.5, signed=False
)


def make_series(**changes: Any) -> SeriesStart:
    """Return a small series of 6 time points; `changes` replace its fields."""
    values: dict[str, Any] = {
        "version": 1,
        "series_uid": "uid-1",
        "name": "kit",
        "started_ns": 1_700_000_000_000_000_000,
        "shape": (40, 56),
        "dtype": "<u2",
        "sizes": {"t": 6},
        "channels": [Channel("default")],
        "positions": [Position("site")],
        "pixel_size_um": 0.325,
        "z_step_um": 1.5,
        "interval_s": 0.25,
    }
    return SeriesStart(**values | changes)


def numbered(sequence: int, series: SeriesStart) -> NDArray[Any]:
    """Return pixels that no other sequence has, of the series' shape and dtype."""
    count = int(np.prod(series.shape))
    dtype = np.dtype(series.dtype)
    top = 1 << (8 * dtype.itemsize if dtype.kind == "u" else 16)
    # 97 is coprime to every top: frame n is frame 0 shifted, all differ below top.
    values = (np.arange(count, dtype=np.int64) * 31 + (sequence + 1) * 97) % top
    return values.reshape(series.shape).astype(dtype)


def indices(series: SeriesStart, time_points: int = 6) -> Iterator[dict[str, int]]:
    """Yield the planned indices in acquisition order."""
    lengths = [range(size or time_points) for size in series.sizes.values()]
    for place in product(*lengths):
        yield dict(zip(series.sizes, place, strict=True))


class Recording:
    """An open run folder with slots, accounting and what was reported durable."""

    def __init__(
        self,
        folder: Path,
        series: SeriesStart,
        *,
        store: dict[str, Any] | None = None,
        grid: TileGrid | None = GRID,
        restored: bool = True,
        expects_error: bool = False,
        slots: int = 32,
        on_durable: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.series = series
        self._grid = grid
        self._restored = restored
        self._expects_error = expects_error
        self._on_durable = on_durable
        given = {"min_free_mb": 0, "restored": restored} | (store or {})
        self.store = StoreConfig(**given)
        self.accounting = Accounting()
        self.durable: list[int] = []
        size = int(np.prod(series.shape)) * np.dtype(series.dtype).itemsize
        self.pool = SlotPool(slots, size)
        self.writer: RunWriter = open_writer(
            folder,
            series,
            self.store,
            grid=grid,
            accounting=self.accounting,
            on_durable=self._note_durable,
            on_free=self.pool.release,
            provenance={"config": {"run": {"name": "kit"}}},
            expects_error=expects_error,
        )

    def _note_durable(self, sequence: int) -> None:
        self.durable.append(sequence)
        self._on_durable(sequence)

    def fill(
        self, sequence: int, index: dict[str, int], role: Role = Role.RECORD
    ) -> Slot:
        """Return a slot with a numbered frame, as a receiver would."""
        slot = self.pool.acquire(timeout_s=20)
        assert slot is not None, "no slot was freed within 20 s"
        header = FrameHeader(
            version=1,
            series_uid=self.series.series_uid,
            sequence=sequence,
            shape=self.series.shape,
            dtype=self.series.dtype,
            captured_ns=time.time_ns(),
            exposure_ms=5.0,
            index=index,
            role=role,
            z_um=12.5,
        )
        slot.prepare(header)[...] = numbered(sequence, self.series)
        slot.received_ns = time.perf_counter_ns()
        self.accounting.set_acquired(sequence + 1)
        return slot

    def result(self, sequence: int, index: dict[str, int]) -> FrameResult:
        """Return what a processor would make of a numbered frame."""
        restored = None
        if self._restored:
            restored = numbered(sequence, self.series)[::-1].copy()
            if self.store.restored_dtype == "float32":
                restored = restored.astype(np.float32)
        defocus = error = None
        if self._grid is not None:
            shape = (self._grid.rows, self._grid.columns)
            if self._expects_error:
                error = np.full(shape, sequence + 0.5, np.float32)
                error[0, 0] = 0
            values = np.full(shape, sequence, np.float32)
            values[0, 0] = np.nan
            confidence = np.full(shape, 0.5, np.float32)
            level = np.zeros(shape, np.int16)
            spread = np.full(shape, sequence + 0.25, np.float32)
            defocus = DefocusMap(
                self._grid, values, confidence, level, spread, stated_um=spread + 1
            )
        estimate = Estimate(
            series_uid=self.series.series_uid,
            sequence=sequence,
            level=sequence % 11,
            defocus_um=float(sequence),
            signed=False,
            confidence=0.5,
            foreground=1.0,
            z_um=12.5,
            z_offset_um=0.0,
            index=index,
            captured_ns=0,
            estimated_ns=0,
        )
        return FrameResult(
            estimate,
            defocus,
            restored,
            expected_error=error,
            engines={"classifier": "delpnet@0123abcd"},
            stage_ms={"classify": 2.5, "restore": float("nan")},
        )

    def send(self, sequence: int, index: dict[str, int]) -> None:
        """Append one numbered frame."""
        slot = self.fill(sequence, index)
        self.writer.append(slot, self.result(sequence, index))

    def send_all(self, time_points: int = 6) -> int:
        """Append the whole plan; returns the number of frames."""
        count = 0
        for count, index in enumerate(indices(self.series, time_points), start=1):
            self.send(count - 1, index)
        return count

    def close(self, frames: int, reason: str = "completed") -> Path:
        """Finish the run folder."""
        end = SeriesEnd(1, self.series.series_uid, frames, reason)
        return self.writer.close(end, {})


@contextmanager
def recording(folder: Path, series: SeriesStart, **options: Any) -> Iterator[Recording]:
    """Open a recording; leaving it early aborts the writer."""
    opened = Recording(folder, series, **options)
    with opened.writer:
        yield opened


LIVE = make_series(sizes={"t": None, "c": 2}, channels=[Channel("a"), Channel("b")])
"""What `record_until_killed` records."""


def record_until_killed(folder: str, shard_frames: str) -> None:
    """Record `LIVE` for ever, saying on standard output what is durable.

    The program of a process that a test kills; it goes on where it was.
    """

    def say(sequence: int) -> None:
        sys.stdout.write(f"{sequence}\n")
        sys.stdout.flush()

    store = {"shard_frames": int(shard_frames)}
    opened = Recording(Path(folder), LIVE, store=store, on_durable=say)
    for sequence, index in enumerate(indices(LIVE, time_points=1_000_000)):
        if sequence >= opened.writer.next_sequence:
            opened.send(sequence, index)


if __name__ == "__main__":
    record_until_killed(*sys.argv[1:])
