"""Pictures: PNG, JPEG and BMP through Pillow; colours of 16 bits through imagecodecs.

Pillow cuts those to 8, and grey of 16 bits with an alpha channel too.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rtfocus.errors import InputError
from rtfocus.images.series import (
    ImageSeries,
    import_imagecodecs,
    native_dtype,
    one_line,
)

# Modes that are no grey levels and no RGB, what they become and what is told.
_CONVERT = {
    "1": ("L", ""),
    "P": ("RGB", ""),
    "LA": ("L", "its alpha channel is left out"),
    "La": ("L", "its alpha channel is left out"),
    "RGBA": ("RGB", "its alpha channel is left out"),
    "RGBa": ("RGB", "its alpha channel is left out"),
    "PA": ("RGB", "its alpha channel is left out"),
    "CMYK": ("RGB", "its printing colours are converted to RGB"),
    "YCbCr": ("RGB", ""),
}
_KEPT = ("L", "RGB", "I", "I;16", "I;16B", "I;16L", "F")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class _Form:
    """What the header of a picture says of its pixels."""

    shape: tuple[int, ...]
    dtype: str
    note: str = ""


def read_picture(path: Path) -> list[ImageSeries]:
    """Open one picture; palettes become RGB, alpha is left out and that is noted.

    Raises
    ------
    InputError
        If the file is none, or its colours are of a kind that cannot be kept.
    """
    form = _form(path)
    return [
        ImageSeries(
            name=path.stem,
            path=path,
            files=(path,),
            sizes={"t": 1, "c": 1, "z": 1},
            shape=form.shape,
            dtype=native_dtype(np.dtype(form.dtype)),
            read_plane=lambda _t, _c, _z: _load(path),
            notes=(form.note,) if form.note else (),
        )
    ]


def _form(path: Path) -> _Form:
    try:
        deep = _deep_channels(path)
        if deep is not None:
            import_imagecodecs(path, "has colours or alpha of 16 bits")
        # The limit is against attacks on servers; slides are as large.
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(path) as picture:
            height, width, mode = picture.height, picture.width, picture.mode
    except InputError:
        raise
    # A damaged file makes the parser raise whatever it stumbles over.
    except Exception as error:
        raise _unreadable(path, error) from error
    if deep is not None:
        colours = (3,) if deep >= 3 else ()
        note = "its alpha channel is left out" if deep in (2, 4) else ""
        return _Form((height, width, *colours), "<u2", note)
    if mode not in _CONVERT and mode not in _KEPT:
        msg = f"'{path}' has colours of kind '{mode}'; save it as grey or RGB"
        raise InputError(msg)
    kept, note = _CONVERT.get(mode, (mode, ""))
    colours = (3,) if kept == "RGB" else ()
    dtypes = {"L": "|u1", "RGB": "|u1", "F": "<f4", "I": "<i4"}
    dtype = dtypes.get(kept, "<u2")
    if path.suffix.lower() == ".png" and kept == "I":
        dtype = "<u2"  # older Pillows give 16-bit grey as 32 bits
    return _Form((height, width, *colours), dtype, note)


def _deep_channels(path: Path) -> int | None:
    """Return how many samples a pixel of a 16-bit PNG has; None: Pillow reads it."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or not head.startswith(_SIGNATURE) or head[24] != 16:
        return None
    return {2: 3, 4: 2, 6: 4}.get(head[25])


def _load(path: Path) -> NDArray[np.generic]:
    deep = _deep_channels(path)
    if deep is not None:
        codecs = import_imagecodecs(path, "has colours or alpha of 16 bits")
        pixels = np.asarray(codecs.png_decode(path.read_bytes()))
        kept = 3 if deep >= 3 else 1
        pixels = pixels[..., :kept]
        return pixels if kept == 3 else pixels[..., 0]
    with Image.open(path) as picture:
        mode = _CONVERT.get(picture.mode, ("", ""))[0]
        return np.asarray(picture.convert(mode) if mode else picture)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"'{path}' cannot be read as a picture: {one_line(error)}")


def stretch_histogram(image: ArrayLike) -> NDArray[np.uint8]:
    """Map the smallest value to 0 and the largest to 255, linearly, for viewing.

    ``g = (f - f_min) / (f_max - f_min) * 255``: Cardot, Marxer and Snozzi, EPFL
    cornea report, equation 1. Intensities of different images can no longer be
    compared afterwards; a constant image becomes 0.

    Examples
    --------
    >>> stretch_histogram([[10, 20], [30, 20]]).tolist()
    [[0, 128], [255, 128]]
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    scale = 255 / (high - low) if high > low else 0.0
    return np.rint((values - low) * scale).astype(np.uint8)
