"""Registry: finds an engine's folder by its name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtfocus.errors import EngineError
from rtfocus.processing.engines.card import CARD_NAME, EngineCard, read_card
from rtfocus.resources import resource_folder


@dataclass(frozen=True, slots=True)
class FoundEngine:
    """An engine's folder with its card."""

    folder: Path
    card: EngineCard

    @property
    def name(self) -> str:
        """The name configs use: that of the folder."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """``classifier``, ``restorer`` or ``joint``."""
        return self.card.kind

    @property
    def implementation(self) -> str:
        """``onnx`` or ``builtin:METHOD``."""
        return self.card.implementation


def engine_places(folders: Sequence[Path]) -> list[Path]:
    """Return the folders that are searched, in order: configured, then shipped."""
    places = list(folders)
    try:
        places.append(resource_folder("engines"))
    except FileNotFoundError:
        # A checkout without the shipped engines still runs those configured.
        pass
    return places


def list_engines(folders: Sequence[Path] = ()) -> list[FoundEngine]:
    """Return every engine there is; of equal names the first one found.

    Raises
    ------
    EngineError
        If a card cannot be read.
    """
    found: dict[str, FoundEngine] = {}
    for place in engine_places(folders):
        for path in sorted(place.glob(f"*/{CARD_NAME}")):
            name = path.parent.name
            if name not in found:
                found[name] = FoundEngine(path.parent, read_card(path.parent))
    return list(found.values())


def find_engine(name: str, folders: Sequence[Path] = ()) -> FoundEngine:
    """Return the engine of a name; a path to an engine folder works too.

    Raises
    ------
    EngineError
        Names what was looked for, where, which ones there are and the remedy.
    """
    places = engine_places(folders)
    candidates = [place / name for place in places]
    for folder in (*candidates, Path(name)):
        if (folder / CARD_NAME).is_file():
            return FoundEngine(folder, read_card(folder))
    present = sorted(
        {path.parent.name for place in places for path in place.glob(f"*/{CARD_NAME}")}
    )
    looked = ", ".join(f"'{folder}'" for folder in candidates) or "nowhere"
    msg = (
        f"engine '{name}' not found; looked for {CARD_NAME} in {looked}; "
        f"engines there: {', '.join(present) or 'none'}; add its parent folder to "
        "processing.engine_folders or train it with: rtfocus train configs/"
        f"train_{Path(name).name}.yaml"
    )
    raise EngineError(msg)
