"""Reading bench: the time of one plane in files of few and of many planes.

Writes time-lapses of small planes as ImageJ, OME-TIFF (one description, pages behind
one another) and OME-TIFF as Micro-Manager writes it (an entry per plane), and reads
every plane in order through `rtfocus.images`, parsing included.

Run: python -m bench.reading [--planes 100 1000 10000] [--size 64]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from bench import machine
from rtfocus.images.reading import open_images

NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def write_imagej(path: Path, planes: NDArray[np.uint16]) -> None:
    """Write one page that all planes lie behind."""
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "TYX"})


def write_ome(path: Path, planes: NDArray[np.uint16]) -> None:
    """Write a page per plane, compressed, so that each is decoded."""
    tifffile.imwrite(
        path,
        planes,
        ome=True,
        metadata={"axes": "TYX"},
        photometric="minisblack",
        compression="zlib",
    )


def write_ome_per_plane(path: Path, planes: NDArray[np.uint16]) -> None:
    """Write a page and a TiffData per plane, as Micro-Manager does."""
    data = "".join(
        f'<TiffData FirstT="{t}" IFD="{t}" PlaneCount="1"/>' for t in range(len(planes))
    )
    height, width = planes.shape[1:]
    xml = (
        f'<?xml version="1.0"?><OME xmlns="{NAMESPACE}"><Image ID="Image:0" Name="m">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" '
        f'SizeX="{width}" SizeY="{height}" SizeZ="1" SizeC="1" SizeT="{len(planes)}">'
        f'<Channel ID="C:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
    )
    with tifffile.TiffWriter(path) as file:
        for t, plane in enumerate(planes):
            file.write(
                plane,
                contiguous=False,
                metadata=None,
                photometric="minisblack",
                description=xml.encode() if t == 0 else None,
            )


WRITERS = {
    "imagej": write_imagej,
    "ome": write_ome,
    "ome_per_plane": write_ome_per_plane,
}


def read_all(path: Path, planes: NDArray[np.uint16]) -> dict[str, Any]:
    """Read every plane once, check it, and return the seconds it took."""
    started, started_cpu = time.perf_counter(), time.process_time()
    (series,) = open_images(path)
    opened_s = time.perf_counter() - started
    wrong = sum(
        not np.array_equal(series.read(t=t), plane) for t, plane in enumerate(planes)
    )
    if wrong:
        raise SystemExit(f"{path.name}: {wrong} of {len(planes)} planes are wrong")
    seconds = time.perf_counter() - started
    cpu_s = time.process_time() - started_cpu
    return {
        "planes": len(planes),
        "open_s": round(opened_s, 4),
        "seconds": round(seconds, 4),
        "cpu_s": round(cpu_s, 4),
        "planes_per_s": round(len(planes) / seconds),
        "planes_per_cpu_s": round(len(planes) / cpu_s),
    }


def main() -> None:
    """Measure and write ``reading.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planes", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    counts = [5, 20] if options.smoke else options.planes
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form, write in WRITERS.items():
            for count in counts:
                shape = (count, options.size, options.size)
                planes = rng.integers(0, 4000, shape, dtype=np.uint16)
                path = Path(folder) / f"{form}_{count}.ome.tif"
                write(path, planes)
                rows.append({"form": form, **read_all(path, planes)})
                print(rows[-1], flush=True)
    payload = {"size_px": options.size, "smoke": options.smoke, "rows": rows}
    print(machine.write("reading", payload, options.out))


if __name__ == "__main__":
    main()
