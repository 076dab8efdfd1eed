"""Features: frozen networks whose maps say whether two images look alike.

The paper compares images by a layer of VGG-19. Its weights belong to natural
images and are not part of this package; the defocus classifier's own convolutions
are in-domain and at hand. Who has VGG-19's weights can use them.
"""

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from rtfocus.errors import ConfigError
from rtfocus.training.half_weights import float_weights

# Maps of VGG-19's convolutions; 0 stands for a 2 x 2 max pool. The places in the
# list are torchvision's, so that its weight files fit.
_VGG19 = (64, 64, 0, 128, 128, 0, *(256,) * 4, 0, *(512,) * 4, 0, *(512,) * 4)


def classifier_features(weights: Path, layers: int) -> nn.Module:
    """Return the first convolutions of an exported defocus classifier, frozen.

    BatchNorm is part of the exported convolutions; each is followed by its ReLU.

    Parameters
    ----------
    weights
        ONNX file of an engine like ``engines/delpnet/model.fp32.onnx``.
    layers
        How many convolutions; more look at more of the image, more coarsely.

    Returns
    -------
    nn.Module
        From (N, 1, H, W) to the maps after the last of them.

    Raises
    ------
    ConfigError
        If the file cannot be read or has fewer convolutions.
    """
    try:
        graph = onnx.load(str(weights)).graph
    except Exception as error:  # onnx raises whatever its parser met
        msg = (
            f"content features: '{weights}' cannot be read: {error}; "
            "name the model.fp32.onnx of a classifier"
        )
        raise ConfigError(msg) from error
    values = float_weights(graph)
    nodes = [node for node in graph.node if node.op_type == "Conv"]
    if len(nodes) < layers:
        msg = (
            f"content features: '{weights}' has {len(nodes)} convolutions, "
            f"{layers} are wanted; lower 'layers'"
        )
        raise ConfigError(msg)
    modules: list[nn.Module] = []
    for node in nodes[:layers]:
        settings = {item.name: list(item.ints) for item in node.attribute}
        kernel = values[node.input[1]]
        convolution = nn.Conv2d(
            kernel.shape[1],
            kernel.shape[0],
            kernel.shape[2],
            stride=settings["strides"][0],
            padding=settings["pads"][0],
        )
        offset = values[node.input[2]]
        convolution.load_state_dict({"weight": kernel, "bias": offset})
        modules += [convolution, nn.ReLU()]
    return _frozen(nn.Sequential(*modules))


class Vgg19Features(nn.Module):
    """The first convolutions of VGG-19, fed a grey image in all three colours."""

    def __init__(self, convolutions: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, made = 3, 0
        for width in _VGG19:
            if made == convolutions:
                break
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
            made += 1
        self.features = nn.Sequential(*layers)

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the maps after the last convolution's ReLU of (N, 1, H, W)."""
        maps: Tensor = self.features(tiles.expand(-1, 3, -1, -1))
        return maps


def vgg19_features(weights: Path, layers: int) -> nn.Module:
    """Return the first convolutions of VGG-19, frozen.

    Parameters
    ----------
    weights
        The weight file of torchvision's ``vgg19``, which the user has.
    layers
        How many convolutions, 1 to 16.

    Raises
    ------
    ConfigError
        If the file cannot be read or holds another network.
    """
    network = Vgg19Features(layers)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        wanted = {name: state[name] for name in network.state_dict()}
        network.load_state_dict(wanted)
    except Exception as error:  # torch raises whatever the unpickler met
        msg = (
            f"content features: '{weights}' is no weight file of torchvision's vgg19: "
            f"{error}; leave 'weights' out to use the defocus classifier"
        )
        raise ConfigError(msg) from error
    return _frozen(network)


def _frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(False).eval()
