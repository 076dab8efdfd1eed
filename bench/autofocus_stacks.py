"""Autofocus stacks: searches on recorded real z-stacks, from every plane.

    nice python -m bench.autofocus_stacks --data FOLDER

The stage picks the nearest real plane. Optics that nobody stated are assumed, see
`STACKS`; planes finer than the engine was trained for are binned.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench import machine
from bench.autofocus import Reader
from rtfocus.autofocus.appearance import amplitude_spectrum, sharpness
from rtfocus.autofocus.execution import Verdict, run_search
from rtfocus.autofocus.planes import PlaneComparison
from rtfocus.autofocus.policy import Limits, MoveRule
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


@dataclass(frozen=True, slots=True)
class Taken:
    """A stack as somebody may have taken it."""

    planes: NDArray[np.generic]
    """Axes (z, y, x)."""
    heights: list[float]
    """Stage z of every plane in um, rising."""
    optics: OpticalSystem
    reference: tuple[int, ...]
    """Planes in focus."""


def _quarter(taken: Taken, top: int, left: int) -> Taken:
    height, width = (side // 2 for side in taken.planes.shape[1:])
    planes = taken.planes[:, top * height :, left * width :][:, :height, :width]
    # Of a tilted specimen a quarter may have a plane of its own.
    own = int(np.argmax([sharpness(*amplitude_spectrum(plane)) for plane in planes]))
    reference = (*taken.reference, own)
    return replace(taken, planes=planes, reference=reference)


def _binned_twice(taken: Taken) -> Taken:
    planes = np.stack([_binned(plane, 2) for plane in taken.planes])
    pixel_um = 2 * taken.optics.pixel_size_um
    return replace(
        taken, planes=planes, optics=replace(taken.optics, pixel_size_um=pixel_um)
    )


def _of_8_bits(taken: Taken) -> Taken:
    low, high = float(taken.planes.min()), float(taken.planes.max())
    planes = np.rint((taken.planes - low) / (high - low) * 255).astype(np.uint8)
    return replace(taken, planes=planes)


def _inverted(taken: Taken) -> Taken:
    low, high = taken.planes.min(), taken.planes.max()
    return replace(taken, planes=(high - (taken.planes - low)).astype(high.dtype))


def _noisy(taken: Taken) -> Taken:
    low, high = np.quantile(taken.planes, [0.01, 0.99])
    noise = np.random.default_rng(5).normal(0, 0.05 * (high - low), taken.planes.shape)
    kind = taken.planes.dtype
    planes = np.clip(taken.planes + noise, 0, np.iinfo(kind).max).astype(kind)
    return replace(taken, planes=planes)


def _reversed(taken: Taken) -> Taken:
    last = len(taken.planes) - 1
    heights = [taken.heights[-1] - z_um for z_um in taken.heights[::-1]]
    reference = tuple(last - plane for plane in taken.reference)
    return replace(
        taken, planes=taken.planes[::-1], heights=heights, reference=reference
    )


def _every_second(taken: Taken) -> Taken:
    # A plane in focus that is left out has two neighbours that are left.
    halves = {
        half for plane in taken.reference for half in (plane // 2, -(-plane // 2))
    }
    kept = range((len(taken.planes) + 1) // 2)
    return replace(
        taken,
        planes=taken.planes[::2],
        heights=taken.heights[::2],
        reference=tuple(half for half in sorted(halves) if half in kept),
    )


VARIANTS: dict[str, Callable[[Taken], Taken]] = {
    "recorded": lambda taken: taken,
    "binned": _binned_twice,
    "top-left": partial(_quarter, top=0, left=0),
    "top-right": partial(_quarter, top=0, left=1),
    "bottom-left": partial(_quarter, top=1, left=0),
    "bottom-right": partial(_quarter, top=1, left=1),
    "8-bit": _of_8_bits,
    "inverted": _inverted,
    "noisy": _noisy,
    "reversed": _reversed,
    "every-second": _every_second,
}
"""Quarters of the field, whose own sharpest plane counts as in focus too; noise of 5 %
of the contrast; the stage's direction turned."""


def take(folder: Path, name: str, variant: str = "recorded") -> Taken:
    """Return one of `STACKS` as one of `VARIANTS`."""
    stack = STACKS[name]
    planes, heights = read_planes(folder, stack)
    return VARIANTS[variant](Taken(planes, heights, stack.optics, stack.reference))


def searches(
    taken: Taken, starts: Iterable[int] | None = None, *, engine: str = "delpnet"
) -> Iterator[tuple[int, int, Verdict]]:
    """Yield start, end and verdict of a search from planes; None: from every plane."""
    heights = taken.heights
    reader = Reader(engine, taken.optics)
    reader.settings = replace(reader.settings, dark_counts=0.0, saturation_counts=None)
    comparison = PlaneComparison(taken.optics, 0)
    unit = comparison.unit_um
    readings: dict[int, FocusReading] = {}
    try:
        for start in range(len(heights)) if starts is None else starts:
            stage = PlaneStage(heights, start)
            search = FocusSearch(
                comparison,
                MoveRule(Limits(heights[0], heights[-1]), 0.1 * unit, 20 * unit),
                direction=0,
            )

            def look(_: float, stage: PlaneStage = stage) -> FocusReading:
                if stage.plane not in readings:
                    readings[stage.plane] = reader.read(taken.planes[stage.plane])
                return readings[stage.plane]

            verdict = run_search(search, stage, look)
            yield start, stage.plane, verdict
    finally:
        reader.close()


def planes_off(taken: Taken, plane: int) -> int:
    """Return how many planes one is from the nearest in focus."""
    return min(abs(plane - reference) for reference in taken.reference)


def summarise(taken: Taken, every: int, engine: str) -> dict[str, object]:
    """Search from each n-th plane and count how it ended."""
    landed, refused, farther, wrong, images = 0, 0, 0, [], []
    reasons: Counter[str] = Counter()
    starts = range(0, len(taken.planes), every)
    for start, end, verdict in searches(taken, starts, engine=engine):
        off = planes_off(taken, end)
        images.append(verdict.images)
        farther += off > planes_off(taken, start) + 1
        if not verdict.focused:
            refused += 1
            reasons[verdict.reason.split("(")[0].strip()] += 1
        elif off <= 1:
            landed += 1
        else:
            wrong.append((start, off))
    return {
        "landed within 1 plane": landed,
        "refused": refused,
        "wrong in silence": wrong,
        "farther than it began": farther,
        "median images": float(np.median(images)),
        "reasons": dict(reasons),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument(
        "--variants", default="recorded", help=f"all, or some of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--engine", default="delpnet")
    parser.add_argument("--every", type=int, default=1, help="start at each n-th plane")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    wanted = list(VARIANTS) if given.variants == "all" else given.variants.split(",")
    table: dict[str, dict[str, object]] = {}
    for name in given.stacks.split(","):
        if not list(given.data.glob(STACKS[name].pattern)):
            parser.error(
                f"'{given.data}' holds no {STACKS[name].pattern}: name the folder of "
                "the recorded stacks by --data, or others by --stacks"
            )
        for variant in wanted:
            taken = take(given.data, name, variant)
            row = f"{name}, {variant}"
            table[row] = summarise(taken, given.every, given.engine)
            print(row, table[row], flush=True)
    if given.json:
        found = {"machine": machine.describe(), "table": table}
        given.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
