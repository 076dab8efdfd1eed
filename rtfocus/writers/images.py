"""Images: the arrays of all positions of a run, and their groups."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rtfocus.errors import WriterError
from rtfocus.frame import FrameResult
from rtfocus.writers.arrays import Commit, FrameArray, open_context
from rtfocus.writers.header import RunHeader
from rtfocus.writers.layout import image_groups, update_attributes, write_groups
from rtfocus.writers.places import Index
from rtfocus.writers.specs import (
    CONFIDENCE,
    DEFOCUS,
    RAW,
    RESTORED,
    ImageSpec,
    ShardFile,
    image_specs,
)

_MOST_THREADS = 8
"""More than this many copies at once do not make a disk faster."""


class RunImages:
    """Raw, restored, defocus and confidence of every position.

    Parameters
    ----------
    folder
        The run folder.
    header
        Decides what there is.
    create
        True: write the metadata that is not there, whole, before any frame.
    """

    def __init__(self, folder: Path, header: RunHeader, *, create: bool) -> None:
        self.specs = image_specs(header)
        self.names = [spec.name for spec in self.specs]
        self._needs_pixels = bool({RAW, RESTORED} & set(self.names))
        self._fsync = header.store.fsync
        self._groups = {
            spec.name: image_groups(folder, header, spec) for spec in self.specs
        }
        if create:
            write_groups(folder, header, self.specs)
        context = open_context(
            header.store, threads=min(os.cpu_count() or 1, _MOST_THREADS)
        )
        sizes = header.size("t"), header.size("c") or 1, header.size("z") or 1

        def array(spec: ImageSpec, group: Path) -> FrameArray:
            return FrameArray(
                group / "0", spec, sizes, header.store, context, create=create
            )

        self._arrays = {
            spec.name: [array(spec, group) for group in self._groups[spec.name]]
            for spec in self.specs
        }

    @property
    def frame_bytes(self) -> int:
        """Bytes per frame in all images, before compression."""
        return sum(spec.frame_bytes for spec in self.specs)

    @property
    def frames(self) -> int:
        """Longest present length along t."""
        lengths = [a.frames for arrays in self._arrays.values() for a in arrays]
        return max(lengths, default=0)

    def pixels(
        self, raw: NDArray[Any], result: FrameResult | None
    ) -> dict[str, NDArray[Any]]:
        """Return what is to be stored of one frame, by image.

        Empty where the run keeps restored frames only and this one is not restored.

        Raises
        ------
        WriterError
            If a shape or dtype is not that of its image.
        """
        found: dict[str, NDArray[Any] | None] = {RAW: raw}
        if result is not None:
            found[RESTORED] = result.restored
        if result is not None and result.defocus is not None:
            found[DEFOCUS] = result.defocus.defocus_um
            found[CONFIDENCE] = result.defocus.confidence
        pixels = {
            spec.name: _checked(spec, array)
            for spec in self.specs
            if (array := found.get(spec.name)) is not None
        }
        if self._needs_pixels and not {RAW, RESTORED} & pixels.keys():
            return {}
        return pixels

    def write(self, name: str, index: Index, frames: list[NDArray[Any]]) -> Commit:
        """Start to write `frames` from `index` on along t; returns the future."""
        array = self._arrays[name][index["p"]]
        return array.write(index["t"], index["c"], index["z"], frames)

    def read(self, name: str, index: Index) -> NDArray[Any]:
        """Read one frame of image `name` back; WriterError if it cannot be."""
        array = self._arrays[name][index["p"]]
        return array.read(index["t"], index["c"], index["z"])

    def holds(self, name: str, index: Index) -> bool:
        """Tell whether image `name` has a whole and right frame at `index`."""
        array = self._arrays[name][index["p"]]
        return array.holds(index["t"], index["c"], index["z"])

    def shards(self) -> Iterator[tuple[str, int, ShardFile]]:
        """Yield every shard on the disk with its image and position."""
        for name, arrays in self._arrays.items():
            for position, array in enumerate(arrays):
                for shard in array.shards():
                    yield name, position, shard

    def reserve(self, frames: int) -> None:
        """Make all arrays at least this long along t."""
        for arrays in self._arrays.values():
            for array in arrays:
                array.reserve(frames)

    def trim(self, frames: int) -> list[Path]:
        """Set all lengths along t; returns the shards left beyond it."""
        return [
            path
            for arrays in self._arrays.values()
            for array in arrays
            for path in array.trim(frames)
        ]

    def describe(self, position: int, rtfocus: dict[str, Any]) -> None:
        """Add to the ``rtfocus`` attribute of all images of a position."""
        for groups in self._groups.values():
            update_attributes(groups[position], {"rtfocus": rtfocus}, fsync=self._fsync)

    @property
    def positions(self) -> int:
        """Number of positions."""
        return max((len(groups) for groups in self._groups.values()), default=0)


def _checked(spec: ImageSpec, array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` if it is what the image holds."""
    shape = spec.plane_shape if spec.planes == 1 else (*spec.plane_shape, spec.planes)
    if array.shape != shape or array.dtype.name != spec.dtype:
        msg = (
            f"{spec.name} frame is {array.dtype.name} {array.shape}, its image holds "
            f"{spec.dtype} {shape}; a new shape or dtype needs a new series"
        )
        raise WriterError(msg)
    return array
