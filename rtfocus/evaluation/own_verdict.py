"""Own verdict: one's own engine beside the shipped ones, and which to use.

Judged on held-out fields of the same laboratory, blurred on purpose on both sides of
focus, as they are, and, where they are of stacks, in their own planes out of focus.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from rtfocus.channel import OpticalSystem
from rtfocus.engines.card import CARD_NAME
from rtfocus.evaluation.data_sets import LEVELS, STEP_UM
from rtfocus.evaluation.evaluate import Outcome, Scored
from rtfocus.evaluation.own_fields import OwnFields
from rtfocus.evaluation.samples import BBBC006, DataSet, Field, Sample, middle
from rtfocus.evaluation.scorecard import markdown, save_side_by_side
from rtfocus.images.metadata import TEXT_MARK
from rtfocus.images.optics import in_short
from rtfocus.images.reading import open_images
from rtfocus.optics.formation import CameraModel, blur
from rtfocus.optics.psf import compute_psf

Image = NDArray[np.float32]

PICTURE_NAME = "before_after.png"
README_NAME = "README.md"
SHARP_GROUP = "sharp"
"""Group of frames in focus, which must come back unchanged."""
OWN_PLANES = "own planes"
"""Group of planes of a stack out of focus, against its sharpest one."""
# Another engine must be better by this to be worth a change.
_WORTH_DB = 0.1
# In focus an engine is sharp enough from here on, whatever others do.
_SHARP_DB = 42.0
_SHARP_LOSS_DB = 1.0
_SEED = 20
_SIDE_PX = 512


# Of fields of one's own: levels they are shown at, the first ones in the picture too.
LEVELS_SHOWN = (4, -4, 2, -7)
_OWN_PHOTONS = 3000.0


def own_set(
    name: str,
    fields: Sequence[tuple[str, Path, Sequence[Path]]],
    optics: OpticalSystem,
) -> DataSet:
    """Return sharp fields of one's own, blurred on purpose, and as they are.

    Parameters
    ----------
    name
        Of the set.
    fields
        Name, sharp plane, and other planes of the same stack out of focus.
    optics
        Of the images.
    """
    camera = CameraModel(photons=_OWN_PHOTONS, gain_e_per_count=1.0, bit_depth=16)
    step_um = STEP_UM * optics.defocus_unit_um / BBBC006.defocus_unit_um

    def read(path: Path, sharp: Path) -> Image:
        """Read a plane on the scale on which the sharp one goes from 0 to 1."""
        like = _read(sharp).astype(np.float32)
        rows, columns = (middle(side, _SIDE_PX) for side in like.shape)
        dark = np.percentile(like, 0.5)
        pixels = _read(path)[rows, columns].astype(np.float32)
        return np.asarray((pixels - dark) / (like.max() - dark), dtype=np.float32)

    def counts(light: Image) -> NDArray[np.uint16]:
        values = camera.offset_counts + light * np.float32(_OWN_PHOTONS)
        whole = np.clip(np.rint(values), 0, camera.full_scale_counts)
        return np.asarray(whole, dtype=np.uint16)

    def samples() -> Iterator[Sample]:
        for level in LEVELS_SHOWN:
            psf = compute_psf(optics, level * step_um)
            for number, (title, path, _) in enumerate(fields):
                light = np.clip(read(path, path), 0, 1)
                rng = np.random.default_rng([_SEED, number, level + LEVELS])
                yield Sample(
                    name=f"{title} {level * step_um:+.3g} um",
                    pixels=camera.expose(blur(light, psf), rng),
                    sharp=camera.offset_counts + light * np.float32(_OWN_PHOTONS),
                    defocus_um=(level * step_um,) * 2,
                    group=f"{level * step_um:+.3g} um",
                    data_range=_OWN_PHOTONS,
                )
        for title, path, blurred in fields:
            sharp = counts(read(path, path))
            shown = [(SHARP_GROUP, sharp)]
            shown += [(OWN_PLANES, counts(read(one, path))) for one in blurred]
            for n, (group, pixels) in enumerate(shown):
                said = f"{title} {group} {n or ''}".strip()
                yield Sample(said, pixels, sharp, None, group, _OWN_PHOTONS)

    title = (
        f"{len(fields)} sharp fields blurred on both sides of focus, and as they are; "
        f"range {_OWN_PHOTONS:g}"
    )
    return DataSet(name, title, optics, camera.offset_counts, (Field(name, samples),))


@dataclass(frozen=True, slots=True)
class Standing:
    """How one contender did on fields that nothing was learned from."""

    name: str
    gain_db: float
    """Mean over fields blurred on purpose, of PSNR."""
    worst_db: float
    """Of one frame."""
    in_focus_db: float
    """PSNR of frames in focus against what went in."""
    own_planes_db: float | None
    """Mean gain on the stacks' own planes out of focus; None: there are none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which engine to use."""

    use: str
    text: str
    """In one line, with the reason."""


def standing(outcome: Outcome) -> Standing:
    """Sum up how a contender did."""

    def gains(frames: Sequence[Scored]) -> list[float]:
        return [one.after.psnr_db - one.before.psnr_db for one in frames]

    by_group: dict[str, list[Scored]] = {}
    for frame in outcome.frames:
        group = frame.group if frame.group in (SHARP_GROUP, OWN_PLANES) else ""
        by_group.setdefault(group, []).append(frame)
    blurred = gains(by_group[""])
    own_planes = gains(by_group.get(OWN_PLANES, []))
    in_focus = [one.after.psnr_db for one in by_group[SHARP_GROUP]]
    return Standing(
        outcome.contender.name,
        round(float(np.mean(blurred)), 2),
        round(float(min(blurred)), 2),
        round(float(np.mean(in_focus)), 1),
        round(float(np.mean(own_planes)), 2) if own_planes else None,
    )


def judge(own: Standing, shipped: Sequence[Standing]) -> Verdict:
    """Say which engine to use: one's own only where it is better and spoils nothing.

    Parameters
    ----------
    own
        The engine that was trained.
    shipped
        The others, at least one.
    """
    best = max(shipped, key=lambda one: one.gain_db)
    against = []
    if own.gain_db < best.gain_db + _WORTH_DB:
        against.append(f"'{own.name}' gains {own.gain_db:+.2f} dB")
    if own.in_focus_db < min(best.in_focus_db - _SHARP_LOSS_DB, _SHARP_DB):
        against.append(
            f"'{own.name}' changes what is in focus ({own.in_focus_db:.1f} dB against "
            f"{best.in_focus_db:.1f})"
        )
    if (
        own.own_planes_db is not None
        and best.own_planes_db is not None
        and own.own_planes_db < best.own_planes_db - _WORTH_DB
    ):
        against.append(
            f"on the stacks' own planes '{own.name}' gains {own.own_planes_db:+.2f} dB "
            f"against {best.own_planes_db:+.2f}"
        )
    if against:
        said = f"use the shipped '{best.name}': {best.gain_db:+.2f} dB; "
        return Verdict(best.name, said + ", ".join(against))
    said = (
        f"use '{own.name}': {own.gain_db:+.2f} dB on held-out fields, the best shipped"
    )
    return Verdict(own.name, f"{said} one '{best.name}' {best.gain_db:+.2f} dB")


def describe(
    engine: Path,
    fields: OwnFields,
    outcomes: Sequence[Outcome],
    standings: Sequence[Standing],
    verdict: Verdict,
    start: str,
) -> None:
    """Write picture and README of an engine, and the figures into its card.

    Parameters
    ----------
    engine
        Folder of the engine.
    fields
        What it was made of.
    outcomes, standings
        Of the engine first, then of the shipped ones.
    verdict
        Which to use.
    start
        The engine that it was trained on from.
    """
    best = max(range(1, len(standings)), key=lambda n: standings[n].gain_db)
    shown = [outcomes[0], outcomes[best]]
    save_side_by_side(engine / PICTURE_NAME, outcomes[0].data, shown)
    path = engine / CARD_NAME
    card = yaml.safe_load(path.read_text(encoding="utf-8"))
    card["figures"] = {
        "use": verdict.use,
        "verdict": verdict.text,
        "held_out": [asdict(one) for one in standings],
    }
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=88)
    path.write_text(f"{TEXT_MARK}\n{text}", encoding="utf-8")
    lines = [
        f"# {engine.name}",
        "",
        f"Verdict: {verdict.text}.",
        "",
        f"Trained on from '{start}' for {in_short(fields.optics)}.",
        "",
        f"![Held-out fields: blurred, restored, sharp]({PICTURE_NAME})",
        "",
        *_standings_table(standings),
        "",
        "Gains are of PSNR on held-out fields blurred with these optics; 'in focus' is "
        "what comes out against what went in; 'own planes' are planes of the held-out "
        "stacks out of focus, against their sharpest (thick specimens have more in "
        "them than any one plane).",
        "",
        *(f"- {one.side}: {one.source}" for one in fields.fields),
        *(f"- left out: {line}" for line in fields.left_out),
        "",
    ]
    command = f"rtfocus train --own FOLDER -o {engine.name}"
    details = markdown(outcomes, command=command).replace("# ", "## ", 1)
    text = "\n".join(lines) + "\n" + details
    (engine / README_NAME).write_text(text, encoding="utf-8")


def _standings_table(standings: Sequence[Standing]) -> list[str]:
    rows = [
        "| engine | gain dB | worst frame dB | in focus dB | own planes dB |",
        "|---|---|---|---|---|",
    ]
    for one in standings:
        planes = "" if one.own_planes_db is None else f"{one.own_planes_db:+.2f}"
        rows.append(
            f"| {one.name} | {one.gain_db:+.2f} | {one.worst_db:+.2f} | "
            f"{one.in_focus_db:.1f} | {planes} |"
        )
    return rows


def _read(path: Path) -> NDArray[np.generic]:
    return open_images(path)[0].read()
