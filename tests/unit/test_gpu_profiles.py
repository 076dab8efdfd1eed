"""Shapes a plan is built for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtfocus.engines.card import EngineCard
from rtfocus.engines.registry import (
    balanced_batch,
    count_tiles,
    find_engine,
    fit_frame,
)
from rtfocus.errors import EngineError
from rtfocus.runtimes.gpu import (
    Gpu,
    engine_inputs,
    pixels_at_once,
)

CLASSIFIER = find_engine("delpnet").card


def restorer(
    condition: list[str] | None = None, tile_px: int = 256, halo_px: int = 32
) -> EngineCard:
    """Return the card of a restorer with tiles of 256 px and a halo of 32 px."""
    card = CLASSIFIER.model_dump(exclude_unset=True)
    card.update(
        kind="restorer",
        input={
            "name": "tiles",
            "tile_px": tile_px,
            "halo_px": halo_px,
            "multiple_px": 16,
        },
        output={"name": "restored"},
    )
    card.pop("background", None)
    if condition is not None:
        card["condition"] = {"name": "known", "entries": condition}
    return EngineCard.model_validate(card)


@pytest.mark.parametrize("frame", [(512, 512), (1080, 1440), (2048, 2048), (90, 90)])
def test_a_classifier_sees_the_padded_frame_alone(frame: tuple[int, int]) -> None:
    assert CLASSIFIER.input is not None
    shapes = engine_inputs(CLASSIFIER, frame)["tiles"]
    whole = (1, 1, *fit_frame(CLASSIFIER.input, frame).padded)
    assert (shapes.smallest, shapes.usual, shapes.largest) == (whole, whole, whole)


def test_a_restorer_sees_tiles_in_batches_with_their_conditions() -> None:
    inputs = engine_inputs(restorer(["sampling", "optics_known"]), (2048, 2048))
    # 11 tiles that own 192 px each cover 2048 px: 121 tiles in 4 batches.
    assert inputs["tiles"].largest == (31, 1, 256, 256)
    assert inputs["known"].largest == (31, 2)
    assert all(shapes.smallest[0] == 1 for shapes in inputs.values())
    assert all(shapes.usual == shapes.largest for shapes in inputs.values())


def test_small_tiles_come_in_as_many_as_keep_a_gpu_busy() -> None:
    shapes = engine_inputs(restorer(tile_px=64, halo_px=16), (2048, 2048))["tiles"]
    # 64 x 64 tiles that own 32 px each: 8 batches rather than 128.
    assert shapes.largest == (512, 1, 64, 64)
    few = engine_inputs(restorer(tile_px=64, halo_px=16), (128, 96))["tiles"]
    assert few.largest[0] == 12
    told = engine_inputs(restorer(["optics_known"]), (2048, 2048), tiles_per_batch=9)
    assert {shapes.largest[0] for shapes in told.values()} == {9}


def test_a_frame_of_one_tile_is_a_batch_of_one() -> None:
    assert engine_inputs(restorer(), (100, 192))["tiles"].largest[0] == 1


def gpu(memory_gb: float) -> Gpu:
    """Return a card of so much memory."""
    return Gpu(0, "a card", (8, 6), int(memory_gb * 2**30))


@pytest.mark.parametrize(
    ("memory_gb", "batch"), [(4, 16), (8, 31), (24, 61), (48, 121), (0.0001, 1)]
)
def test_a_larger_card_sees_more_tiles_at_once(memory_gb: float, batch: int) -> None:
    inputs = engine_inputs(
        restorer(["optics_known"]), (2048, 2048), pixels=pixels_at_once(gpu(memory_gb))
    )
    assert inputs["tiles"].largest[0] == inputs["known"].largest[0] == batch


def test_a_card_that_others_fill_sees_fewer_and_else_always_the_same() -> None:
    card = gpu(16)
    assert pixels_at_once(card, 8 * 2**30) == pixels_at_once(card)
    assert pixels_at_once(card, 7 * 2**30) == pixels_at_once(card) // 2
    assert pixels_at_once(card, 0) == 1


def anywhere() -> EngineCard:
    """Return the card of a restorer whose tiles may have any size."""
    card = restorer(tile_px=64, halo_px=10).model_dump(exclude_unset=True)
    card["input"]["any_size"] = True
    return EngineCard.model_validate(card)


def test_a_frame_is_one_tile_where_card_and_memory_allow_it() -> None:
    def shape(memory_gb: float, told: int | None = None) -> tuple[int, ...]:
        pixels = pixels_at_once(gpu(memory_gb))
        return engine_inputs(anywhere(), (2048, 2040), told, pixels)["tiles"].largest

    # Behind and before it a halo, padded to multiples of 16 px.
    assert shape(24) == (1, 1, 2080, 2064)
    assert shape(8)[2:] == shape(24, 9)[2:] == (64, 64)
    assert shape(24, 9)[0] == 9


def test_a_network_that_is_told_of_its_tile_takes_no_frame_as_one() -> None:
    card = restorer(["optics_known"]).model_dump(exclude_unset=True)
    card["input"]["any_size"] = True
    with pytest.raises(ValueError, match=r"input\.any_size"):
        EngineCard.model_validate(card)


@given(st.integers(1, 5000), st.integers(1, 600))
def test_batches_are_few_and_nearly_equal(tiles: int, most: int) -> None:
    batch = balanced_batch(tiles, most)
    assert 1 <= batch <= most
    batches = -(-tiles // batch)
    assert batches == -(-tiles // most)
    # The last batch lacks at most one tile per batch.
    assert batches * batch - tiles < batches


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_tiles_cover_the_frame_and_no_tile_more(height: int, width: int) -> None:
    card = restorer().input
    assert card is not None
    tiles = count_tiles(card, (height, width))
    assert tiles == len(range(0, height, 192)) * len(range(0, width, 192))


def test_a_method_without_a_network_has_no_profile() -> None:
    card = EngineCard(name="wiener", kind="restorer", implementation="builtin:wiener")
    with pytest.raises(EngineError, match=r"'wiener'.*no network"):
        engine_inputs(card, (512, 512))
