"""DelpNet: seven convolutions that tell the defocus level of a patch.

He et al. 2020 fix the layers' order, the number of labels and the parameter
count, not the widths and strides. Those here put the resolution into few early
channels and the parameters into the deep layers, so that a whole frame costs
5.7 k multiply-adds per pixel. The network is fully convolutional: global max
pooling becomes a max pool over one patch's cells, the dense layer a 1 x 1
convolution, and a frame gives one label per tile in a single pass.
"""

from dataclasses import dataclass

from torch import Tensor, nn

LABELS: tuple[int | str, ...] = (*range(11), "bg")
"""Label of every output: defocus levels 0 to 10, then background."""

WIDTHS = (16, 32, 48, 96, 160, 400, 424)
_KERNELS = (5, 3, 3, 3, 3, 3, 3)
_STRIDES = (2, 2, 1, 3, 2, 1, 1)


@dataclass(frozen=True, slots=True)
class TileGeometry:
    """Where the tiles of the network lie in its input, along both axes."""

    cell_px: int
    """Pixels per cell of the last feature map: product of the strides."""
    tile_cells: int
    """Cells under one max pool: those that a patch of 84 px makes."""
    stride_cells: int
    """Cells between neighbouring tiles."""

    @property
    def tile_px(self) -> int:
        """Pixels that the cells of one tile stand for."""
        return self.tile_cells * self.cell_px

    @property
    def stride_px(self) -> int:
        """Pixels between the centres of neighbouring tiles."""
        return self.stride_cells * self.cell_px

    @property
    def centre_px(self) -> int:
        """Centre of tile 0: cell i looks at pixel i * cell_px, not half a cell on."""
        return (self.tile_cells - 1) * self.cell_px // 2

    def count(self, length_px: int) -> int:
        """Return how many tiles an axis of this length has."""
        cells = -(-length_px // self.cell_px)
        return (cells - self.tile_cells) // self.stride_cells + 1


GEOMETRY = TileGeometry(cell_px=24, tile_cells=4, stride_cells=2)


class DelpNet(nn.Module):
    """Defocus classifier of He et al. 2020, fully convolutional.

    Parameters
    ----------
    dropout
        Probability of dropping a whole feature map after each inner layer.
    batch_norm_momentum
        Weight of the newest batch in the running statistics; 0.40 is the
        paper's 0.60 counted the other way round.
    labels
        Number of outputs; 12 with `bg`, 11 without (He 2020, table 1).

    References
    ----------
    .. [1] D. He et al., "Restoration of out-of-focus fluorescence microscopy
       images using learning-based depth-variant deconvolution", IEEE Photonics
       Journal 12 (2), 2020, section 2.2.
    """

    def __init__(
        self,
        *,
        dropout: float = 0.05,
        batch_norm_momentum: float = 0.40,
        labels: int = len(LABELS),
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for place, width in enumerate(WIDTHS):
            kernel = _KERNELS[place]
            layers += [
                nn.Conv2d(
                    channels,
                    width,
                    kernel,
                    stride=_STRIDES[place],
                    padding=kernel // 2,
                    bias=False,
                ),
                nn.BatchNorm2d(width, momentum=batch_norm_momentum),
                nn.ReLU(inplace=True),
            ]
            # The first layer has too few maps to lose one of them.
            if place > 0:
                layers.append(nn.Dropout2d(dropout))
            channels = width
        self.features = nn.Sequential(*layers)
        self.dense = nn.Conv2d(channels, labels, 1)

    def forward(
        self, tiles: Tensor, stride_cells: int = GEOMETRY.stride_cells
    ) -> Tensor:
        """Return logits (N, label, row, column) of frames or patches (N, 1, H, W).

        The input is normalised (`rtfocus.optics.normalisation`). A patch of 84 or
        96 px gives one row and one column. `stride_cells` is the distance between
        neighbouring tiles; in training every position counts: more to learn per crop.
        """
        cells = self.features(tiles)
        pooled = nn.functional.max_pool2d(
            cells, GEOMETRY.tile_cells, stride=stride_cells
        )
        logits: Tensor = self.dense(pooled)
        return logits
