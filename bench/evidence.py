"""Evidence: fit how far the corrections of a blind engine are trusted.

Sharp images that recipes train on, shown smaller and larger than they were taken, and
drawn specimens, bright, absorbing and as relief, are blurred and photographed at random
(as the set ``unseen``, whose kinds are left out here) and restored by the loop's code,
the optics untold. A small function from `rtfocus.engines.fitted.measures` to the
share of the correction is fitted to what that share does to the error: decibels gained
count, decibels lost count several times, and frames in focus are to stay as they are.
Real pairs of BBBC006 (rows a02 to a18) weigh more, being few. The deviation that is
stated of a defocus is widened by one factor until it covers the errors made there.
An ``expected_error`` of the card holds for what the old evidence let through: a new
one takes it out, and ``python -m bench.expected_error`` fits it anew.

``python -m bench.evidence engines/rtfocus-2 --data-folder images`` writes the card;
``rtfocus evaluate rtfocus-2 --blind --data unseen`` shows what it does. Every round of
photographs is kept (``--keep``): the same command goes on where a killed one was.
Networks run in float32, so that the card does not depend on the CPU it was made on.
"""

import argparse
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.engines.card import CARD_NAME
from rtfocus.engines.fitted import (
    CELL_PX,
    FARTHEST,
    DeviationCard,
    measures,
    stated_variance,
)
from rtfocus.engines.registry import step_um
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.samples import (
    BBBC006,
    GREEN,
    IN_FOCUS,
    DataSet,
    Sample,
    as_light,
    shown,
    windows,
)
from rtfocus.evaluation.scores import specimen_tiles
from rtfocus.frame import BACKGROUND, DefocusMap
from rtfocus.images.reading import open_images
from rtfocus.offline import ImageProcessor
from rtfocus.optics.normalisation import PercentileRange, luminance
from rtfocus.specimens import SPECIMEN_KINDS, draw_specimen, draw_stained

Image = NDArray[np.float32]

_SEED = 600
_SIDE_PX = 288
_LEAST_PX = 150
# How much larger or smaller than they were taken sharp images are shown.
_ZOOM = (0.6, 3.2)
# The file of a kind that is left out, see `rtfocus.evaluation.samples`.
_LEFT_OUT = "cell_dna_mts_actin"
_PAIRS = ("a0[2-9]*", "a1[0-8]*")
_OPEN = 4
_STRIDE = 2


@dataclass(frozen=True, slots=True)
class Restored:
    """What one frame tells; sums over cells are shares of the squared range."""

    kind: str
    in_focus: bool
    before: Image
    """Squared error of the frame, axes (row, column) of blocks of cells."""
    common: Image
    """Product of error and correction."""
    correction: Image
    """Square of the correction."""
    measured: Image
    """See `measures`; axes (measure, row, column)."""
    unit: float
    """Turns the sums into squares of the frame's own range, summed over pixels."""
    tiles: NDArray[np.float64]
    """Of tiles that hold a specimen, in levels: defocus found, its deviation by the
    labels, and found minus true; axes (value, tile). None where nobody knows it."""


def keep(path: Path, frames: Sequence[Restored]) -> None:
    """Write frames to a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    arrays: dict[str, Any] = {
        f"{number} {name}": np.asarray(getattr(one, name))
        for number, one in enumerate(frames)
        for name in Restored.__slots__
    }
    with partial.open("wb") as file:
        np.savez(file, count=np.asarray(len(frames)), **arrays)
    os.replace(partial, path)


def kept(path: Path) -> list[Restored]:
    """Read the frames of a file that `keep` wrote."""
    with np.load(path) as held:
        return [
            Restored(
                **{
                    name: array if array.ndim else array.item()
                    for name in Restored.__slots__
                    for array in (held[f"{number} {name}"],)
                }
            )
            for number in range(int(held["count"]))
        ]


class Restorer:
    """Restores frames blind, by an engine whose corrections are not weighed yet."""

    def __init__(self, folder: Path) -> None:
        self._engine = contender(str(folder), classifier=str(folder), blind=True)
        if self._engine.engine is None:
            msg = f"'{folder}' is no engine"
            raise SystemExit(msg)
        self._step_um = step_um(self._engine.engine.card, BBBC006, blind=True)
        self._open: OrderedDict[object, ImageProcessor] = OrderedDict()
        self._range = PercentileRange(
            **{
                key: value
                for key, value in self._engine.engine.card.normalisation.items()
                if key != "name"
            }
        )

    def restored(self, kind: str, sample: Sample) -> Restored:
        """Restore one frame and compare."""
        result = self._processor(sample).restore(sample.pixels)
        if result.restored is None or result.defocus is None or sample.sharp is None:
            msg = f"'{sample.name}' was not restored"
            raise SystemExit(msg)
        frame, after, truth = (
            luminance(np.asarray(image, np.float32))
            for image in (sample.pixels, result.restored, sample.sharp)
        )
        dark, scale = self._range.fit(frame)
        change = (after - frame) / np.float32(scale)
        normalised = (frame - np.float32(dark)) / np.float32(scale)
        measured = measures(normalised, change, result.defocus, self._step_um)
        full = np.iinfo(sample.pixels.dtype).max  # type: ignore[type-var]
        change = np.minimum(after, full) - frame
        error, unit = truth - frame, sample.data_range**2 * frame.size
        return Restored(
            kind,
            IN_FOCUS in sample.name,
            _sums(error * error) / unit,
            _sums(error * change) / unit,
            _sums(change * change) / unit,
            measured[:, ::_STRIDE, ::_STRIDE],
            unit / float(scale) ** 2,
            defocus_errors(sample, result.defocus, self._step_um),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _processor(self, sample: Sample) -> ImageProcessor:
        """Keep the networks of the last sizes and types open."""
        kind = (sample.pixels.shape, sample.pixels.dtype.str)
        if kind not in self._open:
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)[1].close()
            data = DataSet("evidence", "", BBBC006, 0.0, ())
            config = self._engine.config(data, threads=1, precision="f32")
            self._open[kind] = ImageProcessor(config)
        self._open.move_to_end(kind)
        return self._open[kind]


def defocus_errors(
    sample: Sample, found: DefocusMap, step_um: float
) -> NDArray[np.float64]:
    """Return defocus, its deviation by the labels and its error, see `Restored.tiles`.

    Parameters
    ----------
    sample
        A frame.
    found
        In it.
    step_um
        Defocus between two levels.
    """
    if sample.defocus_um is None or found.uncertainty_um is None:
        return np.zeros((3, 0))
    wanted = specimen_tiles(
        luminance(sample.pixels.astype(np.float32)), found.grid, quantum=1.0
    )
    wanted &= found.level != BACKGROUND
    defocus, spread = found.defocus_um[wanted], found.uncertainty_um[wanted]
    true_um = sum(sample.defocus_um) / 2
    one_sided = sample.even or not found.grid.signed
    error = abs(defocus) - abs(true_um) if one_sided else defocus - true_um
    return np.stack([defocus, spread, error], dtype=np.float64) / step_um


def _sums(image: Image) -> Image:
    """Sum over blocks of 2 x 2 cells, for which the measures of one cell stand."""
    block = CELL_PX * _STRIDE
    rows, columns = (-(-side // block) for side in image.shape)
    whole = np.zeros((rows * block, columns * block))
    whole[: image.shape[0], : image.shape[1]] = image
    sums = whole.reshape(rows, block, columns, block).sum(axis=(1, 3))
    return np.asarray(sums, dtype=np.float32)


def lights(folder: Path, rng: np.random.Generator) -> Iterator[tuple[str, Image]]:
    """Yield kind and light, 0 to 1, of sharp photographs and of drawn specimens."""
    for path in sorted((folder / "in_focus").rglob("*.tif")):
        if _LEFT_OUT in path.name:
            continue
        for series in open_images(path):
            for index in series.indices():
                plane = luminance(series.read(**index).astype(np.float32))
                for light in _photographed(plane, rng):
                    yield path.stem, light
    yield from _drawn(rng)


def _photographed(plane: Image, rng: np.random.Generator) -> Iterator[Image]:
    for factor in (1.0, float(np.exp(rng.uniform(*np.log(_ZOOM))))):
        image = plane
        if factor > 1:
            image = zoom(plane, factor, order=3)
        elif factor < 1:
            image = zoom(gaussian_filter(plane, 0.5 / factor), factor, order=1)
        if min(image.shape) < _LEAST_PX:
            continue
        for number, window in enumerate(windows(image)):
            is_flat = window.max() <= np.percentile(window, 0.5)
            if not is_flat and (number == 0 or factor == 1.0):
                yield as_light(window)


def _drawn(rng: np.random.Generator) -> Iterator[tuple[str, Image]]:
    shape = (_SIDE_PX, _SIDE_PX)
    for kind in SPECIMEN_KINDS:
        for number in range(4):
            scale = float(np.exp(rng.uniform(np.log(0.5), np.log(2.2))))
            light = draw_specimen(kind, shape, rng, scale=scale)
            light /= light.max()
            yield f"drawn {kind}", light
            if number < 2:
                absorbing = 1 - np.float32(rng.uniform(0.3, 0.95)) * light
                yield f"absorbing {kind}", absorbing
                continue
            edges = light - gaussian_filter(light, rng.uniform(1, 4))
            edges *= rng.uniform(0.2, 0.5) / np.abs(edges).max()
            yield f"relief {kind}", np.clip(0.5 + edges, 0, 1)
    for _ in range(3):
        yield "drawn stained", (draw_stained(shape, rng) @ GREEN).astype(np.float32)


def real_pairs(folder: Path) -> Iterator[Sample]:
    """Yield the BBBC006 pairs of the training rows, out of focus and in it."""
    for pattern in _PAIRS:
        for path in sorted((folder / "bbbc006_pairs/sharp").glob(pattern)):
            other = folder / "bbbc006_pairs/defocus10um" / path.name
            sharp, blurred = (open_images(one)[0].read() for one in (path, other))
            yield Sample(path.name, blurred, sharp, None, "", 255.0)
            yield Sample(f"{path.name} {IN_FOCUS}", sharp, sharp, None, "", 255.0)


# What decibels lost and frames in focus weigh beside decibels gained.
_LOSS = 4.0
_IN_FOCUS = 0.5
# What is hardly blurred weighs more: there a correction spoils most. 38 dB.
_HARDLY = 10**-3.8
_NEAR_WEIGHT = 3.0
_PAIR_WEIGHT = 4.0
_PAIR_KIND = "bbbc006"
# Squared errors, in shares of the range, below which decibels do not count.
_ENOUGH, _ENOUGH_IN_FOCUS = 1e-6, 1e-5
NOISE = 0.15
"""Of the measures, in units of their spread, while a function is fitted."""
_LEAST_VARIANCE = 1e-4  # of a defocus, in squared levels
_HIDDEN = (32, 16)


class Fitted(nn.Module):
    """From measures, shape (cell, measure), to one number."""

    def __init__(self, middle: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.middle, self.spread = middle, spread
        widths = (len(middle), *_HIDDEN, 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, measured: Tensor) -> Tensor:
        """Return shape (cell,)."""
        value = ((measured - self.middle) / self.spread).clamp(-FARTHEST, FARTHEST)
        for number, layer in enumerate(self.layers):
            value = layer(functional.relu(value) if number else value)
        return value[:, 0]

    def card(self) -> dict[str, Any]:
        """Return the section of the engine's card."""

        def plain(values: Tensor) -> Any:
            return np.round(values.detach().double().numpy(), 4).tolist()

        return {
            "middle": plain(self.middle),
            "spread": plain(self.spread),
            "layers": [
                {"weights": plain(one["weight"]), "bias": plain(one["bias"])}
                for one in (layer.state_dict() for layer in self.layers)
            ],
        }


def fit(frames: Sequence[Restored], steps: int) -> Fitted:
    """Fit the log-odds of the share applied to all frames at once."""
    torch.manual_seed(0)
    cells = [
        torch.cat([torch.from_numpy(getattr(one, name).ravel()) for one in frames])
        for name in ("before", "common", "correction")
    ]
    measured = torch.cat(
        [
            torch.from_numpy(one.measured.reshape(len(one.measured), -1)).T
            for one in frames
        ]
    )
    number = torch.repeat_interleave(
        torch.arange(len(frames)), torch.tensor([one.before.size for one in frames])
    )
    in_focus = torch.tensor([one.in_focus for one in frames])
    weights = torch.tensor([_weight(one) for one in frames])
    odds = Fitted(measured.mean(dim=0), measured.std(dim=0) + 1e-3)
    optimiser = torch.optim.AdamW(odds.parameters(), 1e-2, weight_decay=1e-2)
    course = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    blank = torch.zeros(len(frames))
    before = blank.index_add(0, number, cells[0])
    for _ in range(steps):
        noise = NOISE * torch.randn_like(measured) * odds.spread
        share = torch.sigmoid(odds(measured + noise))
        error = cells[0] - 2 * share * cells[1] + share.square() * cells[2]
        after = blank.index_add(0, number, error).clamp(min=0)
        gain = 10 * torch.log10((before + _ENOUGH) / (after + _ENOUGH))
        blurred = -gain + _LOSS * functional.relu(-gain)
        focus = 10 * torch.log10(after / _ENOUGH_IN_FOCUS + 1)
        loss = (weights * torch.where(in_focus, _IN_FOCUS * focus, blurred)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        course.step()
    return odds


def _weight(one: Restored) -> float:
    weight = _PAIR_WEIGHT if one.kind == _PAIR_KIND else 1.0
    if not one.in_focus and one.before.sum() < _HARDLY:
        weight *= _NEAR_WEIGHT
    return weight


_COVERED = 0.95  # what twice the deviation covers if it is honest


def widened(fit: DeviationCard, frames: Sequence[Restored]) -> DeviationCard:
    """Return a fit of the deviation times the factor that the frames ask for.

    Twice the deviation then covers 95 %, every kind counting alike; once the deviation
    more than of a Gaussian, for a few tiles are taken for the other side of focus.
    """
    ratios, weights = [], []
    for kind in sorted({one.kind for one in frames}):
        level, spread, error = np.concatenate(
            [one.tiles for one in frames if one.kind == kind], axis=1
        )
        if level.size:
            variance = np.maximum(stated_variance(fit, level, spread), _LEAST_VARIANCE)
            ratios.append(np.square(error) / variance)
            weights.append(np.full(level.size, 1 / level.size))
    ratio, weight = np.concatenate(ratios), np.concatenate(weights)
    order = np.argsort(ratio)
    covered = np.cumsum(weight[order]) / weight.sum()
    factor = float(np.interp(_COVERED, covered, ratio[order])) / 4
    return DeviationCard(
        **{name: round(factor * value, 4) for name, value in fit.model_dump().items()}
    )


def main() -> None:
    """Draw, restore, fit; write what is fitted into the engine's card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, help="folder of a joint engine")
    parser.add_argument("--data-folder", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=6, help="of all photographs")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--only",
        choices=("deviation", "evidence"),
        help="write this section of the card alone",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("evidence_rounds"),
        help="finished rounds; start an empty one where images or blurs are others",
    )
    options = parser.parse_args()
    card_path = options.engine / CARD_NAME
    card = yaml.safe_load(card_path.read_text(encoding="utf-8"))
    frames = restored_frames(
        options.engine, options.data_folder, options.rounds, options.keep
    )
    stale = False
    if options.only != "evidence" and "blind" in card.get("deviation", {}):
        old = DeviationCard.model_validate(card["deviation"]["blind"])
        card["deviation"]["blind"] = widened(old, frames).model_dump()
    if options.only != "deviation":
        card["evidence"] = fit(frames, options.steps).card()
        stale = card.pop("expected_error", None) is not None
    write_card(card_path, card)
    if stale:
        print(
            f"{card_path} states no expected_error any more, which was fitted to what "
            "the old evidence let through; fit it anew: python -m bench.expected_error "
            f"{options.engine} --data-folder {options.data_folder} --write"
        )


def restored_frames(
    engine: Path, images: Path, rounds: int, keep_in: Path
) -> list[Restored]:
    """Return the frames of all rounds; those that are not kept yet are made.

    Parameters
    ----------
    engine
        Folder of a joint engine.
    images
        Folder of the published images.
    rounds
        Of all photographs; the real pairs come before.
    keep_in
        Folder of finished rounds.
    """
    card = yaml.safe_load((engine / CARD_NAME).read_text(encoding="utf-8"))
    for name in _FUNCTIONS:
        card.pop(name, None)
    frames: list[Restored] = []
    with tempfile.TemporaryDirectory() as folder:
        # The same engine without what is fitted here.
        bare = Path(folder) / card["name"]
        shutil.copytree(engine, bare)
        (bare / CARD_NAME).write_text(yaml.safe_dump(card), encoding="utf-8")
        weights = f"{card['name']}-{card['sha256']['fp32'][:12]}"
        with Restorer(bare) as restorer:
            for number in range(rounds + 1):
                path = keep_in / weights / f"round_{number}.npz"
                if not path.is_file():
                    keep(path, _round(restorer, number, images))
                frames += kept(path)
                print(f"{len(frames)} frames", flush=True)
    return frames


def _round(restorer: Restorer, number: int, folder: Path) -> list[Restored]:
    """Restore all real pairs (round 0), or all photographs, drawn anew each round."""
    if not number:
        return [restorer.restored(_PAIR_KIND, one) for one in real_pairs(folder)]
    rng = np.random.default_rng(_SEED + number - 1)
    return [
        restorer.restored(kind, sample)
        for kind, light in lights(folder, rng)
        for sample in shown(kind, kind, light, rng)
    ]


_FUNCTIONS = ("evidence", "expected_error")
"""Sections of numbers alone, which stand last."""


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Write a card, rows of numbers on one line."""
    functions = {name: card.pop(name) for name in _FUNCTIONS if name in card}
    head = path.read_text(encoding="utf-8").splitlines()[0]
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=88)
    numbers = yaml.safe_dump(
        functions, sort_keys=False, default_flow_style=None, width=88
    )
    path.write_text(f"{head}\n{text}{numbers}", encoding="utf-8")


if __name__ == "__main__":
    main()
