"""Alarms reach a real receiver and a real program; one that fails costs nothing."""

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from loop_kit import read_report, run_loop, small
from writer_kit import make_series

from rtfocus.alarms import Attendance, Rules
from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config import Config, parse_config
from rtfocus.config.sections import AlarmConfig
from rtfocus.errors import TakenOverError, WriterError
from rtfocus.frame import Estimate, FrameHeader, Slot, SlotPool
from rtfocus.monitor import Monitor

UNIT_UM = OpticalSystem(0.5, 520, 0.65).defocus_unit_um


@contextmanager
def receiver(code: int = 200) -> Iterator[tuple[str, "Queue[dict[str, Any]]"]]:
    """Yield the URL of an HTTP receiver on this machine, and what it is told."""
    told: Queue[dict[str, Any]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.put({**json.loads(body), "type": self.headers["Content-Type"]})
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/hook", told
        finally:
            server.shutdown()
            thread.join()


def watched(**optics: Any) -> Monitor:
    """Return the monitor of a series of one channel that has begun."""
    known = OpticalSystem(0.5, 520, 0.65) if not optics else None
    monitor = Monitor()
    monitor.begin(make_series(channels=[Channel("DAPI", known)], planned=1000))
    return monitor


def arrived(monitor: Monitor) -> Slot:
    """Return a frame of the series."""
    series, pool = monitor.series, SlotPool(1, 8)
    assert series is not None
    slot = pool.acquire(timeout_s=1)
    assert slot is not None
    slot.prepare(
        FrameHeader(1, series.series_uid, 0, (2, 2), "<u2", 0, 1.0, {"t": 0, "c": 0})
    )
    slot.received_ns = time.perf_counter_ns()
    return slot


def commit(monitor: Monitor, number: int) -> None:
    """Let frames be on the disk, as the loop notes them."""
    for _ in range(number):
        monitor.committed(arrived(monitor))


def estimate(monitor: Monitor, *found: float | None, z_offset_um: float = 0.0) -> None:
    """Let estimates come, as the loop notes them."""
    slot = arrived(monitor)
    for um in found:
        told = Estimate(
            series_uid=slot.frame().series_uid,
            sequence=0,
            level=0,
            defocus_um=um,
            signed=False,
            confidence=1.0,
            foreground=1.0,
            z_um=0.0,
            z_offset_um=z_offset_um,
            index={"t": 0, "c": 0},
            captured_ns=0,
            estimated_ns=0,
        )
        monitor.estimated(slot, told)


def kinds(rules: Rules, monitor: Monitor, now_s: float = 0.0) -> list[str]:
    return [alarm.kind for alarm in rules.look(monitor, now_s)]


def test_focus_is_lost_when_every_frame_lies_beyond() -> None:
    rules, monitor = Rules(AlarmConfig(focus_lost_s=0)), watched()
    far = 3.1 * UNIT_UM
    estimate(monitor, 0.0, 2.9 * UNIT_UM, None)
    assert kinds(rules, monitor) == []
    estimate(monitor, far, -far, far, 0.0)
    assert kinds(rules, monitor) == [], "the newest is in focus"
    for planned_um in (2 * UNIT_UM, -0.6 * UNIT_UM):
        estimate(monitor, far, z_offset_um=planned_um)
        assert kinds(rules, monitor) == [], "a plane of a stack is out of focus by plan"
    estimate(monitor, far, None, -far)
    assert kinds(rules, monitor) == ["focus"]
    nearby = Rules(AlarmConfig(focus_lost_s=0, focus_lost_um=0.4 * UNIT_UM))
    estimate(monitor, -0.4 * UNIT_UM)
    assert kinds(nearby, monitor) == []
    estimate(monitor, -0.5 * UNIT_UM, z_offset_um=-0.4 * UNIT_UM)
    assert kinds(nearby, monitor) == ["focus"]
    nothing_known = watched(none=True)
    estimate(nothing_known, 1e3)
    assert kinds(Rules(AlarmConfig(focus_lost_s=0)), nothing_known) == []


def test_focus_must_be_lost_for_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    rules, monitor = Rules(AlarmConfig(focus_lost_s=10)), watched()
    now_s = 5000.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    told = []
    for now_s, found_um in (
        *((5000.0, 1e3), (5009.0, -1e3), (5009.5, 0.0)),  # it came back in time
        *((5011.0, 900.0), (5020.0, 900.0), (5021.0, -800.0)),
    ):
        estimate(monitor, found_um)
        told.append([alarm.text for alarm in rules.look(monitor, now_s)])
    assert told == [*([[]] * 5), ["focus is lost for 10 s, -800.0 um by now"]]


def test_lost_frames_are_told_once_each_and_not_too_often() -> None:
    rules, monitor = Rules(AlarmConfig(interval_s=60)), watched()
    monitor.accounting.count("dropped", "gap", number=3)
    (alarm,) = rules.look(monitor, 0.0)
    assert alarm.text == "3 frames lost (3 gap in all)"
    assert kinds(rules, monitor, 100.0) == [], "nothing new"
    monitor.accounting.count("in_error", "store")
    assert kinds(rules, monitor, 130.0) == ["frames"]
    monitor.accounting.count("in_error", "store")
    assert kinds(rules, monitor, 140.0) == [], "one a minute"
    (later,) = rules.look(monitor, 190.0)
    assert later.text == "1 frame lost (3 gap, 2 store in all)"


def test_disk_is_told_unless_the_plan_ends_before() -> None:
    monitor = watched()
    monitor.free_bytes, monitor.time_to_full_s = 3 * 10**9, 300.0
    (alarm,) = Rules(AlarmConfig()).look(monitor, 0.0)
    assert alarm.text == "the disk is full in 5 min, 3.0 GB free"
    assert kinds(Rules(AlarmConfig(disk_full_min=4)), monitor) == []
    assert kinds(Rules(AlarmConfig(on=["end"])), monitor) == []
    commit(monitor, 2)  # at once: so fast that all 1000 are there in good time
    assert kinds(Rules(AlarmConfig()), monitor) == []
    monitor.free_bytes, monitor.time_to_full_s = None, 0.0
    (alarm,) = Rules(AlarmConfig()).look(monitor, 0.0)
    assert alarm.text == "the disk is full in 0 min"
    monitor.time_to_full_s = 300.0
    monitor.begin(make_series(planned=None))
    assert kinds(Rules(AlarmConfig()), monitor) == ["disk"], "it has no end"


def config(**alarm: Any) -> Config:
    return parse_config({"alarm": alarm, "run": {"name": "night"}})


def test_receiver_and_program_are_told_what_happened_and_the_end(
    tmp_path: Path,
) -> None:
    note = tmp_path / "note.txt"
    program = (
        "import os, sys, json, pathlib; told = json.load(sys.stdin); "
        "assert told['text'] == os.environ['RTFOCUS_ALARM_TEXT']; "
        "pathlib.Path(sys.argv[1]).open('a').write(told['kind'] + sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(note), "; $(touch x) "]
    monitor = Monitor()
    with receiver() as (url, told):

        def run() -> None:
            with Attendance(
                config(webhook=url, command=command, timeout_s=60), monitor
            ):
                monitor.accounting.count("dropped", "gap")
                heard.append(told.get(timeout=60))
                msg = "the disk is gone"
                raise WriterError(msg)

        heard: list[dict[str, Any]] = []
        with pytest.raises(WriterError):
            run()
        first, last = *heard, told.get(timeout=60)
    assert first["text"] == "rtfocus night: 1 frame lost (1 gap in all)"
    assert (first["kind"], first["run"]) == ("frames", "night")
    assert first["type"] == "application/json"
    assert last["text"] == "rtfocus night: the run ended: the disk is gone"
    assert note.read_text() == "frames; $(touch x) end; $(touch x) "
    assert monitor.alarms == {"raised": 2, "webhook": 2, "command": 2}


@pytest.mark.parametrize("kind", ["refusing", "silent", "absent"])
def test_receiver_that_fails_is_counted_and_nothing_else(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Monitor()
    # Accepts and never answers; or nobody listens any more.
    with receiver(500) as (refusing, _), socket.create_server(("127.0.0.1", 0)) as one:
        silent = f"http://127.0.0.1:{one.getsockname()[1]}"
        url = refusing if kind == "refusing" else silent
        if kind == "absent":
            one.close()
        absent = ["/no/such/program"]
        with (
            caplog.at_level(logging.WARNING),
            Attendance(config(webhook=url, command=absent, timeout_s=0.2), monitor),
        ):
            monitor.accounting.count("in_error", "store")
    failed = {"raised": 2, "webhook failed": 2, "command failed": 2}
    assert monitor.alarms == failed
    assert caplog.text.count("alarm.webhook failed, the run goes on") == 1


def test_folder_that_another_has_now_gets_no_page(tmp_path: Path) -> None:
    def run() -> None:
        with Attendance(config(on=[]), Monitor()) as attendance:
            attendance.folder = tmp_path
            msg = "it is another's"
            raise TakenOverError(msg)

    with pytest.raises(TakenOverError):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_run_tells_its_end_and_keeps_the_receiver_to_itself(tmp_path: Path) -> None:
    with receiver() as (url, told):
        secret = f"{url}/T0KEN"
        settings = small(tmp_path, None, alarm={"webhook": secret, "on": ["end"]})
        run = run_loop(settings)
        end = told.get(timeout=60)
    assert end["text"].endswith("completed")
    assert (run.folder / "report.html").is_file()
    assert read_report(run.folder)["alarms"] == {}
    texts = [p.read_bytes() for p in run.folder.rglob("*") if p.is_file()]
    assert not any(b"T0KEN" in text for text in texts)


@pytest.mark.parametrize(
    ("alarm", "words"),
    [
        ({"webhook": "ftp://x"}, "alarm.webhook"),
        ({"webhook": "file:///etc/passwd"}, "alarm.webhook"),
        ({"command": "beep"}, "alarm.command"),
        ({"command": []}, "alarm.command"),
        ({"on": ["fire"]}, "alarm.on"),
        ({"timeout_s": 0}, "alarm.timeout_s"),
    ],
)
def test_config_refuses_what_is_no_alarm(alarm: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        config(**alarm)
