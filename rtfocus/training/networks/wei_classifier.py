"""Wei's classifier: how far and on which side of focus a patch is, in five classes.

The paper fixes the patch (224 px), four blocks of 5 x 5 convolutions with channel
attention and pooling, and 7 x 7 x 128 features behind them; four halvings alone
would leave 14 x 14, so the first convolution has a stride of two here. Its two
other preparations are here too: channel normalisation, part of the network so that
an exported engine does what training did, and the exchange of colour channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

LABELS: tuple[int, ...] = (-2, -1, 0, 1, 2)
"""Class of every output: near focus is negative, far focus positive."""
PATCH_PX = 224
WIDTHS = (16, 32, 64, 128)

_KERNEL = 5
_REDUCTION = 8
_FUSED = 32
_HIDDEN = 128
_CELLS = PATCH_PX // 2 ** (len(WIDTHS) + 1)
# Of counts: a channel without contrast is not blown up to noise of deviation 1.
_LEAST_DEVIATION = 1e-4
_OPEN = 2.0


class ChannelAttention(nn.Module):
    """Squeeze and excitation: weigh channels by what the whole patch shows.

    ``U * sigmoid(W2 relu(W1 mean(U)))`` with the mean over the patch (Wei 2024,
    figure 6). The paper does not give the inner width; here an eighth.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // _REDUCTION, 4)
        self.squeeze = nn.Linear(channels, inner)
        self.excite = nn.Linear(inner, channels)
        # Begins nearly open: four times one half would leave a sixteenth.
        nn.init.constant_(self.excite.bias, _OPEN)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape (N, C, H, W)."""
        mean = features.mean(dim=(2, 3))
        weights = self.excite(functional.relu(self.squeeze(mean))).sigmoid()
        weighed: Tensor = features * weights[:, :, None, None]
        return weighed


class WeiClassifier(nn.Module):
    """Signed defocus classifier of Wei et al. 2024.

    Parameters
    ----------
    channels
        3 for colour (the paper), 1 for fluorescence.
    channel_normalisation
        Bring every channel of a patch to mean 0 and deviation 1 (table 1).
    attention
        Weigh the channels of every block (table 1).
    batch_norm
        BatchNorm after every convolution, which the paper does not mention: with it
        some thousand steps are enough to learn the sign, without it they are not.

    References
    ----------
    .. [1] Y. Wei, Q. Li, W. Hou, "Image restoration model for microscopic defocused
       images based on blurring kernel guidance", 2024, section 3.1 and table 1.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        channel_normalisation: bool = True,
        attention: bool = True,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.channel_normalisation = channel_normalisation
        layers: list[nn.Module] = []
        inputs = channels
        for place, width in enumerate(WIDTHS):
            stride = 2 if place == 0 else 1
            layers.append(
                nn.Conv2d(
                    inputs,
                    width,
                    _KERNEL,
                    stride,
                    padding=_KERNEL // 2,
                    bias=not batch_norm,
                )
            )
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            if attention:
                layers.append(ChannelAttention(width))
            layers.append(nn.MaxPool2d(2))
            inputs = width
        self.features = nn.Sequential(*layers)
        self.fuse = nn.Conv2d(inputs, _FUSED, 1)
        self.hidden = nn.Linear(_FUSED * _CELLS**2, _HIDDEN)
        self.dense = nn.Linear(_HIDDEN, len(LABELS))
        self._initialise()

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits (N, 5) of patches (N, channels, 224, 224).

        Counts in any unit with channel normalisation, else in [0, 1]. Their
        softmax is the paper's equation 4.
        """
        if self.channel_normalisation:
            patches = normalise_channels(patches)
        fused = functional.relu(self.fuse(self.features(patches)))
        hidden = functional.relu(self.hidden(fused.flatten(1)))
        logits: Tensor = self.dense(hidden)
        return logits

    def _initialise(self) -> None:
        """Keep the size of the signal: without BatchNorm it would die on the way."""
        for place in (*self.features, self.fuse, self.hidden):
            if isinstance(place, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(place.weight, nonlinearity="relu")
                if place.bias is not None:
                    nn.init.zeros_(place.bias)


def normalise_channels(patches: Tensor) -> Tensor:
    """Bring every channel of every patch to mean 0 and deviation 1.

    In float32 whatever surrounds it: bfloat16 would round counts before their
    mean is gone. A channel without contrast becomes 0.
    """
    with torch.autocast(patches.device.type, enabled=False):
        patches = patches.float()
        patches = patches - patches.mean(dim=(2, 3), keepdim=True)
        power = patches.square().mean(dim=(2, 3), keepdim=True)
        return patches / power.sqrt().clamp_min(_LEAST_DEVIATION)


def exchange_channels(patches: Tensor, orders: Tensor) -> Tensor:
    """Reorder the colours of every patch: the colour changes, the blur does not.

    Parameters
    ----------
    patches
        Shape (N, C, H, W).
    orders
        A permutation of the channels per patch, shape (N, C).
    """
    places = orders[:, :, None, None].expand_as(patches)
    return patches.gather(1, places)
