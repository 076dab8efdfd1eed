"""What is told of the computer."""

from pathlib import Path

import psutil
import pytest

from rtfocus.runtimes.machine import (
    adds_int8_in_16_bits,
    processor_name,
    usable_threads,
)


def test_the_processor_has_a_name_of_one_line() -> None:
    name = processor_name()
    assert name
    assert "\n" not in name


def test_no_more_threads_are_usable_than_there_are() -> None:
    assert 1 <= usable_threads() <= psutil.cpu_count()


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file(), reason="this system describes no processor"
)
def test_int8_is_exact_where_the_processor_has_vnni() -> None:
    described = Path("/proc/cpuinfo").read_text("utf-8")
    flags = next((ln for ln in described.splitlines() if ln.startswith("flags")), "")
    assert adds_int8_in_16_bits() == (bool(flags) and "vnni" not in flags)
