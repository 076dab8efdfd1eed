"""A frame's way is the one that the architecture draws."""

from collections.abc import Iterator
from pathlib import Path

from bench.walk import walk

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
MOST_FILES = 30


Way = list[tuple[str, set[str]]]
"""Rooms in order, with the files entered there: of one room, whichever comes first."""


def way(files: str) -> Way:
    """Read a cell of the table."""
    rooms = (part.split("` ") for part in files.split("; "))
    return [(room, set(names.split(", "))) for room, names in rooms]


def drawn() -> Iterator[tuple[str, Way]]:
    """Yield every thread of the table and the way through it."""
    text = PAGE.read_text("utf-8")
    part = text.partition("## A frame's way")[2].partition("\n## ")[0]
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and "`" in cells[-1]:
            yield cells[0], way(cells[-1])


def test_a_frame_goes_the_way_that_the_architecture_draws() -> None:
    followed = walk()
    assert followed.rooms() == [
        ["microscope", "transport"],
        ["transport", "processing", "writers"],
    ]
    found = {thread: way(files) for thread, files in followed.table().items()}
    assert found == dict(drawn())
    assert len(followed.carrying()) <= MOST_FILES
