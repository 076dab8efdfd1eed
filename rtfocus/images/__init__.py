"""Images: reads and writes image files, one form for all formats."""

from rtfocus.images.reading import FoundImages, find_images, open_images
from rtfocus.images.series import ImageSeries
from rtfocus.images.writing import write_images

__all__ = [
    "FoundImages",
    "ImageSeries",
    "find_images",
    "open_images",
    "write_images",
]
