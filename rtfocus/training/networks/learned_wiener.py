"""Learned Wiener: a network says how noisy each band is, the FFT does the rest.

After Pronina et al. 2020 and the map of Makarkin et al. (the regulariser is
predicted, the filter stays a formula): what the network can do wrong is bounded,
and what it decided can be read off, band by band.

The network measures rather than draws: learned linear filters on four scales, the
logarithm of their mean power over the tile, and a small dense network from there
to the logarithm of the signal-to-noise ratio per radial frequency band.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import Section
from rtfocus.optics.formation import TAPER_PX, band_weights, edge_taper
from rtfocus.optics.psf import compute_psf
from rtfocus.training.recipe import Count, PairRecipe, PairsRecipe
from rtfocus.training.task import (
    Arrays,
    Graph,
    RestorerTask,
    Tensors,
    gain_db,
)

CONDITION = ("sampling", "spherical_waves", "defocus_levels")
"""Entries of the condition vector, see the engine card."""
BANDS = 12
TILE_PX = 144
HALO_PX = 32

_SCALES = 4
_HIDDEN = 96
# Mean power below which a filter sees nothing; 1 = square of the frame's range.
_FAINTEST = 1e-7
# Bounds of the ratio, powers of e: from "all noise" to "as if there were none".
_LARGEST = 12.0


class LearnedWiener(nn.Module):
    """Predicts the signal-to-noise ratio of tiles per radial frequency band.

    Parameters
    ----------
    filters
        Learned filters per scale.
    """

    def __init__(self, filters: int = 16) -> None:
        super().__init__()
        self.filters = nn.ModuleList(
            nn.Conv2d(1, filters, 5, bias=False) for _ in range(_SCALES)
        )
        measured = _SCALES * filters
        self.mix = nn.Sequential(
            nn.Linear(measured + len(CONDITION), _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
        )
        self.ratio = nn.Linear(_HIDDEN, BANDS)
        # Begins as a filter of falling strength, whatever it sees.
        nn.init.zeros_(self.ratio.weight)
        with torch.no_grad():
            self.ratio.bias.copy_(torch.linspace(6.0, 0.0, BANDS))

    def forward(self, tiles: Tensor, condition: Tensor) -> Tensor:
        """Predict.

        Parameters
        ----------
        tiles
            Shape (N, 1, y, x), 0 and 1 at the frame's dark and bright percentile;
            sides at least 48.
        condition
            Shape (N, 3), see `CONDITION`.

        Returns
        -------
        Tensor
            Natural logarithm of signal power over noise power, (N, band), bands as
            in `rtfocus.optics.formation`; within -12 and 12.
        """
        powers = []
        # A low-pass pyramid: each scale sees the half band below the one before.
        for place, convolution in enumerate(self.filters):
            if place:
                tiles = functional.avg_pool2d(tiles, 2)
            features = convolution(tiles)
            powers.append((features.square().mean(dim=(2, 3)) + _FAINTEST).log())
        stacked = torch.cat([*powers, condition], dim=1)
        ratio: Tensor = self.ratio(self.mix(stacked))
        return ratio.clamp(-_LARGEST, _LARGEST)


def wiener_filter(tiles: Tensor, psf: Tensor, log_snr: Tensor) -> Tensor:
    """Restore tiles with their PSFs: ``conj(H) / (|H|^2 + 1 / SNR)``, 1 at f = 0.

    Differentiable in `log_snr`; the same as
    `rtfocus.processing.cpu.network_restorer.filter_tiles`.

    Parameters
    ----------
    tiles
        Shape (N, 1, y, x).
    psf
        Shape (N, side, side), odd side, sums to 1.
    log_snr
        Shape (N, band), see `LearnedWiener`.

    Returns
    -------
    Tensor
        Shape of `tiles`; the outer pixels are of no use, see `TAPER_PX`.
    """
    height, width = tiles.shape[-2:]
    weights = torch.from_numpy(band_weights((height, width), log_snr.shape[1]).copy())
    window = torch.from_numpy(edge_taper((height, width), TAPER_PX).copy())
    noise = torch.einsum("nb,byx->nyx", -log_snr, weights.to(log_snr)).exp()
    side = psf.shape[-1]
    kernel = functional.pad(psf, (0, width - side, 0, height - side))
    transfer = torch.fft.rfft2(kernel.roll((-(side // 2), -(side // 2)), (1, 2)))
    gain = transfer.conj() / (transfer.abs().square() + noise)
    mean = tiles.mean(dim=(1, 2, 3), keepdim=True)
    spectrum = torch.fft.rfft2((tiles - mean)[:, 0] * window.to(tiles))
    # What is left at f = 0 after the taper keeps its brightness.
    gain = torch.cat([gain.flatten(1)[:, :1] * 0 + 1, gain.flatten(1)[:, 1:]], dim=1)
    filtered = spectrum * gain.reshape(spectrum.shape)
    restored: Tensor = torch.fft.irfft2(filtered, s=(height, width))
    return restored[:, None] + mean


# Mean squared error, of the frame's range, below which little is left to gain.
_NO_ERROR = 1e-4
_FARTHEST = 10


class LearnedWienerSection(Section):
    """The predictor's size and the PSFs its filter is given."""

    filters: Count = 16
    """Learned filters per scale."""
    level_error: Annotated[float, Field(ge=0)] = 0.3
    """Deviation of the level that the PSF is computed for, in levels, before it is
    rounded: neither classifier nor calibration is exact, and the predictor must
    know how far to trust a PSF."""
    real_level: Annotated[float, Field(ge=-_FARTHEST, le=_FARTHEST)] = 5.0
    """Level of the real pairs, whose defocus is not in the data."""


class LearnedWienerRecipe(PairRecipe):
    """A training run of the learned Wiener filter."""

    name: str = "learned_wiener"
    network: Literal["learned_wiener"] = "learned_wiener"
    learned_wiener: LearnedWienerSection = LearnedWienerSection()


class LearnedWienerTask(RestorerTask[LearnedWienerRecipe]):
    """Negative PSNR of each tile's inner part; the filter is part of the loss."""

    network: LearnedWiener
    description = (
        f"Wiener filter, signal-to-noise ratio in {BANDS} bands per tile learned."
    )
    tile_px = TILE_PX
    halo_px = HALO_PX
    multiple_px = TILE_PX

    def __init__(self, recipe: LearnedWienerRecipe) -> None:
        super().__init__(recipe)
        self.network = LearnedWiener(recipe.learned_wiener.filters)

    def batch(self, step: int, draw: int = 0) -> Arrays:
        """Make pairs, each with the PSF of the level it would be called."""
        rng = np.random.default_rng([self.recipe.seed, 8, step, draw])
        return with_psf(self.source.batch(step, draw), self.recipe, rng)

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return minus the mean PSNR, in tens of dB, of what a tile would keep."""
        blurred, sharp = tensors["blurred"], tensors["sharp"]
        # Powers down to the camera's noise need more digits than bfloat16 has.
        with torch.autocast(blurred.device.type, enabled=False):
            log_snr = self.network(blurred, tensors["condition"])
            restored = wiener_filter(blurred, tensors["psf"], log_snr)
        inner, target, before = (own_part(part) for part in (restored, sharp, blurred))
        error = (inner - target).square().mean(dim=(1, 2, 3))
        figures = {"gain_db": gain_db(before, inner, target)}
        return torch.log10(error + _NO_ERROR).mean(), figures

    def graph(self, network: nn.Module) -> Graph:
        """Return the predictor; the filter runs outside."""
        return Graph(
            network,
            {
                "tiles": torch.zeros(2, 1, TILE_PX, TILE_PX),
                "condition": torch.zeros(2, len(CONDITION)),
            },
            ("log_snr",),
            {"tiles": {0: "number"}, "condition": {0: "number"}},
        )

    def card(self) -> dict[str, Any]:
        """Return the card of a learned Wiener engine."""
        return {
            **super().card(),
            "implementation": "builtin:learned_wiener",
            "condition": {"name": "condition", "entries": list(CONDITION)},
            "output": {"name": "log_snr"},
        }


def with_psf(
    arrays: Arrays, recipe: LearnedWienerRecipe, rng: np.random.Generator
) -> Arrays:
    """Give every patch of a batch the PSF and the condition it is filtered with.

    Parameters
    ----------
    arrays
        A batch of `PairBatches`.
    recipe
        How far the level may be off.
    rng
        Source of that error.

    Returns
    -------
    Arrays
        ``blurred`` and ``sharp`` (N, 1, y, x), ``psf`` (N, side, side), ``condition``
        (N, entry).
    """
    settings, pairs = recipe.learned_wiener, recipe.pairs
    levels = np.asarray(arrays["levels"], np.float64).mean(axis=(1, 2))
    levels = np.where(np.isnan(levels), settings.real_level, levels)
    levels_told = told_levels(levels, settings.level_error, rng)
    optics = np.asarray(arrays["optics"], np.float32)
    psfs = [
        level_psf(pairs, float(sampling), float(spherical), float(level))
        for (sampling, spherical), level in zip(optics, levels_told, strict=True)
    ]
    return {
        "blurred": arrays["blurred"],
        "sharp": arrays["sharp"],
        "psf": np.stack(psfs),
        "condition": np.column_stack([optics, levels_told]).astype(np.float32),
    }


def own_part(tiles: Tensor) -> Tensor:
    """Return tiles without their halo."""
    return tiles[..., HALO_PX:-HALO_PX, HALO_PX:-HALO_PX]


def told_levels(
    levels: NDArray[np.float64], error: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return the whole levels that tiles are called; never 0, which is not filtered."""
    called = np.rint(levels + rng.normal(0, error, levels.shape))
    side = np.where(levels < 0, -1.0, 1.0)
    return np.clip(np.where(called == 0, side, called), -_FARTHEST, _FARTHEST)


def level_psf(
    pairs: PairsRecipe, sampling: float, spherical_waves: float, level: float
) -> NDArray[np.float32]:
    """Compute the PSF of a level as the live loop does, from what is known there.

    Asymmetric aberrations and the exact aperture of a training image are not known
    there, so they are missing here.

    Returns
    -------
    NDArray[np.float32]
        Shape (65, 65), a tile's two halos and the centre.
    """
    reference = pairs.reference
    unit_um = reference.wavelength_nm * 1e-3 / reference.numerical_aperture
    optics: OpticalSystem = replace(
        reference,
        # Rounded, for equal optics share one computed PSF.
        pixel_size_um=round(sampling * unit_um, 6),
        aberrations=Aberrations(spherical_waves=round(spherical_waves, 6)),
    )
    defocus_um = level * pairs.level_step_um
    return compute_psf(optics, defocus_um, size_px=2 * HALO_PX + 1)


NETWORKS = {"learned_wiener": (LearnedWienerRecipe, LearnedWienerTask)}
