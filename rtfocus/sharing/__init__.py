"""Engines that travel: out as model packages of bioimage.io, in from anywhere."""
