"""Stack focus: how often `focus_of_stack` is right within a plane, and wrongly sure.

The five recorded stacks, and stacks made of sharp images, blurred through focus by
optics drawn at random, photographed by a camera drawn at random, classified blind:

- *middle*, *three missing*: two planes or more lie on either side of focus,
- *near an end*: one, on one side, or two,
- *beyond an end*: focus is one to six planes outside,
- *two layers*: the sum of two images five to ten planes apart; either is right,
- *one defocus*: frames that differ by their noise; any place is wrong,
- *shuffled*: the planes of a stack in no order; any place is wrong.

An end that is named is right if focus lies there or beyond, to a plane.

``nice python -m bench.stack_focus --data FOLDER``
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.autofocus_stacks import read_planes
from bench.unseen import ENGINES, found_by, stacks
from rtfocus.batch.findings import StackFocus, focus_of_stack
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.samples import BBBC006, DataSet, as_light, draw_camera, middle
from rtfocus.images.reading import open_images
from rtfocus.offline import ImageProcessor
from rtfocus.optics.formation import CameraModel, blur
from rtfocus.optics.normalisation import luminance
from rtfocus.optics.psf import compute_psf

Floats = NDArray[np.float64]
Image = NDArray[np.float32]
Distance = Callable[[NDArray[np.generic]], float]

_SEED, _SIDE_PX, _FARTHEST = 57, 224, 16
_FRAMES = 15
"""Of one defocus."""
_FEWEST, _MOST = 6, 19
"""Planes of a stack."""
_TIMES = 4
"""That a scene's planes are made into stacks."""


class Sweep(NamedTuple):
    """The distances of all planes of a scene, of which stacks are made."""

    focus: float
    """In planes."""
    distance: Floats
    """Of planes 0 to 2 * `_FARTHEST`."""
    layers: tuple[float, float]
    """Where those of the next are in focus."""
    layered: Floats
    """The same of the scene with another one above it."""
    still: Floats
    """Of frames at one defocus."""


class Case(NamedTuple):
    """One stack and what is right."""

    kind: str
    planes: NDArray[np.intp]
    distance: Floats
    truth: tuple[float, ...]
    """Where it is in focus, in planes; empty: nowhere."""


def scenes(folder: Path) -> Iterator[Image]:
    """Yield the middle of every plane of the sharp images: 0 to 1."""
    for path in sorted((folder / "in_focus").glob("*/*.tif")):
        for series in open_images(path):
            for index in series.indices():
                plane = luminance(series.read(**index).astype(np.float32))
                rows, columns = (middle(side, _SIDE_PX) for side in plane.shape)
                yield as_light(plane[rows, columns])


def sharpest_um(optics: OpticalSystem) -> float:
    """Return where the PSF is sharpest: spherical aberration moves that."""
    tried = np.linspace(-1, 1, 33) * optics.defocus_unit_um
    energy = [float(np.square(compute_psf(optics, float(z))).sum()) for z in tried]
    return float(tried[int(np.argmax(energy))])


def sweeps(folder: Path, distance: Distance) -> Iterator[Sweep]:
    """Blur every scene through focus, and measure its planes."""
    lights = list(scenes(folder))
    for number, light in enumerate(lights):
        rng = np.random.default_rng([_SEED, number])
        other = lights[(number + 7) % len(lights)]
        yield _sweep(light, other, distance, rng)


def _sweep(
    light: Image, other: Image, distance: Distance, rng: np.random.Generator
) -> Sweep:
    aperture, sampling = rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.8)
    optics = OpticalSystem(
        float(aperture),
        520.0,
        float(sampling * 0.52 / aperture),
        aberrations=Aberrations(spherical_waves=float(rng.uniform(-0.25, 0.25))),
    )
    # Of a depth of field, as stacks are taken.
    step_um = float(rng.uniform(0.25, 1.0)) * optics.defocus_unit_um
    camera, _ = draw_camera(rng)
    nominal = _FARTHEST + float(rng.uniform(-0.5, 0.5))
    apart = float(rng.uniform(5, 10))
    layers = nominal - apart / 2, nominal + apart / 2
    still_um = float(rng.uniform(0, 8)) * step_um
    shift = sharpest_um(optics) / step_um
    cut = tuple(
        slice(min(sides)) for sides in zip(light.shape, other.shape, strict=True)
    )

    def psf(planes: float) -> Image:
        return compute_psf(optics, planes * step_um)

    def seen(image: Image) -> float:
        return distance(_exposed(camera, image, rng))

    planes = range(2 * _FARTHEST + 1)
    still = blur(light, compute_psf(optics, still_um))
    return Sweep(
        nominal + shift,
        np.array([seen(blur(light, psf(k - nominal))) for k in planes]),
        (layers[0] + shift, layers[1] + shift),
        np.array(
            [
                seen(
                    np.float32(0.5) * blur(light[cut], psf(k - layers[0]))
                    + np.float32(0.5) * blur(other[cut], psf(k - layers[1]))
                )
                for k in planes
            ]
        ),
        np.array([seen(still) for _ in range(_FRAMES)]),
    )


def _exposed(
    camera: CameraModel, image: Image, rng: np.random.Generator
) -> NDArray[np.generic]:
    return camera.expose(np.clip(image, 0, 1), rng)


def cases(sweep: Sweep, rng: np.random.Generator) -> Iterator[Case]:
    """Yield stacks of a scene, one of each kind."""
    count = int(rng.integers(_FEWEST, _MOST + 1))
    nearest = round(sweep.focus)

    def stack(kind: str, before: int) -> Case:
        """Return `count` planes, `before` of them below the one nearest to focus."""
        planes = np.arange(nearest - before, nearest - before + count)
        planes = planes[(planes >= 0) & (planes < len(sweep.distance))]
        return Case(kind, planes, sweep.distance[planes], (sweep.focus,))

    taken = stack("middle", int(rng.integers(2, count - 2)))
    yield taken
    hidden = taken.distance.copy()
    hidden[rng.choice(len(hidden), 3, replace=False)] = np.nan
    yield taken._replace(kind="three missing", distance=hidden)
    mixed = rng.permutation(taken.distance)
    yield taken._replace(kind="shuffled", distance=mixed, truth=())
    near, beyond = int(rng.integers(1, 3)), -int(rng.integers(1, 7))
    for kind, before in (("near an end", near), ("beyond an end", beyond)):
        yield stack(kind, before if rng.random() < 0.5 else count - 1 - before)
    half = int(rng.integers(7, 13))
    low = max(round(np.mean(sweep.layers)) - half, 0)
    planes = np.arange(low, min(low + 2 * half + 1, len(sweep.layered)))
    yield Case("two layers", planes, sweep.layered[planes], sweep.layers)
    yield Case("one defocus", np.arange(_FRAMES), sweep.still, ())


def judged(found: StackFocus, truth: Iterable[float]) -> str:
    """Say how an answer compares with the truth."""
    if found.place == "unknown":
        return "not known"
    if found.z is not None:
        near = any(abs(found.z - one) <= 1 for one in truth)
        return "within a plane" if near else "wrong place"
    low = -np.inf if found.low is None else found.low
    high = np.inf if found.high is None else found.high
    there = any(low - 1 <= one <= high + 1 for one in truth)
    return "right end" if there else "wrong end"


VERDICTS = ("within a plane", "right end", "not known", "wrong place", "wrong end")


def simulated(folder: Path, distance: Distance) -> Iterator[str]:
    """Yield a row per kind of stack: how often what was said, in percent."""
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    held: dict[str, list[bool]] = defaultdict(list)
    rng = np.random.default_rng(_SEED)
    for sweep in sweeps(folder, distance):
        for _ in range(_TIMES):
            for case in cases(sweep, rng):
                found = focus_of_stack(case.planes, case.distance)
                verdicts[case.kind][judged(found, case.truth)] += 1
                if found.low is not None and found.high is not None and case.truth:
                    right = [found.low <= one <= found.high for one in case.truth]
                    held[case.kind].append(any(right))
    for kind, counts in verdicts.items():
        cells = [f"{100 * counts[one] / counts.total():.0f}" for one in VERDICTS]
        inside = f"{100 * np.mean(held[kind]):.0f}" if held[kind] else ""
        yield f"| {kind} ({counts.total()}) | {' | '.join([*cells, inside])} |"


def recorded(folder: Path, distance: Distance) -> Iterator[str]:
    """Yield a cell per recorded stack: what is said, and the planes truly in focus."""
    for name, stack in stacks().items():
        images, z_um = read_planes(folder, stack)
        found = focus_of_stack(z_um, [distance(image) for image in images])
        if found.z is None or found.low is None or found.high is None:
            yield f"{name}: {found.place} ({found.explained:.2f} explained)"
            continue
        steps = np.interp([found.z, found.low, found.high], z_um, range(len(z_um)))
        place, low, high = (f"{one:.1f}" for one in steps)
        right = ", ".join(map(str, stack.reference))
        share = f"{found.explained:.2f} explained"
        yield f"{name}: {place} ({low} to {high}; {share}), truly {right}"


def main() -> None:
    """Print both tables for every engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    options = parser.parse_args()
    for name in options.engines:
        engine = contender(name, classifier=name, blind=True)
        config = replace(engine, method="none").config(
            DataSet("stacks", "", BBBC006, 0.0, ()), threads=1
        )
        print(f"\n{name}", flush=True)
        with ImageProcessor(config) as processor:
            for line in recorded(options.data, found_by(processor)):
                print(line, flush=True)
            head = " | ".join(["kind (stacks)", *VERDICTS, "in the likely range"])
            print(f"\n| {head} |\n|---{'|---' * (head.count('|') + 1)}|")
            for line in simulated(options.data, found_by(processor)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
