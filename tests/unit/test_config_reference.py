"""Config reference: every key is described, and the written page is up to date."""

from rtfocus.config.model import reference
from rtfocus.files import resource_folder


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.rstrip().endswith("|  |")] == []


def test_the_written_reference_is_what_the_models_say() -> None:
    page = resource_folder("configs") / "README.md"
    assert page.read_text("utf-8").endswith(reference()), (
        "run: rtfocus configs --reference, and put it into configs/README.md"
    )
