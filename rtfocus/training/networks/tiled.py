"""Tiled: a network that judges a patch as a whole, over whole frames."""

from torch import Tensor, nn


class TiledClassifier(nn.Module):
    """A patch classifier over whole frames: one label per patch, side by side.

    Attention, pooling and dense layers look at a patch as a whole, so a frame
    cannot pass through the convolutions at once: it is cut into patches that do not
    overlap.

    Parameters
    ----------
    patch_network
        Takes patches (N, channels, side, side), returns logits (N, labels).
    patch_px
        Side of the patches.
    """

    def __init__(self, patch_network: nn.Module, patch_px: int) -> None:
        super().__init__()
        self.patch_network = patch_network
        self.patch_px = patch_px

    def forward(self, tiles: Tensor) -> Tensor:
        """Return logits (N, labels, rows, columns) of frames (N, channels, H, W).

        What lies behind the last whole patch is not looked at.
        """
        number, channels, height, width = tiles.shape
        side = self.patch_px
        rows, columns = height // side, width // side
        cut = tiles[:, :, : rows * side, : columns * side]
        grid = cut.reshape(number, channels, rows, side, columns, side)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)
        logits: Tensor = self.patch_network(patches)
        return logits.reshape(number, rows, columns, -1).permute(0, 3, 1, 2)
