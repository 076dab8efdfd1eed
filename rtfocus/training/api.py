"""Training commands: what `rtfocus train` and `rtfocus export` call."""

from pathlib import Path

from rtfocus.training.recipe import load_recipe
from rtfocus.training.trainer import train


def train_command(recipe: Path, resume: bool, device: str) -> Path:
    """Train the network of a recipe; returns its newest checkpoint."""
    return train(load_recipe(recipe), resume=resume, device=device)
