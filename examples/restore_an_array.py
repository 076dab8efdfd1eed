"""Restore a NumPy array and look at its defocus, tile by tile."""

import numpy as np

import rtfocus

rng = np.random.default_rng(1)
blurred = rng.poisson(800, (384, 384)).astype(np.uint16)

optics = rtfocus.Optics(numerical_aperture=0.5, wavelength_nm=520, pixel_size_um=0.65)
restored = rtfocus.restore(blurred, optics=optics, engine="wiener")
defocus = rtfocus.classify(blurred, optics=optics)

print("restored", restored.shape, restored.dtype)
print("defocus in um, by tile:", defocus.defocus_um.shape, defocus.defocus_um.dtype)
