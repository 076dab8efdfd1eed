"""MobileNet v2: a rival of DelpNet in He's comparison (table 2), for grey patches."""

from torch import Tensor, nn

# Expansion, width, blocks and first stride of every stage (Sandler 2018, table 2).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_FIRST = 32
_LAST = 1280


class InvertedResidual(nn.Module):
    """Widen, convolve every map alone, narrow without activation."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += _convolution(inputs, inner, 1, 1, 1)
        layers += _convolution(inner, inner, 3, stride, inner)
        layers += [nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == width

    def forward(self, maps: Tensor) -> Tensor:
        """Return (N, width, H / stride, W / stride)."""
        result: Tensor = self.body(maps)
        return maps + result if self.adds else result


class MobileNetV2(nn.Module):
    """MobileNet v2 of width 1; one input channel, any number of labels.

    References
    ----------
    .. [1] M. Sandler et al., "MobileNetV2: inverted residuals and linear
       bottlenecks", CVPR 2018.
    """

    def __init__(self, *, labels: int) -> None:
        super().__init__()
        layers = _convolution(1, _FIRST, 3, 2, 1)
        inputs = _FIRST
        for expansion, width, blocks, first_stride in _STAGES:
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                layers.append(InvertedResidual(inputs, width, stride, expansion))
                inputs = width
        layers += _convolution(inputs, _LAST, 1, 1, 1)
        self.features = nn.Sequential(*layers)
        self.dense = nn.Linear(_LAST, labels)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (N, labels) of patches (N, 1, H, W)."""
        logits: Tensor = self.dense(self.features(patches).mean(dim=(2, 3)))
        return logits


def _convolution(
    inputs: int, width: int, kernel: int, stride: int, groups: int
) -> list[nn.Module]:
    return [
        nn.Conv2d(
            inputs,
            width,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
    ]
