"""Registry: finds an engine by its name, and fits it to optics and frames."""

import difflib
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from math import ceil
from pathlib import Path

from platformdirs import user_data_path

from rtfocus.channel import OpticalSystem
from rtfocus.engines.card import (
    CARD_NAME,
    EngineCard,
    InputCard,
    LevelsCard,
    OpticsCard,
    input_of,
    read_card,
    verified_file,
)
from rtfocus.errors import ConfigError, EngineError, OutputError
from rtfocus.files import is_reserved_name, recover, remove, resource_folder, whole

ENGINES_VARIABLE = "RTFOCUS_ENGINES"
"""Environment variable that names another folder for the user's engines."""

ENTRY_POINTS = "rtfocus.engines"
"""Group of entry points by which other packages bring engines."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundEngine:
    """An engine's folder with its card."""

    folder: Path
    card: EngineCard

    @property
    def name(self) -> str:
        """The name configs use: that of the folder."""
        return self.folder.name


def user_engine_folder() -> Path:
    """Return where ``rtfocus engines add`` puts engines; it may not exist yet."""
    named = os.environ.get(ENGINES_VARIABLE)
    if named:
        return Path(named)
    return user_data_path("rtfocus", appauthor=False) / "engines"


def engine_places(folders: Sequence[Path]) -> list[Path]:
    """Return the folders searched: configured, the user's, of packages, shipped."""
    own = user_engine_folder()
    places = [*folders, *([] if _is_closed(own) else [own]), *package_folders()]
    try:
        places.append(resource_folder("engines"))
    except FileNotFoundError:
        # A checkout without the shipped engines still runs those configured.
        pass
    return places


def package_folders() -> list[Path]:
    """Return the folders of engines that installed packages bring.

    A package names them in its entry points, group ``rtfocus.engines``: the value is
    a package whose folder holds engine folders. It is found, not imported. One that
    is not there is left out with a warning.
    """
    places: list[Path] = []
    for entry in _entry_points(_search_path()):
        spec, why = None, ""
        try:
            spec = find_spec(entry.value)
        except (ImportError, ValueError) as error:
            why = f": {error}"
        folders = spec and spec.submodule_search_locations
        if folders:
            places += map(Path, folders)
        else:
            named = f"entry point {ENTRY_POINTS} '{entry.name}' names '{entry.value}'"
            logger.warning("%s, which is no package%s", named, why)
    return places


def _search_path() -> tuple[tuple[str, int], ...]:
    """Return where packages lie, and when each place last changed."""
    places = (place or os.curdir for place in sys.path)
    # One that may not be looked into does not count: Path.is_dir would raise.
    return tuple((p, os.stat(p).st_mtime_ns) for p in places if os.path.isdir(p))


@lru_cache(maxsize=1)
def _entry_points(search_path: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    # Reading all that is installed takes tens of milliseconds: not at each engine.
    del search_path
    return sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name)


def _is_closed(folder: Path) -> bool:
    """Whether it may not be looked into: ``HOME`` may still be another user's."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return not os.access(folder, os.R_OK | os.X_OK)


def list_engines(folders: Sequence[Path] = ()) -> list[FoundEngine]:
    """Return every engine there is; of equal names the first one found.

    Raises
    ------
    EngineError
        If a card cannot be read.
    """
    engines: dict[str, FoundEngine] = {}
    for place in engine_places(folders):
        for folder in _engines_in(place):
            if folder.name not in engines:
                engines[folder.name] = FoundEngine(folder, read_card(folder))
    return list(engines.values())


def _engines_in(place: Path) -> list[Path]:
    """Return the engine folders of a place, without what is being added or removed."""
    folders = sorted(path.parent for path in place.glob(f"*/{CARD_NAME}"))
    return [folder for folder in folders if not folder.name.startswith(".")]


def find_engine(
    name: str, folders: Sequence[Path] = (), methods: Sequence[str] = ()
) -> FoundEngine:
    """Return the engine of a name; a path to an engine folder works too.

    `methods` are what else `name` might have been meant for: the error suggests them.

    Raises
    ------
    EngineError
        Names what was looked for, where, which ones there are and the remedy.
    """
    places = engine_places(folders)
    candidates = [place / name for place in places]
    for folder in (*candidates, Path(name)):
        # A name may be too long for a path, at which is_file raises.
        if os.path.isfile(folder / CARD_NAME):
            return FoundEngine(folder, read_card(folder))
    present = sorted({folder.name for p in places for folder in _engines_in(p)})
    looked = ", ".join(f"'{folder}'" for folder in candidates) or "nowhere"
    near = difflib.get_close_matches(name.lower(), [*methods, *present], n=1)
    meant = f", did you mean '{near[0]}'?" if near else ";"
    built_in = f"; built in: {', '.join(methods)}" if methods else ""
    msg = (
        f"engine '{name}' not found{meant} looked for {CARD_NAME} in {looked}; "
        f"engines there: {', '.join(present) or 'none'}{built_in}; add its parent "
        "folder to processing.engine_folders, or train one: rtfocus train RECIPE"
    )
    raise EngineError(msg)


def add_engine(folder: Path) -> FoundEngine:
    """Copy an engine into the user's folder, where configs find it by its name.

    Raises
    ------
    EngineError
        If the card or a weights file is not in order, the name is no name, there
        is an engine of that name, or the folder holds a link: what it leads to may
        be anything. Nothing is left of an engine that could not be added.
    """
    for inside, folders, names in os.walk(folder):
        for name in (*folders, *names):
            refuse_link(Path(inside) / name)
    card = read_card(folder)
    for precision in card.files:
        verified_file(folder, card, precision)
    check_new_name(card.name)
    target = user_engine_folder() / card.name
    try:
        with whole(target) as part:
            shutil.copytree(folder, part, symlinks=True)
    except OutputError as error:
        msg = f"engine '{card.name}' cannot be added: {error}"
        raise EngineError(msg) from error
    return FoundEngine(target, card)


def check_new_name(name: str) -> None:
    """Refuse a name that no engine can be added under.

    Raises
    ------
    EngineError
        If it is no folder name on every system, or there is such an engine.
    """
    if not _is_name(name):
        msg = (
            f"engine name '{name}' is no folder name on every system; give it "
            "another: --name NAME"
        )
        raise EngineError(msg)
    for place in engine_places(()):
        if (place / name / CARD_NAME).is_file():
            msg = (
                f"there is an engine '{name}' in '{place}'; give this one another "
                "name: --name NAME"
            )
            raise EngineError(msg)


def remove_engine(name: str) -> Path:
    """Remove one of the user's own engines; return where it lay.

    It loses its name in one step, so it is there whole or gone, even if interrupted.

    Raises
    ------
    EngineError
        If the user has no engine of that name; says where one lies that is not his.
    OutputError
        If it cannot be removed; then it is as it was.
    """
    own = user_engine_folder()
    folder = own / name
    if _is_name(name):
        recover(folder)
        if (folder / CARD_NAME).is_file():
            remove(folder)
            return folder
    others = [place / name for place in engine_places(()) if place != own]
    for other in others:
        if _is_name(name) and (other / CARD_NAME).is_file():
            msg = (
                f"engine '{name}' lies in '{other.parent}', not among your own in "
                f"'{own}': it goes with the package that brought it"
            )
            raise EngineError(msg)
    yours = ", ".join(engine.name for engine in _engines_in(own)) or "none"
    msg = f"there is no engine '{name}' among your own in '{own}'; there are: {yours}"
    raise EngineError(msg)


def _is_name(name: str) -> bool:
    """Tell whether it can be the name of an engine's folder on every system."""
    return re.fullmatch(r"\w[\w.-]*", name) is not None and not is_reserved_name(name)


def refuse_link(path: Path) -> None:
    """Refuse what is neither a file nor a folder: a copy would follow it.

    Raises
    ------
    EngineError
        Names it and the remedy.
    """
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        msg = (
            f"'{path}' is a link or no plain file; an engine that is added "
            "consists of plain files: put the file itself there"
        )
        raise EngineError(msg)


def why_unfit(card: EngineCard, optics: OpticalSystem) -> str | None:
    """Return why an engine was not trained for these optics; None: it was."""
    if card.optics is None:
        return None
    lowest, highest = card.optics.sampling_min, card.optics.sampling_max
    if lowest <= optics.sampling <= highest:
        return None
    return (
        f"engine '{card.name}' was trained for pixels of {lowest:g} to {highest:g} "
        f"lambda/NA, but {optics.pixel_size_um:g} um at NA "
        f"{optics.numerical_aperture:g} and {optics.wavelength_nm:g} nm are "
        f"{optics.sampling:.3g}"
    )


def check_fit(
    card: EngineCard, optics: OpticalSystem, *, ignore: bool, blind: bool = False
) -> None:
    """Refuse an engine outside the optics it was trained for.

    An engine that can do without any is not refused where it is told nothing (`blind`).

    Raises
    ------
    EngineError
        Names both ranges and the remedies, unless `ignore`.
    """
    why = why_unfit(card, optics)
    if why is not None and not ignore and not (blind and card.needs_no_optics):
        msg = (
            f"{why}; train one for these optics (rtfocus train RECIPE --optics OPTICS "
            "--images FOLDER) or run it anyway with processing.ignore_optics: true"
        )
        raise EngineError(msg)


@dataclass(frozen=True, slots=True)
class FrameFit:
    """How frames of one size are brought to a size the network takes."""

    shape: tuple[int, int]
    """Height and width of the frame."""
    padded: tuple[int, int]
    """Height and width handed to the network, mirrored behind each axis."""


def fit_frame(card: InputCard, shape: tuple[int, int]) -> FrameFit:
    """Compute the input size for frames of a shape (height, width).

    A frame is extended to a whole tile more where more than half a stride would
    lie behind the last tile, and to the multiple the network asks for.
    """
    padded = tuple(_padded_side(card, side) for side in shape)
    return FrameFit(shape, (padded[0], padded[1]))


LEAST_PX = 16
"""Of smaller crops of real fields, mirrored to fill a tile, networks tell other levels
than of a whole tile there."""


def why_too_small(shape: Sequence[int]) -> str | None:
    """Say why an image (y, x, ...) is too small for a defocus; None: it is not."""
    if min(shape[:2]) >= LEAST_PX:
        return None
    return (
        f"of shape {tuple(shape)} is too small to tell its defocus; "
        f"give at least {LEAST_PX} pixels along y and x"
    )


def check_region(card: EngineCard, region: tuple[int, int, int, int] | None) -> None:
    """Refuse a region of ``autofocus`` in which no tile has its centre.

    Parameters
    ----------
    card
        Of the engine that finds the defocus.
    region
        x, y, width, height in pixels; None: the whole frame.

    Raises
    ------
    ConfigError
        If nothing would be known of it.
    """
    if region is None:
        return
    tiles = input_of(card)
    x, y, width, height = region
    for start, side in ((x, width), (y, height)):
        number = max(0, ceil((start - tiles.origin_px) / tiles.stride_px))
        if tiles.origin_px + number * tiles.stride_px >= start + side:
            msg = (
                f"autofocus.region {list(region)} lies between the tiles of "
                f"'{card.name}', whose centres are {tiles.stride_px:g} px apart: "
                f"nothing would be known of it; make it at least {tiles.stride_px:g} "
                "px wide and high, or choose a classifier with finer tiles"
            )
            raise ConfigError(msg)


def _padded_side(card: InputCard, side: int) -> int:
    first = card.origin_px - (card.tile_px - 1) / 2
    behind = side - first - card.tile_px
    tiles = max(0, ceil(behind / card.stride_px - 0.5))
    needed = max(side, ceil(first + card.tile_px + tiles * card.stride_px))
    return ceil(needed / card.multiple_px) * card.multiple_px


def count_tiles(card: InputCard, frame: tuple[int, int]) -> int:
    """Return how many tiles a frame is cut into, each owning all but its halo."""
    own_px = card.tile_px - 2 * card.halo_px
    return ceil(frame[0] / own_px) * ceil(frame[1] / own_px)


def fit_tiles(
    card: InputCard, frame: tuple[int, int], tiles_per_batch: int | None, pixels: int
) -> tuple[int, tuple[int, int]]:
    """Return how many tiles of a frame a restorer sees at once, and their sides.

    So many `tiles_per_batch` at most, or as many as make up `pixels`; the frame as one
    tile, halo and padding included, where these hold it and the card allows it.
    """
    height, width = (
        ceil((side + 2 * card.halo_px) / card.multiple_px) * card.multiple_px
        for side in frame
    )
    if card.any_size and tiles_per_batch is None and height * width <= pixels:
        return 1, (height, width)
    most = tiles_per_batch or max(1, pixels // card.tile_px**2)
    batch = balanced_batch(count_tiles(card, frame), most)
    return batch, (card.tile_px, card.tile_px)


def balanced_batch(tiles: int, most: int) -> int:
    """Return the batch that cuts a frame's tiles into the fewest, nearly equal parts.

    Examples
    --------
    >>> balanced_batch(121, 32), balanced_batch(9, 32)
    (31, 9)
    """
    return ceil(tiles / ceil(tiles / most))


def step_um(card: EngineCard, optics: OpticalSystem, *, blind: bool = False) -> float:
    """Return the defocus between two levels in the configured optics.

    A network sees defocus in units of n lambda / NA^2: the same blur stands for
    more micrometres at a smaller aperture. One that is not even told the sampling
    (`blind`) sees how many pixels a blur spans: that many in its reference optics.
    """
    levels, optics_of_card = parts(card)
    reference = optics_of_card.reference
    step = levels.step_um * optics.defocus_unit_um / reference.defocus_unit_um
    if blind and card.needs_no_optics:
        step *= optics.sampling / reference.sampling
    return step


def parts(card: EngineCard) -> tuple[LevelsCard, OpticsCard]:
    """Return the sections every classifier has; EngineError for other kinds."""
    if card.levels is None or card.optics is None:
        msg = f"engine '{card.name}' is a {card.kind}: it has no defocus levels"
        raise EngineError(msg)
    return card.levels, card.optics
