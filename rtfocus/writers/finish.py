"""Finish: what turns a recorded run folder into a finished one.

Closing a run and repairing a cut-off one are the same steps; the report is
written last, so that its presence means that all the others are done.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from rtfocus.writers.columns import write_columns
from rtfocus.writers.folder import set_aside
from rtfocus.writers.header import REPORT_NAME, RunHeader, write_json
from rtfocus.writers.images import RunImages
from rtfocus.writers.places import complete
from rtfocus.writers.tally import Tally


def finish_run(
    folder: Path,
    header: RunHeader,
    images: RunImages,
    tally: Tally,
    report: dict[str, Any],
) -> None:
    """Trim t, write totals, missing places, journal columns and the report.

    Raises
    ------
    WriterError
        If any of it cannot be written; the folder can be repaired.
    """
    # A Zarr image without a single time point is refused by many readers. What lies
    # beyond the last journalled one was never acknowledged, but is somebody's.
    if (aside := set_aside(folder, images.trim(max(tally.extent, 1)))) is not None:
        report = report | {"set_aside": str(aside.relative_to(folder).as_posix())}
    totals = tally.totals()
    missing = defaultdict(list)
    for line in tally.missing:
        if line["index"] is not None:
            told = {key: line[key] for key in ("sequence", "index", "reason")}
            missing[complete(line["index"])["p"]].append(told)
    for position in range(images.positions):
        found = {"finished": True, "missing": missing[position], "totals": totals}
        images.describe(position, found)
    write_columns(folder, tally.lines)
    write_json(
        folder / REPORT_NAME,
        {
            "name": header.series.name,
            "series_uid": header.series.series_uid,
            "started_ns": header.series.started_ns,
            "planned_frames": tally.plan.images,
            "time_points": tally.extent,
            "totals": totals,
            "missing": tally.missing,
            **report,
        },
        fsync=header.store.fsync,
    )
