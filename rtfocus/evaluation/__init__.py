"""Evaluation: engines side by side on the same images, through the live loop's code."""
