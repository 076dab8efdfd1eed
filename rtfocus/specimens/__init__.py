"""Specimens: sharp scenes drawn at random, to put under a virtual microscope."""
