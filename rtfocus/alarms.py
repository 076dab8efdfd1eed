"""Alarms: messages about lost focus, lost frames, a full disk and the end of a run.

A thread of its own looks at the numbers of the run and delivers, so that neither a
hanging receiver nor a failing command ever touches the loop: it costs alarms, which
are counted.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rtfocus.channel import FOCUS_LOST_UNITS
from rtfocus.config import Config
from rtfocus.config.sections import AlarmConfig, AlarmKind
from rtfocus.errors import BusyError, PeerLostError, TakenOverError, number_of
from rtfocus.metrics import Outcome, accounting_in_words
from rtfocus.monitor import Monitor
from rtfocus.writers.header import REPORT_NAME

logger = logging.getLogger(__name__)

_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Alarm:
    """One message."""

    kind: AlarmKind
    text: str


class Rules:
    """What is worth an alarm; keeps which alarms of the run it has raised."""

    def __init__(self, config: AlarmConfig) -> None:
        self._config = config
        self._seen = 0
        self._far_since_s: float | None = None
        self._newest_s = self._newest_um = 0.0
        self._told_lost = 0
        """Frames that were lost at the newest alarm of them."""
        self._told_s: dict[AlarmKind, float] = {}

    def look(self, monitor: Monitor, now_s: float) -> list[Alarm]:
        """Return the alarms to raise now.

        Parameters
        ----------
        monitor
            Numbers of the run.
        now_s
            Of ``time.perf_counter``.
        """
        terms = monitor.accounting.summary()
        lost = {**terms["dropped"], **terms["in_error"]}
        candidates = [self._focus(monitor), self._disk(monitor), self._frames(lost)]
        due = [
            alarm
            for alarm in candidates
            if alarm is not None and self._is_time(alarm.kind, now_s)
        ]
        if any(alarm.kind == "frames" for alarm in due):
            self._told_lost = sum(lost.values())
        return due

    def wants(self, kind: AlarmKind) -> bool:
        """Whether alarms of this kind are wanted at all."""
        return kind in self._config.on

    def _is_time(self, kind: AlarmKind, now_s: float) -> bool:
        """Let one alarm of a kind through per interval."""
        if not self.wants(kind):
            return False
        last = self._told_s.get(kind)
        if last is not None and now_s - last < self._config.interval_s:
            return False
        self._told_s[kind] = now_s
        return True

    def _focus(self, monitor: Monitor) -> Alarm | None:
        self._seen, samples = monitor.estimates_since(self._seen)
        channels = () if monitor.series is None else monitor.series.channels
        optics = [channel.optics for channel in channels]
        units_um = [None if one is None else one.defocus_unit_um for one in optics]
        for sample in samples:
            unit_um = units_um[sample.c] if sample.c < len(units_um) else None
            if unit_um is None or sample.defocus_um is None:
                continue
            # Planes of a stack lie out of focus by plan.
            if abs(sample.z_offset_um) > unit_um / 2:
                continue
            limit_um = self._config.focus_lost_um or FOCUS_LOST_UNITS * unit_um
            if abs(sample.defocus_um) <= limit_um:
                self._far_since_s = None
                continue
            self._newest_um, self._newest_s = sample.defocus_um, sample.time_s
            if self._far_since_s is None:
                self._far_since_s = sample.time_s
        if self._far_since_s is None:
            return None
        lost_s = self._newest_s - self._far_since_s
        if lost_s < self._config.focus_lost_s:
            return None
        text = f"focus is lost for {lost_s:.0f} s, {self._newest_um:+.1f} um by now"
        return Alarm("focus", text)

    def _disk(self, monitor: Monitor) -> Alarm | None:
        left_s = monitor.time_to_full_s
        if left_s is None or left_s > 60 * self._config.disk_full_min:
            return None
        planned, rate = monitor.planned, monitor.frames_per_s
        if planned is not None and rate > 0:
            rest_s = (planned - monitor.accounting.written) / rate
            if rest_s < left_s:
                return None
        text = f"the disk is full in {left_s / 60:.0f} min"
        if monitor.free_bytes is not None:
            text += f", {monitor.free_bytes / 1e9:.1f} GB free"
        return Alarm("disk", text)

    def _frames(self, lost: dict[str, int]) -> Alarm | None:
        news = sum(lost.values()) - self._told_lost
        if news <= 0:
            return None
        where = ", ".join(f"{number} {place}" for place, number in lost.items())
        return Alarm("frames", f"{number_of(news, 'frame')} lost ({where} in all)")


class Messenger:
    """Brings alarms to where the config says; whatever fails is counted."""

    def __init__(self, config: AlarmConfig, run: str, counts: Counter[str]) -> None:
        self._config = config
        self._run = run
        self._counts = counts
        self._complained: set[str] = set()

    def deliver(self, alarm: Alarm) -> None:
        """Tell everybody, one after the other, each within ``alarm.timeout_s``."""
        self._counts["raised"] += 1
        if alarm.kind != "end":
            logger.warning("alarm: %s", alarm.text)
        if self._config.sound and sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write("\a")
            sys.stderr.flush()
        message = {
            "text": f"rtfocus {self._run}: {alarm.text}",
            "kind": alarm.kind,
            "run": self._run,
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        ways: dict[str, Callable[[dict[str, str]], None]] = {}
        if self._config.webhook is not None:
            ways["webhook"] = partial(self._post, self._config.webhook)
        if self._config.command is not None:
            ways["command"] = partial(self._run_command, self._config.command)
        for way, tell in ways.items():
            try:
                tell(message)
            # Whatever it is: the run does not depend on it.
            except Exception as error:
                self._fail(way, error)
            else:
                self._counts[way] += 1

    def _post(self, url: str, message: dict[str, str]) -> None:
        """Post the message as JSON; its ``text`` is what Slack and others show."""
        # Takes long to import, and few runs need it.
        from urllib.request import Request, urlopen

        body = json.dumps(message).encode("utf-8")
        headers = {"Content-Type": "application/json", "User-Agent": "rtfocus"}
        request = Request(url, body, headers, method="POST")
        with urlopen(request, timeout=self._config.timeout_s):
            pass

    def _run_command(self, command: list[str], message: dict[str, str]) -> None:
        """Run a program without a shell: JSON on its input, text in its environment."""
        environment = {
            **os.environ,
            **{f"RTFOCUS_ALARM_{key.upper()}": value for key, value in message.items()},
        }
        subprocess.run(
            command,
            input=json.dumps(message).encode("utf-8"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=self._config.timeout_s,
            check=True,
            # Ctrl-C ends the run, not the message that it ended.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def _fail(self, way: str, error: Exception) -> None:
        self._counts[f"{way} failed"] += 1
        if way not in self._complained:
            # Once: a receiver that is down is down for every alarm.
            self._complained.add(way)
            logger.warning("alarm.%s failed, the run goes on: %s", way, error)


class Attendance:
    """Attends a series while its block runs: alarms, and in the end its page.

    A folder that another process has taken over gets no page from here. What ended a
    run is raised with a note of where its frames went.
    """

    def __init__(self, config: Config, monitor: Monitor) -> None:
        self.folder: Path | None = None
        """Set when it is ours; its page is made in the end."""
        self._config = config.alarm
        self._monitor = monitor
        self._rules = Rules(config.alarm)
        self._messenger = Messenger(config.alarm, config.run.name, monitor.alarms)
        self._done = threading.Event()
        self._end: Alarm | None = None
        self._thread = threading.Thread(target=self._watch, name="alarms", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        failure: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._rules.wants("end"):
            self._end = Alarm("end", self._how_it_ended(failure))
        self._done.set()
        is_ours = not isinstance(failure, (TakenOverError, BusyError))
        if self.folder is not None and is_ours:
            # Drawing takes long to import, and is wanted only now.
            from rtfocus.report.page import leave_page

            leave_page(self.folder)
            self._account(self.folder, failure)
        # One delivery may be under way, one alarm of every other kind may follow.
        most_s = 2 * (2 + len(self._config.on)) * self._config.timeout_s
        self._thread.join(most_s)
        if self._thread.is_alive():
            logger.warning("the last alarms are not delivered after %g s", most_s)

    def _account(self, folder: Path, failure: BaseException | None) -> None:
        """Note on what ended a finished run where its frames are."""
        if failure is None or isinstance(failure, PeerLostError):
            return
        account = accounting_in_words(self._monitor.accounting.summary())
        failure.add_note(f"{account}, in '{folder}'")

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S):
            self._look()
        self._look()
        if self._end is not None:
            self._messenger.deliver(self._end)

    def _look(self) -> None:
        for alarm in self._rules.look(self._monitor, time.perf_counter()):
            self._messenger.deliver(alarm)

    def _how_it_ended(self, failure: BaseException | None) -> str:
        if failure is not None:
            return f"the run ended: {failure or type(failure).__name__}"
        try:
            text = ((self.folder or Path()) / REPORT_NAME).read_text("utf-8")
            report: dict[str, Any] = json.loads(text)
            outcome = Outcome.of_report(report)
        except (OSError, ValueError, KeyError):
            return "the run ended"
        return "completed" if outcome.is_plain else str(outcome)
