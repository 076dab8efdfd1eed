"""Deviation: fit what a card states of its defocus, and check it on kinds left out.

The frames are those of `bench.evidence`: sharp images that recipes train on and drawn
specimens, blurred and photographed at random, their optics untold. And once more told:
by pupils of optics drawn from `OPTICS`. The frames are classified by the code that
people use, and the three coefficients of `rtfocus.engines.fitted.DeviationCard` fitted
so that the deviation covers 68 % of the errors and its double 95 %, every kind alike.
Printed are the shares covered as the card states it now, as fitted, and of kinds that
were left out of the fit, a quarter at a time. The set ``unseen`` is not looked at.

``python -m bench.deviation engines/delpnet --data-folder images`` prints; ``--write``
writes the card too; ``rtfocus evaluate delpnet --blind --data unseen`` shows what it
does to kinds that nothing was fitted to.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import minimize

from bench.evidence import Image, defocus_errors, lights
from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.engines.card import CARD_NAME
from rtfocus.engines.fitted import DeviationCard, stated_variance
from rtfocus.engines.registry import step_um
from rtfocus.evaluation.contenders import Contender, contender
from rtfocus.evaluation.samples import (
    BBBC006,
    STEP_UM,
    DataSet,
    Sample,
    draw_camera,
    shown,
)
from rtfocus.offline import ImageProcessor
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf

Floats = NDArray[np.float64]

_SEED = 650
_FARTHEST, _IN_FOCUS = 10.0, 0.12
"""Levels, and the share of told frames that are in focus."""
_TOLD = 2
"""Told frames of every sharp image."""
_PARTS = 4
COVERED = 0.68, 0.95
"""By the deviation and its double, if it is honest."""


def _optics(aperture: float, sampling: float, spherical: float) -> OpticalSystem:
    aberrations = Aberrations(spherical_waves=spherical)
    pixel_um = sampling * 0.52 / aperture
    return OpticalSystem(aperture, 520.0, pixel_um, aberrations=aberrations)


OPTICS = (
    BBBC006,
    _optics(0.4, 0.38, -0.3),
    _optics(0.6, 0.5, 0.2),
    _optics(0.75, 0.65, -0.1),
    _optics(0.5, 0.75, -0.45),
)
"""What is told: a sampling of 0.38 to 0.75, both signs of the aberration."""


class Errors(NamedTuple):
    """Tiles of all frames, in levels."""

    kind: NDArray[np.str_]
    level: Floats
    """Defocus found."""
    spread: Floats
    """Its deviation by the labels."""
    error: Floats
    """Found minus true; of distances where the side cannot be known."""


def draw_told(kind: str, light: Image, rng: np.random.Generator) -> Iterator[Sample]:
    """Yield an image as optics of `OPTICS` show it; its group is their number."""
    for _ in range(_TOLD):
        number = int(rng.integers(len(OPTICS)))
        optics = OPTICS[number]
        level = float(rng.uniform(-_FARTHEST, _FARTHEST))
        level *= rng.random() > _IN_FOCUS
        defocus_um = level * STEP_UM * optics.defocus_unit_um / BBBC006.defocus_unit_um
        camera, counts = draw_camera(rng)
        seen = np.clip(blur(light, compute_psf(optics, defocus_um)), 0, 1)
        yield Sample(
            kind,
            camera.expose(seen, rng),
            None,
            (defocus_um, defocus_um),
            str(number),
            counts,
            sided=True,
        )


def errors_of(folder: str, images: Path, rounds: int, *, blind: bool) -> Errors:
    """Classify all frames by an engine, told its optics or not.

    Parameters
    ----------
    folder
        Of the engine, or its name.
    images
        Folder of the published images.
    rounds
        How often each image is shown.
    blind
        Nothing is told.
    """
    one = replace(contender(folder, classifier=folder, blind=blind), method="none")
    kinds: list[str] = []
    found = [np.zeros((3, 0))]
    frames: dict[tuple[int, str], list[tuple[str, Sample]]] = {}
    for number in range(rounds):
        rng = np.random.default_rng(_SEED + number)
        for kind, light in lights(images, rng):
            samples = shown(kind, kind, light, rng) if blind else None
            for sample in samples or draw_told(kind, light, rng):
                if sample.defocus_um is not None:
                    optics = 0 if blind else int(sample.group)
                    key = optics, f"{sample.pixels.shape} {sample.pixels.dtype}"
                    frames.setdefault(key, []).append((kind, sample))
    # One start of the processor for all frames of a size in the same optics.
    for (number, _), alike in sorted(frames.items(), key=lambda item: item[0]):
        for kind, tiles in _classified(one, OPTICS[number], alike):
            kinds += [kind] * tiles.shape[1]
            found.append(tiles)
    return Errors(np.array(kinds), *np.concatenate(found, axis=1))


def _classified(
    one: Contender, optics: OpticalSystem, frames: list[tuple[str, Sample]]
) -> Iterator[tuple[str, Floats]]:
    assert one.engine is not None
    step = step_um(one.engine.card, optics, blind=one.blind)
    config = one.config(DataSet("deviation", "", optics, 0.0, ()), threads=1)
    with ImageProcessor(config) as processor:
        for kind, sample in frames:
            defocus = processor.classify(sample.pixels).defocus
            assert defocus is not None
            yield kind, defocus_errors(sample, defocus, step)


def covered(fit: DeviationCard, errors: Errors, wanted: NDArray[np.bool_]) -> Floats:
    """Return the shares that the deviation and its double cover, kinds alike."""
    stated = np.sqrt(stated_variance(fit, errors.level, errors.spread))
    weights = _weights(errors.kind) * wanted
    inside = [np.abs(errors.error) <= times * stated for times in (1, 2)]
    return np.array([np.average(one, weights=weights) for one in inside])


def fitted(errors: Errors, wanted: NDArray[np.bool_]) -> DeviationCard:
    """Return the coefficients that cover what they should of some tiles.

    Those of least pinball loss of both quantiles, in logarithms: the scale of an
    error does not weigh.
    """
    weights = (_weights(errors.kind) * wanted)[wanted]
    level, spread = errors.level[wanted], errors.spread[wanted]
    size = np.log(np.abs(errors.error[wanted]) + 0.02)
    names = list(DeviationCard.model_fields)

    def card(logarithms: Floats) -> DeviationCard:
        return DeviationCard(**dict(zip(names, np.exp(logarithms), strict=True)))

    def loss(logarithms: Floats) -> float:
        stated = 0.5 * np.log(stated_variance(card(logarithms), level, spread) + 1e-4)
        total = 0.0
        for times, share in zip((1, 2), COVERED, strict=True):
            beyond = size - stated - np.log(times)
            pinball = np.maximum(share * beyond, (share - 1) * beyond)
            # The rare errors tell of the double.
            total += times**3 * float(weights @ pinball)
        return total

    starts = np.full(3, -1.0), np.array([0.0, -3.0, -3.0])
    ends = [minimize(loss, one, method="Nelder-Mead") for one in starts]
    best = card(min(ends, key=lambda end: float(end.fun)).x)
    return DeviationCard(
        **{name: round(value, 4) for name, value in best.model_dump().items()}
    )


def left_out(errors: Errors) -> Floats:
    """Return what fits to the other kinds cover of each quarter of them."""
    names = np.unique(errors.kind)
    parts = np.random.default_rng(0).permutation(len(names)) % _PARTS
    part = parts[np.searchsorted(names, errors.kind)]
    shares = [
        covered(fitted(errors, part != one), errors, part == one)
        for one in range(_PARTS)
    ]
    kinds = np.bincount(parts, minlength=_PARTS)
    return np.asarray(np.average(shares, axis=0, weights=kinds))


def _weights(kinds: NDArray[np.str_]) -> Floats:
    _, place, count = np.unique(kinds, return_inverse=True, return_counts=True)
    return np.asarray(1 / count[place])


def with_deviation(text: str, fits: dict[str, DeviationCard]) -> str:
    """Return a card's text with another section ``deviation``, nothing else changed."""
    section = ["deviation:"]
    for name, fit in fits.items():
        values = yaml.safe_dump(
            fit.model_dump(), default_flow_style=True, sort_keys=False, width=88
        )
        section.append(f"  {name}: {values.strip()}")
    kept, inside = [], False
    for line in text.splitlines():
        inside = line == "deviation:" or (inside and line.startswith(" "))
        if not inside:
            kept.append(line)
    heads = ("evidence:", "figures:")
    places = [place for place, line in enumerate(kept) if line in heads]
    place = min(places, default=len(kept))
    return "\n".join([*kept[:place], *section, *kept[place:]]) + "\n"


def main() -> None:
    """Classify, fit, print; write the card where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, help="folder of a classifier")
    parser.add_argument("--data-folder", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=2, help="of all photographs")
    parser.add_argument("--only", choices=("told", "blind"))
    parser.add_argument("--write", action="store_true", help="into the card")
    options = parser.parse_args()
    path = options.engine / CARD_NAME
    text = path.read_text(encoding="utf-8")
    fits = {
        name: DeviationCard.model_validate(values)
        for name, values in yaml.safe_load(text).get("deviation", {}).items()
    }
    for name in ("told", "blind") if options.only is None else (options.only,):
        errors = errors_of(
            str(options.engine),
            options.data_folder,
            options.rounds,
            blind=name == "blind",
        )
        everything = np.ones(len(errors.kind), np.bool_)
        # Without a fit the spread of the labels is what is stated.
        spread = errors._replace(level=np.zeros_like(errors.level))
        alone = DeviationCard(spread=1.0, floor=0.0, distance=0.0)
        rows = {"the labels' spread": covered(alone, spread, everything)}
        if name in fits:
            rows["the card"] = covered(fits[name], errors, everything)
        fits[name] = fitted(errors, everything)
        rows["fitted"] = covered(fits[name], errors, everything)
        rows["kinds left out"] = left_out(errors)
        kinds = len(np.unique(errors.kind))
        print(f"{name}: {len(errors.kind)} tiles of {kinds} kinds; {fits[name]!r}")
        for row, (once, twice) in rows.items():
            print(f"  {row}: {once:.3f} / {twice:.3f}", flush=True)
    if options.write:
        path.write_text(with_deviation(text, fits), encoding="utf-8")


if __name__ == "__main__":
    main()
