"""Opening: from an engine's folder to a network that is ready for one shape."""

import logging

from rtfocus.config.processor import ProcessingConfig
from rtfocus.errors import EngineError
from rtfocus.processing.engines.backends import CpuPrecision, Request, choose_backend
from rtfocus.processing.engines.card import EngineCard, verified_file
from rtfocus.processing.engines.card_sections import InputCard, Precision
from rtfocus.processing.engines.inputs import Inputs, Shape
from rtfocus.processing.engines.registry import FoundEngine
from rtfocus.processing.engines.seam import Engine

logger = logging.getLogger(__name__)


def open_engine(
    found: FoundEngine,
    settings: ProcessingConfig,
    *,
    shape: Shape | None,
    outputs: tuple[str, ...],
    threads: int = 1,
) -> Engine:
    """Open an engine on the backend and in the precision of the config.

    Parameters
    ----------
    found
        Engine with its card.
    settings
        ``backend`` and ``precision`` count here.
    shape
        (N, C, H, W) of the tiles; None: any, slower.
    outputs
        Output tensors that are wanted.
    threads
        Of the network.

    Raises
    ------
    EngineError
        If it is no network, its weights are damaged, or it cannot be loaded.
    """
    card = found.card
    tiles = input_of(card)
    condition = card.condition
    weights, precision = choose_weights(card, settings.precision)
    return choose_backend(settings.backend).open_engine(
        Request(
            model=verified_file(found.folder, card, weights),
            inputs=Inputs(
                engine=found.name,
                tiles=tiles.name,
                shape=shape,
                condition=None if condition is None else condition.name,
                entries=0 if condition is None else len(condition.entries),
            ),
            outputs=outputs,
            precision=precision,
            threads=threads,
        )
    )


def input_of(card: EngineCard) -> InputCard:
    """Return the input every network has; EngineError for classical methods."""
    if card.input is None:
        msg = (
            f"engine '{card.name}' is {card.implementation}: it has no network to open"
        )
        raise EngineError(msg)
    return card.input


def choose_weights(card: EngineCard, wanted: str) -> tuple[Precision, CpuPrecision]:
    """Return the weights file to run and what to compute in.

    Parameters
    ----------
    card
        Of the engine; where it lacks the file that is wanted, fp32 runs instead.
    wanted
        ``processing.precision``.
    """
    files: dict[str, Precision] = {"fp16": "fp16", "int8": "int8"}
    if wanted in files:
        if files[wanted] in card.files:
            return files[wanted], "auto"
        logger.warning("engine '%s' has no %s weights: fp32 runs", card.name, wanted)
    computed: dict[str, CpuPrecision] = {"f32": "f32", "bf16": "bf16"}
    return "fp32", computed.get(wanted, "auto")


def runs_on(card: EngineCard, engine: Engine, wanted: str) -> str:
    """Say what a network runs on, e.g. ``openvino bf16`` or ``openvino int8 bf16``.

    Parameters
    ----------
    card, engine
        Of the network.
    wanted
        ``processing.precision`` it was opened with.
    """
    weights, _ = choose_weights(card, wanted)
    parts = [engine.backend, weights, engine.precision]
    return " ".join(part for part in parts if part != "fp32")
