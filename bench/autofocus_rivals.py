"""Autofocus rivals: the classical searches, on the same scenes and stages.

Brent's search on a sharpness score as Micro-Manager's OughtaFocus, a coarse and a fine
sweep as sweeps of navigate or LumaViewPro, and a hill climb with a check of its peak
as openUC2's. All know the range to search: ten depths of field around the start.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, laplace, sobel
from scipy.optimize import minimize_scalar

from bench.autofocus_scenes import Scene, Stage
from rtfocus.autofocus.policy import Limits

Pixels = NDArray[np.generic]
Score = Callable[[Pixels], float]
HALF_RANGE = 6.0
"""Depths of field on either side of the start; starts lie within five of focus."""
TOLERANCE = 0.25
COARSE, FINE = 1.0, 0.25


@dataclass(frozen=True, slots=True)
class RivalVerdict:
    """How a rival ended."""

    focused: bool
    reason: str
    moves: int


def laplacian(pixels: Pixels) -> float:
    """Variance of the Laplacian."""
    return float(laplace(gaussian_filter(pixels.astype(np.float64), 1)).var())


def tenengrad(pixels: Pixels) -> float:
    """Mean gradient energy."""
    image = gaussian_filter(pixels.astype(np.float64), 1)
    return float(np.mean(sobel(image, 0) ** 2 + sobel(image, 1) ** 2))


def mid_band(pixels: Pixels) -> float:
    """Energy between two widths of a Gaussian."""
    image = pixels.astype(np.float64)
    return float((gaussian_filter(image, 1) - gaussian_filter(image, 3)).var())


def normalised_variance(pixels: Pixels) -> float:
    """Variance over the mean."""
    image = pixels.astype(np.float64)
    return float(image.var() / image.mean())


class Scored:
    """Moves and scores; counts both."""

    def __init__(
        self, scene: Scene, stage: Stage, limits: Limits, score: Score
    ) -> None:
        self._scene, self._stage = scene, stage
        self._limits, self._score = limits, score
        self.moves = 0
        self.seen: dict[float, float] = {}

    def at(self, z_um: float) -> float:
        """Return the score of an image at a z."""
        z_um = self._limits.clip(z_um)
        if z_um not in self.seen:
            self.go(z_um)
            pixels = self._scene.expose(self._stage.seen_um())
            self.seen[z_um] = self._score(pixels)
        return self.seen[z_um]

    def go(self, z_um: float) -> None:
        """Move there."""
        if z_um != self._stage.position_um():
            self._stage.go_to(z_um)
            self.moves += 1

    def best(self) -> float:
        """Return the z of the best score."""
        return max(self.seen, key=lambda z: self.seen[z])


def brent(score: Score) -> Callable[[Scene, Stage, float, Limits], RivalVerdict]:
    """Brent's search on a score, as OughtaFocus does."""

    def run(scene: Scene, stage: Stage, unit: float, limits: Limits) -> RivalVerdict:
        scored, start = Scored(scene, stage, limits, score), stage.position_um()
        found = minimize_scalar(
            lambda z: -scored.at(float(z)),
            bounds=(start - HALF_RANGE * unit, start + HALF_RANGE * unit),
            method="bounded",
            options={"xatol": TOLERANCE * unit},
        )
        scored.go(float(found.x))
        return RivalVerdict(True, "found", scored.moves)

    return run


def sweep(score: Score) -> Callable[[Scene, Stage, float, Limits], RivalVerdict]:
    """Sweep coarsely, then finely around the best."""

    def run(scene: Scene, stage: Stage, unit: float, limits: Limits) -> RivalVerdict:
        scored, start = Scored(scene, stage, limits, score), stage.position_um()
        for step in np.arange(-HALF_RANGE, HALF_RANGE + 0.01, COARSE):
            scored.at(start + step * unit)
        middle = scored.best()
        for step in np.arange(-COARSE, COARSE + 0.01, FINE):
            scored.at(middle + step * unit)
        scored.go(scored.best())
        return RivalVerdict(True, "found", scored.moves)

    return run


def hill_climb(scene: Scene, stage: Stage, unit: float, limits: Limits) -> RivalVerdict:
    """Climb with halving steps; the peak must stand out, as openUC2 asks."""
    scored, here = Scored(scene, stage, limits, tenengrad), stage.position_um()
    start, step, side = here, COARSE * unit, 1.0
    while step > TOLERANCE * unit and len(scored.seen) < 40:
        now = scored.at(here)
        if scored.at(here + side * step) > now:
            here += side * step
        elif scored.at(here - side * step) > now:
            side, here = -side, here - side * step
        else:
            step /= 2
    values = np.array(list(scored.seen.values()))
    valid = values.max() > 1.1 * np.median(values)
    scored.go(scored.best() if valid else start)
    return RivalVerdict(bool(valid), "found" if valid else "no peak", scored.moves)


RIVALS: dict[str, Callable[[Scene, Stage, float, Limits], RivalVerdict]] = {
    "brent_tenengrad": brent(tenengrad),
    "sweep_laplacian": sweep(laplacian),
    "sweep_tenengrad": sweep(tenengrad),
    "sweep_mid_band": sweep(mid_band),
    "sweep_variance": sweep(normalised_variance),
    "hill_climb": hill_climb,
}
