"""Virtual microscope: a specimen under real optics, and devices that show it."""

from rtfocus.microscope.virtual.load import load_virtual_microscope
from rtfocus.microscope.virtual.specimen import Truth, VirtualSpecimen

__all__ = ["Truth", "VirtualSpecimen", "load_virtual_microscope"]
