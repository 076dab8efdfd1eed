"""Expected error: fit what a joint engine states of the error that it leaves.

The frames are those of `bench.evidence`, restored blind and weighed as the card says.
A small function leads from `rtfocus.engines.fitted.error_measures` of every 32 px to
the logarithm of the squared error left there, in squares of the frame's range: the root
of it is what the error is on average, every kind alike, in focus as well. What is in
focus is its own truth, with its noise; what is blurred is compared with the sharp image
before the camera.

Printed is what the function is worth on kinds left out of the fit, a quarter at a time,
of frames out of focus: how far the stated errors of places rank as the true ones do,
over all frames and within one; how often that of a frame is right within a factor of
2; and what is stated of frames in focus that nothing changed. The set ``unseen`` is not
looked at.

``python -m bench.expected_error engines/rtfocus-2 --data-folder images`` prints;
``--write`` writes the card too; ``rtfocus evaluate rtfocus-2 --blind --data unseen``
tells what it is worth there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from bench.evidence import (
    NOISE,
    Fitted,
    Restored,
    restored_frames,
    write_card,
)
from rtfocus.engines.card import CARD_NAME
from rtfocus.engines.fitted import (
    BLOCK_PX,
    Evidence,
    EvidenceCard,
    with_applied,
)
from rtfocus.evaluation.scores import ErrorScore
from rtfocus.optics.normalisation import PercentileRange

_BATCH, _RATE, _DECAY = 8192, 1e-2, 1e-2
_START = -6.0
"""Logarithm of the squared error that the fit begins with."""
_LEAST = 1e-6
"""Squared error, in squares of the range, below which nothing is told apart."""
_PARTS = 4


class Blocks(NamedTuple):
    """Blocks of 32 px of all frames."""

    frame: NDArray[np.int64]
    """Number of the frame."""
    measured: NDArray[np.float32]
    """Axes (block, measure), see `rtfocus.engines.fitted.with_applied`."""
    error: NDArray[np.float32]
    """Mean squared error left, in squares of the frame's range."""


def blocks_of(frames: Sequence[Restored], evidence: Evidence) -> Blocks:
    """Return what is left where corrections are weighed, and what it follows from.

    The last row and column of a frame are left out: they may hold fewer pixels.
    """
    numbers, measured, errors = [], [], []
    for number, one in enumerate(frames):
        before, common, power = (
            part * np.float32(one.unit / BLOCK_PX**2)
            for part in (one.before, one.common, one.correction)
        )
        share = evidence.shares(one.measured)
        left = np.maximum(before - 2 * share * common + share**2 * power, 0)
        found = with_applied(one.measured, share, power)[:, :-1, :-1]
        measured.append(found.reshape(len(found), -1).T)
        errors.append(left[:-1, :-1].ravel())
        numbers.append(np.full(errors[-1].size, number))
    return Blocks(
        np.concatenate(numbers), np.concatenate(measured), np.concatenate(errors)
    )


def fitted(
    blocks: Blocks, kinds: NDArray[np.str_], wanted: NDArray[np.bool_], steps: int
) -> Fitted:
    """Fit the function to the blocks of some frames.

    Parameters
    ----------
    blocks
        Of all frames.
    kinds, wanted
        By frame: its kind, and whether it is looked at.
    steps
        Of as many blocks each.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    inside = wanted[blocks.frame]
    measured = torch.from_numpy(blocks.measured[inside])
    root = torch.from_numpy(np.sqrt(blocks.error[inside] + np.float32(_LEAST)))
    _, place, count = np.unique(
        kinds[blocks.frame[inside]], return_inverse=True, return_counts=True
    )
    share = 1 / count[place]
    weight = torch.from_numpy((share / share.mean()).astype(np.float32))
    error = Fitted(measured.mean(dim=0), measured.std(dim=0) + 1e-3)
    last = error.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.constant_(last.bias, _START)
    optimiser = torch.optim.AdamW(error.parameters(), _RATE, weight_decay=_DECAY)
    course = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps)
    for _ in range(steps):
        batch = torch.from_numpy(rng.integers(0, len(measured), _BATCH))
        noise = NOISE * torch.randn(_BATCH, measured.shape[1]) * error.spread
        half = error(measured[batch] + noise) / 2
        # Least where the exponential is the mean of the roots.
        loss = (weight[batch] * (half + root[batch] * torch.exp(-half))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        course.step()
    return error


def left_out(
    blocks: Blocks, kinds: NDArray[np.str_], steps: int
) -> NDArray[np.floating]:
    """Return the squared error stated of every block by fits to other kinds."""
    names = np.unique(kinds)
    parts = np.random.default_rng(0).permutation(len(names)) % _PARTS
    part = parts[np.searchsorted(names, kinds)]
    stated = np.zeros(len(blocks.error))
    for one in range(_PARTS):
        inside = (part == one)[blocks.frame]
        error = fitted(blocks, kinds, part != one, steps)
        stated[inside] = squared(error, blocks.measured[inside])
    return stated


def squared(error: Fitted, measured: NDArray[np.float32]) -> NDArray[np.floating]:
    """Return the squared error that a function states of blocks."""
    with torch.no_grad():
        found: NDArray[np.floating] = error(torch.from_numpy(measured)).exp().numpy()
    return found


def worth(
    blocks: Blocks, frames: Sequence[Restored], stated: NDArray[np.floating]
) -> str:
    """Say what the squared errors stated of all blocks are worth."""
    score, unchanged = ErrorScore(), []
    ends = np.flatnonzero(np.diff(blocks.frame, append=-1)) + 1
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        one, said = frames[blocks.frame[begin]], np.sqrt(stated[begin:end])
        true = np.sqrt(blocks.error[begin:end])
        if not one.in_focus:
            score.add(said, true)
        elif not true.any():
            unchanged.append(100 * np.sqrt(np.square(said).mean()))
    middle, high = np.percentile(unchanged, (50, 90))
    return (
        f"{score.summary()}; of {len(unchanged)} frames in focus that nothing changed "
        f"{middle:.2f} % of the range in the median, {high:.2f} % in a tenth"
    )


def main() -> None:
    """Restore, fit, print; write the card where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, help="folder of a joint engine")
    parser.add_argument("--data-folder", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=6, help="of all photographs")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--keep", type=Path, default=Path("evidence_rounds"))
    parser.add_argument("--write", action="store_true", help="into the card")
    options = parser.parse_args()
    # Sums do not depend on the number of cores, and small ones are no faster on two.
    torch.set_num_threads(1)
    path = options.engine / CARD_NAME
    card = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "evidence" not in card:
        raise SystemExit(f"'{path}' has no evidence: first python -m bench.evidence")
    evidence = Evidence(
        EvidenceCard.model_validate(card["evidence"]), PercentileRange(), 1.0
    )
    frames = restored_frames(
        options.engine, options.data_folder, options.rounds, options.keep
    )
    blocks = blocks_of(frames, evidence)
    kinds = np.array([one.kind for one in frames])
    stated = left_out(blocks, kinds, options.steps)
    print(f"{len(blocks.error)} blocks of {len(np.unique(kinds))} kinds")
    print(f"kinds left out: {worth(blocks, frames, stated)}", flush=True)
    error = fitted(blocks, kinds, np.ones(len(frames), np.bool_), options.steps)
    said = worth(blocks, frames, squared(error, blocks.measured))
    print(f"fitted: {said}", flush=True)
    if options.write:
        card["expected_error"] = error.card()
        write_card(path, card)


if __name__ == "__main__":
    main()
