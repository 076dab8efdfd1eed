"""rtfocus: finds, corrects and records defocus while a microscope acquires."""

__version__ = "0.1.0"
