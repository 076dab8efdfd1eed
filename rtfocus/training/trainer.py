"""Trainer: from a recipe to weights; deterministic, resumable, watched.

Every random choice depends on (seed, step) alone, so a run that was killed and
resumed ends with the same weights as one that was not.
"""

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from rtfocus.errors import ConfigError
from rtfocus.training.blurring import Blurring
from rtfocus.training.checkpoint import NEWEST, load_checkpoint, save_checkpoint
from rtfocus.training.curve import CURVE_NAME, StepResult, add_to_curve
from rtfocus.training.dataset import Batch, Batches
from rtfocus.training.delpnet import DelpNet, recalibrate
from rtfocus.training.fields import load_fields
from rtfocus.training.recipe import OptimiserRecipe, Recipe

_REPORT_STEPS = 25
_CALIBRATION_BATCHES = 40


class Trainer:
    """One training run.

    Parameters
    ----------
    recipe
        What to train on what.
    device
        ``cpu`` or ``cuda``.
    """

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.recipe = recipe
        self.step = 0
        self.seconds = 0.0
        self._device = torch.device(device)
        torch.manual_seed(recipe.seed)
        switches = recipe.delpnet
        # Before the first sum: how it is split between threads decides the rounding.
        torch.set_num_threads(recipe.threads)
        network = DelpNet(
            dropout=switches.dropout, batch_norm_momentum=switches.batch_norm_momentum
        )
        if recipe.start_from is not None:
            _, earlier = load_checkpoint(recipe.start_from)
            network.load_state_dict(earlier["average"])
        self.network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.network)
        # In training every position of a tile counts: more to learn per crop.
        self.network.stride_cells = 1
        self._optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=recipe.optimiser.rate,
            weight_decay=recipe.optimiser.weight_decay,
            fused=True,
        )
        blurring = Blurring(recipe, load_fields(recipe), validation=False)
        self._batches = Batches(recipe, blurring)

    @property
    def finished(self) -> bool:
        """Whether all steps of the recipe are done."""
        return self.step >= self.recipe.optimiser.steps

    def train_step(self) -> StepResult:
        """Take one step of the optimiser."""
        batch = self._batches.batch(self.step)
        # Dropout draws from torch's own source: tie it to the step.
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step)
        rate = learning_rate(self.recipe.optimiser, self.step)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self.network.train()
        labels = torch.from_numpy(batch.labels).to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            logits = self.network(self._to_tensor(batch))
        loss = loss_of(logits.float(), labels, self.recipe.optimiser.ordinal_weight)
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimiser.step()
        self._average_weights()
        self.step += 1
        return _measure(loss, logits, labels)

    def calibrate_average(self) -> None:
        """Give the averaged weights exact batch statistics of their own."""
        draws = range(1, _CALIBRATION_BATCHES + 1)
        recalibrate(
            self.average,
            (self._to_tensor(self._batches.batch(self.step, draw)) for draw in draws),
        )

    def state(self) -> dict[str, Any]:
        """Return everything that a later run needs to go on."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self._optimiser.load_state_dict(state["optimiser"])

    @torch.no_grad()
    def _average_weights(self) -> None:
        # The average follows closely while there is little to average.
        decay = min(
            self.recipe.optimiser.average_decay, (1 + self.step) / (10 + self.step)
        )
        for mean, new in zip(
            self.average.parameters(), self.network.parameters(), strict=True
        ):
            mean.lerp_(new, 1 - decay)

    def _to_tensor(self, batch: Batch) -> Tensor:
        crops = torch.from_numpy(batch.crops)
        return crops.to(self._device, memory_format=torch.channels_last)


def loss_of(logits: Tensor, labels: Tensor, ordinal_weight: float) -> Tensor:
    """Return cross-entropy, plus a weight times the error of the mean level.

    Parameters
    ----------
    logits
        Shape (N, label, row, column), background last.
    labels
        Shape (N, row, column).
    ordinal_weight
        Weight of the smooth absolute error between the true level and the mean of
        the levels by their probabilities, over tiles with specimen. Cross-entropy
        alone (He 2020) does not know that level 4 is nearer to 5 than 9 is; 0
        leaves it at that.
    """
    entropy = nn.functional.cross_entropy(logits, labels)
    background = logits.shape[1] - 1
    specimen = labels != background
    if ordinal_weight == 0 or not specimen.any():
        return entropy
    levels = torch.arange(background, dtype=logits.dtype, device=logits.device)
    shares = logits[:, :background].softmax(dim=1)
    mean = torch.einsum("nlyx,l->nyx", shares, levels)
    error = nn.functional.smooth_l1_loss(
        mean[specimen], labels[specimen].to(mean.dtype)
    )
    return entropy + ordinal_weight * error


def learning_rate(recipe: OptimiserRecipe, step: int) -> float:
    """Return the rate of a step: linear rise, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return recipe.rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(
    recipe: Recipe,
    *,
    resume: bool = True,
    device: str = "auto",
    show_progress: bool = True,
) -> Path:
    """Run a recipe to its end and return the newest checkpoint.

    Parameters
    ----------
    recipe
        What to train on what.
    resume
        Go on from the newest checkpoint, if there is one of the same recipe.
    device
        ``cpu``, ``cuda`` or ``auto``.
    show_progress
        Draw a progress bar with the time left.

    Raises
    ------
    ConfigError
        If the device is missing or the checkpoint belongs to another recipe.
    """
    trainer = Trainer(recipe, choose_device(device))
    folder = recipe.checkpoints / recipe.name
    newest = folder / NEWEST
    if resume and newest.is_file():
        _resume(trainer, newest)
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not show_progress,
    )
    steps = recipe.optimiser.steps
    with progress:
        bar = progress.add_task(recipe.name, total=steps, completed=trainer.step)
        recent: list[StepResult] = []
        while not trainer.finished:
            started = time.perf_counter()
            recent.append(trainer.train_step())
            trainer.seconds += time.perf_counter() - started
            if len(recent) == _REPORT_STEPS or trainer.finished:
                rate = learning_rate(recipe.optimiser, trainer.step - 1)
                text = add_to_curve(
                    folder / CURVE_NAME, trainer.step, trainer.seconds, rate, recent
                )
                progress.update(bar, completed=trainer.step, description=text)
                recent = []
            if trainer.step % recipe.checkpoint_steps == 0 or trainer.finished:
                trainer.calibrate_average()
                save_checkpoint(newest, recipe, trainer.state())
    return newest


def choose_device(wanted: str) -> str:
    """Resolve ``auto`` and refuse a device that is not there.

    Raises
    ------
    ConfigError
        If `wanted` is unknown, or CUDA is asked for and missing.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        msg = f"device '{wanted}' is unknown; choose auto, cpu or cuda"
        raise ConfigError(msg)
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        msg = "device 'cuda': torch sees no CUDA device here; use --device cpu"
        raise ConfigError(msg)
    return "cuda" if wanted != "cpu" and has_cuda else "cpu"


def _resume(trainer: Trainer, newest: Path) -> None:
    recipe, state = load_checkpoint(newest)
    if recipe != trainer.recipe:
        msg = (
            f"checkpoint '{newest}' belongs to another recipe; give the recipe another "
            "name, or start over with --no-resume"
        )
        raise ConfigError(msg)
    trainer.load_state(state)


def _measure(loss: Tensor, logits: Tensor, labels: Tensor) -> StepResult:
    with torch.no_grad():
        found = logits.argmax(dim=1)
        background = logits.shape[1] - 1
        specimen = labels != background
        close = ((found - labels).abs() <= 1) & (found != background)
        within = close[specimen].float().mean() if specimen.any() else torch.tensor(1.0)
        exact = (found == labels).float().mean()
    return StepResult(float(loss.detach()), float(exact), float(within))
