"""Learned Wiener: a network says how noisy each band is, the FFT does the rest.

After Pronina et al. 2020 and the map of Makarkin et al. (the regulariser is
predicted, the filter stays a formula): what the network can do wrong is bounded,
and what it decided can be read off, band by band.

The network measures rather than draws: learned linear filters on four scales, the
logarithm of their mean power over the tile, and a small dense network from there
to the logarithm of the signal-to-noise ratio per radial frequency band.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.optics.bands import band_weights, edge_taper

CONDITION = ("sampling", "spherical_waves", "defocus_levels")
"""Entries of the condition vector, see the engine card."""
BANDS = 12
TILE_PX = 144
HALO_PX = 32
TAPER_PX = 16
"""Outer pixels of a tile that fade to its mean before the transform."""

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
            in `rtfocus.optics.bands`; within -12 and 12.
        """
        powers = []
        # A low-pass pyramid: each scale sees the half band below the one before.
        for place, convolution in enumerate(self.filters):
            if place:
                tiles = functional.avg_pool2d(tiles, 2)
            found = convolution(tiles)
            powers.append((found.square().mean(dim=(2, 3)) + _FAINTEST).log())
        seen = torch.cat([*powers, condition], dim=1)
        ratio: Tensor = self.ratio(self.mix(seen))
        return ratio.clamp(-_LARGEST, _LARGEST)


def wiener_filter(tiles: Tensor, psf: Tensor, log_snr: Tensor) -> Tensor:
    """Restore tiles with their PSFs: ``conj(H) / (|H|^2 + 1 / SNR)``, 1 at f = 0.

    Differentiable in `log_snr`; the same as
    `rtfocus.processing.learned_wiener.filter_tiles`.

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
