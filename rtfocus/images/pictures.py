"""Pictures: PNG, JPEG and BMP through Pillow."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rtfocus.errors import InputError
from rtfocus.images.series import ImageSeries, native_dtype

# Modes that NumPy sees as grey levels or RGB; everything else is converted.
_CONVERT = {"1": "L", "P": "RGB", "LA": "L", "RGBA": "RGB", "CMYK": "RGB", "PA": "RGB"}


def read_picture(path: Path) -> list[ImageSeries]:
    """Open one picture; alpha is dropped, palettes become RGB."""
    plane = _load(path)
    return [
        ImageSeries(
            name=path.stem,
            path=path,
            files=(path,),
            sizes={"t": 1, "c": 1, "z": 1},
            shape=plane.shape,
            dtype=native_dtype(plane.dtype),
            read_plane=lambda _t, _c, _z: _load(path),
        )
    ]


def _load(path: Path) -> NDArray[np.generic]:
    try:
        with Image.open(path) as picture:
            mode = _CONVERT.get(picture.mode)
            pixels = np.asarray(picture.convert(mode) if mode else picture)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        msg = f"'{path}' cannot be read as a picture: {error}"
        raise InputError(msg) from error
    # 16-bit PNGs arrive as int32 ("I"); they hold 0..65535.
    if pixels.dtype.kind == "i" and pixels.min() >= 0 and pixels.max() <= 0xFFFF:
        return pixels.astype(np.uint16)
    return pixels
