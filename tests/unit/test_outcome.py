"""Outcome: the words and the exit code of every way a series can end."""

import pytest

from rtfocus.errors import ExitCode
from rtfocus.metrics import Accounting, Outcome

DONE, INCOMPLETE = ExitCode.DONE, ExitCode.INCOMPLETE


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (Outcome(9, 9, "completed"), DONE, "9 of 9 planned frames"),
        # Without a planned end, stopping is how a series ends.
        (Outcome(None, 5, "canceled"), DONE, "stopped by the user: 5 frames"),
        (Outcome(None, 5, "completed"), DONE, "5 frames"),
        # All is there; that the sender named another reason is not kept silent.
        (Outcome(9, 9, "no light"), DONE, "9 of 9 planned frames: no light"),
        (Outcome(9, 9, "canceled"), DONE, "stopped by the user: 9 of 9 planned"),
        (
            Outcome(9, 4, "canceled", not_acquired=5),
            INCOMPLETE,
            "stopped by the user: 4 of 9 planned frames; 5 not acquired",
        ),
        (
            Outcome(9, 4, "stopped", {"dropped (gap)": 2}, not_acquired=3),
            INCOMPLETE,
            "stopped by the user: 4 of 9 planned frames; 2 dropped (gap), 3 not",
        ),
        (
            Outcome(9, 4, "no image", {"lost by the camera": 5}),
            INCOMPLETE,
            "incomplete: 4 of 9 planned frames; 5 lost by the camera: no image",
        ),
        (
            Outcome(9, 0, "completed", {"dropped (gap)": 9}),
            INCOMPLETE,
            "incomplete: 0 of 9 planned frames; 9 dropped (gap)",
        ),
        (Outcome(None, 5, "overflow"), INCOMPLETE, "incomplete: 5 frames: overflow"),
    ],
)
def test_words_and_exit_code(outcome, code, said):
    assert outcome.exit_code == code
    assert str(outcome).startswith(said)


@pytest.mark.parametrize(
    ("said", "lost", "rest"),
    [
        # The sender counts itself; of one that is gone the rest was not acquired.
        ({"camera_lost": 20, "not_acquired": 30}, 20, 30),
        ({}, 0, 50),
        ({"camera_lost": 50}, 50, 0),
        ({"camera_lost": 20, "not_acquired": 1}, 20, 30),
    ],
)
def test_the_plan_is_what_came_was_lost_or_had_no_turn(said, lost, rest):
    accounting = Accounting()
    accounting.count("written", number=50)
    accounting.count("focus", number=2)
    accounting.end(52, planned=100, **said)
    terms = accounting.summary()
    assert (terms["planned"], terms["camera_lost"], terms["not_acquired"]) == (
        100,
        lost,
        rest,
    )
    outcome = Outcome.of_report({"accounting": terms, "reason": "why"})
    assert (outcome.present, outcome.planned, outcome.exit_code) == (50, 100, 5)


def test_reports_that_name_no_plan_are_judged_by_their_losses():
    terms = {"written": 4, "dropped": {}, "in_error": {"write": 1}}
    outcome = Outcome.of_report({"accounting": terms, "reason": "completed"})
    assert outcome.lost == {"in error (write)": 1}
    assert outcome.exit_code == INCOMPLETE
