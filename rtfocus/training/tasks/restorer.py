"""Restorer: what engines from a blurred tile to a restored one have in common."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from rtfocus.optics.normalisation import PercentileRange
from rtfocus.training.data.pair_recipe import PairsRecipe
from rtfocus.training.task import Graph

# Optics drawn in training lie within these factors of the reference sampling.
_SAMPLING_RANGE = (0.6, 1.6)


def restorer_graph(network: nn.Module, multiple_px: int) -> Graph:
    """Return the graph of a network from `tiles` to `restored`, nothing else given."""
    return Graph(
        network,
        {"tiles": torch.zeros(2, 1, 16 * multiple_px, 24 * multiple_px)},
        ("restored",),
        {"tiles": {0: "number", 2: "height", 3: "width"}},
    )


def restorer_card(
    pairs: PairsRecipe,
    description: str,
    *,
    tile_px: int,
    halo_px: int,
    multiple_px: int,
) -> dict[str, Any]:
    """Return the card of a restorer that is told nothing but its tile.

    Parameters
    ----------
    pairs
        Data it was trained on: optics and levels.
    description
        One sentence.
    tile_px
        Side of a tile, halo included.
    halo_px
        Border on each side that neighbouring tiles share.
    multiple_px
        Sides of tiles must be multiples of it.
    """
    low, high = (factor * pairs.reference.sampling for factor in _SAMPLING_RANGE)
    normalisation = asdict(PercentileRange())
    del normalisation["sample_px"]
    return {
        "kind": "restorer",
        "implementation": "onnx",
        "description": description,
        "input": {
            "name": "tiles",
            "channels": 1,
            "tile_px": tile_px,
            "halo_px": halo_px,
            "multiple_px": multiple_px,
        },
        "output": {"name": "restored"},
        "levels": {"step_um": pairs.level_step_um, "count": 11, "signed": True},
        "normalisation": {"name": "percentile_range", **normalisation},
        "optics": {
            "sampling_min": round(low, 3),
            "sampling_max": round(high, 3),
            "reference": asdict(pairs.reference),
        },
    }


def gain_db(blurred: Tensor, restored: Tensor, sharp: Tensor) -> Tensor:
    """Return by how many dB a batch came nearer to its target."""
    before = (blurred - sharp).square().mean()
    after = (restored.detach() - sharp).square().mean()
    return 10 * torch.log10((before + 1e-9) / (after + 1e-9))
