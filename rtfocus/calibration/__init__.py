"""Calibration: a microscope's PSF from its own images, written as a config."""
