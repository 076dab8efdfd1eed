"""Pool: blurred scenes held in memory, renewed one by one while training goes on.

Which scenes a step sees depends on its number alone. In shards, steps see one part
of the pool each, in turn: processes that share the steps then share the scenes too,
instead of making every scene once per process.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from rtfocus.training.recipe import PoolRecipe

Entry = TypeVar("Entry")


class Pool(Generic[Entry]):
    """The newest scenes.

    Parameters
    ----------
    recipe
        How many there are, how soon the oldest is replaced, in how many shards.
    make
        Makes the scene of a number; called once for each that is needed.
    """

    def __init__(self, recipe: PoolRecipe, make: Callable[[int], Entry]) -> None:
        self._recipe = recipe
        self._make = make
        self._held: dict[int, Entry] = {}

    def at(self, step: int) -> list[Entry]:
        """Return the scenes that a step may draw from, oldest first."""
        first = step // self._recipe.refresh_steps
        newest = range(first, first + self._recipe.entries)
        shards = self._recipe.shards
        numbers = [n for n in newest if n % shards == step % shards]
        self._held = {n: one for n, one in self._held.items() if n in newest}
        for number in numbers:
            if number not in self._held:
                self._held[number] = self._make(number)
        return [self._held[number] for number in numbers]
