"""Recorder child: records until it is killed, and goes on where its journal ends.

Run: python recorder_child.py FRAMES_ENDPOINT CONTROL_ENDPOINT JOURNAL
"""

import sys
from contextlib import closing
from pathlib import Path

from rtfocus.metrics import Accounting
from rtfocus.transport.inflow import Gap
from rtfocus.transport.receiver import FrameReceiver

sys.path.insert(0, str(Path(__file__).parents[1]))
from transport_kit import DEADLINE_S, make_config, number_of


def record_into(journal_path: Path, frames: str, control: str) -> None:
    config = make_config(frames=frames, control=control, slots=4)
    with (
        closing(FrameReceiver(config, Accounting())) as receiver,
        journal_path.open("a+", encoding="utf-8") as journal,
    ):
        assert receiver.wait_series(DEADLINE_S) is not None
        journal.seek(0)
        receiver.begin(len(journal.readlines()))
        for slot in receiver.frames():
            assert not isinstance(slot, Gap)
            # Written and flushed before it is called durable, as the store does.
            journal.write(f"{number_of(slot)}\n")
            journal.flush()
            receiver.report_durable(slot.frame().sequence)
            receiver.release(slot)


if __name__ == "__main__":
    record_into(Path(sys.argv[3]), sys.argv[1], sys.argv[2])
