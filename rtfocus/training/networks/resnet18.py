"""ResNet18: a rival of DelpNet in He's comparison (table 2), for grey patches."""

from torch import Tensor, nn
from torch.nn import functional

_STAGES = (64, 128, 256, 512)
_BLOCKS = 2


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a short cut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.short_cut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.short_cut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N, width, H / stride, W / stride)."""
        return functional.relu(self.body(maps) + self.short_cut(maps))


class ResNet18(nn.Module):
    """The 18-layer residual network; one input channel, any number of labels.

    References
    ----------
    .. [1] K. He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    def __init__(self, *, labels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, _STAGES[0], 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(_STAGES[0]),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        ]
        inputs = _STAGES[0]
        for place, width in enumerate(_STAGES):
            for block in range(_BLOCKS):
                stride = 2 if place > 0 and block == 0 else 1
                layers.append(BasicBlock(inputs, width, stride))
                inputs = width
        self.features = nn.Sequential(*layers)
        self.dense = nn.Linear(inputs, labels)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (N, labels) of patches (N, 1, H, W)."""
        logits: Tensor = self.dense(self.features(patches).mean(dim=(2, 3)))
        return logits
