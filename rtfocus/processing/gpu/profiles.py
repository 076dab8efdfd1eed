"""Profiles: the shapes a plan is built for, from an engine's card and the camera.

Sides are fixed by the camera's frame, only the batch is dynamic: kernels are
chosen for the shapes that occur, and one plan still serves the last, smaller
batch of a frame.
"""

from math import ceil

from rtfocus.errors import EngineError
from rtfocus.processing.engines.card import EngineCard
from rtfocus.processing.engines.card_sections import InputCard
from rtfocus.processing.frame_fit import fit_frame
from rtfocus.processing.gpu.seam import Shape, ShapeRange

TILES_PER_BATCH = 32
"""Most tiles per batch: beyond it a GPU is busy and memory only grows."""


def engine_inputs(card: EngineCard, frame: tuple[int, int]) -> dict[str, ShapeRange]:
    """Return the shapes of every input of an engine for a camera.

    Classifiers and joint engines take whole frames, one at a time; restorers take
    the frame's tiles in batches.

    Parameters
    ----------
    card
        Of a network.
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
    if card.kind == "restorer":
        batch = balanced_batch(count_tiles(card.input, frame))
        sides = (card.input.tile_px, card.input.tile_px)
    else:
        batch, sides = 1, fit_frame(card.input, frame).padded
    inputs = {card.input.name: batched((batch, card.input.channels, *sides))}
    if card.condition is not None:
        inputs[card.condition.name] = batched((batch, len(card.condition.entries)))
    return inputs


def count_tiles(card: InputCard, frame: tuple[int, int]) -> int:
    """Return how many tiles a frame is cut into, each owning all but its halo."""
    own_px = card.tile_px - 2 * card.halo_px
    return ceil(frame[0] / own_px) * ceil(frame[1] / own_px)


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
