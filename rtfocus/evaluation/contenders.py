"""Contenders: what is evaluated, each as a config of the live loop, and what it costs.

``NAME`` is an engine, a folder with one, or a restoration that is built in;
``METHOD:exact`` is a built-in method that is told every frame's defocus: the bound
that an estimate of the defocus is measured against. ``ENGINE:8`` restores in the mean
over 8 orientations (`rtfocus.offline`). Multiply-adds are counted in the ONNX graph.
The live loop keeps the chosen label alone; to count how many labels an engine found
likelier than the right one, it sees each frame once more, prepared by the same code.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel
from rtfocus.config import Config, parse_config
from rtfocus.config.sections import RestorationConfig
from rtfocus.engines.card import BACKGROUND_LABEL, verified_file
from rtfocus.engines.registry import FoundEngine, find_engine
from rtfocus.errors import ConfigError
from rtfocus.evaluation.samples import DataSet, Sample
from rtfocus.frame import PROTOCOL_VERSION, Position, SeriesStart, TileGrid
from rtfocus.optics.psf import compute_psf
from rtfocus.processing.channel_plan import plan_channel
from rtfocus.processing.classify import is_mirrored
from rtfocus.processing.cpu.device import OpenChannel
from rtfocus.processing.cpu.network_restorer import make_restorer
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import METHODS
from rtfocus.runtimes.cpu_engine import AXES, arranged_shape, import_openvino
from rtfocus.workers import Closing

# Leading axes of an operator's weights that are no part of one product: group and
# output channel. Transposed convolutions multiply per input, the others per output.
_PER_OUTPUT = {"Convolution": 1, "GroupConvolution": 2}
_PER_INPUT = {"ConvolutionBackpropData": 1, "GroupConvolutionBackpropData": 2}
_FRAME_PX = 512


def multiply_adds_per_pixel(engine: FoundEngine) -> float | None:
    """Return the multiply-adds of convolutions and matrix products per frame pixel.

    Restorers are counted on one of their tiles, halo included, per pixel that the
    tile owns; classifiers and joint engines on a frame of about 512 pixels a side.

    Parameters
    ----------
    engine
        The engine.

    Returns
    -------
    float | None
        None: no network, or OpenVINO, which reads the graph, is not installed.
    """
    card = engine.card
    if not card.is_network or card.input is None:
        return None
    try:
        openvino = import_openvino()
    except ImportError:
        return None
    multiple = card.input.multiple_px
    side = round(_FRAME_PX / multiple) * multiple
    owned = side
    if card.kind == "restorer":
        side = card.input.tile_px
        owned = side - 2 * card.input.halo_px
    model = openvino.Core().read_model(verified_file(engine.folder, card))
    axes = AXES if card.steps is None else card.steps.input_axes
    shape = arranged_shape((1, card.input.channels, side, side), axes)
    shapes = {card.input.name: list(shape)}
    if card.condition is not None:
        shapes[card.condition.name] = [1, len(card.condition.entries)]
    model.reshape(shapes)
    return sum(map(_multiply_adds, model.get_ops())) / owned**2


def _multiply_adds(node: Any) -> int:  # noqa: ANN401
    """Count one operator of OpenVINO's graph."""
    kind = node.get_type_name()
    if kind == "MatMul":
        inner = list(node.input(0).get_shape())
        axis = -2 if node.get_attributes()["transpose_a"] else -1
        return int(prod(node.output(0).get_shape()) * inner[axis])
    if kind in _PER_OUTPUT:
        weights = list(node.input(1).get_shape())[_PER_OUTPUT[kind] :]
        return int(prod(node.output(0).get_shape()) * prod(weights))
    if kind in _PER_INPUT:
        weights = list(node.input(1).get_shape())[_PER_INPUT[kind] :]
        return int(prod(node.input(0).get_shape()) * prod(weights))
    return 0


Image = NDArray[np.float32]

# The montage of one tile as large as the frame: one PSF everywhere.
_GRID = TileGrid(
    rows=1, columns=1, tile_px=96, stride_px=48, origin_px=47.5, signed=False
)
_LEVEL = 1


def restore_exactly(method: str, data: DataSet, sample: Sample) -> Image:
    """Restore a frame with the PSF of its own defocus.

    A frame that may be in focus comes back as it was. Where a range is known, the
    nominal defocus is its middle.

    Raises
    ------
    ConfigError
        If the defocus of the frame is not known.
    """
    span = sample.defocus_um
    if span is None:
        msg = (
            f"'{sample.name}' of {data.name}: nobody knows its defocus, so no method "
            "can be told it; leave out ':exact'"
        )
        raise ConfigError(msg)
    pixels = sample.pixels.astype(np.float32)
    if span[0] <= 0.0 <= span[1]:
        return pixels
    psf = compute_psf(data.optics, (span[0] + span[1]) / 2)
    montage = Montage(_GRID, (pixels.shape[0], pixels.shape[1]))
    quantum = 1.0 if np.issubdtype(sample.pixels.dtype, np.integer) else 0.0
    settings = RestorationConfig(method=method)
    restorer = make_restorer(montage, {_LEVEL: psf}, settings, quantum)
    signal = pixels - np.float32(data.offset_counts)
    labels = np.full((1, 1), _LEVEL, np.int16)
    restored = restorer.restore(signal, labels, np.empty_like(signal))
    return restored + np.float32(data.offset_counts)


EXACT = ":exact"


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table."""

    name: str
    """Engine or method, as the table shows it."""
    classifier: str | None
    """Engine that finds the defocus; None: the true one is given."""
    method: str
    """Restoration; ``none`` for classifiers."""
    engine: FoundEngine | None
    """The network under test; None: a built-in method."""
    blind: bool
    """Engines do not get the aberrations."""
    orientations: int = 1
    """In how many an image is restored; the mean counts."""

    @property
    def title(self) -> str:
        """Name with what the contender knows, where that makes a difference."""
        condition = None if self.engine is None else self.engine.card.condition
        if condition is None or "optics_known" not in condition.entries:
            return self.name
        return f"{self.name}, {'blind' if self.blind else 'optics given'}"

    @property
    def restores(self) -> bool:
        """Whether images come out."""
        return self.method != "none"

    @property
    def is_told_the_defocus(self) -> bool:
        """Whether nothing has to be found."""
        return self.classifier is None

    @property
    def estimates(self) -> bool:
        """Whether the defocus it finds is its own."""
        return self.engine is not None and self.engine.card.kind != "restorer"

    def multiply_adds_per_pixel(self) -> float | None:
        """Return the cost of the network under test alone; None: no network."""
        return None if self.engine is None else multiply_adds_per_pixel(self.engine)

    def config(
        self, data: DataSet, *, folders: Sequence[Path] = (), **processing: str | int
    ) -> Config:
        """Return the live loop's config for the frames of a data set.

        Restored frames stay float: rounding to the camera's counts is no fault of
        an engine. They are cut at its full scale later.
        """
        optics = asdict(data.optics)
        return parse_config(
            {
                "camera": {"offset_counts": data.offset_counts},
                "channels": [{"name": "default", "optics": optics}],
                "processing": {
                    "classifier": self.classifier,
                    "restoration": {
                        "method": self.method,
                        "orientations": self.orientations,
                    },
                    "engine_folders": [str(folder) for folder in folders],
                    "ignore_optics": True,
                    "blind": self.blind,
                    **processing,
                },
                "store": {"restored_dtype": "float32"},
            },
            origin=f"evaluation of {self.name}",
        )


def contender(
    name: str, *, classifier: str, blind: bool, folders: Sequence[Path] = ()
) -> Contender:
    """Find what a name on the command line stands for.

    Parameters
    ----------
    name
        Engine, built-in method, ``METHOD:exact`` or ``ENGINE:ORIENTATIONS``.
    classifier
        Finds the defocus for restorers.
    blind
        Tell engines no aberrations.
    folders
        With further engines.

    Raises
    ------
    EngineError
        If there is no such engine.
    ConfigError
        If something other than a built-in method is to get the true defocus.
    """
    if name.endswith(EXACT):
        method = name.removesuffix(EXACT)
        if method not in METHODS:
            msg = (
                f"'{name}': only {', '.join(METHODS)} can be told the exact defocus; "
                f"leave out '{EXACT}'"
            )
            raise ConfigError(msg)
        return Contender(name, None, method, None, blind=False)
    if name in METHODS:
        return Contender(name, classifier, name, None, blind=False)
    engine, _, number = name.rpartition(":")
    ways = int(number) if engine and number in ("2", "4", "8") else 1
    entry = find_engine(engine if ways > 1 else name, folders, METHODS)
    if ways > 1 and entry.card.kind == "classifier":
        msg = f"'{name}': {entry.name} restores nothing; leave out ':{ways}'"
        raise ConfigError(msg)
    finds = entry.card.kind != "restorer"
    return Contender(
        name=entry.name if ways == 1 else f"{entry.name}:{ways}",
        classifier=str(entry.folder) if finds else classifier,
        method="none" if entry.card.kind == "classifier" else str(entry.folder),
        engine=entry,
        blind=blind,
        orientations=ways,
    )


_UID = "ranking"


class Ranking(Closing):
    """Ranks the labels of one engine on the frames of one data set.

    A context manager: networks stay open for frames of one size in a row.
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        self._config = config.without_restoration()
        self._data = data
        self._channel: OpenChannel | None = None
        self._kind: object = None

    def ranks(
        self, sample: Sample, right: tuple[int, int], used: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Return how many labels are likelier than the likeliest right one.

        Parameters
        ----------
        sample
            The frame.
        right
            Lowest and highest level that count as right.
        used
            Tiles that are asked for, axes (tile_y, tile_x).

        Returns
        -------
        NDArray[np.int64]
            One per wanted tile; 0: no label is likelier than a right one.
        """
        opened = self._open_for(sample)
        classifier = opened.classifier
        if classifier is None or classifier.card.output is None:
            return np.zeros(0, dtype=np.int64)
        signal = np.empty(sample.pixels.shape, np.float32)
        opened.plan.camera.to_signal(sample.pixels, signal)
        likely = classifier.probabilities(classifier.prepare(signal))
        levels = classifier.card.levels
        turned = levels is not None and levels.signed and is_mirrored(self._data.optics)
        lowest, highest = (-right[1], -right[0]) if turned else right
        names = classifier.card.output.labels
        rows = [
            row
            for row, name in enumerate(names)
            if name != BACKGROUND_LABEL and lowest <= int(name) <= highest
        ]
        chosen = likely[rows].max(axis=0)
        return np.asarray((likely > chosen).sum(axis=0)[used], dtype=np.int64)

    def close(self) -> None:
        """Free the networks; called twice does nothing."""
        if self._channel is not None:
            self._channel.close()
        self._channel, self._kind = None, None

    def _open_for(self, sample: Sample) -> OpenChannel:
        kind = (sample.pixels.shape, sample.pixels.dtype.str)
        if self._channel is not None and kind == self._kind:
            return self._channel
        self.close()
        channel = Channel("default", self._data.optics)
        series = SeriesStart(
            version=PROTOCOL_VERSION,
            series_uid=_UID,
            name=_UID,
            started_ns=0,
            shape=sample.pixels.shape,
            dtype=sample.pixels.dtype.str,
            sizes={"t": None},
            channels=[channel],
            positions=[Position("image")],
            pixel_size_um=self._data.optics.pixel_size_um,
        )
        threads = self._config.processing.threads or 1
        plan = plan_channel(self._config, series, channel)
        self._channel, self._kind = OpenChannel(plan, threads), kind
        return self._channel
