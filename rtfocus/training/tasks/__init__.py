"""Tasks: per network its recipe, its batches, its losses and its card."""
