"""Profiles: the shapes a plan is built for, from an engine's card and the camera.

Sides are fixed by the camera's frame, only the batch is dynamic: kernels are
chosen for the shapes that occur, and one plan still serves the last, smaller
batch of a frame.
"""

from math import ceil

from rtfocus.errors import EngineError
from rtfocus.processing.classifier import fit_frame
from rtfocus.processing.engines.card import EngineCard
from rtfocus.processing.gpu.seam import Shape, ShapeRange

TILES_PER_BATCH = 32
"""Most tiles per batch: beyond it a GPU is busy and memory only grows."""


def engine_inputs(card: EngineCard, frame: tuple[int, int]) -> dict[str, ShapeRange]:
    """Return the inputs of an engine that takes whole frames, one at a time.

    Parameters
    ----------
    card
        Of a fully convolutional classifier.
    frame
        Height and width of the camera's frame in pixels.

    Raises
    ------
    EngineError
        If the card describes no input.
    """
    if card.input is None:
        msg = f"engine '{card.name}' ({card.implementation}) is no network to build"
        raise EngineError(msg)
    height, width = fit_frame(card.input, frame).padded
    shape = (1, card.input.channels, height, width)
    return {card.input.name: ShapeRange(shape, shape, shape)}


def balanced_batch(tiles: int, most: int = TILES_PER_BATCH) -> int:
    """Return the batch that cuts a frame's tiles into the fewest, nearly equal parts.

    Examples
    --------
    >>> balanced_batch(121), balanced_batch(9)
    (31, 9)
    """
    return ceil(tiles / ceil(tiles / most))


def batched(largest: Shape) -> ShapeRange:
    """Return the shapes from a batch of one to the largest, which is the usual.

    Examples
    --------
    >>> batched((31, 1, 256, 256)).smallest
    (1, 1, 256, 256)
    """
    return ShapeRange((1, *largest[1:]), largest, largest)
