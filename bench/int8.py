"""int8: how far the int8 weights of an engine are from its fp32 weights.

Held-out nuclei and actin of BBBC006 are classified and restored by both, blind, by the
code that people use. Printed are the share of tiles that get the same label, and of
joint engines the mean change of the restored frames' PSNR, frames in focus apart; then
what the card may state: the figures of all tiles and of all frames out of focus.
`precision: auto` may choose int8 where the card states at most 0.2 dB and at least
99 %. Last, the processor time of a frame of 512 x 512 in each precision, in turns.

``python -m bench.int8 engines/rtfocus-2 --data-folder images``; ``--also unseen`` shows
another set, which the card does not count.
"""

import argparse
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtfocus.engines.card import read_card
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.data_sets import bbbc006_factin, bbbc006_pairs
from rtfocus.evaluation.samples import BBBC006, DataSet, packages, unseen
from rtfocus.evaluation.scores import psnr
from rtfocus.offline import ImageProcessor

Precision = Literal["f32", "bf16", "int8"]

STATED = {"bbbc006_pairs": bbbc006_pairs, "bbbc006_factin": bbbc006_factin}
ALSO = {"unseen": unseen, "packages": packages}
_HIGHEST_DB = 60.0
"""PSNR from which on an image in focus counts as unchanged."""


class Frames(NamedTuple):
    """What an engine made of the frames of a set."""

    psnr_db: NDArray[np.float64]
    """Of every frame that is out of focus."""
    sharp_db: NDArray[np.float64]
    """Of every frame in focus."""
    labels: NDArray[np.int16]
    """Of all tiles."""


def opened(folder: Path, precision: str, data: DataSet) -> ImageProcessor:
    """Open an engine in a precision, blind, for the frames of a set."""
    engine = contender(str(folder), classifier=str(folder), blind=True)
    return ImageProcessor(engine.config(data, threads=1, precision=precision))


def processed(folder: Path, precision: Precision, data: DataSet) -> Frames:
    """Process the frames of a set, of which the sharp image is known."""
    restores = read_card(folder).kind != "classifier"
    blurred_db: list[float] = []
    sharp_db: list[float] = []
    labels = []
    with opened(folder, precision, data) as processor:
        for sample in data.samples():
            process = processor.restore if restores else processor.classify
            result = process(np.ascontiguousarray(sample.pixels))
            assert result.defocus is not None
            labels.append(result.defocus.level.ravel())
            if result.restored is None:
                continue
            assert sample.sharp is not None
            full = np.iinfo(sample.pixels.dtype).max  # type: ignore[type-var]
            image = np.clip(result.restored, 0, full)
            quality = psnr(sample.sharp, image, data_range=sample.data_range)
            in_focus = np.array_equal(sample.sharp, sample.pixels)
            (sharp_db if in_focus else blurred_db).append(min(quality, _HIGHEST_DB))
    return Frames(np.array(blurred_db), np.array(sharp_db), np.concatenate(labels))


def compare(
    folder: Path, data: DataSet
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Print how int8 and fp32 differ on a set; return changes, dB, and equal labels."""
    full, small = (processed(folder, one, data) for one in ("f32", "int8"))
    change = small.psnr_db - full.psnr_db
    alike = small.labels == full.labels
    print(f"{data.name}: {alike.mean():.4f} of {alike.size} labels alike")
    if len(change):
        print(f"  restored {change.mean():+.3f} dB, {change.min():+.2f} at the worst")
    if len(full.sharp_db):
        sharp = small.sharp_db - full.sharp_db
        print(f"  in focus {sharp.mean():+.2f} dB, {sharp.min():+.2f} at the worst")
    return change, alike


def frame_ms(folder: Path, rounds: int) -> dict[str, float]:
    """Return the least processor time of a frame of 512 x 512, by precision.

    Of its classification: what a joint engine takes of it, restored or not.
    """
    data = DataSet("noise", "", BBBC006, 0.0, ())
    frame = np.random.default_rng(1).poisson(400, (512, 512)).astype(np.uint16)
    least: dict[str, float] = {}
    processors = {one: opened(folder, one, data) for one in ("f32", "bf16", "int8")}
    for _ in range(rounds):
        for name, processor in processors.items():
            begun_s = time.process_time()
            processor.classify(frame)
            spent_ms = 1e3 * (time.process_time() - begun_s)
            least[name] = min(least.get(name, spent_ms), spent_ms)
    for processor in processors.values():
        processor.close()
    return least


def main() -> None:
    """Compare, print what the card may state, and time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path, help="folder of an engine")
    parser.add_argument("--data-folder", type=Path, required=True)
    parser.add_argument("--also", choices=ALSO, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=12, help="frames that are timed")
    options = parser.parse_args()
    changes, alike = zip(
        *(
            compare(options.engine, make(options.data_folder))
            for make in STATED.values()
        ),
        strict=True,
    )
    for name in options.also:
        compare(options.engine, ALSO[name](options.data_folder))
    print("int8:")
    if len(change := np.concatenate(changes)):
        print(f"  restored_db: {change.mean():.3f}")
    print(
        f"  labels_alike: {np.concatenate(alike).mean():.4f}\n"
        f"  command: python -m bench.int8 engines/{options.engine.name}"
    )
    for name, spent_ms in frame_ms(options.engine, options.rounds).items():
        print(f"{name}: {spent_ms:.1f} ms of processor time a frame of 512 x 512")


if __name__ == "__main__":
    main()
