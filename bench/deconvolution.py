"""Deconvolution bench: quality per level and speed of every restoration.

Speed: a frame whose surface runs from level 1 to level 5, restored whole, against
the loop a user would write with scikit-image: each patch of 84 px, padded to 110,
by itself, blended with triangular weights. Quality: PSNR per level with the known
PSF, on drawn nuclei and, where the real images are, on sharp real fields; the
accelerated form is compared with 15 matched iterations. Real pairs: fields of
BBBC006 rows a19 to a24, PSF fitted to other rows.

Run: python -m bench.deconvolution [--size 512] [--rounds 5] [--data FOLDER]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from skimage.restoration import richardson_lucy

from bench import machine
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import RestorationConfig
from rtfocus.evaluation.scores import psnr, ssim
from rtfocus.frame import TileGrid
from rtfocus.optics.formation import BlurredPlanes, blur
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.cpu.network_restorer import make_restorer
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import METHODS, PATCH_BY_PATCH
from rtfocus.specimens import draw_specimen

NOMINAL = OpticalSystem(0.5, 451.0, 0.65, psf_model="born_wolf")
FITTED = OpticalSystem(0.36, 451.0, 0.65, aberrations=Aberrations(-0.38))
OPTICS = {"Born-Wolf NA 0.5": NOMINAL, "fitted to BBBC006": FITTED}
STEP_UM = 2.0
LEVELS = range(1, 11)
PATCH, STRIDE, HALO, ITERATIONS = 84, 42, 13, 15

Image = np.ndarray


def grid_of(side: int) -> TileGrid:
    """Return the paper's grid: patches of 84 px at stride 42."""
    count = (side - PATCH) // STRIDE + 1
    return TileGrid(count, count, PATCH, STRIDE, (PATCH - 1) / 2, signed=False)


def restorer_of(
    method: str, side: int, psfs: dict[int, Image]
) -> Callable[[Image, Image], Image]:
    """Return a function of (frame, labels) for a method."""
    montage = Montage(grid_of(side), (side, side))
    made = make_restorer(montage, psfs, RestorationConfig(method=method), 1.0)
    return lambda frame, labels: made.restore(frame, labels, np.empty_like(frame))


def scikit_image_loop(frame: Image, labels: Image, psfs: dict[int, Image]) -> Image:
    """Restore patch by patch with scikit-image, as LB-DVD describes it."""
    scale = frame.max()
    # Counts below the offset are no light; Richardson-Lucy diverges on them.
    padded = np.pad(np.maximum(frame, 0) / scale, HALO).astype(np.float32)
    triangle = (1 - np.abs(np.arange(PATCH) - 41.5) / STRIDE).astype(np.float32)
    window = np.outer(triangle, triangle)
    total, weight = np.zeros_like(frame), np.zeros_like(frame)
    for (row, column), level in np.ndenumerate(labels):
        y, x = row * STRIDE, column * STRIDE
        patch = padded[y : y + PATCH + 2 * HALO, x : x + PATCH + 2 * HALO]
        if level >= 1:
            patch = richardson_lucy(patch, psfs[int(level)], ITERATIONS, clip=False)
        inner = patch[HALO:-HALO, HALO:-HALO]
        total[y : y + PATCH, x : x + PATCH] += window * inner
        weight[y : y + PATCH, x : x + PATCH] += window
    return scale * total / np.maximum(weight, 1e-6)


def expose(light: Image, photons: float, seed: int) -> Image:
    """Return camera counts above the offset: Poisson and read noise."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(np.maximum(light, 0) * photons + 20)
    return (counts - 20 + rng.normal(0, 1.5, light.shape)).astype(np.float32)


def speed(side: int, rounds: int) -> dict[str, Any]:
    """Time whole frames against the loop, taking turns."""
    optics = FITTED
    psfs = {level: compute_psf(optics, level * STEP_UM) for level in LEVELS}
    sharp = draw_specimen("nuclei", (side, side), np.random.default_rng(1))
    depth = np.linspace(1 * STEP_UM, 5 * STEP_UM, side, dtype=np.float32)
    surface = np.broadcast_to(depth[:, None], sharp.shape)
    frame = expose(BlurredPlanes(sharp, optics).at(surface), 2000, 2)
    grid = grid_of(side)
    centres = grid.origin_px + grid.stride_px * np.arange(grid.rows)
    rows = np.rint(np.interp(centres, np.arange(side), depth) / STEP_UM)
    labels = np.repeat(rows.astype(np.int16)[:, None], grid.columns, axis=1)
    steps: dict[str, Callable[[], Image]] = {
        "scikit-image loop": lambda: scikit_image_loop(frame, labels, psfs)
    }
    for method in METHODS:
        run = restorer_of(method, side, psfs)
        steps[method] = partial(run, frame, labels)
    inner = slice(STRIDE, side - STRIDE)
    rows_of: dict[str, Any] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begun, used = time.perf_counter(), time.process_time()
            restored = step()
            wall, cpu = time.perf_counter() - begun, time.process_time() - used
            if turn > 0:
                times[name].append((wall * 1e3, cpu * 1e3))
            quality = psnr(
                (sharp * 2000)[inner, inner], restored[inner, inner], data_range=2000
            )
            rows_of[name] = {"psnr_db": quality}
    for name, pairs in times.items():
        rows_of[name]["wall_ms"] = statistics.median(w for w, _ in pairs)
        rows_of[name]["cpu_ms"] = statistics.median(c for _, c in pairs)
    loop_ms = rows_of["scikit-image loop"]["wall_ms"]
    for name in METHODS:
        rows_of[name]["times_faster"] = loop_ms / rows_of[name]["wall_ms"]
    return rows_of


def scenes(data: Path | None, side: int) -> dict[str, Image]:
    """Return sharp scenes with values up to 1: drawn, and real where there are."""
    found = {
        kind: draw_specimen(kind, (side, side), np.random.default_rng(5))
        for kind in ("nuclei", "tissue")
    }
    if data is not None:
        for name in ("a04_s1_w1.tif", "a12_s1_w1.tif"):
            path = data / "bbbc006_pairs" / "sharp" / name
            if path.is_file():
                field = tifffile.imread(path)[:side, :side].astype(np.float32)
                found[f"real {name[:3]}"] = field / field.max()
    return found


def quality(data: Path | None, side: int) -> list[dict[str, Any]]:
    """Return PSNR before and after, per optics, level, scene and photon level."""
    methods = [method for method in METHODS if method != PATCH_BY_PATCH]
    rows = []
    for optics_name, optics in OPTICS.items():
        for level in LEVELS:
            psf = compute_psf(optics, level * STEP_UM)
            runs = {m: restorer_of(m, side, {level: psf}) for m in methods}
            for scene, sharp in scenes(data, side).items():
                seen = blur(sharp, psf)
                for photons in (200.0, 2000.0):
                    frame = expose(seen, photons, level)
                    grid = grid_of(side)
                    labels = np.full((grid.rows, grid.columns), level, np.int16)
                    truth = sharp * photons
                    row: dict[str, Any] = {
                        "optics": optics_name,
                        "level": level,
                        "scene": scene,
                        "photons": photons,
                        "blurred": psnr(truth, frame, data_range=photons),
                    }
                    for method, run in runs.items():
                        row[method] = psnr(
                            truth, run(frame, labels), data_range=photons
                        )
                    rows.append(row)
    return rows


def per_level(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Average over scenes, optics and photons; the worst accelerated case too."""
    table = {}
    for level in LEVELS:
        here = [row for row in rows if row["level"] == level]
        lost = [
            row["richardson_lucy"] - row["richardson_lucy_accelerated"] for row in here
        ]
        names = [name for name in here[0] if name in ("blurred", *METHODS)]
        table[level] = {n: float(np.mean([row[n] for row in here])) for n in names}
        table[level]["accelerated_loses_db"] = float(np.mean(lost))
        table[level]["accelerated_loses_most_db"] = float(np.max(lost))
        table[level]["wiener_gains_least_db"] = float(
            np.min([row["wiener"] - row["blurred"] for row in here])
        )
    return table


def real_pairs(data: Path) -> dict[str, Any]:
    """Restore the defocused validation fields with the fitted PSF."""
    folder = data / "bbbc006_pairs"
    names = [
        path.name
        for path in sorted((folder / "sharp").glob("a*.tif"))
        if "a19" <= path.name[:3] <= "a24"
    ]
    pairs = [
        (tifffile.imread(folder / "sharp" / n), tifffile.imread(folder / kind / n))
        for n in names
        for kind in ("defocus10um",)
    ]
    side = pairs[0][0].shape[0]
    grid = grid_of(side)
    labels = np.full((grid.rows, grid.columns), 5, np.int16)
    result: dict[str, Any] = {
        "fields": len(pairs),
        "data_range": 255,
        "blurred": _mean_scores([(s, b) for s, b in pairs]),
    }
    for optics_name, optics in OPTICS.items():
        psf = compute_psf(optics, 5 * STEP_UM)
        for method in METHODS:
            run = restorer_of(method, side, {5: psf})
            scores = [(s, run(b.astype(np.float32), labels)) for s, b in pairs]
            result[f"{method}, {optics_name}"] = _mean_scores(scores)
    return result


def _mean_scores(pairs: list[tuple[Image, Image]]) -> dict[str, float]:
    return {
        "psnr_db": float(np.mean([psnr(a, b, data_range=255) for a, b in pairs])),
        "ssim": float(np.mean([ssim(a, b, data_range=255) for a, b in pairs])),
    }


def main() -> None:
    """Measure, print tables and ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder of real images")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small, one round")
    given = parser.parse_args()
    if given.smoke:
        given.size, given.rounds = 168, 1
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = given.data or Path(os.environ.get("RTFOCUS_DATA", beside))
    data = data if data.is_dir() else None
    figures: dict[str, Any] = {
        "size": given.size,
        "rounds": given.rounds,
        "speed": speed(given.size, given.rounds),
    }
    for name, row in figures["speed"].items():
        print(
            f"{name:30} {row['wall_ms']:8.1f} ms  cpu {row['cpu_ms']:8.1f} ms  "
            f"{row['psnr_db']:.2f} dB  {row.get('times_faster', 1):.1f} x"
        )
    rows = quality(data, min(given.size, 256))
    figures["quality"] = rows
    figures["quality_per_level"] = per_level(rows)
    for level, row in figures["quality_per_level"].items():
        print(level, {name: round(value, 2) for name, value in row.items()})
    if data is not None and not given.smoke:
        figures["real_pairs"] = real_pairs(data)
        for name, row in figures["real_pairs"].items():
            print(name, row)
    faster = figures["speed"]["richardson_lucy"]["times_faster"]
    lost = max(r["accelerated_loses_db"] for r in figures["quality_per_level"].values())
    print(f"whole frame / scikit-image patch loop: {faster:.1f} times faster")
    print(f"accelerated loses at most {lost:.2f} dB against 15 iterations")
    print(machine.write("deconvolution", figures, given.out))


if __name__ == "__main__":
    main()
