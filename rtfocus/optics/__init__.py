"""Optics: PSFs, blur, camera noise, specimens and their calibration."""
