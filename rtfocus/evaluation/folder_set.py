"""Folder set: a user's own pairs, ``sharp/`` beside one folder of blurred images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rtfocus.channel import OpticalSystem
from rtfocus.errors import InputError
from rtfocus.evaluation.planes import plane_name
from rtfocus.evaluation.samples import DataSet, Sample
from rtfocus.images import ImageSeries, open_images

SHARP_FOLDER = "sharp"


def folder_set(
    folder: Path, optics: OpticalSystem, *, offset_counts: float = 0.0
) -> DataSet:
    """Return the pairs of a folder, matched by file name.

    Parameters
    ----------
    folder
        Holds ``sharp`` and one or more other folders; each of these is a group.
    optics
        Of the images.
    offset_counts
        Of the camera in the dark.

    Raises
    ------
    InputError
        If there is no such folder or no image has a partner.
    """
    sharp = folder / SHARP_FOLDER
    others = [
        place
        for place in sorted(folder.iterdir() if folder.is_dir() else ())
        if place.is_dir() and place != sharp
    ]
    if not sharp.is_dir() or not others:
        msg = (
            f"'{folder}' is no data set: needed are a folder '{SHARP_FOLDER}' and "
            "beside it folders of blurred images with the same file names"
        )
        raise InputError(msg)
    truth = {series.name: series for series in open_images(sharp)}
    pairs = [
        (place.name, series)
        for place in others
        for series in open_images(place)
        if series.name in truth
    ]
    if not pairs:
        msg = f"no image below '{folder}' has the name of one in '{sharp}'"
        raise InputError(msg)

    def samples() -> Iterator[Sample]:
        for group, series in pairs:
            yield from _samples(group, series, truth[series.name])

    title = f"{folder.name}: {len(pairs)} pairs; range 255 or that of the sharp image"
    return DataSet(folder.name, title, optics, offset_counts, samples)


def _samples(group: str, blurred: ImageSeries, sharp: ImageSeries) -> Iterator[Sample]:
    for index in blurred.indices():
        pixels, truth = blurred.read(**index), sharp.read(**index)
        if pixels.shape != truth.shape:
            msg = (
                f"'{blurred.path}' is {pixels.shape}, its partner '{sharp.path}' is "
                f"{truth.shape}; a pair has one size"
            )
            raise InputError(msg)
        span = 255.0 if truth.dtype == np.uint8 else float(np.ptp(truth))
        name = f"{group} {plane_name(blurred.name, index)}"
        yield Sample(name, pixels, truth, None, group, span)
