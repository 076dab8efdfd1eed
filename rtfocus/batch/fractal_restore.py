"""Fractal: restoring one field of a plate, as a task of the Fractal platform.

``__FRACTAL_MANIFEST__.json`` beside the package's code describes it; Fractal calls this
file with ``--args-json`` and ``--out-json`` for every image it has on its list.
"""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock
from pydantic import validate_call

from rtfocus import files
from rtfocus.config import parse_config
from rtfocus.errors import ConfigError, InputError, OutputError, RtfocusError
from rtfocus.image_set import ImageSet, restoring_with
from rtfocus.images.metadata import written_by_rtfocus
from rtfocus.images.optics import StatedOptics, stated_optics
from rtfocus.images.reading import open_images
from rtfocus.images.zarr_writing import ZarrForm, write_zarr

logger = logging.getLogger(__name__)


@validate_call
def fractal_restore(
    *,
    zarr_url: str,
    engine: str | None = None,
    optics: str | None = None,
    suffix: str = "_restored",
    pyramid: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Restore an out-of-focus image, tile by tile, beside the image it is of.

    Args:
        zarr_url: Path of the image's OME-Zarr group. (standard argument for Fractal
            tasks, managed by Fractal server).
        engine: Restoration method or engine of rtfocus. If empty, Wiener, or an engine
            that needs no optics where these are unknown.
        optics: Such as `NA=0.75,wavelength=520,pixel=0.325`. What is left out comes
            from the image.
        suffix: What the restored image's name has after that of its input.
        pyramid: Whether the restored image has smaller levels for viewers.
        overwrite: Whether an earlier result of rtfocus may be replaced.
    """
    source = Path(zarr_url)
    target = source.with_name(source.name + suffix)
    if not suffix or Path(target.name) != Path(source.name + suffix):
        msg = f"suffix '{suffix}' is no end of a name; give one such as '_restored'"
        raise ConfigError(msg)
    source_images = open_images(source)
    if len(source_images) != 1:
        msg = f"'{source}' holds {len(source_images)} images; give the group of one"
        raise InputError(msg)
    _refuse_foreign(target, overwrite=overwrite)
    settings = parse_config({})
    if engine is not None:
        settings = restoring_with(settings, engine)
    stated = None if optics is None else StatedOptics(stated_optics(optics), optics)
    is_old = not (source / "zarr.json").is_file()
    form = ZarrForm(version="0.4" if is_old else "0.5", pyramid=pyramid)
    # A group of its own, not a plate.
    source_images = [replace(source_images[0], place=None)]
    with ImageSet(
        settings, source_images, stated=stated, free_choice=engine is None
    ) as images:
        for line in images.assumptions():
            logger.warning("%s", line)
        planes = images.restored(0)
        image = replace(images.outline(0), planes=planes)
        with files.whole(target, overwrite=overwrite) as part:
            write_zarr(part, [image], form)
        for line in images.doubts():
            logger.warning("%s", line)
    _note_in_well(source, target)
    update = {"zarr_url": str(target), "origin": zarr_url, "types": {"restored": True}}
    return {"image_list_updates": [update]}


def _refuse_foreign(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not written_by_rtfocus(target):
        msg = f"'{target}' exists and is not of rtfocus; choose another suffix"
        raise OutputError(msg)
    if not overwrite:
        msg = f"'{target}' exists; choose another suffix, or overwrite"
        raise OutputError(msg)


def _note_in_well(source: Path, target: Path) -> None:
    """List the new image in its well, if it lies in one; other tasks do so too."""
    well = source.parent
    document = well / "zarr.json"
    if not document.is_file():
        document = well / ".zattrs"
    if not document.is_file():
        return
    with FileLock(well / ".rtfocus-well.lock"):
        content = json.loads(document.read_text("utf-8"))
        attributes = content.get("attributes", content)
        images = attributes.get("ome", attributes).get("well", {}).get("images")
        if not isinstance(images, list):
            return
        if any(image.get("path") == target.name for image in images):
            return
        like: dict[str, Any] = next(
            (o for o in images if o.get("path") == source.name), {}
        )
        images.append({**like, "path": target.name})
        with files.whole(document, overwrite=True) as part:
            part.write_text(json.dumps(content, indent=2), "utf-8")


def main() -> None:
    """Do what Fractal asks for in one file, and answer in another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--args-json", type=Path, required=True)
    parser.add_argument("--out-json", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    try:
        arguments = msgspec.json.decode(given.args_json.read_bytes(), type=dict)
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        sys.exit(f"error: '{given.args_json}' is no JSON of arguments: {error}")
    try:
        answer = fractal_restore(**arguments)
    except RtfocusError as error:
        sys.exit(f"error: {error}")
    given.out_json.write_text(json.dumps(answer, indent=2), "utf-8")


if __name__ == "__main__":
    main()
