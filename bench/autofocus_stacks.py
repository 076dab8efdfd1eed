"""Autofocus stacks: searches on recorded real z-stacks, from every plane.

    nice python -m bench.autofocus_stacks --data FOLDER

The stage picks the nearest real plane. Optics that nobody stated are assumed, see
`STACKS`; planes finer than the engine was trained for are binned.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench import machine
from bench.autofocus import Reader
from rtfocus.autofocus.planes import PlaneComparison
from rtfocus.autofocus.policy import Limits, MoveRule
from rtfocus.autofocus.run import Verdict, run_search
from rtfocus.autofocus.search import FocusSearch
from rtfocus.channel import OpticalSystem
from rtfocus.frame import FocusReading
from rtfocus.images.reading import open_images


@dataclass(frozen=True, slots=True)
class RecordedStack:
    """One stack with its assumed optics."""

    pattern: str
    """Below the data folder; several files are planes in name order."""
    optics: OpticalSystem
    """After binning."""
    z_um: tuple[float, ...] | float
    """Of every plane, or the step."""
    reference: tuple[int, ...]
    """Planes in focus."""
    channel: int = 0
    binning: int = 1


STACKS = {
    "neubias widefield": RecordedStack(
        "neubias_confocal_widefield/zcyx.tif",
        OpticalSystem(0.5, 461.0, 0.512),
        0.5,
        (19,),
        channel=1,
    ),
    "dfnn light-sheet": RecordedStack(
        "dfnn_mitochondria/stack_zyx.tif",
        OpticalSystem(1.1, 520.0, 0.2, refractive_index=1.33),
        0.1,
        (9,),
        binning=2,
    ),
    "yeast bright field": RecordedStack(
        "yeast_brightfield_zstack/stack_zyx.tif",
        OpticalSystem(0.5, 550.0, 0.5),
        0.3,
        (14, 15),
    ),
    "sephace bright field": RecordedStack(
        "sephace_brightfield_Set1/*_z*um.tif",
        OpticalSystem(0.6, 550.0, 0.4008),
        (1341.95, 1352.25, 1362.0, 1327.6, 1351.6, 1376.8),
        (2, 3),
        binning=2,
    ),
}


def read_planes(
    folder: Path, stack: RecordedStack
) -> tuple[NDArray[np.generic], list[float]]:
    """Return planes (z, y, x) in rising z and their z."""
    paths = sorted(folder.glob(stack.pattern))
    planes = []
    for path in paths:
        series = open_images(path)[0]
        axis = "z" if series.sizes["z"] > 1 else "t"
        for number in range(series.sizes[axis]):
            plane = series.read(**{axis: number, "c": stack.channel})
            planes.append(_binned(plane, stack.binning))
    z_um = stack.z_um
    heights = (
        [number * z_um for number in range(len(planes))]
        if isinstance(z_um, float)
        else list(z_um)
    )
    order = np.argsort(heights)
    return np.stack([planes[i] for i in order]), [heights[i] for i in order]


def _binned(plane: NDArray[np.generic], times: int) -> NDArray[np.generic]:
    if plane.ndim == 3:
        plane = plane.mean(axis=2)
    height, width = (side // times * times for side in plane.shape)
    blocks = plane[:height, :width].reshape(
        height // times, times, width // times, times
    )
    kind = plane.dtype if plane.dtype.kind == "u" else np.uint16
    return blocks.mean(axis=(1, 3)).astype(kind)


class PlaneStage:
    """A stage that stands on planes only."""

    def __init__(self, heights: list[float], start: int) -> None:
        self._heights = np.array(heights)
        self.plane = start

    def position_um(self) -> float:
        """Return the z of the plane."""
        return float(self._heights[self.plane])

    def go_to(self, z_um: float) -> None:
        """Go to the nearest plane."""
        self.plane = int(np.argmin(np.abs(self._heights - z_um)))


def searches(
    folder: Path,
    name: str,
    starts: list[int] | None = None,
    *,
    engine: str = "delpnet",
    region: tuple[slice, slice] = (slice(None), slice(None)),
) -> Iterator[tuple[int, int, Verdict]]:
    """Yield start, end and verdict of a search from every plane; `region`: y, x."""
    stack = STACKS[name]
    planes, heights = read_planes(folder, stack)
    planes = planes[:, *region]
    reader = Reader(engine, stack.optics)
    reader.settings = replace(reader.settings, dark_counts=0.0, saturation_counts=None)
    comparison = PlaneComparison(stack.optics, 0)
    unit = comparison.unit_um
    readings = {}
    try:
        for start in range(len(planes)) if starts is None else starts:
            stage = PlaneStage(heights, start)
            search = FocusSearch(
                comparison,
                MoveRule(Limits(heights[0], heights[-1]), 0.1 * unit, 20 * unit),
                direction=0,
            )

            def look(_: float, stage: PlaneStage = stage) -> FocusReading:
                if stage.plane not in readings:
                    readings[stage.plane] = reader.read(planes[stage.plane])
                return readings[stage.plane]

            verdict = run_search(search, stage, look)
            yield start, stage.plane, verdict
    finally:
        reader.close()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument("--engine", default="delpnet")
    parser.add_argument("--every", type=int, default=1, help="start at each n-th plane")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    table: dict[str, dict[str, object]] = {}
    for name in given.stacks.split(","):
        reference = STACKS[name].reference
        landed, refused, wrong, images = 0, 0, [], []
        reasons: dict[str, int] = {}
        count = len(read_planes(given.data, STACKS[name])[0])
        starts = list(range(0, count, given.every))
        for start, _, verdict in searches(
            given.data, name, starts, engine=given.engine
        ):
            planes_off = min(
                abs(_plane(name, given.data, verdict) - r) for r in reference
            )
            images.append(verdict.images)
            if not verdict.focused:
                refused += 1
                key = verdict.reason.split("(")[0].strip()
                reasons[key] = reasons.get(key, 0) + 1
            elif planes_off <= 1:
                landed += 1
            else:
                wrong.append((start, planes_off))
        table[name] = {
            "landed within 1 plane": landed,
            "refused": refused,
            "wrong in silence": wrong,
            "median images": float(np.median(images)),
            "reasons": reasons,
        }
        print(name, table[name], flush=True)
    if given.json:
        found = {"machine": machine.describe(), "table": table}
        given.json.write_text(json.dumps(found, indent=1), "utf-8")


_HEIGHTS: dict[str, list[float]] = {}


def _plane(name: str, folder: Path, verdict: Verdict) -> int:
    if name not in _HEIGHTS:
        _HEIGHTS[name] = read_planes(folder, STACKS[name])[1]
    return int(np.argmin(np.abs(np.array(_HEIGHTS[name]) - verdict.end_um)))


if __name__ == "__main__":
    main()
