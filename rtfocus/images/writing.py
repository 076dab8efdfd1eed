"""Writing: processed images as TIFF, OME-TIFF or OME-Zarr, by the output's ending.

What the input says of its pixels, channels and wells is kept; what it does not say
stays unknown. Every result says how it was made, see `rtfocus.images.metadata`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import tifffile
from numpy.typing import NDArray

from rtfocus.errors import InputError, OutputError
from rtfocus.images.metadata import NAMESPACE, SOFTWARE, Provenance
from rtfocus.images.ome_xml import signed_rgba
from rtfocus.images.outputs import OutputGuard, companions, result_names
from rtfocus.images.reading import BrokenImage
from rtfocus.images.series import ImageSeries, StagePosition, writable_text
from rtfocus.images.zarr_writing import ZarrForm, write_zarr

Planes = Iterator[NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class PlaneFacts:
    """When and where one plane was taken; None: unknown."""

    delta_s: float | None = None
    """End of its exposure since the series began."""
    exposure_ms: float | None = None
    z_um: float | None = None


@dataclass(frozen=True)
class OutputImage:
    """One image to write: the form of `like`, other pixels."""

    like: ImageSeries
    """Gives name, sizes, shape, pixel sizes, channels, well."""
    dtype: np.dtype[np.generic]
    planes: Planes
    """In the order of ``like.indices()``; consumed once, one plane at a time."""
    made: Provenance = field(default_factory=dict)
    """How: engine, optics, where they come from."""
    keeps_counts: bool = True
    """Whether the planes' grey values mean what those of `like` mean."""
    taken: Sequence[PlaneFacts] = ()
    """Of every plane, in their order; empty: unknown."""


class ImageOutput:
    """Where images will be written, checked before any of them is computed.

    Parameters
    ----------
    output
        ``.tif`` or ``.tiff``: one file (OME-TIFF; several images = several
        series); ``.zarr``: OME-Zarr 0.5, images of one plate as a plate; no ending,
        or a folder that exists: a folder with one TIFF per image, in the layout of
        the input.
    series
        At least one.
    guard
        Knows the inputs.
    root
        The input that the images were found in; None: that of the first.

    Raises
    ------
    OutputError
        If the ending is unknown, something must not be replaced, or the place takes
        no files.
    """

    def __init__(
        self,
        output: Path,
        series: Sequence[ImageSeries],
        guard: OutputGuard,
        root: Path | None = None,
    ) -> None:
        self.path = output
        self._guard = guard
        self.ending = output.suffix.lower()
        self.is_folder = self.ending == "" or (
            os.path.isdir(output) and self.ending not in (".tif", ".tiff", ".zarr")
        )
        if self.is_folder:
            guard.claim_folder(output)
            names = result_names(series, root or series[0].path)
            self.targets = [guard.claim(output / name) for name in names]
        elif self.ending in (".tif", ".tiff", ".zarr"):
            self.targets = [guard.claim(output, named=self.ending != ".zarr")]
        else:
            msg = (
                f"'{output}': unknown ending '{self.ending}'; use .tif, .ome.zarr, or "
                "a folder's name without ending"
            )
            raise OutputError(msg)

    def write(
        self, images: Sequence[OutputImage], form: ZarrForm | None = None
    ) -> list[BrokenImage]:
        """Write images plane by plane, each target whole.

        Parameters
        ----------
        images
            One for each series, in the same order.
        form
            Of an OME-Zarr; None: of version 0.5, in full size alone.

        Returns
        -------
        list of BrokenImage
            Inputs whose planes cannot be read: nothing is written of them. In one
            file for all there is none, it is all or nothing.

        Raises
        ------
        InputError
            If a plane cannot be read and all images go into one file.
        OutputError
            If the disk refuses it.
        """
        if not self.is_folder:
            with self._guard.whole(self.path) as part:
                if self.ending == ".zarr":
                    write_zarr(part, images, form or ZarrForm())
                else:
                    write_tiff(part, images)
            return []
        broken = []
        for image, target in zip(images, self.targets, strict=True):
            try:
                with self._guard.whole(target) as part:
                    write_tiff(part, [image])
            except InputError as error:
                broken.append(BrokenImage(image.like.path, str(error)))
        return broken

    def written(self) -> list[Path]:
        """Return the targets that are on disk now."""
        return [target for target in self.targets if target.exists()]


def write_images(output: Path, images: Sequence[OutputImage]) -> list[Path]:
    """Write images to an output that does not exist yet and return the paths written.

    What fails halfway leaves nothing.

    Parameters
    ----------
    output
        See `ImageOutput`.
    images
        At least one.

    Raises
    ------
    InputError
        If an image cannot be read.
    OutputError
        If the ending is unknown, the output exists, or the disk refuses it.
    """
    series = [image.like for image in images]
    guard = OutputGuard(companions(series))
    place = ImageOutput(output, series, guard, _common_folder(series))
    broken = place.write(images)
    if broken:
        raise InputError(broken[0].reason)
    return place.written()


def _common_folder(series: Sequence[ImageSeries]) -> Path:
    """Return the folder that holds all files of some images."""
    parents = [one.path.absolute().parent for one in series]
    first = parents[0]
    return next(
        folder
        for folder in (first, *first.parents)
        if all(parent.is_relative_to(folder) for parent in parents)
    )


def write_tiff(path: Path, images: Sequence[OutputImage]) -> None:
    """Write images as the series of one OME-TIFF, plane by plane."""
    with tifffile.TiffWriter(path, ome=True, bigtiff=_is_big(images)) as file:
        for image in images:
            like = image.like
            rgb = len(like.shape) == 3
            sizes = tuple(like.sizes[axis] for axis in "tcz")
            file.write(
                image.planes,
                shape=(*sizes, *like.shape),
                dtype=image.dtype,
                photometric="rgb" if rgb else "minisblack",
                compression="zlib",
                software=SOFTWARE,
                metadata={
                    "axes": "TCZYXS" if rgb else "TCZYX",
                    "UUID": _uuid(images),
                    "Name": like.name,
                    **_ome_sizes(like),
                    **_ome_channels(like),
                    **_ome_planes(image),
                    "MapAnnotation": _ome_map(image),
                },
            )


def _uuid(images: Sequence[OutputImage]) -> str:
    """Return the same for the same images made in the same way, so equal files.

    A UUID of another kind would hold the time and this computer's address.
    """
    made = [(i.like.name, i.like.path.name, i.like.sizes, dict(i.made)) for i in images]
    return f"urn:uuid:{uuid5(NAMESPACE_OID, repr(made))}"


def _is_big(images: Sequence[OutputImage]) -> bool:
    """Tell whether the pixels may pass the 4 GiB of a classic TIFF."""
    size = sum(
        len(i.like) * int(np.prod(i.like.shape)) * i.dtype.itemsize for i in images
    )
    return size > 3 * 2**30


def _ome_sizes(like: ImageSeries) -> dict[str, object]:
    """Return what is known of the distances between pixels, slices and times."""
    known: dict[str, object] = {}
    for axis, size_um in (
        ("X", like.pixel_size_x_um),
        ("Y", like.pixel_size_y_um),
        ("Z", like.z_step_um),
    ):
        if size_um is not None:
            known |= {f"PhysicalSize{axis}": size_um, f"PhysicalSize{axis}Unit": "µm"}
    if like.time_step_s is not None:
        known |= {"TimeIncrement": like.time_step_s, "TimeIncrementUnit": "s"}
    return known


def _ome_channels(like: ImageSeries) -> dict[str, object]:
    """Return names, colours and wavelengths, a list each; what no channel has: none."""
    found: dict[str, list[object]] = {
        "Name": [channel.name for channel in like.channels],
        "Color": [
            None if channel.color is None else signed_rgba(channel.color)
            for channel in like.channels
        ],
        "EmissionWavelength": [channel.emission_nm for channel in like.channels],
        "ExcitationWavelength": [channel.excitation_nm for channel in like.channels],
    }
    known: dict[str, object] = {}
    for key, values in found.items():
        if any(value is not None for value in values):
            known[key] = values
            if key.endswith("Wavelength"):
                known[f"{key}Unit"] = ["nm"] * len(values)
    return {"Channel": known} if known else {}


def _ome_planes(image: OutputImage) -> dict[str, object]:
    """Return where and when the planes were taken, as far as it is known."""
    like = image.like
    taken = image.taken or [PlaneFacts()] * len(like)
    stage = like.stage or StagePosition()
    known = [
        _measured(
            ("PositionX", stage.x_um, "µm"),
            ("PositionY", stage.y_um, "µm"),
            ("PositionZ", stage.z_um if one.z_um is None else one.z_um, "µm"),
            ("DeltaT", one.delta_s, "s"),
            ("ExposureTime", one.exposure_ms, "ms"),
        )
        for one in taken
    ]
    return {"Plane": known} if any(known) else {}


def _measured(*facts: tuple[str, float | None, str]) -> dict[str, object]:
    known: dict[str, object] = {}
    for key, value, unit in facts:
        if value is not None:
            known |= {key: value, f"{key}Unit": unit}
    return known


def _ome_map(image: OutputImage) -> dict[str, object]:
    """Return how an image was made, and what OME-XML has no place for."""
    like = image.like
    told = dict(image.made)
    if like.position is not None:
        told["position"] = like.position
    if like.place is not None:
        row, column = like.place.rows[like.place.row], like.place.columns
        told["plate"] = like.place.plate
        told["well"] = f"{row}{column[like.place.column]}"
        told["field"] = str(like.place.field)
    for number, channel in enumerate(like.channels):
        window = channel.window
        if window is not None and image.keeps_counts:
            told[f"contrast window c{number}"] = f"{window.start:g} to {window.end:g}"
    value = {key: writable_text(text) for key, text in told.items()}
    return {"Namespace": NAMESPACE, "Value": {"rtfocus": SOFTWARE, **value}}
