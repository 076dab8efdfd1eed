"""Batch kit: inputs of batches, and workers that do them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from image_file_kit import ngff_axes, write_ngff
from scipy.ndimage import gaussian_filter

OPTICS = ("--optics", "NA=0.75,wavelength=520,pixel=0.325")
WIENER = (*OPTICS, "--engine", "wiener")
SIDE = 112


def picture(seed: int) -> np.ndarray:
    """Return noise on stripes, so that no two images are equal."""
    rng = np.random.default_rng(seed)
    stripes = np.add.outer(np.arange(SIDE), np.arange(SIDE)) % 32 > 16
    return rng.poisson(200 + 400 * stripes).astype("<u2")


def write_folder(source: Path) -> Path:
    """Write six TIFFs in two folders."""
    (source / "day.1").mkdir(parents=True)
    for number in range(6):
        below = source / "day.1" if number > 3 else source
        tifffile.imwrite(below / f"f{number}.tif", picture(number))
    return source


def write_pairs(place: Path) -> Path:
    """Write six fields sharp and blurred, with equal names."""
    (place / "blurred").mkdir(parents=True)
    (place / "sharp").mkdir()
    for number in range(6):
        pixels, name = picture(number), f"f{number}.tif"
        tifffile.imwrite(place / "sharp" / name, pixels)
        soft = gaussian_filter(pixels.astype("f4"), 1 + number / 4)
        tifffile.imwrite(place / "blurred" / name, soft.astype("<u2"))
    return place


def write_plate(path: Path) -> Path:
    """Write two wells of two fields."""
    root = zarr.open_group(path, mode="w", zarr_format=2)
    wells: list[Any] = [
        {"path": f"{row}/3", "rowIndex": number, "columnIndex": 0}
        for number, row in enumerate("AB")
    ]
    root.attrs["plate"] = {
        "name": "screen",
        "rows": [{"name": "A"}, {"name": "B"}],
        "columns": [{"name": "3"}],
        "wells": wells,
    }
    for number, well in enumerate(("A/3", "B/3")):
        group = root.require_group(well)
        group.attrs["well"] = {"images": [{"path": "0"}, {"path": "1"}]}
        for field in (0, 1):
            pixels = picture(2 * number + field)
            image = path / well / str(field)
            write_ngff(image, pixels, ngff_axes("yx"), [0.325, 0.325])
    return path


@contextmanager
def two_workers() -> Iterator[str]:
    """Run a scheduler with two workers, processes of their own; yield its address."""
    # Only rtfocus[batch] has it.
    import distributed

    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        memory_limit=None,
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
    ) as cluster:
        yield cluster.scheduler_address
