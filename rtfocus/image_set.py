"""Image set: files restored or classified, each channel in its own optics.

Optics are settled for every channel of every image before the first plane is read,
see `rtfocus.images.optics`. Where they are unknown, engines that see nothing but
pixels run blind and say so; methods that compute PSFs are refused.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.config import Config
from rtfocus.config.loading import with_engine
from rtfocus.config.model import ChannelConfig
from rtfocus.engines.card import identity, input_of
from rtfocus.engines.registry import (
    FoundEngine,
    check_fit,
    find_engine,
    parts,
)
from rtfocus.errors import ConfigError, EngineError, InputError
from rtfocus.frame import FrameResult
from rtfocus.images.metadata import OutputImage
from rtfocus.images.optics import (
    EXAMPLE,
    ImageOptics,
    StatedOptics,
    find_optics,
    in_short,
    refuse_other_reference,
)
from rtfocus.images.series import ImageSeries, nothing_shown, shows_nothing
from rtfocus.offline import ImageProcessor
from rtfocus.optics.normalisation import told_below
from rtfocus.processing.channel_plan import find_classifier
from rtfocus.processing.restore import METHODS, NEEDS_OPTICS
from rtfocus.workers import Closing

BLIND_ENGINE = "rtfocus-2"
"""What restores where the optics are unknown and no engine is named."""

_MOST_PROCESSORS = 4

Find = Callable[[str], FoundEngine]
_Result = tuple[dict[str, int], NDArray[np.generic], FrameResult]


def why_no_error(
    settings: Config, channel: str | None, find: Find, *, optics: str | None
) -> str | None:
    """Say why the error left is not stated; None: it is. `optics`: their source."""
    classifier, restoration = settings.engines_of(channel)
    name, ways = restoration.method, restoration.orientations
    is_told = optics is not None and not settings.processing.blind
    if name in (*METHODS, "none") or find(name).card.expected_error is None:
        hide = ", and set processing.blind=true" if is_told else ""
        return f"'{name}' states none: take engine '{BLIND_ENGINE}'{hide}"
    if is_told:
        return (
            f"'{name}' states it only blind, and the optics are told (from {optics}): "
            "leave them out, or hide them: set processing.blind=true"
        )
    if classifier != name:
        return (
            f"'{name}' states it only where it finds the defocus too, not with "
            f"classifier '{classifier}': set processing.classifier to '{name}'"
        )
    if ways > 1:
        return f"nobody knows it of the mean over {ways} orientations: leave those out"
    return None


@dataclass(frozen=True)
class _Channel:
    """How one channel of one image is processed."""

    settings: Config
    known: ChannelConfig
    """The config's entry, by the name in the file."""
    optics: ImageOptics
    find: Find
    find_classifier: Find

    @property
    def classifier(self) -> str | None:
        """Name of the engine that finds the defocus; None: it is not looked for."""
        return self.settings.engines_of(self.known.name)[0]

    @property
    def method(self) -> str:
        """What restores: a method, an engine's name or ``none``."""
        return self.settings.engines_of(self.known.name)[1].method

    @cached_property
    def engines(self) -> list[FoundEngine]:
        """Classifier and restorer, as far as they are engines."""
        classifier, method = self.classifier, self.method
        engines = [] if classifier is None else [self.find_classifier(classifier)]
        if method not in (*METHODS, "none", classifier):
            engines.append(self.find(method))
        return engines

    @property
    def needs_no_optics(self) -> bool:
        """Whether it is restored by what knows no focus, and not classified."""
        return bool(self.engines) and all(e.card.sees_image_alone for e in self.engines)

    @property
    def reference(self) -> OpticalSystem:
        """The optics that blind engines take for granted."""
        if self.classifier is None:
            msg = "no classifier is configured; set processing.classifier or --engine"
            raise EngineError(msg)
        return parts(self.find(self.classifier).card)[1].reference

    def check(self, image: ImageSeries) -> None:
        """Refuse engines that do not fit the optics, or cannot do without."""
        processing = self.settings.processing
        if self.optics.system is not None:
            for engine in self.engines:
                check_fit(
                    engine.card,
                    self.optics.system,
                    ignore=processing.ignore_optics,
                    blind=processing.blind,
                )
            return
        if self.needs_no_optics:
            return
        needing = [self.method] if self.method in NEEDS_OPTICS else []
        needing += [
            e.name for e in self.engines if e.card.implementation.startswith("builtin:")
        ]
        if needing:
            msg = (
                f"the optics of '{image.path}' are unknown ({self.optics.source}) and "
                f"'{needing[0]}' computes with them: give --optics {EXAMPLE}, or a "
                f"--config with the optics of channel '{self.known.name}', or choose "
                f"an engine that runs blind: --engine {BLIND_ENGINE}"
            )
            raise ConfigError(msg)
        name = self.method if self.method != "none" else self.engines[0].name
        refuse_other_reference(image, self.optics, name, self.reference)

    @property
    def tiles(self) -> str:
        """The tiles that its classifier tells of, in words."""
        card = input_of(self.engines[0].card)
        every, first = f"{card.stride_px:g} px", f"{card.origin_px:g} px"
        return f"tiles of {card.tile_px} px every {every} from {first} on"

    def refuse_unstated_error(self, image: ImageSeries, first: "_Channel") -> None:
        """Refuse an image of which the error left is not stated, with the reason.

        One image holds that of all channels, with a pixel per tile of the `first`.
        """
        source = None if self.optics.system is None else self.optics.source
        name = self.known.name
        why = why_no_error(self.settings, name, self.find, optics=source)
        if why is None and self.tiles != first.tiles:
            why = (
                f"'{self.method}' states it of {self.tiles}, '{first.method}', of "
                f"channel '{first.known.name}', of {first.tiles}; one image cannot "
                "hold both: take one engine for all channels, or give each channel "
                "as a file of its own"
            )
        if why:
            msg = f"'{image.path}', channel '{name}': no expected error: {why}"
            raise ConfigError(msg)

    def assumed(self) -> str:
        """Say in a line which optics count, unless they come from the config."""
        where = f"optics of channel '{self.known.name}'"
        if self.optics.system is not None:
            return f"{where}: {self.optics.describe()}"
        if self.needs_no_optics:
            return f"{where} are unknown: engine '{self.engines[0].name}' needs none"
        engine = self.method if self.method != "none" else self.classifier
        return (
            f"{where} are unknown ({self.optics.source}): engine '{engine}' runs "
            f"blind, as if {in_short(self.reference)}; micrometres of defocus hold "
            "for those only"
        )

    def made(self) -> dict[str, str]:
        """Say which engines with which weights restore it, and which optics count."""
        if self.optics.system is not None:
            optics, source = in_short(self.optics.system), self.optics.source
        elif self.needs_no_optics:
            optics, source = "none", "nobody: the engine needs none"
        else:
            optics = in_short(self.reference)
            source = f"nobody ({self.optics.source}): assumed, engines ran blind"
        return {
            "engine": self._identity(self.method),
            "classifier": self._identity(self.classifier or "none"),
            "optics": optics,
            "optics from": source,
        }

    def _identity(self, name: str) -> str:
        """Return ``name@hash`` of an engine, the bare name of a method."""
        return name if name in (*METHODS, "none") else identity(self.find(name).card)


class ImageSet(Closing):
    """The images of one command, their optics and processors; a context manager.

    Parameters
    ----------
    settings
        As for the live loop.
    series
        The images.
    stated
        Optics the user states for them; None: those of config and files.
    free_choice
        No engine was named: what has no optics is restored by `BLIND_ENGINE`.
    states_error
        The error left in restored images is to be stated of all.

    Raises
    ------
    ConfigError
        If the optics contradict a file, are unknown and needed, or an error that is
        to be stated is not known.
    EngineError
        If an engine is missing or was not made for the optics.
    """

    def __init__(
        self,
        settings: Config,
        series: Sequence[ImageSeries],
        *,
        stated: StatedOptics | None = None,
        free_choice: bool = False,
        states_error: bool = False,
    ) -> None:
        self._stated = stated
        self._states_error = states_error
        self._settings = settings
        self._processors = OrderedDict[tuple[int, object], ImageProcessor]()
        folders = settings.processing.engine_folders
        # Looked for once, not once per image.
        self._find: Find = cache(partial(find_engine, folders=folders))
        self._find_classifier: Find = cache(partial(find_classifier, folders=folders))
        # One config object for all that is processed alike.
        self._blind = restoring_with(settings, BLIND_ENGINE) if free_choice else None
        self.turn_to(series)

    def turn_to(self, series: Sequence[ImageSeries]) -> None:
        """Take other images in place of those so far; engines stay open.

        Raises
        ------
        ConfigError, EngineError
            As for the first ones.
        """
        self.series = series
        self._cut: Counter[int] = Counter()
        self._below: dict[int, str] = {}
        self._plans = [self._plan(image) for image in series]

    def optics(self, number: int, channel: int) -> ImageOptics:
        """Return the optics of a channel of an image, by their numbers."""
        return self._plans[number][channel].optics

    def assumptions(self) -> list[str]:
        """Say, a line each, which optics do not come from the config."""
        told = (line for plan in self._plans for line in plan)
        lines = (line.assumed() for line in told if line.optics.source != "the config")
        return list(dict.fromkeys(lines))

    def made(self, number: int) -> dict[str, str]:
        """Return how an image is restored: engines with weights, optics, their origin.

        With equal optics in all channels these are named once.
        """
        facts = [channel.made() for channel in self._plans[number]]
        if all(one == facts[0] for one in facts):
            return facts[0]
        return {
            f"c{channel} {key}": text
            for channel, one in enumerate(facts)
            for key, text in one.items()
        }

    def restored_dtype(self, number: int) -> np.dtype[np.generic]:
        """Return the pixel type in which the restored planes of an image come."""
        if self._settings.store.restored_dtype == "float32":
            return np.dtype("<f4")
        return self.series[number].dtype

    def outline(self, number: int, *, stretch: bool = False) -> OutputImage:
        """Return a restored image without its planes; `stretch`: 8 bits for viewing."""
        return OutputImage(
            like=self.series[number],
            dtype=np.dtype("u1") if stretch else self.restored_dtype(number),
            planes=iter(()),
            made={"command": "restore", **self.made(number)},
            keeps_counts=not stretch,
        )

    def restored(
        self,
        number: int,
        on_result: Callable[[FrameResult], None] = lambda _: None,
    ) -> Iterator[NDArray[np.generic]]:
        """Yield the restored planes of an image in the order of its indices.

        `on_result` gets everything else about each.

        Raises
        ------
        InputError
            If a plane cannot be read, or no pixel of any is a number.
        EngineError
            If an engine fails.
        """
        for _, pixels, result in self._results(number, restore=True):
            restored = cast("NDArray[np.generic]", result.restored)
            self._count_cut(number, pixels, restored)
            on_result(result)
            yield restored

    def classified(self, number: int) -> Iterator[tuple[dict[str, int], FrameResult]]:
        """Yield index and result of every plane of an image; errors as `restored`."""
        results = self._results(number, restore=False)
        return ((index, result) for index, _, result in results)

    def doubts(self) -> list[str]:
        """Say, a line each, of which images light is taken for dark or does not fit."""
        return [self._below[number] for number in sorted(self._below)] + [
            f"'{self.series[number].path}': {count} restored pixels exceed "
            f"{np.iinfo(self.restored_dtype(number)).max} and are stored as that; "  # type: ignore[type-var]
            "store.restored_dtype=float32 (--set) keeps them"
            for number, count in sorted(self._cut.items())
            if count
        ]

    def close(self) -> None:
        """Close what was opened for the images."""
        while self._processors:
            self._processors.popitem()[1].close()

    def _plan(self, image: ImageSeries) -> list[_Channel]:
        """Settle optics and engines of every channel of an image."""
        plan: list[_Channel] = []
        of_file = image.channel_names, image.sizes["c"]
        for channel in range(image.sizes["c"]):
            settings = self._settings
            known = settings.channels_of(*of_file)[channel]
            optics = find_optics(
                image, channel, configured=known.optics, stated=self._stated
            )
            if optics.system is None and self._blind is not None:
                settings = self._blind
                known = settings.channels_of(*of_file)[channel]
            planned = _Channel(
                settings, known, optics, self._find, self._find_classifier
            )
            planned.check(image)
            if self._states_error:
                planned.refuse_unstated_error(image, first=(plan or [planned])[0])
            plan.append(planned)
        return plan

    def _processor(self, number: int, channel: int) -> tuple[ImageProcessor, str]:
        """Return a channel's processor, opened when it is first needed, and its name.

        The one unused for longest makes room.
        """
        plan = self._plans[number][channel]
        key = (id(plan.settings), plan.optics.system)
        if key not in self._processors:
            if len(self._processors) >= _MOST_PROCESSORS:
                self._processors.popitem(last=False)[1].close()
            self._processors[key] = ImageProcessor(
                plan.settings.without_optics(), plan.optics.system
            )
        self._processors.move_to_end(key)
        return self._processors[key], plan.known.name

    def _results(self, number: int, *, restore: bool) -> Iterator[_Result]:
        """Yield index, pixels and result of every plane of an image."""
        image, offset = self.series[number], self._settings.camera.offset_counts
        for index, pixels in _planes(image):
            processor, name = self._processor(number, index["c"])
            process = processor.restore if restore else processor.classify
            with _naming_file(image):
                result = process(pixels, channel=name, of_stack=len(image) > 1)
            if number not in self._below and (told := told_below(pixels, offset)):
                self._below[number] = f"'{image.path}': {told}"
            yield index, pixels, result

    def _count_cut(
        self, number: int, before: NDArray[np.generic], after: NDArray[np.generic]
    ) -> None:
        if after.dtype.kind == "u":
            top = np.iinfo(after.dtype).max  # type: ignore[type-var]
            self._cut[number] += int(np.count_nonzero((after == top) & (before < top)))  # type: ignore[operator]


def _planes(image: ImageSeries) -> Iterator[tuple[dict[str, int], NDArray[np.generic]]]:
    """Yield index and pixels of every plane, the last only of what shows anything."""
    shows_something = False
    for number, index in enumerate(image.indices(), 1):
        pixels = image.read(**index)
        shows_something = shows_something or not shows_nothing(pixels)
        if number == len(image) and not shows_something:
            raise InputError(nothing_shown(f"'{image.path}'"))
        yield index, pixels


@contextmanager
def _naming_file(image: ImageSeries) -> Iterator[None]:
    """Name the file of an image whose pixels are refused."""
    try:
        yield
    except InputError as error:
        msg = f"'{image.path}': {error}"
        raise InputError(msg) from error


def restoring_with(settings: Config, engine: str, *, whole: bool = True) -> Config:
    """Return `settings` with one restoration for all channels.

    A joint engine also says what is out of focus, if `whole`: one pass less, and
    no classifier is named. For one that knows no focus none is looked for.
    """
    method = settings.processing.restoration.model_copy(update={"method": engine})
    settings = with_engine(settings, "restoration", method.model_dump())
    if not whole or engine in (*METHODS, "none"):
        return settings
    named = find_engine(engine, settings.processing.engine_folders, METHODS)
    if named.card.sees_image_alone:
        return with_engine(settings, "classifier", None)
    if named.card.kind != "joint":
        return settings
    return with_engine(settings, "classifier", engine)
