"""Writer bench: rtfocus against bare tensorstore, and other writers of the field.

All write the same Poisson frames with the same chunks, shards, codec and sync to
the same disk, taking turns, so that load from outside hits all. rtfocus' time runs
from the first `append` until `close` has returned: journal, totals, journal
arrays and report included. The bare loop keeps as many writes outstanding and waits
for the last: no OME metadata, no journal, no accounting. acquire-zarr and
ome-writers run where they are installed; neither says when a frame is committed,
and neither has the per-chunk checksum of the first two.

Run: python -m bench.writer [--rounds 7] [--frames 200] [--size 1024 2048]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from bench import machine
from rtfocus.channel import Channel
from rtfocus.config.sections import StoreConfig
from rtfocus.frame import (
    FrameHeader,
    FrameResult,
    Position,
    SeriesEnd,
    SeriesStart,
    Slot,
    SlotPool,
)
from rtfocus.metrics import Accounting
from rtfocus.writers.arrays import context_of
from rtfocus.writers.header import RunHeader, array_metadata, image_specs
from rtfocus.writers.run import open_writer

DISTINCT = 16
"""Different frames, so that no writer profits from repetition."""

Contender = Callable[
    [Path, list[NDArray[np.uint16]], int, StoreConfig], tuple[float, float]
]
"""Writes N frames into a folder; returns its wall and CPU seconds, set-up excluded."""


class Stopwatch:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self._wall_s = time.perf_counter()
        self._cpu_s = time.process_time()

    def read(self) -> tuple[float, float]:
        """Return (wall, CPU) seconds."""
        wall_s = time.perf_counter() - self._wall_s
        return wall_s, time.process_time() - self._cpu_s


def series_start(size: int, frames: int) -> SeriesStart:
    """Return a time-lapse of square 16-bit frames."""
    return SeriesStart(
        version=1,
        series_uid="bench",
        name="bench",
        started_ns=time.time_ns(),
        shape=(size, size),
        dtype="<u2",
        sizes={"t": frames},
        channels=[Channel("default")],
        positions=[Position("p0")],
        pixel_size_um=0.65,
        interval_s=0.01,
    )


def header(sequence: int, size: int) -> FrameHeader:
    """Return one frame's header."""
    return FrameHeader(
        version=1,
        series_uid="bench",
        sequence=sequence,
        shape=(size, size),
        dtype="<u2",
        captured_ns=time.time_ns(),
        exposure_ms=5.0,
        index={"t": sequence},
        event_index=sequence,
    )


def taken(pool: SlotPool) -> Slot:
    """Take a slot, however long it takes; the pool is open."""
    slot = pool.acquire()
    assert slot is not None
    return slot


def run_rtfocus(
    folder: Path, pixels: list[NDArray[np.uint16]], frames: int, store: StoreConfig
) -> tuple[float, float]:
    """Write through the run folder of the product; the slots are filled before."""
    size = pixels[0].shape[0]
    pool = SlotPool(len(pixels), pixels[0].nbytes)
    slots = [taken(pool) for _ in pixels]
    for slot, frame in zip(slots, pixels, strict=True):
        slot.prepare(header(0, size))[...] = frame
        pool.release(slot)
    accounting = Accounting()
    with open_writer(
        folder / "bench.rtfocus",
        series_start(size, frames),
        store,
        grid=None,
        accounting=accounting,
        on_durable=lambda _: None,
        on_free=pool.release,
        provenance={},
    ) as writer:
        watch = Stopwatch()
        for sequence in range(frames):
            slot = taken(pool)
            # Only the header is new: the pixels of the slot are a frame already.
            slot.prepare(header(sequence, size))
            slot.received_ns = time.perf_counter_ns()
            writer.append(slot, FrameResult(None, None, None, stage_ms={"wait": 0.1}))
        writer.close(SeriesEnd(1, "bench", frames, "completed"), {})
        measured = watch.read()
    if accounting.written != frames:
        raise SystemExit(f"only {accounting.written} of {frames} frames were written")
    return measured


def run_tensorstore(
    folder: Path, pixels: list[NDArray[np.uint16]], frames: int, store: StoreConfig
) -> tuple[float, float]:
    """Write with tensorstore alone, as many frames outstanding."""
    size = pixels[0].shape[0]
    run = RunHeader(series_start(size, frames), store, None, False, {})
    (spec,) = image_specs(run)
    array = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder / "bare.zarr")},
            "metadata": array_metadata(spec, [frames, 1, 1, size, size], store),
            "store_data_equal_to_fill_value": True,
        },
        context=context_of(fsync=store.fsync),
        create=True,
    ).result()
    watch = Stopwatch()
    under_way: deque[Any] = deque()
    for t in range(frames):
        if len(under_way) == store.outstanding:
            under_way.popleft().result()
        frame = pixels[t % len(pixels)]
        under_way.append(
            array[t, 0, 0].write(frame, can_reference_source_data_indefinitely=True)
        )
    for write in under_way:
        write.result()
    return watch.read()


def run_ome_writers(
    folder: Path, pixels: list[NDArray[np.uint16]], frames: int, store: StoreConfig
) -> tuple[float, float]:
    """Write with ome-writers on its tensorstore backend."""
    import ome_writers

    size, chunk = pixels[0].shape[0], store.chunk_px
    shard = size // chunk
    settings = ome_writers.AcquisitionSettings(
        root_path=str(folder / "ome-writers"),
        dimensions=(
            ome_writers.Dimension(name="t", count=frames, chunk_size=1, type="time"),
            *(
                ome_writers.Dimension(
                    name=axis,
                    count=size,
                    chunk_size=chunk,
                    shard_size_chunks=shard,
                    type="space",
                )
                for axis in "yx"
            ),
        ),
        dtype="uint16",
        format=ome_writers.OmeZarrFormat(backend="tensorstore"),
        compression=None if store.codec == "none" else store.codec,
    )
    with ome_writers.create_stream(settings) as stream:
        watch = Stopwatch()
        for t in range(frames):
            stream.append(pixels[t % len(pixels)])
    return watch.read()


def run_acquire_zarr(
    folder: Path, pixels: list[NDArray[np.uint16]], frames: int, store: StoreConfig
) -> tuple[float, float]:
    """Write with acquire-zarr."""
    import acquire_zarr as aq

    size, chunk = pixels[0].shape[0], store.chunk_px
    codecs = {
        "blosc-lz4": aq.CompressionCodec.BLOSC_LZ4,
        "blosc-zstd": aq.CompressionCodec.BLOSC_ZSTD,
    }
    compression = None
    if store.codec in codecs:
        compression = aq.CompressionSettings(
            compressor=aq.Compressor.BLOSC1,
            codec=codecs[store.codec],
            level=store.codec_level,
            shuffle=1,
        )
    space = [
        aq.Dimension(
            name=axis,
            kind=aq.DimensionType.SPACE,
            array_size_px=size,
            chunk_size_px=chunk,
            shard_size_chunks=size // chunk,
        )
        for axis in "yx"
    ]
    array = aq.ArraySettings(
        dimensions=[
            aq.Dimension(
                name="t",
                kind=aq.DimensionType.TIME,
                array_size_px=0,
                chunk_size_px=1,
                shard_size_chunks=1,
            ),
            *space,
        ],
        data_type=aq.DataType.UINT16,
        compression=compression,
    )
    settings = aq.StreamSettings(
        store_path=str(folder / "acquire.zarr"), arrays=[array], overwrite=True
    )
    stream = aq.ZarrStream(settings)
    watch = Stopwatch()
    for t in range(frames):
        stream.append(pixels[t % len(pixels)])
    stream.close()
    return watch.read()


CONTENDERS: dict[str, tuple[str | None, Contender]] = {
    "rtfocus": (None, run_rtfocus),
    "tensorstore": (None, run_tensorstore),
    "ome-writers (tensorstore)": ("ome_writers", run_ome_writers),
    "acquire-zarr": ("acquire_zarr", run_acquire_zarr),
}
"""Name to the module it needs and the function."""


def compare(
    size: int, frames: int, rounds: int, store: StoreConfig, folder: Path
) -> dict[str, Any]:
    """Let all installed contenders write in turn; return seconds and ratios."""
    rng = np.random.default_rng(1)
    pixels = [rng.poisson(300, (size, size)).astype(np.uint16) for _ in range(DISTINCT)]
    names = [n for n, (needs, _) in CONTENDERS.items() if not needs or find_spec(needs)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_s: dict[str, list[float]] = {name: [] for name in names}
    # One round more than counted: the first warms caches and imports.
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            place = Path(tempfile.mkdtemp(prefix="rtfocus-bench-", dir=folder))
            wall, used = CONTENDERS[name][1](place, pixels, frames, store)
            shutil.rmtree(place)
            if hasattr(os, "sync"):
                os.sync()  # what one contender left dirty must not slow the next
            if turn > 0:
                seconds[name].append(wall)
                cpu_s[name].append(used)
    return _figures(size, frames, names, seconds, cpu_s)


def _figures(
    size: int,
    frames: int,
    names: list[str],
    seconds: dict[str, list[float]],
    cpu_s: dict[str, list[float]],
) -> dict[str, Any]:
    megabytes = frames * size * size * 2 / 1e6
    bare = seconds["tensorstore"]
    table = {}
    for name in names:
        ratios = [b / own for b, own in zip(bare, seconds[name], strict=True)]
        table[name] = {
            "frames_per_s": frames / statistics.median(seconds[name]),
            "mb_per_s": megabytes / statistics.median(seconds[name]),
            "cpu_ms_per_frame": 1e3 * statistics.median(cpu_s[name]) / frames,
            "ratio_to_tensorstore": statistics.median(ratios),
            # On a shared machine the best rounds compare what the others hide.
            "ratio_of_best": min(bare) / min(seconds[name]),
            "cpu_ratio_to_tensorstore": statistics.median(cpu_s["tensorstore"])
            / statistics.median(cpu_s[name]),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "seconds": [round(value, 4) for value in seconds[name]],
        }
    return {"size_px": size, "contenders": table}


def main() -> None:
    """Measure, print the ratios and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--codec", default="blosc-lz4")
    parser.add_argument("--fsync", action="store_true")
    parser.add_argument("--folder", type=Path, help="disk to write to")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="run, measure nothing")
    given = parser.parse_args()
    if given.smoke:
        given.rounds, given.frames, given.size = 1, 4, [512]
    store = StoreConfig(
        codec=given.codec, fsync=given.fsync, min_free_mb=100, restored=False
    )
    folder = given.folder or Path(tempfile.gettempdir())
    results = []
    for size in given.size:
        result = compare(size, given.frames, given.rounds, store, folder)
        results.append(result)
        print(f"{size} x {size}, {given.frames} frames, {store.codec}:")
        for name, row in result["contenders"].items():
            print(
                f"  {name:26} {row['frames_per_s']:7.1f} frames/s "
                f"{row['mb_per_s']:7.0f} MB/s "
                f"{row['cpu_ms_per_frame']:6.2f} CPU ms/frame "
                f"{row['ratio_to_tensorstore']:.3f} of bare tensorstore "
                f"(best rounds {row['ratio_of_best']:.3f}, "
                f"CPU {row['cpu_ratio_to_tensorstore']:.3f})"
            )
    for name, (needs, _) in CONTENDERS.items():
        if needs and not find_spec(needs):
            print(f"  {name}: not run, {needs} is not installed")
    settings = {key: str(value) for key, value in vars(given).items()}
    store_settings = store.model_dump(mode="json")
    payload = {"settings": settings, "store": store_settings, "results": results}
    print(machine.write("writer", payload, given.out))


if __name__ == "__main__":
    main()
