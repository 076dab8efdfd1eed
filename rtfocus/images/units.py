"""Units: lengths and times of image metadata in um and s; what is unknown stays None.

Symbols of OME-XML, names of OME-Zarr (UDUNITS-2) and the spellings of ImageJ.
"""

import math
import unicodedata

_PREFIXES = {
    "yotta": ("Y", 24),
    "zetta": ("Z", 21),
    "exa": ("E", 18),
    "peta": ("P", 15),
    "tera": ("T", 12),
    "giga": ("G", 9),
    "mega": ("M", 6),
    "kilo": ("k", 3),
    "hecto": ("h", 2),
    "deca": ("da", 1),
    "": ("", 0),
    "deci": ("d", -1),
    "centi": ("c", -2),
    "milli": ("m", -3),
    "micro": ("μ", -6),
    "nano": ("n", -9),
    "pico": ("p", -12),
    "femto": ("f", -15),
    "atto": ("a", -18),
    "zepto": ("z", -21),
    "yocto": ("y", -24),
}
_INCH_UM = 25400.0
_OTHER_LENGTHS_UM = {
    "um": 1.0,
    "micron": 1.0,
    "angstrom": 1e-4,
    "ångström": 1e-4,
    "Å": 1e-4,
    "A": 1e-4,
    "thou": _INCH_UM / 1000,
    "li": _INCH_UM / 12,
    "in": _INCH_UM,
    '"': _INCH_UM,
    "inch": _INCH_UM,
    "inches": _INCH_UM,
    "ft": 12 * _INCH_UM,
    "foot": 12 * _INCH_UM,
    "feet": 12 * _INCH_UM,
    "yd": 36 * _INCH_UM,
    "yard": 36 * _INCH_UM,
    "mi": 63360 * _INCH_UM,
    "mile": 63360 * _INCH_UM,
    "pt": _INCH_UM / 72,
    "ua": 149_597_870_700e6,
    "ly": 9_460_730_472_580_800e6,
    "pc": 3.0856775814913673e22,
    "parsec": 3.0856775814913673e22,
}
_OTHER_TIMES_S = {
    "us": 1e-6,
    "sec": 1.0,
    "msec": 1e-3,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hr": 3600.0,
    "hour": 3600.0,
    "d": 86400.0,
    "day": 86400.0,
}


def _table(
    symbol: str, names: tuple[str, ...], exponent: int, others: dict[str, float]
) -> dict[str, float]:
    """Return all units made of prefixes, in powers of ten from `exponent`."""
    table = dict(others)
    for prefix, (letter, power) in _PREFIXES.items():
        table[letter + symbol] = 10.0 ** (power + exponent)
        for name in names:
            table[prefix + name] = 10.0 ** (power + exponent)
    return table


_UM = _table("m", ("meter", "metre"), 6, _OTHER_LENGTHS_UM)
_S = _table("s", ("second",), 0, _OTHER_TIMES_S)


def length_um(value: object, unit: str | None) -> float | None:
    """Return a length in um; None if value or unit say nothing about it.

    Examples
    --------
    >>> length_um(325, "nm"), length_um("0.5", "µm"), length_um(1, "pixel")
    (0.325, 0.5, None)
    """
    return _scaled(value, unit, _UM)


def time_s(value: object, unit: str | None) -> float | None:
    """Return a time in s; None if value or unit say nothing about it."""
    return _scaled(value, unit, _S)


def coordinate_um(value: object, unit: str | None) -> float | None:
    """Return a place in um, which other than a length may be 0 or negative."""
    number = finite(value)
    factor = _factor(unit, _UM)
    return None if number is None or factor is None else _tidy(number * factor)


def finite(value: object) -> float | None:
    """Return a number of metadata, None if it is none or not finite."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def positive(value: object) -> float | None:
    """Return a number of metadata, None if it is none, not finite or not above 0."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def _scaled(value: object, unit: str | None, table: dict[str, float]) -> float | None:
    number = positive(value)
    factor = _factor(unit, table)
    if number is None or factor is None:
        return None
    return positive(_tidy(number * factor))


def _factor(unit: str | None, table: dict[str, float]) -> float | None:
    if not isinstance(unit, str):
        return None
    text = unit.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ")
    text = unicodedata.normalize("NFKC", _as_utf8(text))
    for spelling in (text, text.lower(), text.lower().removesuffix("s")):
        if spelling in table:
            return table[spelling]
    return None


def _as_utf8(text: str) -> str:
    """Undo UTF-8 that was read as Latin-1, as ImageJ's micro sign often is."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _tidy(number: float) -> float:
    """Drop the last digits, which are those of the conversion: 0.325, not 0.32499…."""
    return float(f"{number:.12g}")
