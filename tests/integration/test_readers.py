"""Runs and their exports as other programs read them; docs/reference/readers.md."""

from pathlib import Path

import pytest

from bench.readers import FORMS, LAYOUTS, READERS, installed, stores, tried

SINGLY = "one by one: `/0`, `/1`"
PARTLY = {
    ("ome-zarr", "positions"): SINGLY,
    ("ome-zarr", "plate"): "first field of each well",
    ("napari-ome-zarr", "plate"): "first field of each well",
    ("iohub", "positions"): SINGLY,
}
"""Where a reader does not show all positions at once, and how it does."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("stores")
    return {layout.name: stores(folder, layout) for layout in LAYOUTS}


# What other libraries warn of, their own dependencies most of all, is theirs to mend.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_reader_shows_the_pixels_of_every_form(reader, layout, made):
    if installed(reader) is None:
        pytest.skip(f"{reader} is not installed: pip install {reader}")
    for form in FORMS:
        if reader == "iohub" and form != "exported 0.4":
            continue  # its releases for Zarr 3 are not on the package index
        how = tried(reader, made[layout.name][form], layout)
        expected = PARTLY.get((reader, layout.name), "all")
        assert how.endswith(expected), f"{form}: {how}"
