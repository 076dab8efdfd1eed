"""Learned Wiener bench: the learned filter beside the best fixed one, same PSFs.

Fixed: one noise-to-signal ratio for everything, the best of a grid on training data.
Automatic: the one of the loop, which reads its ratio from the frame. Drawn and blurred
tiles of held-out fields get the PSF of a level near the true one, as in a live loop;
the real pairs of BBBC006, rows a19 to a24, that of level 5.

Run: python -m bench.learned_wiener engines/learned_wiener [--tiles 256]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from rtfocus.config.sections import RestorationConfig
from rtfocus.evaluation.scores import psnr, ssim
from rtfocus.frame import TileGrid
from rtfocus.images.reading import open_images
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.processing.cpu.depth_variant import DepthVariantRestorer
from rtfocus.processing.cpu.network_restorer import (
    LearnedWienerRestorer,
    Predict,
    filter_tiles,
)
from rtfocus.processing.montage import Montage
from rtfocus.processing.restore import transfer_function
from rtfocus.training.networks.learned_wiener import (
    BANDS,
    HALO_PX,
    TILE_PX,
    LearnedWienerRecipe,
    level_psf,
    with_psf,
)
from rtfocus.training.pairs import PairBatches
from rtfocus.training.recipe import load_recipe
from rtfocus.training.scenes import data_folder

Image = NDArray[np.float32]

RECIPE = Path(__file__).parents[1] / "configs" / "train_learned_wiener.yaml"
RATIOS = np.geomspace(1e-3, 1.0, 10)
# Training fields that the fixed ratio is tuned on, every third one.
TUNED_ON = slice(0, None, 3)
REAL_LEVEL = 5
# Levels below which a tile's target is (in part) the tile itself: not filtered.
DEFOCUSED = 0.8
# 8-bit images: figures of the real pairs are relative to their full scale.
RANGE = 255.0


def predict_with(folder: Path) -> Predict:
    """Return the network of an engine folder."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.fp32.onnx", options)

    def predict(tiles: Image, condition: Image | None) -> Image:
        given = {"tiles": tiles, "condition": condition}
        return np.asarray(session.run(["log_snr"], given)[0])

    return predict


def constant(ratio: float) -> Predict:
    """Return a predictor of one noise-to-signal ratio for all tiles and bands."""
    value = np.float32(-np.log(ratio))
    return lambda tiles, condition: np.full((len(tiles), BANDS), value)


def tile_scores(batches: list[Any], predict: Predict | None) -> float:
    """Return the mean PSNR over tiles without halo; None: of the blurred tiles."""
    own = slice(HALO_PX, -HALO_PX)
    scores = []
    for batch in batches:
        for place, psf in enumerate(batch["psf"]):
            tile = batch["blurred"][place]
            if abs(batch["levels"][place].mean()) < DEFOCUSED:
                continue
            if predict is not None:
                told = batch["condition"][place : place + 1]
                transfer = transfer_function(psf, (TILE_PX, TILE_PX))
                tile = filter_tiles(tile, transfer, predict(tile[None], told))
            wanted = batch["sharp"][place, 0, own, own]
            scores.append(psnr(wanted, tile[0, own, own], data_range=1.0))
    return float(np.mean(scores))


def drawn_batches(
    recipe: LearnedWienerRecipe, tiles: int, *, validation: bool
) -> list[Any]:
    """Make batches of drawn tiles only, each blurred anew."""
    drawn = recipe.pairs.model_copy(update={"real_share": 0.0})
    recipe = recipe.model_copy(update={"pairs": drawn})
    source = PairBatches(recipe, validation=validation)
    rng = np.random.default_rng([recipe.seed, 9, int(validation)])
    count = -(-tiles // recipe.pairs.batch_patches)
    # Far enough apart that the pool of scenes is renewed from one to the next.
    steps = recipe.pool.refresh_steps * 8 * np.arange(count)
    batches = (source.batch(int(step)) for step in steps)
    return [
        {**with_psf(made, recipe, rng), "levels": made["levels"]} for made in batches
    ]


def real_fields(recipe: LearnedWienerRecipe) -> dict[bool, list[tuple[Image, Image]]]:
    """Return (blurred, sharp) of the pairs, by whether they are held out."""
    folder = data_folder(recipe) / "bbbc006_pairs"
    fields: dict[bool, list[tuple[Image, Image]]] = {False: [], True: []}
    for path in sorted((folder / "sharp").glob("*.tif")):
        blurred, sharp = (
            open_images(place)[0].read().astype(np.float32)
            for place in (folder / "defocus10um" / path.name, path)
        )
        fields[path.name[:3] >= "a19"].append((blurred, sharp))
    return fields


def frame_scores(
    fields: list[tuple[Image, Image]], restore: Callable[[Image], Image]
) -> tuple[float, float]:
    """Return mean PSNR and SSIM of whole frames."""
    scores = [
        (
            psnr(sharp, image, data_range=RANGE),
            ssim(sharp, image, data_range=RANGE),
        )
        for sharp, image in ((sharp, restore(blurred)) for blurred, sharp in fields)
    ]
    quality_db, similarity = np.mean(scores, axis=0)
    return float(quality_db), float(similarity)


def frame_restorer(
    recipe: LearnedWienerRecipe, predict: Predict | None
) -> Callable[[Image], Image]:
    """Return the restoration of frames, all of `REAL_LEVEL`; None: automatic."""
    pairs = recipe.pairs
    optics = pairs.reference.sampling, pairs.reference.aberrations.spherical_waves
    psf = level_psf(pairs, *optics, REAL_LEVEL)
    labels = np.full((1, 1), REAL_LEVEL, np.int16)

    def restore(blurred: Image) -> Image:
        shape = blurred.shape[0], blurred.shape[1]
        montage = Montage(TileGrid(1, 1, 96, 48, 47.5, signed=True), shape)
        made = (
            DepthVariantRestorer(
                montage, {REAL_LEVEL: psf}, RestorationConfig(), quantum=1.0
            )
            if predict is None
            else LearnedWienerRestorer(
                montage,
                {REAL_LEVEL: psf},
                np.array([(*optics, REAL_LEVEL)], np.float32),
                predict,
                tile_px=TILE_PX,
                halo_px=HALO_PX,
                normalisation=PercentileRange(),
            )
        )
        return made.restore(blurred, labels, np.empty_like(blurred))

    return restore


def main() -> None:
    """Tune the fixed filter on training data, then compare on held-out data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--tiles", type=int, default=256)
    options = parser.parse_args()
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe, LearnedWienerRecipe)
    predict = predict_with(options.engine)

    train = drawn_batches(recipe, options.tiles, validation=False)
    best = max(RATIOS, key=lambda ratio: tile_scores(train, constant(ratio)))
    held_out = drawn_batches(recipe, options.tiles, validation=True)
    print(f"drawn, {options.tiles} held-out tiles, PSNR over the frame's range:")
    print(f"  blurred           {tile_scores(held_out, None):6.2f} dB")
    print(f"  fixed {best:<9.2g}   {tile_scores(held_out, constant(best)):6.2f} dB")
    print(f"  learned           {tile_scores(held_out, predict):6.2f} dB")

    fields = real_fields(recipe)
    best = max(
        RATIOS,
        key=lambda ratio: frame_scores(
            fields[False][TUNED_ON], frame_restorer(recipe, constant(ratio))
        )[0],
    )
    print(f"real pairs, {len(fields[True])} held-out fields, PSNR over 255, SSIM:")
    rows: dict[str, Callable[[Image], Image]] = {
        "blurred": np.asarray,
        f"fixed {best:.2g}": frame_restorer(recipe, constant(best)),
        "automatic": frame_restorer(recipe, None),
        "learned": frame_restorer(recipe, predict),
    }
    for name, restore in rows.items():
        quality_db, similarity = frame_scores(fields[True], restore)
        print(f"  {name:<17} {quality_db:6.2f} dB  {similarity:.4f}")


if __name__ == "__main__":
    main()
