"""Planes cut out of the images that published packages carry."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import tifffile

from bench.package_images import IMAGES, Wanted, write_planes


def test_of_a_format_without_a_reader_the_window_wanted_is_written(
    tmp_path: Path,
) -> None:
    mosaic = np.arange(20 * 30, dtype="<u2").reshape(20, 30)
    path = tmp_path / "content/some_data/mosaic.czi"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"header!" + mosaic.tobytes() + b"what else such a file holds")
    corner = 7 + 2 * (12 * 30 + 4)

    one = Wanted("cells", "p==1", "mosaic.czi", rows=6, columns=9, raw=(corner, 30))
    write_planes(one, tmp_path / "content", tmp_path / "more")

    written = tifffile.imread(tmp_path / "more/cells.tif")
    np.testing.assert_array_equal(written, mosaic[12:18, 4:13])
    assert written.dtype == np.uint16


def test_four_channels_of_a_tiff_are_not_taken_for_colours(tmp_path: Path) -> None:
    channels = np.arange(4 * 8 * 6, dtype=np.uint16).reshape(4, 8, 6)
    tifffile.imwrite(tmp_path / "neuron.tiff", channels, photometric="minisblack")

    one = Wanted("nucleus", "p==1", "neuron.tiff", ((3,),))
    write_planes(one, tmp_path, tmp_path / "more")

    written = tifffile.imread(tmp_path / "more/nucleus_03.tif")
    np.testing.assert_array_equal(written, channels[3])


def test_one_colour_of_a_photograph_is_written_alone(tmp_path: Path) -> None:
    photograph = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    tifffile.imwrite(tmp_path / "merged.tif", photograph, photometric="rgb")

    one = Wanted("nuclei", "p==1", "merged.tif", rows=5, colour=2)
    write_planes(one, tmp_path, tmp_path / "more")

    written = tifffile.imread(tmp_path / "more/nuclei.tif")
    np.testing.assert_array_equal(written, photograph[:5, :, 2])


def test_no_file_of_a_package_is_in_two_groups_and_no_name_is_written_twice() -> None:
    files = [{(one.package, one.path) for one in group} for group in IMAGES.values()]
    assert max(Counter(chain.from_iterable(files)).values()) == 1
    names = Counter(one.name for group in IMAGES.values() for one in group)
    assert max(names.values()) == 1
