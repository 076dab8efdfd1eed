"""Engine facts: what ``rtfocus engines info`` shows of an engine, a row each."""

from collections.abc import Iterator

from rtfocus.cli.commands import read_config
from rtfocus.engines.card import EngineCard, verified_file
from rtfocus.engines.registry import FoundEngine, step_um, why_unfit
from rtfocus.engines.spec_steps import Values
from rtfocus.errors import EngineError
from rtfocus.evaluation.contenders import multiply_adds_per_pixel
from rtfocus.runtimes.cpu_backends import BACKENDS
from rtfocus.runtimes.gpu import GPU_BACKENDS

Row = tuple[str, str]
"""Topic and what is said of it."""

VALUES = {
    Values.input: "as those of its input",
    Values.shown: "as those it is shown, so the steps before it are undone",
    Values.own: "on a scale of its own: only for store.restored_dtype: float32",
}


def facts(found: FoundEngine, config: str | None) -> tuple[list[Row], bool]:
    """Describe an engine.

    Parameters
    ----------
    found
        The engine; its files are compared with its card.
    config
        Whose optics it is to fit; None: none are asked for.

    Returns
    -------
    rows
        In the order of reading.
    damaged
        Whether a weights file is not what the card says.
    """
    files, damaged = _files(found)
    rows = [*_what(found), *_tensors(found.card), *files]
    if not damaged:
        rows += _cost(found)
    rows += [*_optics(found.card, config), *_runtimes(found.card)]
    rows += _history(found.card)
    return rows, damaged


def _what(found: FoundEngine) -> Iterator[Row]:
    card = found.card
    yield "name", found.name
    yield "folder", str(found.folder)
    yield "kind", card.kind
    yield "implementation", card.implementation
    if card.description:
        yield "description", card.description


def _tensors(card: EngineCard) -> Iterator[Row]:
    if card.input is not None:
        tiles = card.input
        colour = "grey" if tiles.channels == 1 else "RGB"
        halo = f" with a halo of {tiles.halo_px} px" if tiles.halo_px else ""
        every = "" if card.kind == "restorer" else f" every {tiles.stride_px:g} px"
        yield "sees", f"{colour} tiles of {tiles.tile_px} px{halo}{every}"
        if card.steps is None:
            yield "normalisation", str(card.normalisation.get("name"))
    if card.steps is not None:
        around = {"before it": card.steps.before, "after it": card.steps.after}
        for topic, steps in around.items():
            yield topic, ", ".join(step.id for step in steps) or "nothing"
        yield "its values", VALUES[card.steps.values]
    if card.condition is not None:
        yield "is told", ", ".join(card.condition.entries)
    given = []
    if card.output is not None and card.output.labels:
        given.append(f"{len(card.output.labels)} labels")
    if card.kind != "classifier":
        given.append("restored image")
    if card.kernel_output is not None:
        side = card.kernel_output.size_px
        given.append(f"blur kernel of {side} x {side} px")
    yield "gives", ", ".join(given)
    if card.levels is not None:
        signed = "both sides of focus" if card.levels.signed else "no direction"
        yield (
            "levels",
            f"{card.levels.count} from focus on, {card.levels.step_um:g} um, {signed}",
        )


def _files(found: FoundEngine) -> tuple[list[Row], bool]:
    """Describe every weights file; second: whether one is not in order."""
    rows, damaged = [], False
    for precision in found.card.files:
        try:
            path = verified_file(found.folder, found.card, precision)
            size = path.stat().st_size / 1e6
            said = f"{path.name}, {size:.2f} MB, sha256 as on the card"
        except EngineError as error:
            said, damaged = str(error), True
        rows.append((f"weights {precision}", said))
    return rows, damaged


def _cost(found: FoundEngine) -> Iterator[Row]:
    count = multiply_adds_per_pixel(found)
    if count is not None:
        yield "multiply-adds", f"{count:,.0f} per pixel"


def _optics(card: EngineCard, config: str | None) -> Iterator[Row]:
    if card.optics is None:
        return
    lowest, highest = card.optics.sampling_min, card.optics.sampling_max
    yield "trained for", f"pixels of {lowest:g} to {highest:g} lambda/NA"
    if config is None:
        return
    for channel in read_config(config, None).channels:
        topic = f"fits '{channel.name}'"
        if channel.optics is None:
            yield topic, "unknown: the channel has no optics"
            continue
        why = why_unfit(card, channel.optics)
        step = step_um(card, channel.optics)
        yield topic, f"yes, levels of {step:.3g} um" if why is None else f"no: {why}"


def _runtimes(card: EngineCard) -> Iterator[Row]:
    if not card.is_network:
        yield "runs on", "any CPU: no network"
        return
    for cpu in BACKENDS:
        yield f"on {cpu.name}", cpu.why_unavailable() or "yes"
    if card.sees_image_alone:
        yield "on a GPU", "no: a model of bioimage.io"
        return
    for gpu in GPU_BACKENDS:
        yield f"on {gpu.name}", gpu.why_unavailable(None) or "yes, given a GPU"


def _history(card: EngineCard) -> Iterator[Row]:
    for title, entries in (("trained", card.trained), ("figures", card.figures)):
        for key, value in entries.items():
            yield f"{title}: {key}", str(value)
