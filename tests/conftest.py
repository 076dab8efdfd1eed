"""Fixtures that every test may use."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA_VARIABLE = "RTFOCUS_DATA"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real microscopy images; skips where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(DATA_VARIABLE, beside))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set {DATA_VARIABLE}")
    return folder


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Every thread a test starts must have ended with it."""
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and not t.daemon]
    for thread in left:
        thread.join(timeout=5)
    alive = [t.name for t in left if t.is_alive()]
    assert not alive, f"threads left running: {alive}"
