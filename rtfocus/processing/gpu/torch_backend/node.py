"""Node: one operator of an ONNX file with its attributes, as torch functions see it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Inputs = list[Tensor | None]
"""Tensors in the operator's order; None: an optional one that is not given."""
Operator = Callable[["Node", Inputs], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of a network."""

    operator: str
    """ONNX name, e.g. ``Conv``."""
    name: str
    """For messages."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def integer(self, name: str, default: int = 0) -> int:
        """Return an integer attribute."""
        return int(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """Return a real attribute."""
        return float(self.attributes.get(name, default))

    def integers(self, name: str, default: list[int]) -> list[int]:
        """Return a list of integers."""
        return [int(value) for value in self.attributes.get(name, default)]

    def text(self, name: str, default: str) -> str:
        """Return a text attribute."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)


def given(inputs: Inputs, place: int) -> Tensor | None:
    """Return an optional input; None where the node has none there."""
    return inputs[place] if place < len(inputs) else None


def needed(inputs: Inputs, place: int = 0) -> Tensor:
    """Return an input that the operator always has."""
    tensor = inputs[place]
    if tensor is None:
        msg = f"input {place} is empty"
        raise ValueError(msg)
    return tensor


def listed(inputs: Inputs, place: int) -> list[int]:
    """Return the values of an input that holds axes or sizes; they lie on the host."""
    return [int(value) for value in needed(inputs, place).flatten().tolist()]
