"""Scorecard: score sheets as tables and pictures, the same in every format."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from rtfocus import __version__
from rtfocus.drawing.canvas import PixelCanvas
from rtfocus.drawing.figures import Axis, Panel, draw_panels, figure_size, save_panels
from rtfocus.errors import OutputError, writing
from rtfocus.evaluation.contenders import Contender
from rtfocus.evaluation.evaluate import ScoreSheet
from rtfocus.evaluation.samples import SHARP_GROUP, DataSet, Sample
from rtfocus.evaluation.scores import ErrorScore, LevelScore
from rtfocus.files import portable_name
from rtfocus.machine import with_load
from rtfocus.optics.normalisation import luminance

_SHOWN_PX = 320
# Scale on which the brightest part of a frame is looked for.
_SMOOTH_PX = 65
_CELL_PT = 34.0
_BRIGHT = 0.6


def save_side_by_side(path: Path, data: DataSet, sheets: Sequence[ScoreSheet]) -> bool:
    """Write blurred | every contender | sharp, one row per frame.

    Parameters
    ----------
    path
        PNG to write.
    data
        Where the frames come from.
    sheets
        Of contenders that restored them.

    Returns
    -------
    bool
        False: there is nothing to show.
    """
    with_images = [sheet for sheet in sheets if sheet.images]
    if not with_images:
        return False
    # A field may have failed for one of them.
    names = set.intersection(*(set(sheet.images) for sheet in with_images))
    pixel_um = data.optics.pixel_size_um
    rows = [_row(sample, with_images, pixel_um) for sample in data.named(names)]
    if not rows:
        return False
    panels = [panel for row in rows for panel in row]
    save_panels(path, panels, columns=len(rows[0]))
    return True


def save_confusion(path: Path, title: str, score: LevelScore) -> None:
    """Write true levels (down) against found ones (right), shares of a row in %."""
    counts = score.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = shares.shape
    names = (*(str(level) for level in score.levels), "bg")
    panel = Panel(
        title,
        100 * shares,
        0.0,
        100.0,
        "% of row",
        "even",
        x=Axis("found level", -0.5, columns - 0.5, names=names[:columns]),
        y=Axis("true level", rows - 0.5, -0.5, names=names[:rows]),
        smooth=False,
    )
    side = _CELL_PT * max(rows, columns)
    canvas = PixelCanvas(*figure_size([panel], 1, side))
    ((left, top, right, bottom),) = draw_panels(
        canvas, [panel], columns=1, side_pt=side
    )
    for row, column in np.ndindex(shares.shape):
        if counts[row, column]:
            middle = (
                left + (column + 0.5) * (right - left) / columns,
                top + (row + 0.5) * (bottom - top) / rows,
            )
            ink = "#000000" if shares[row, column] > _BRIGHT else "#ffffff"
            text = f"{100 * shares[row, column]:.0f}"
            canvas.text(middle, text, anchor="middle", colour=ink)
    canvas.save(path)


def _row(sample: Sample, sheets: Sequence[ScoreSheet], pixel_um: float) -> list[Panel]:
    like = sample.pixels if sample.sharp is None else sample.sharp
    window = _window(like)
    low, high = np.percentile(_grey(like)[window], (0.5, 99.9))
    before = {frame.name: frame for frame in sheets[0].frames}.get(sample.name)
    caption = sample.name
    if before is not None:
        caption += f"  {before.before.psnr_db:.1f} dB"
    images = [(caption, sample.pixels)]
    for sheet in sheets:
        scored = {frame.name: frame for frame in sheet.frames}.get(sample.name)
        suffix = f"  {scored.after.psnr_db:.1f} dB" if scored else ""
        images.append((f"{sheet.contender.title}{suffix}", sheet.images[sample.name]))
    if sample.sharp is not None:
        images.append(("sharp", sample.sharp))
    return [
        Panel(text, _grey(image)[window], float(low), float(high), pixel_um=pixel_um)
        for text, image in images
    ]


def _window(image: NDArray[np.generic]) -> tuple[slice, slice]:
    """Return the piece of at most 320 px around the brightest part."""
    grey = _grey(image)
    side = min(_SHOWN_PX, *grey.shape)
    peak = np.unravel_index(np.argmax(uniform_filter(grey, _SMOOTH_PX)), grey.shape)
    starts = [
        int(np.clip(place - side // 2, 0, length - side))
        for place, length in zip(peak, grey.shape, strict=True)
    ]
    rows, columns = (slice(start, start + side) for start in starts)
    return rows, columns


def _grey(image: NDArray[np.generic]) -> NDArray[np.float32]:
    return luminance(np.asarray(image, dtype=np.float32))


Rows = list[list[str]]

RESTORED_COLUMNS = (
    "data",
    "engine",
    "before dB",
    "PSNR dB",
    "gain dB",
    "worst gain",
    "SSIM",
    "PCC",
    "MSE",
    "sharp in dB",
    "mult-adds/px",
    "ms/Mpx",
    "CPU ms/Mpx",
)
"""Of restored images; ``sharp in``: frames in focus against their input."""
LEVEL_COLUMNS = (
    "data",
    "engine",
    "tiles",
    "right",
    "within one",
    "top 3",
    "sign right",
    "called empty",
    "calibration error",
    "within 1 sigma",
    "within 2 sigma",
    "mean error um",
    "mult-adds/px",
    "ms/Mpx",
    "CPU ms/Mpx",
)
"""Of the tiles that hold a specimen."""


ERROR_COLUMNS = (
    *("data", "engine", "frames", "tiles", "rank", "rank in a frame"),
    *("rank of frames", "within x2", "stated/true", "in focus %"),
)
"""Of the error stated beside restored images; ``in focus``: of the range, median."""


def tables(sheets: Sequence[ScoreSheet]) -> list[tuple[str, tuple[str, ...], Rows]]:
    """Return title, columns and rows of every table."""
    # By data set; contenders within as they were given.
    sets = list(dict.fromkeys(sheet.data.name for sheet in sheets))
    ordered = sorted(sheets, key=lambda sheet: sets.index(sheet.data.name))
    restored = [_restored(sheet) for sheet in ordered if sheet.frames]
    levels = [
        _levels(sheet, sheet.levels) for sheet in ordered if sheet.levels is not None
    ]
    errors = [
        _errors(sheet, sheet.errors) for sheet in ordered if sheet.errors is not None
    ]
    return [
        ("restored images", RESTORED_COLUMNS, restored),
        ("defocus of tiles", LEVEL_COLUMNS, levels),
        ("expected error of restored images", ERROR_COLUMNS, errors),
    ]


def _errors(sheet: ScoreSheet, score: ErrorScore) -> list[str]:
    cells = ["" if x is None else f"{x:g}" for x in score.summary().values()]
    return [sheet.data.name, sheet.contender.title, *cells]


def _restored(sheet: ScoreSheet) -> list[str]:
    groups = sheet.groups()
    everything, sharp = groups["all"], groups.get(SHARP_GROUP)
    before, after = everything["before"], everything["after"]
    return [
        sheet.data.name,
        sheet.contender.title,
        f"{before['psnr_db']:.2f}",
        f"{after['psnr_db']:.2f}",
        f"{everything['gain_db']:+.2f}",
        f"{everything['worst_gain_db']:+.2f}",
        f"{after['ssim']:.4f}",
        f"{after['pcc']:.4f}",
        f"{after['mse']:.4g}",
        "" if sharp is None else f"{sharp['after']['psnr_db']:.1f}",
        *_cost(sheet),
    ]


def _levels(sheet: ScoreSheet, score: LevelScore) -> list[str]:
    summary = score.summary()
    shares = (
        summary["accuracy"],
        summary["within_one"],
        summary["top_k"][2] if summary["top_k"] else None,
        summary["sign_right"],
        summary["called_background"],
        summary["calibration_error"],
        summary["within_one_sigma"],
        summary["within_two_sigma"],
    )
    error_um = summary["mean_error_um"]
    return [
        sheet.data.name,
        sheet.contender.title,
        str(summary["tiles"]),
        *map(_share, shares),
        "" if error_um is None else f"{error_um:.2f}",
        *_cost(sheet),
    ]


def _cost(sheet: ScoreSheet) -> list[str]:
    operations = sheet.contender.multiply_adds_per_pixel()
    return [
        "" if operations is None else f"{operations:,.0f}",
        *(
            "" if milliseconds is None else f"{milliseconds:,.0f}"
            for milliseconds in (sheet.ms_per_megapixel, sheet.cpu_ms_per_megapixel)
        ),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


JSON_NAME = "evaluation.json"
MARKDOWN_NAME = "evaluation.md"


def write_report(
    folder: Path,
    sheets: Sequence[ScoreSheet],
    *,
    command: str,
    lacking: Sequence[str],
    taken_on: str | None,
) -> list[Path]:
    """Write a report and return the paths written.

    Parameters
    ----------
    folder
        Made if needed; a report of an earlier evaluation is replaced.
    sheets
        In the order of the tables.
    command
        That made them, for later readers.
    lacking
        What failed and is in no figure, and why; one line each.
    taken_on
        Machines that milliseconds hold for; None: this one.

    Raises
    ------
    OutputError
        If the disk refuses it.
    """
    with writing(folder, OutputError):
        folder.mkdir(parents=True, exist_ok=True)
        content = as_json(sheets, command=command, taken_on=taken_on)
        if lacking:
            content["failed"] = list(lacking)
        report = markdown(sheets, command=command, taken_on=taken_on, lacking=lacking)
        paths = [folder / JSON_NAME, folder / MARKDOWN_NAME]
        text = json.dumps(content, indent=1, allow_nan=False)
        paths[0].write_text(text, encoding="utf-8")
        paths[1].write_text(report, encoding="utf-8")
        paths += _pictures(folder, sheets)
    return paths


def as_json(
    sheets: Sequence[ScoreSheet], *, command: str, taken_on: str | None
) -> dict[str, Any]:
    """Return everything that was measured as plain values."""
    return {
        "command": command,
        "rtfocus": __version__,
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": taken_on or with_load(),
        "data": {sheet.data.name: sheet.data.title for sheet in sheets},
        "outcomes": [_sheet(sheet) for sheet in sheets],
    }


def markdown(
    sheets: Sequence[ScoreSheet],
    *,
    command: str,
    taken_on: str | None = None,
    lacking: Sequence[str] = (),
) -> str:
    """Return the tables in Markdown."""
    place = taken_on or with_load()
    lines = ["# Evaluation", "", f"`{command}`", "", f"Machine: {place}.", ""]
    titles = {sheet.data.name: sheet.data.title for sheet in sheets}
    lines += [f"- **{name}**: {title}" for name, title in titles.items()]
    lines += [f"- {why}" for sheet in sheets if (why := sheet.nothing_found())]
    if lacking:
        lines += ["", "**Failed, and in no figure:**", ""]
        lines += [f"- {line}" for line in lacking]
    for title, columns, rows in tables(sheets):
        if rows:
            lines += ["", f"## {title.capitalize()}", "", *table(columns, rows)]
    by_group = [line for sheet in sheets for line in _groups(sheet)]
    if by_group:
        lines += ["", "## By group", "", *by_group]
    return "\n".join(lines) + "\n"


def _sheet(sheet: ScoreSheet) -> dict[str, Any]:
    contender = sheet.contender
    return {
        "engine": contender.name,
        "title": contender.title,
        "kind": "builtin" if contender.engine is None else contender.engine.card.kind,
        "classifier": contender.classifier and Path(contender.classifier).name,
        "blind": contender.blind,
        "data": sheet.data.name,
        "multiply_adds_per_pixel": contender.multiply_adds_per_pixel(),
        "ms_per_megapixel": sheet.ms_per_megapixel,
        "cpu_ms_per_megapixel": sheet.cpu_ms_per_megapixel,
        "restored": sheet.groups(),
        "expected_error": sheet.errors.summary() if sheet.errors else None,
        "levels": None if sheet.levels is None else sheet.levels.summary(),
        "levels_by_group": {
            name: score.summary() for name, score in sheet.levels_by_group.items()
        },
        "frames": [
            {
                "name": frame.name,
                "before_db": round(frame.before.psnr_db, 3),
                "after_db": round(frame.after.psnr_db, 3),
            }
            for frame in sheet.frames
        ],
    }


def _groups(sheet: ScoreSheet) -> list[str]:
    """Return a small table of one contender on one data set, by group."""
    images, levels = sheet.groups(), sheet.levels_by_group
    names = [name for name in dict.fromkeys([*images, *levels]) if name != "all"]
    if len(names) < 2:
        return []
    rows = []
    for name in names:
        row = [name, *[""] * 6]
        if image := images.get(name):
            before, after = image["before"], image["after"]
            row[1:3] = f"{before['psnr_db']:.2f}", f"{after['psnr_db']:.2f}"
            row[3] = f"{after['ssim']:.4f}"
        if name in levels:
            score = levels[name].summary()
            row[4:] = (str(score[key]) for key in ("tiles", "accuracy", "within_one"))
        rows.append(row)
    columns = ("group", "before dB", "after dB", "SSIM", "tiles", "right", "within one")
    heading = f"**{sheet.contender.title}** on {sheet.data.name}"
    return [heading, "", *table(columns, rows), ""]


def table(columns: Sequence[str], rows: Rows) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def report_names(contenders: Sequence[Contender], sets: Sequence[str]) -> list[str]:
    """Return the files that a report of some contenders on some data may have.

    Parameters
    ----------
    contenders
        Rows of the tables.
    sets
        Names of the data sets.
    """
    pictures = [_images_name(name) for name in sets]
    pictures += [
        _confusion_name(contender, name) for contender in contenders for name in sets
    ]
    return [JSON_NAME, MARKDOWN_NAME, *pictures]


def _images_name(data: str) -> str:
    return f"images_{portable_name(data)}.png"


def _confusion_name(contender: Contender, data: str) -> str:
    row = contender.title.replace(", ", "_").replace(" ", "_")
    return portable_name(f"confusion_{row}_{data}") + ".png"


def _pictures(folder: Path, sheets: Sequence[ScoreSheet]) -> list[Path]:
    paths = []
    for name, data in {sheet.data.name: sheet.data for sheet in sheets}.items():
        path = folder / _images_name(name)
        same = [sheet for sheet in sheets if sheet.data.name == name]
        if save_side_by_side(path, data, same):
            paths.append(path)
    for sheet in sheets:
        if sheet.levels is not None and sheet.levels.tiles:
            path = folder / _confusion_name(sheet.contender, sheet.data.name)
            save_confusion(
                path, f"{sheet.contender.title}, {sheet.data.name}", sheet.levels
            )
            paths.append(path)
    return paths
