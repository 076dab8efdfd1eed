"""Planes: what the planes of a file are called, and the middle of large ones."""

from collections.abc import Mapping


def plane_name(series: str, index: Mapping[str, int]) -> str:
    """Return a name of its own for each plane of a series.

    Examples
    --------
    >>> plane_name("cells", {"t": 0, "c": 0}), plane_name("cells", {"t": 3, "c": 1})
    ('cells', 'cells t3 c1')
    """
    return series + "".join(f" {axis}{n}" for axis, n in index.items() if n)


def middle(length_px: int, most_px: int) -> slice:
    """Return the middle of an axis, at most so many pixels.

    Examples
    --------
    >>> middle(10, 4), middle(3, 4)
    (slice(3, 7, None), slice(0, 3, None))
    """
    side = min(length_px, most_px)
    return slice((length_px - side) // 2, (length_px + side) // 2)
