"""Focus readings: the processor's part of autofocus, read of the frames it has."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from rtfocus.autofocus.policy import EstimatorSettings, read_focus
from rtfocus.config import Config
from rtfocus.engines.registry import find_engine, parts, step_um
from rtfocus.errors import WriterError
from rtfocus.frame import DefocusMap, Estimate, Role, SeriesEnd, SeriesStart, Slot

FOCUS_LOG = "focus.ndjson"
"""Every image, decision and correction of autofocus, in the run folder."""
_MOST_LINES = 1000


def estimator_settings(
    config: Config, channel: str, *, bit_depth: int | None = None
) -> EstimatorSettings | None:
    """Return what the estimator must know of a channel; None: it cannot focus.

    A channel without optics or classifier cannot.
    """
    settings = config.channel(channel)
    name = settings.classifier or config.processing.classifier
    optics = settings.optics
    if optics is None or name is None:
        return None
    card = find_engine(name, config.processing.engine_folders).card
    levels, _ = parts(card)
    saturation = config.camera.saturation_counts
    if saturation is None and bit_depth is not None:
        saturation = float(2**bit_depth - 1)
    return EstimatorSettings(
        unit_um=optics.defocus_unit_um,
        range_um=(levels.count - 1)
        * step_um(card, optics, blind=config.processing.blind),
        dark_counts=config.camera.offset_counts,
        saturation_counts=saturation,
        region=config.autofocus.region,
    )


class SeriesReader:
    """Processor side: adds to an estimate what autofocus must know of a frame.

    Focus probes are always read, planned frames where autofocus holds focus.
    """

    def __init__(self, config: Config, series: SeriesStart) -> None:
        self._holds = config.autofocus.mode == "hold"
        self._settings = [
            estimator_settings(config, channel.name, bit_depth=series.bit_depth)
            for channel in series.channels
        ]

    def read(self, slot: Slot, estimate: Estimate, found: DefocusMap) -> Estimate:
        """Return the estimate with its focus reading, or as it is."""
        frame = slot.frame()
        settings = self._settings[frame.index.get("c", 0)]
        wanted = self._holds or frame.role is Role.FOCUS
        if settings is None or not wanted:
            return estimate
        reading = read_focus(found, slot.pixels, settings)
        return msgspec.structs.replace(estimate, focus=reading)


class FocusLog:
    """Processor side: ``focus.ndjson`` of a run, from the metadata of its frames.

    Parameters
    ----------
    folder
        The run folder.
    also
        Called with the lines of every frame that has some.
    """

    def __init__(
        self,
        folder: Path,
        also: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    ) -> None:
        self._path = folder / FOCUS_LOG
        self._also = also

    def take(self, slot: Slot) -> str | None:
        """Write down what the microscope side did since the frame before.

        Returns
        -------
        str or None
            The newest move in one line, for a terminal; None: there was none.
        """
        lines = _focus_lines(slot.frame().frame_meta)
        if not lines:
            return None
        self._write(lines)
        told = [text for line in lines if (text := _told(line)) is not None]
        return told[-1] if told else None

    def end(self, end: SeriesEnd) -> None:
        """Write down what the microscope side did after its last frame."""
        if lines := list(end.focus_log[:_MOST_LINES]):
            self._write(lines)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._also(lines)
        try:
            with self._path.open("ab") as file:
                for line in lines:
                    file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            msg = f"'{self._path}' cannot be written: {error.strerror or error}"
            raise WriterError(msg) from error


def _focus_lines(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a frame's focus log; of a peer's, what are entries."""
    found: Any = meta
    for key in ("extra", "rtfocus", "focus_log"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, list):
        return []
    return [line for line in found[:_MOST_LINES] if isinstance(line, dict)]


def _told(line: Mapping[str, Any]) -> str | None:
    """Return a line of the log in words, where it moved the stage or ended a search.

    What a peer sends may lack a key or hold a text for a number: it is kept, not told.
    """
    try:
        return _in_words(line)
    except (KeyError, TypeError, ValueError):
        return None


def _in_words(line: Mapping[str, Any]) -> str | None:
    place = "" if line.get("p") is None else f" at position {line['p']}"
    if line["kind"] == "hold" and line["step_um"]:
        return f"held{place}: {line['step_um']:+.2f} um ({line['reason']})"
    if line["kind"] == "verdict":
        word = "focused" if line["focused"] else f"not focused: {line['reason']}"
        return f"{word}{place}, z {line['end_um']:.2f} um, {line['images']} images"
    if line["kind"] == "request":
        return f"asked for by who looks at the run: {line['what']}"
    return f"failed{place}: {line['reason']}" if line["kind"] == "failure" else None
