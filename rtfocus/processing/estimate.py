"""Estimate: one frame's defocus in one number, from its tiles."""

import time

import numpy as np

from rtfocus.frame import BACKGROUND, DefocusMap, Estimate, FrameHeader


def estimate_frame(header: FrameHeader, found: DefocusMap) -> Estimate:
    """Combine the tiles of a frame, each with the weight of its confidence.

    Parameters
    ----------
    header
        Of the frame; its index, z and times are copied.
    found
        Defocus of its tiles.

    Returns
    -------
    Estimate
        ``level`` is the one that gathers most confidence, ``defocus_um`` the
        weighted mean; both None where every tile is background.
    """
    foreground = found.level != BACKGROUND
    weights = found.confidence[foreground].astype(np.float64)
    level: int | None = None
    defocus_um: float | None = None
    confidence = 0.0
    if weights.sum() > 0:
        levels, place = np.unique(found.level[foreground], return_inverse=True)
        level = int(levels[np.bincount(place, weights=weights).argmax()])
        defocus_um = float(np.average(found.defocus_um[foreground], weights=weights))
        confidence = float(weights.mean())
    return Estimate(
        series_uid=header.series_uid,
        sequence=header.sequence,
        level=level,
        defocus_um=defocus_um,
        signed=found.grid.signed,
        confidence=confidence,
        foreground=float(foreground.mean()),
        z_um=header.z_um,
        z_offset_um=header.z_offset_um,
        index=header.index,
        captured_ns=header.captured_ns,
        estimated_ns=time.time_ns(),
    )
