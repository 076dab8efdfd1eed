"""Autofocus hold: a plate that drifts, seen frame by frame.

    nice python -m bench.autofocus_hold --frames 1000 --positions 24 --drift 40
    nice python -m bench.autofocus_hold --positions 1 --frames 60 --interval 0.3 \
        --still 17 --drift 3.9 --tilt 2.5 --kind tissue --late 2 --repeats 16

Images of the virtual microscope's image formation through the holder of the live
loop; 1 % of the frames are bad: half of them blank, half noise that nobody marks.
The second line is the demo's drift, either way in turns, with images that are read two
visits late.

Probes are images taken for focus alone: those of searches after the first. A false
alarm is a place called lost within a depth of field of focus, or read late where
images come at once. The stage oscillates where moves of a place alternate in sign.
"""

import argparse
import json
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine
from bench.autofocus_scenes import DARK, REFERENCE, Scene, camera
from rtfocus.autofocus.appearance import DefocusModels, amplitude_spectrum
from rtfocus.autofocus.hold import Correction, Holder, SpectrumAtZ
from rtfocus.autofocus.policy import Limits, MoveRule
from rtfocus.channel import OpticalSystem
from rtfocus.frame import Estimate, FocusReading
from rtfocus.specimens import SpecimenKind, draw_specimen

SIDE_PX = 256
KINDS: tuple[SpecimenKind, ...] = ("nuclei", "filaments", "tissue")
BAD = 0.01
SEARCHED = (-1.2, 0.9, 0.0)
"""Images of a search, in depths of field beside where it ends."""


def reading(pixels: np.ndarray, refusal: str | None = None) -> FocusReading:
    """Return what hold needs of a frame: its spectrum."""
    spectrum, noise = amplitude_spectrum(pixels, dark_counts=DARK)
    return FocusReading(
        None, None, False, refusal, spectrum=spectrum.tolist(), noise=noise
    )


def plate(given: argparse.Namespace, optics: OpticalSystem, seed: int) -> list[Scene]:
    """Make the specimens of a plate that is bent by some depths of field."""
    rng = np.random.default_rng([seed, 7])
    scenes = []
    for number in range(given.positions):
        own = np.random.default_rng([seed, number])
        kind = given.kind or KINDS[number % 3]
        sharp = draw_specimen(kind, (SIDE_PX, SIDE_PX), own)
        scene = Scene(sharp, optics, camera(), own, tilt_um=given.tilt)
        scene.focus_um = float(rng.normal(0, 3 * optics.defocus_unit_um))
        scenes.append(scene)
    return scenes


def drift_um(frame: int, frames: int, whole_um: float, shape: str) -> float:
    """Return the drift at a frame: a line, or a warming up that settles."""
    share = max(frame / frames, 0.0)
    if shape == "line":
        return whole_um * share
    return float(whole_um * (1 - np.exp(-3 * share)) / (1 - np.exp(-3)))


def visits(
    given: argparse.Namespace, told: OpticalSystem, seed: int, drift: float
) -> Iterator[dict[str, Any]]:
    """Run the plate and yield what was true at every frame."""
    true = replace(told, numerical_aperture=told.numerical_aperture * given.aperture)
    unit = told.defocus_unit_um
    models = DefocusModels(told)
    moves = MoveRule(Limits(-500, 500), given.deadband * unit, 15.0)
    made: list[Correction] = []
    holder = Holder(models, moves, on_correction=made.append)
    scenes = plate(given, true, seed)
    rng, chance = (np.random.default_rng([seed, number]) for number in (11, 13))
    unread: deque[Estimate] = deque()
    stage: dict[int, float] = {}
    for frame in range(given.frames):
        place, time_s = frame % given.positions, float(frame) * given.interval
        scene, key = scenes[place], (place, None)
        risen = drift_um(
            frame - given.still, given.frames - given.still, drift, given.shape
        )
        still = scene.focus_um
        scene.focus_um = still + risen
        stood_um, step_um, is_late = stage.get(place), 0.0, False
        if stood_um is None or holder.lost(key):
            # As a search leaves it: near focus, with the images it took.
            begun = scene.focus_um + float(rng.normal(0, 0.1)) * unit
            places = [begun + away * unit for away in SEARCHED]
            looks = [
                SpectrumAtZ(z, np.array(found.spectrum), found.noise)
                for z in places
                for found in [reading(scene.expose(z))]
            ]
            stage[place] = begun
            holder.begin(key, time_s, begun, looks)
            lost_by = None if stood_um is None else (scene.focus_um - stood_um) / unit
        else:
            step_um = holder.correction_um(key, time_s, int(time_s * 1e9))
            stage[place] = stood_um + step_um
            lost_by, is_late = None, made[-1].is_late
        pixels = scene.expose(stage[place])
        refusal = None
        if rng.random() < BAD:
            dark = rng.poisson(400, pixels.shape).astype(np.uint16)
            refusal, pixels = ("blank" if rng.random() < 0.5 else None), dark
        unread.append(
            Estimate(
                "bench",
                frame,
                None,
                None,
                False,
                0.0,
                1.0,
                stage[place],
                0.0,
                {"t": frame // given.positions, "p": place, "c": 0, "z": 0},
                int(time_s * 1e9) + 1,
                0,
                reading(pixels, refusal),
            )
        )
        if chance.random() >= given.looked:
            unread.pop()
        while len(unread) > given.late:
            holder.take(unread.popleft())
        yield {
            "frame": frame,
            "place": f"{seed}/{place}",
            "defocus": (scene.focus_um - stage[place]) / unit,
            "drift": risen / unit,
            "step": step_um / unit,
            "lost by": lost_by,
            "late": is_late,
        }
        scene.focus_um = still


def turns(steps: list[float]) -> int:
    """Count the moves that go against the one before."""
    return sum(a * b < 0 for a, b in pairwise(steps))


def alternating(steps: list[float]) -> int:
    """Return the most moves in a row of which each goes against the one before."""
    most = now = 0
    for one, next_one in pairwise(steps):
        now = now + 1 if one * next_one < 0 else 0
        most = max(most, now)
    return most


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--positions", type=int, default=24)
    parser.add_argument("--drift", type=float, default=40.0, help="um in all")
    parser.add_argument("--shape", choices=["line", "warming"], default="line")
    parser.add_argument("--interval", type=float, default=1.0, help="s between frames")
    parser.add_argument("--aperture", type=float, default=1.0, help="true NA / told")
    parser.add_argument("--still", type=int, default=0, help="frames before the drift")
    parser.add_argument("--tilt", type=float, default=0.0, help="um over the field")
    parser.add_argument("--late", type=int, default=0, help="visits before it is read")
    parser.add_argument(
        "--looked", type=float, default=1.0, help="share of frames that are looked at"
    )
    parser.add_argument("--kind", choices=KINDS, help="of all specimens")
    parser.add_argument("--repeats", type=int, default=1, help="either way in turns")
    parser.add_argument("--deadband", type=float, default=0.15)
    parser.add_argument("--even", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    told = REFERENCE
    if given.even:
        told = OpticalSystem(0.4, 520.0, 0.6, psf_model="born_wolf")
    rows = [
        row
        for turn in range(given.repeats)
        for row in visits(given, told, given.seed + turn, given.drift * (-1) ** turn)
    ]
    by_place: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_place[row["place"]].append(abs(row["defocus"]))
        if row["step"]:
            steps[row["place"]].append(row["step"])
    means = [float(np.mean(values)) for values in by_place.values()]
    lost_by = [abs(row["lost by"]) for row in rows if row["lost by"] is not None]
    probes = len(SEARCHED) * len(lost_by)
    alarms = sum(by < 1 for by in lost_by)
    alarms += sum(row["late"] for row in rows) if not given.late else 0
    table = {
        "frames": len(rows),
        "mean |defocus|, worst position": max(means),
        "mean |defocus|, all": float(np.mean(means)),
        "farthest": max(abs(r["defocus"]) for r in rows),
        "p99 |defocus|": float(np.percentile([abs(r["defocus"]) for r in rows], 99)),
        "frames within half a depth of field": float(
            np.mean([abs(r["defocus"]) <= 0.5 for r in rows])
        ),
        "moves": sum(map(len, steps.values())),
        "moves against the one before": sum(map(turns, steps.values())),
        "most turns in a row of one place": max(
            map(alternating, steps.values()), default=0
        ),
        "searches after the first": len(lost_by),
        "probes per 100 frames": 100 * probes / len(rows),
        "false alarms": alarms,
    }
    for name, value in table.items():
        print(f"{name}: {value}")
    if given.json:
        found = {"machine": machine.describe(), "table": table, "rows": rows}
        given.json.write_text(json.dumps(found, default=float), "utf-8")


if __name__ == "__main__":
    main()
