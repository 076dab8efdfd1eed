"""Contenders: what is evaluated, each as a config of the live loop.

``NAME`` is an engine, a folder with one, or a restoration that is built in;
``METHOD:exact`` is a built-in method that is told every frame's defocus: the bound
that an estimate of the defocus is measured against.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rtfocus.config import Config, parse_config
from rtfocus.errors import ConfigError
from rtfocus.evaluation.cost import multiply_adds_per_pixel
from rtfocus.evaluation.samples import DataSet
from rtfocus.processing.engines.registry import FoundEngine, find_engine
from rtfocus.processing.methods import METHODS

EXACT = ":exact"


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table."""

    name: str
    """Engine or method, as the table shows it."""
    classifier: str | None
    """Engine that finds the defocus; None: the defocus is told."""
    method: str
    """Restoration; ``none`` for classifiers."""
    engine: FoundEngine | None
    """The network under test; None: a built-in method."""
    blind: bool
    """Engines are not told the aberrations."""

    @property
    def title(self) -> str:
        """Name with what the contender is told, where that makes a difference."""
        told = None if self.engine is None else self.engine.card.condition
        if told is None or "optics_known" not in told.entries:
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
        return self.engine is not None and self.engine.kind != "restorer"

    def multiply_adds_per_pixel(self) -> float | None:
        """Return the cost of the network under test alone; None: it is none."""
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
                    "restoration": {"method": self.method},
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
        Engine, built-in method, or ``METHOD:exact``.
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
        If something other than a built-in method is to be told the defocus.
    """
    if name.endswith(EXACT):
        method = name.removesuffix(EXACT)
        if method not in METHODS:
            msg = f"'{name}': only {', '.join(METHODS)} can be told the exact defocus"
            raise ConfigError(msg)
        return Contender(name, None, method, None, blind=False)
    if name in METHODS:
        return Contender(name, classifier, name, None, blind=False)
    found = find_engine(name, folders)
    finds = found.kind != "restorer"
    return Contender(
        name=found.name,
        classifier=str(found.folder) if finds else classifier,
        method="none" if found.kind == "classifier" else str(found.folder),
        engine=found,
        blind=blind,
    )
