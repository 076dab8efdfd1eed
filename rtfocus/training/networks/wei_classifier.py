"""Wei's classifier: how far and on which side of focus a patch is, in five classes.

The paper fixes the patch (224 px), four blocks of 5 x 5 convolutions with channel
attention and pooling, and 7 x 7 x 128 features behind them; four halvings alone
would leave 14 x 14, so the first convolution has a stride of two here. Its two
other preparations are here too: channel normalisation, part of the network so that
an exported engine does what training did, and the exchange of colour channels.

It learns from photographed patches on either side of focus. Batch number n is a pure
function of (recipe, n).
"""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config.sections import Section
from rtfocus.errors import ConfigError
from rtfocus.optics.formation import blur_stack
from rtfocus.optics.normalisation import PercentileRange
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_stained
from rtfocus.training.layers import (
    ChannelAttention,
    TiledClassifier,
    chance,
    exchange_channels,
    fold_batch_norm,
    normalise_channels,
)
from rtfocus.training.recipe import SignedClassRecipe, SignedRecipe
from rtfocus.training.scenes import (
    POINT,
    DrawnCamera,
    Pool,
    SceneSource,
    SharpField,
    draw_camera,
    lively_window,
    load_fields,
)
from rtfocus.training.task import (
    BatchSource,
    Graph,
    Task,
    Tensors,
    background_rule,
    frames_graph,
    grid_input,
    optics_range,
)

Image = NDArray[np.float32]

LABELS: tuple[int, ...] = (-2, -1, 0, 1, 2)
"""Class of every output: near focus is negative, far focus positive."""
PATCH_PX = 224

_STAINED_SCALE = (1.1, 1.9)
_LEAST_SPHERICAL = -0.1


@dataclass(frozen=True, slots=True)
class SignedScene:
    """One scene at several signed defoci."""

    planes: Image
    """Axes (plane, colour, y, x)."""
    defocus_um: tuple[float, ...]
    """Nominal defocus of every plane in the optics of reference."""


class SignedScenes:
    """Makes the scenes of one side of the split."""

    side = 0
    """Another one draws other scenes from the same seed."""

    def __init__(
        self, recipe: SignedClassRecipe, fields: list[SharpField], *, validation: bool
    ) -> None:
        self._recipe = recipe
        self._exact = validation
        self.signed = recipe.signed
        self._fields = SceneSource(recipe, fields, validation=validation)

    def entry(self, generation: int) -> SignedScene:
        """Draw scene and optics number `generation` and blur it.

        Training draws two planes per class and one in focus; validation takes every
        plane.
        """
        signed, seed = self.signed, self._recipe.seed
        rng = np.random.default_rng([seed, 7, int(self._exact), self.side, generation])
        light, ideal = self.draw_scene(rng)
        light = _at_least(light, PATCH_PX)
        optics = self.draw_optics(rng)
        nominal = plane_places_um(signed) if self._exact else _draw_places(signed, rng)
        unit = optics.defocus_unit_um / signed.reference.defocus_unit_um
        psfs = []
        for place in nominal:
            jitter = 0.0 if self._exact else rng.uniform(-1, 1) * signed.jitter_um
            sharp = place == 0 and not ideal
            psfs.append(POINT if sharp else _psf(optics, (place + jitter) * unit))
        blurred = np.clip(blur_stack(light, psfs), 0, 1)
        planes = blurred[:, None] if blurred.ndim == 3 else np.moveaxis(blurred, 3, 1)
        return SignedScene(np.ascontiguousarray(planes), tuple(nominal))

    def draw_scene(self, rng: np.random.Generator) -> tuple[Image, bool]:
        """Return light, (y, x) or (y, x, colour), and whether it is ideally sharp."""
        if not self.signed.colour:
            scene = self._fields.draw(rng)
            # A drawn scene passes for a photograph half of the time.
            return scene.light, scene.ideal and bool(rng.random() < 0.5)
        side = self._recipe.pool.side_px
        scale = float(rng.uniform(*_STAINED_SCALE))
        return draw_stained((side, side), rng, scale=scale), True

    def draw_optics(self, rng: np.random.Generator) -> OpticalSystem:
        """Return the optics that a scene is seen through."""
        base = self.signed.reference
        if self._exact or rng.random() < self.signed.reference_share:
            return base
        spherical = base.aberrations.spherical_waves + rng.normal(0, 0.05)
        return replace(
            base,
            numerical_aperture=base.numerical_aperture * rng.uniform(0.95, 1.05),
            pixel_size_um=base.pixel_size_um * rng.uniform(0.95, 1.05),
            aberrations=Aberrations(
                spherical_waves=min(spherical, _LEAST_SPHERICAL),
                astigmatism_waves=rng.normal(0, 0.03),
            ),
        )


def class_of(defocus_um: float, signed: SignedRecipe) -> int:
    """Return the index into `LABELS` of a defocus in the optics of reference.

    Examples
    --------
    >>> signed = SignedRecipe(reference=OpticalSystem(0.75, 550.0, 0.1725))
    >>> [LABELS[class_of(z, signed)] for z in (-11, -5.6, -5.5, -0.3, 0.2, 5.5, 6)]
    [-2, -2, -1, -1, 0, 1, 2]
    """
    distance = abs(defocus_um)
    if distance < signed.step_um / 2:
        return LABELS.index(0)
    # The tolerance forgives the rounding of multiples of a step.
    far = distance > signed.inner_um + 1e-6 * signed.step_um
    return LABELS.index(int(np.sign(defocus_um)) * (2 if far else 1))


def plane_places_um(signed: SignedRecipe) -> list[float]:
    """Return the planes of a stack through focus, ascending."""
    count = round(signed.farthest_um / signed.step_um)
    return [place * signed.step_um for place in range(-count, count + 1)]


def _at_least(light: Image, side_px: int) -> Image:
    """Mirror a picture behind its edges where a side is too short."""
    short = [max(side_px - side, 0) for side in light.shape[:2]]
    pads = [(0, pixels) for pixels in short] + [(0, 0)] * (light.ndim - 2)
    return np.pad(light, pads, mode="symmetric") if any(short) else light


def _draw_places(signed: SignedRecipe, rng: np.random.Generator) -> list[float]:
    """Draw one plane in focus, two of every other class, and those beyond."""
    places = plane_places_um(signed)
    chosen = [0.0]
    for label in range(len(LABELS)):
        if label != LABELS.index(0):
            own = [z for z in places if class_of(z, signed) == label]
            picked = rng.choice(len(own), size=min(2, len(own)), replace=False)
            chosen += [own[int(k)] for k in np.sort(picked)]
    if signed.beyond_um > signed.farthest_um:
        side = float(rng.choice([-1, 1]))
        chosen.append(side * float(rng.uniform(signed.farthest_um, signed.beyond_um)))
    return chosen


@lru_cache(maxsize=128)
def _psf(optics: OpticalSystem, defocus_um: float) -> Image:
    """Compute a PSF once per place: most scenes share optics and planes."""
    return compute_psf(optics, defocus_um)


_VISIBLE = 0.1
_DRAWS = 6
# Light of the three colours, relative to the brightest: as balanced by hand.
_BALANCE = (0.92, 1.0)


class SignedPatches:
    """Training batches by number."""

    def __init__(self, recipe: SignedClassRecipe) -> None:
        self._recipe = recipe
        scenes = SignedScenes(recipe, load_fields(recipe), validation=False)
        self._pool = Pool(recipe.pool, scenes.entry)

    def batch(self, step: int, draw: int = 0) -> dict[str, NDArray[np.generic]]:
        """Make ``patches`` (N, channels, 224, 224) and their ``labels`` (N,)."""
        rng = np.random.default_rng([self._recipe.seed, 8, step, draw])
        scenes = self._pool.at(step)
        patches, labels = [], []
        for _ in range(self._recipe.optimiser.batch_patches):
            scene = scenes[int(rng.integers(len(scenes)))]
            place = int(rng.integers(len(scene.defocus_um)))
            window = cut_patch(scene.planes[place], rng)
            turned = np.rot90(window, int(rng.integers(4)), axes=(1, 2))
            if rng.random() < 0.5:
                turned = turned[:, ::-1]
            camera = draw_camera(rng, self._recipe.signed.photons)
            patches.append(photograph(turned, camera, rng))
            labels.append(class_of(scene.defocus_um[place], self._recipe.signed))
        return {"patches": np.stack(patches), "labels": np.array(labels)}


def cut_patch(plane: Image, rng: np.random.Generator) -> Image:
    """Cut a patch at random, seldom an empty one."""
    window = lively_window(
        plane, PATCH_PX, rng, contrast=_VISIBLE, step=4, draws=_DRAWS
    )
    return plane[:, *window]


def photograph(
    light: Image,
    camera: DrawnCamera,
    rng: np.random.Generator,
    balance: tuple[float, float] = _BALANCE,
) -> Image:
    """Take a picture, in shares of the camera's full scale."""
    if len(light) > 1:
        factors = rng.uniform(*balance, (len(light), 1, 1))
        light = light * factors.astype(np.float32)
    return camera.take(light, rng) / np.float32(camera.full)


WIDTHS = (16, 32, 64, 128)

_KERNEL, _PADDING = 5, 2
_FUSED = 32
_HIDDEN = 128
_CELLS = PATCH_PX // 2 ** (len(WIDTHS) + 1)


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
                nn.Conv2d(inputs, width, _KERNEL, stride, _PADDING, bias=not batch_norm)
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

    def make_source(self) -> BatchSource:
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
