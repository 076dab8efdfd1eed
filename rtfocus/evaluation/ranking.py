"""Ranking: how many labels an engine found likelier than the right one.

The live loop keeps the chosen label alone, so the engine sees each frame once more
here, prepared by the same code.
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import Channel
from rtfocus.config import Config
from rtfocus.evaluation.samples import DataSet, Sample
from rtfocus.frame import PROTOCOL_VERSION, Position, SeriesStart
from rtfocus.processing.channel_plan import plan_channel
from rtfocus.processing.conditions import is_mirrored
from rtfocus.processing.cpu.channel import CpuChannel, open_channel
from rtfocus.processing.engines.card_sections import BACKGROUND_LABEL

_UID = "ranking"


class Ranking:
    """Ranks the labels of one engine on the frames of one data set.

    A context manager: networks stay open for frames of one size in a row.
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        processing = config.processing.restoration.model_copy(update={"method": "none"})
        self._config = config.model_copy(
            update={
                "processing": config.processing.model_copy(
                    update={"restoration": processing}
                )
            }
        )
        self._data = data
        self._channel: CpuChannel | None = None
        self._kind: object = None

    def ranks(
        self, sample: Sample, right: tuple[int, int], wanted: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Return how many labels are likelier than the likeliest right one.

        Parameters
        ----------
        sample
            The frame.
        right
            Lowest and highest level that count as right.
        wanted
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
        opened.plan.correction.to_signal(sample.pixels, signal)
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
        return np.asarray((likely > chosen).sum(axis=0)[wanted], dtype=np.int64)

    def close(self) -> None:
        """Free the networks; called twice does nothing."""
        if self._channel is not None:
            self._channel.close()
        self._channel, self._kind = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_for(self, sample: Sample) -> CpuChannel:
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
        self._channel, self._kind = open_channel(plan, threads), kind
        return self._channel
