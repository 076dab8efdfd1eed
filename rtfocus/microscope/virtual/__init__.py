"""Virtual microscope: a specimen under real optics, and devices that show it."""
