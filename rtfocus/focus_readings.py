"""Focus readings: the processor's part of autofocus, read of the frames it has."""

from pathlib import Path

import msgspec

from rtfocus.autofocus.estimator import EstimatorSettings, read_focus
from rtfocus.config import Config
from rtfocus.frame import DefocusMap, Estimate, Role, SeriesStart
from rtfocus.processing.engines.fit import parts, step_um
from rtfocus.processing.engines.registry import find_engine
from rtfocus.slots import Slot


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
        range_um=(levels.count - 1) * step_um(card, optics),
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
    """Processor side: ``focus.ndjson`` of a run, from the metadata of its frames."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "focus.ndjson"

    def take(self, slot: Slot) -> None:
        """Write down what the microscope side did since the frame before."""
        meta = slot.frame().frame_meta
        lines = meta.get("extra", {}).get("rtfocus", {}).get("focus_log", ())
        if not lines:
            return
        with self._path.open("ab") as file:
            for line in lines:
                file.write(msgspec.json.encode(line) + b"\n")
