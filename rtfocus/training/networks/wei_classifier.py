"""Wei's classifier: how far and on which side of focus a patch is, in five classes.

The paper fixes the patch (224 px), four blocks of 5 x 5 convolutions with channel
attention and pooling, and 7 x 7 x 128 features behind them; four halvings alone
would leave 14 x 14, so the first convolution has a stride of two here. Its two
other preparations are here too: channel normalisation, part of the network so that
an exported engine does what training did, and the exchange of colour channels.
"""

from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.config.sections import Section
from rtfocus.errors import ConfigError
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.training.layers import (
    TiledClassifier,
    chance,
    fold_batch_norm,
)
from rtfocus.training.signed_patches import (
    LABELS,
    PATCH_PX,
    SignedClassRecipe,
    SignedPatches,
)
from rtfocus.training.task import (
    Graph,
    Source,
    Task,
    Tensors,
    background_rule,
    frames_graph,
    grid_input,
    optics_range,
)

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


# Optics for which the classes hold: training draws near the reference only.
_SAMPLING_RANGE = (0.85, 1.15)
# A class speaks for its middle; the inner ones for what is nearest to it.
_STEP_OF_INNER = 0.75


class WeiSection(Section):
    """Switches of Wei's classifier: the rows of the paper's table 1."""

    channel_normalisation: bool = True
    """Bring every channel of a patch to mean 0 and deviation 1."""
    channel_exchange: bool = True
    """Train on colours in every order; nothing to exchange in grey."""
    attention: bool = True
    """Weigh the channels of every block by what the patch shows."""
    batch_norm: bool = True
    """BatchNorm after every convolution; the paper mentions none."""


class WeiClassifierRecipe(SignedClassRecipe):
    """A training run of Wei's classifier."""

    name: str = "wei_classifier"
    network: Literal["wei_classifier"] = "wei_classifier"
    wei: WeiSection = WeiSection()


class WeiClassifierTask(Task[WeiClassifierRecipe]):
    """Cross-entropy over five classes."""

    network: WeiClassifier
    statistics_of = ("patches",)
    statistics_batches = 20

    def __init__(self, recipe: WeiClassifierRecipe) -> None:
        super().__init__(recipe)
        self._channels = 3 if recipe.signed.colour else 1
        self.network = WeiClassifier(
            channels=self._channels,
            channel_normalisation=recipe.wei.channel_normalisation,
            attention=recipe.wei.attention,
            batch_norm=recipe.wei.batch_norm,
        )

    def make_source(self) -> Source:
        """Read the sharp images of the recipe."""
        return SignedPatches(self.recipe)

    def loss(self, tensors: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy and the share of right classes."""
        patches, labels = tensors["patches"], tensors["labels"]
        if self.recipe.wei.channel_exchange and self._channels > 1:
            patches = exchange_channels(patches, _random_orders(patches))
        logits = self.network(patches).float()
        loss = nn.functional.cross_entropy(logits, labels)
        right = (logits.detach().argmax(dim=1) == labels).float().mean()
        return loss, {"accuracy": right}

    def graph(self, network: nn.Module) -> Graph:
        """Return the network over whole frames, one label per patch.

        Raises
        ------
        ConfigError
            Without channel normalisation: then counts would have to come on the
            scale of the training's cameras.
        """
        if not self.recipe.wei.channel_normalisation:
            msg = (
                "wei.channel_normalisation is off: such a network depends on the "
                "camera's scale and is for comparisons only; train with it to export"
            )
            raise ConfigError(msg)
        return frames_graph(
            TiledClassifier(fold_batch_norm(network), PATCH_PX),
            (2 * PATCH_PX, 3 * PATCH_PX),
            ("logits",),
            channels=self._channels,
        )

    def card(self) -> dict[str, Any]:
        """Return the card of a Wei engine."""
        signed = self.recipe.signed
        return {
            "kind": "classifier",
            "implementation": "onnx",
            "description": "Signed defocus class of patches, Wei et al. 2024.",
            "input": grid_input(
                PATCH_PX, PATCH_PX, (PATCH_PX - 1) / 2, channels=self._channels
            ),
            "output": {"name": "logits", "labels": list(LABELS)},
            "levels": {
                "step_um": _STEP_OF_INNER * signed.inner_um,
                "count": len(LABELS) // 2 + 1,
                "signed": True,
            },
            "normalisation": {"name": "percentile_range", **asdict(PercentileRange())},
            "background": {} if signed.colour else background_rule(),
            "optics": optics_range(signed.reference, _SAMPLING_RANGE),
        }


def _random_orders(patches: Tensor) -> Tensor:
    """Draw a permutation of the channels per patch."""
    number, channels = patches.shape[:2]
    drawn = torch.rand(number, channels, generator=chance())
    return drawn.argsort(dim=1).to(patches.device)


NETWORKS = {"wei_classifier": (WeiClassifierRecipe, WeiClassifierTask)}
