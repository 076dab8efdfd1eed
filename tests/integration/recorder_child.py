"""Recorder child: records until it is killed, and goes on where its journal ends.

Run: python recorder_child.py FRAMES_ENDPOINT CONTROL_ENDPOINT JOURNAL
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from transport_kit import DEADLINE_S, make_config, number_of

from rtfocus.metrics import Accounting
from rtfocus.transport.receiver import FrameReceiver, Gap

frames, control, journal_path = sys.argv[1:]
receiver = FrameReceiver(
    make_config(frames=frames, control=control, slots=4), Accounting()
)
assert receiver.wait_series(DEADLINE_S) is not None
with Path(journal_path).open("a+", encoding="utf-8") as journal:
    journal.seek(0)
    receiver.begin(len(journal.readlines()))
    for slot in receiver.frames():
        assert not isinstance(slot, Gap)
        # Written and flushed before it is called durable, like the store's journal.
        journal.write(f"{number_of(slot)}\n")
        journal.flush()
        receiver.report_durable(slot.frame().sequence)
        receiver.release(slot)
receiver.close()
