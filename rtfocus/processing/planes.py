"""Planes: frames as the batches that networks of one or three channels take."""

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


def to_planes(signal: Image, channels: int) -> Image:
    """Arrange a frame as the images of a batch.

    Parameters
    ----------
    signal
        Axes (y, x) or (y, x, colour).
    channels
        Of the network. 1: colours are images of their own; 3: a grey frame is
        shown three times.

    Returns
    -------
    Image
        Axes (image, channel, y, x); a view where it can be.
    """
    if signal.ndim == 2:
        return np.broadcast_to(signal, (1, channels, *signal.shape))
    colours = np.moveaxis(signal, -1, 0)
    return colours[:, None] if channels == 1 else colours[None]


def from_planes(planes: Image, shape: tuple[int, ...]) -> Image:
    """Undo `to_planes`; a grey frame is the mean of what its channels became."""
    if len(shape) == 2:
        grey = planes[0, 0] if planes.shape[1] == 1 else planes[0].mean(axis=0)
        return np.asarray(grey)
    colours = planes[:, 0] if planes.shape[1] == 1 else planes[0]
    return np.moveaxis(colours, 0, -1)


def paired_planes(signal: Image, out: Image) -> list[tuple[Image, Image]]:
    """Pair up the 2-D planes of input and output: one, or one per colour."""
    if signal.ndim == 2:
        return [(signal, out)]
    return [(signal[..., c], out[..., c]) for c in range(signal.shape[-1])]
