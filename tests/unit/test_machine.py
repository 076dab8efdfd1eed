"""What is told of the computer."""

import psutil

from rtfocus.machine import processor_name, usable_threads


def test_the_processor_has_a_name_of_one_line() -> None:
    name = processor_name()
    assert name
    assert "\n" not in name


def test_no_more_threads_are_usable_than_there_are() -> None:
    assert 1 <= usable_threads() <= psutil.cpu_count()
