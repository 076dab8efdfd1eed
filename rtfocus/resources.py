"""Resources: where the shipped engines and configs lie.

In a checkout they are the top-level folders; in an installed wheel they are
package data under ``rtfocus/_data``.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """Return the folder ``engines`` or ``configs`` that belongs to this install.

    Raises
    ------
    FileNotFoundError
        If neither place has it: a broken installation.
    """
    places = [_PACKAGE / "_data" / name, _PACKAGE.parent / name]
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    msg = f"no folder '{name}' at {looked}; reinstall rtfocus"
    raise FileNotFoundError(msg)
