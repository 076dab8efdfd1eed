"""Own: from a laboratory's images to a checked engine of its own, in one command.

Fields are chosen and split (`rtfocus.evaluation.own_fields`). Of the shipped networks
that can be trained on, the one that restores the validation fields best is; what it
learned is taken in full or by half, as they say. Then the engine is compared with the
shipped ones on the test fields, which nothing was chosen by. What has been done lies
in ``NAME.training`` beside the engine, so that a killed call goes on where it was.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml
from pydantic import TypeAdapter

from rtfocus.engines.card import CARD_NAME, read_card
from rtfocus.engines.registry import (
    add_engine,
    check_new_name,
    user_engine_folder,
)
from rtfocus.errors import ConfigError, EngineError, RtfocusError
from rtfocus.evaluation.contenders import Contender, contender
from rtfocus.evaluation.evaluate import ScoreSheet, evaluate, standing
from rtfocus.evaluation.own_fields import OwnField, OwnFields, Side, choose_fields
from rtfocus.evaluation.samples import DataSet, own_set
from rtfocus.evaluation.scorecard import markdown, save_side_by_side, table
from rtfocus.evaluation.scores import EngineAdvice, Standing, judge
from rtfocus.files import remove, whole
from rtfocus.images.optics import StatedOptics, in_short, stated_optics
from rtfocus.images.outputs import OutputGuard
from rtfocus.images.reading import FoundImages, companions, find_images
from rtfocus.training.commands import (
    REFINED,
    export_engine,
    refining_recipe,
    write_card,
)
from rtfocus.training.recipe import RecipeBase
from rtfocus.training.trainer import Trainer, choose_device, train

SHIPPED = (
    "rtfocus-2",
    "rtfocus-1",
    "multiscale",
    "learned_wiener",
    "wiener",
    "richardson_lucy",
)
"""What an engine of one's own is compared with."""
_CLASSIFIER = "delpnet"
_PICTURE_NAME = "before_after.png"
_README_NAME = "README.md"
_PLAN = "plan.json"
_FORMAT = 1
_FIELDS = "fields"
_LEAST_STEPS = 20
_TIMED_STEPS = 6


@dataclass(frozen=True, slots=True)
class OwnWish:
    """What the user asks for."""

    images: Path
    """Folder, OME-Zarr or file of sharp fields or z-stacks."""
    output: Path
    """Folder of the engine; its name is the engine's."""
    optics: str | None = None
    """As `rtfocus.images.optics.read_optics` takes it; files complete it."""
    channel: str | None = None
    """Name or number; None: images have one channel."""
    minutes: float = 20.0
    """Of training, at the pace of its first steps."""
    device: str = "auto"
    workers: int = 0
    resume: bool = True
    """Go on with what a killed call left."""


def train_own(
    wish: OwnWish, *, say: Callable[[str], None] = lambda _: None
) -> tuple[Path, EngineAdvice]:
    """Make an engine of a laboratory's images and compare it with the shipped ones.

    Parameters
    ----------
    wish
        What is asked for.
    say
        Takes a line about every step of the work.

    Returns
    -------
    tuple
        Folder of the engine, with its README and picture; and which one to use.

    Raises
    ------
    ConfigError
        If the images, their optics or the options cannot be used, or the state of a
        killed call belongs to other ones.
    EngineError
        If there is an engine of that name, or the engine cannot be admitted.
    InputError
        If there are no images.
    OutputError
        If the output is refused.
    """
    images = find_images(wish.images)
    work = wish.output.with_name(f"{wish.output.name}.training")
    if (work / _PLAN).is_file() and (wish.output / CARD_NAME).is_file():
        # Done but for the last word, or called once more.
        _OwnPlan(work, wish, images, say)
        _admit(wish.output)
        return wish.output, _advice_of(wish.output)
    _claim(wish, images, work)
    plan = _OwnPlan(work, wish, images, say)
    fields = plan.fields()
    shipped = [contender(one, classifier=_CLASSIFIER, blind=False) for one in SHIPPED]
    start = plan.start(fields, shipped)
    recipe = plan.recipe(fields, start)
    checkpoint = train(recipe, device=wish.device, workers=wish.workers)
    engine = _export_best(checkpoint, work, wish.output.name, fields, start, say)
    say(f"comparing on {len(fields.of('test'))} held-out fields")
    own = contender(str(engine), classifier=_CLASSIFIER, blind=False)
    data = _data(fields, fields.of("test"), work, "held-out fields")
    sheets = [_sheet(one, data) for one in (own, *shipped)]
    standings = [standing(one) for one in sheets]
    advice = judge(standings[0], standings[1:])
    _describe(engine, fields, sheets, standings, advice, start)
    with whole(wish.output) as part:
        shutil.copytree(engine, part)
    _admit(wish.output)
    return wish.output, advice


def _claim(wish: OwnWish, images: FoundImages, work: Path) -> None:
    """Refuse what cannot end well before any work; make the folder of the state."""
    check_new_name(wish.output.name)
    if wish.minutes <= 0:
        msg = f"--minutes {wish.minutes:g} trains nothing; give more than 0"
        raise ConfigError(msg)
    choose_device(wish.device)
    guard = OutputGuard(companions(images.series))
    guard.claim(wish.output)
    guard.claim_folder(work)
    if work.is_dir() and any(work.iterdir()) and not (work / _PLAN).is_file():
        msg = f"'{work}' holds no training of rtfocus; choose another name"
        raise ConfigError(msg)
    if work.is_dir() and not wish.resume:
        remove(work)
    work.mkdir(parents=True, exist_ok=True)


class _OwnPlan:
    """What was decided, written to disk at once: later calls decide the same."""

    def __init__(
        self,
        work: Path,
        wish: OwnWish,
        images: FoundImages,
        say: Callable[[str], None],
    ) -> None:
        self._work, self._wish, self._found, self._say = work, wish, images, say
        job = {
            "images": _digest(images),
            "optics": wish.optics,
            "channel": wish.channel,
            "minutes": wish.minutes,
        }
        path = work / _PLAN
        self._known: dict[str, Any] = {"format": _FORMAT, "asked": job}
        if not path.is_file():
            self._keep()
            return
        try:
            known = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.MsgspecError, RecursionError) as error:
            msg = f"'{path}' cannot be read: {error}; start over with --no-resume"
            raise ConfigError(msg) from error
        if known.get("format") != _FORMAT or known.get("asked") != job:
            before = known.get("asked")
            before = before if isinstance(before, dict) else {}
            other = [key for key in job if before.get(key) != job[key]]
            msg = (
                f"'{work}' was begun with other {' and '.join(other) or 'software'}; "
                "call with the same, or start over with --no-resume"
            )
            raise ConfigError(msg)
        self._known = known

    def fields(self) -> OwnFields:
        """Choose the fields."""
        if "fields" not in self._known:
            folder = self._work / _FIELDS
            remove(folder)
            folder.mkdir()
            text = self._wish.optics
            stated = StatedOptics(stated_optics(text), text) if text else None
            try:
                chosen = choose_fields(
                    self._found, folder, stated=stated, channel=self._wish.channel
                )
            except RtfocusError:
                # Nothing is begun: the next call may bring other images or optics.
                remove(self._work)
                raise
            self._known |= _OWN_FIELDS.dump_python(chosen, mode="json")
            self._keep()
        known = {key: self._known[key] for key in ("fields", "optics", "left_out")}
        fields = _OWN_FIELDS.validate_python(known)
        for line in fields.left_out:
            self._say(f"left out: {line}")
        sides = [f"{len(fields.of(side))} {side}" for side in SIDES]
        self._say(f"fields: {', '.join(sides)}; optics {in_short(fields.optics)}")
        return fields

    def start(self, fields: OwnFields, shipped: Sequence[Contender]) -> str:
        """Choose which shipped engine is trained on, by the validation fields."""
        if "start" not in self._known:
            data = _data(fields, fields.of("validation"), self._work, "validation")
            gains = {
                one.name: standing(_sheet(one, data)).gain_db
                for one in shipped
                if one.name in REFINED
            }
            self._known |= {"start": max(gains, key=lambda name: gains[name])}
            self._known["validation_gain_db"] = gains
            self._keep()
        gains = self._known["validation_gain_db"]
        text = ", ".join(f"{name} {gain:+.2f} dB" for name, gain in gains.items())
        start: str = self._known["start"]
        self._say(f"training on from '{start}' (validation: {text})")
        return start

    def recipe(self, fields: OwnFields, start: str) -> RecipeBase:
        """Decide how many steps the minutes allow."""

        def recipe(steps: int) -> RecipeBase:
            return refining_recipe(
                start,
                fields.optics,
                self._work / _FIELDS,
                [one.file for one in fields.of("training")],
                name=self._wish.output.name,
                checkpoints=self._work.resolve() / "checkpoints",
                steps=steps,
            )

        if "steps" not in self._known:
            seconds = _seconds_per_step(recipe(_TIMED_STEPS), self._wish)
            steps = int(60 * self._wish.minutes / seconds)
            self._known["steps"] = max(steps, _LEAST_STEPS)
            self._keep()
        steps = self._known["steps"]
        self._say(f"{steps} steps, about {self._wish.minutes:g} minutes")
        return recipe(steps)

    def _keep(self) -> None:
        with whole(self._work / _PLAN, overwrite=True) as part:
            part.write_text(json.dumps(self._known, indent=1), encoding="utf-8")


_OWN_FIELDS = TypeAdapter(OwnFields)
SIDES: tuple[Side, ...] = ("training", "validation", "test")


def _digest(images: FoundImages) -> str:
    """Return what changes when the images do."""
    lines = []
    for one in images.series:
        facts = one.path.stat()
        size = (facts.st_size, facts.st_mtime_ns)
        lines.append(f"{one.path.resolve()} {one.name} {one.sizes} {one.shape} {size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _seconds_per_step(recipe: RecipeBase, wish: OwnWish) -> float:
    """Time some steps; the first, which fill the pool of scenes, do not count."""
    with Trainer(recipe, choose_device(wish.device), workers=wish.workers) as trainer:
        shards = recipe.pool.shards
        for _ in range(shards):
            trainer.train_step()
        start_s = time.perf_counter()
        for _ in range(_TIMED_STEPS - shards):
            trainer.train_step()
        return (time.perf_counter() - start_s) / (_TIMED_STEPS - shards)


def _export_best(
    checkpoint: Path,
    work: Path,
    name: str,
    fields: OwnFields,
    start: str,
    say: Callable[[str], None],
) -> Path:
    """Export what was learned in full and by half; return what does validation best."""
    data = _data(fields, fields.of("validation"), work, "validation")
    candidates = {"in full": [], "by half": [Path("engines") / start]}
    gains: dict[str, float] = {}
    for how, mean_with in candidates.items():
        folder = work / "exports" / how.replace(" ", "_")
        remove(folder)
        export_engine(checkpoint, folder, name=name, mean_with=mean_with)
        one = contender(str(folder), classifier=_CLASSIFIER, blind=False)
        gains[how] = standing(_sheet(one, data)).gain_db
    text = ", ".join(f"{how} {gain:+.2f} dB" for how, gain in gains.items())
    best = max(gains, key=lambda how: gains[how])
    say(f"what was learned is taken {best} (validation: {text})")
    engine = work / name
    remove(engine)
    (work / "exports" / best.replace(" ", "_")).rename(engine)
    return engine


def _data(
    fields: OwnFields, chosen: Sequence[OwnField], work: Path, name: str
) -> DataSet:
    folder = work / _FIELDS
    return own_set(
        name,
        [
            (one.source, folder / one.file, [folder / other for other in one.blurred])
            for one in chosen
        ],
        fields.optics,
    )


def _sheet(one: Contender, data: DataSet) -> ScoreSheet:
    return evaluate(one, data, one.config(data, threads=1, precision="f32"))


def _describe(
    engine: Path,
    fields: OwnFields,
    sheets: Sequence[ScoreSheet],
    standings: Sequence[Standing],
    advice: EngineAdvice,
    start: str,
) -> None:
    """Write picture and README of an engine, and the figures into its card.

    Parameters
    ----------
    engine
        Folder of the engine.
    fields
        What it was made of.
    sheets, standings
        Of the engine first, then of the shipped ones.
    advice
        Which to use.
    start
        The engine that it was trained on from.
    """
    best = max(range(1, len(standings)), key=lambda n: standings[n].gain_db)
    shown = [sheets[0], sheets[best]]
    save_side_by_side(engine / _PICTURE_NAME, sheets[0].data, shown)
    card = yaml.safe_load((engine / CARD_NAME).read_text(encoding="utf-8"))
    card["figures"] = {
        "use": advice.use,
        "verdict": advice.text,
        "held_out": [asdict(one) for one in standings],
    }
    write_card(engine, card)
    lines = [
        f"# {engine.name}",
        "",
        f"Verdict: {advice.text}.",
        "",
        f"Trained on from '{start}' for {in_short(fields.optics)}.",
        "",
        f"![Held-out fields: blurred, restored, sharp]({_PICTURE_NAME})",
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
    details = markdown(sheets, command=command).replace("# ", "## ", 1)
    text = "\n".join(lines) + "\n" + details
    (engine / _README_NAME).write_text(text, encoding="utf-8")


def _standings_table(standings: Sequence[Standing]) -> list[str]:
    columns = ("engine", "gain dB", "worst frame dB", "in focus dB", "own planes dB")
    rows = [
        [
            one.name,
            f"{one.gain_db:+.2f}",
            f"{one.worst_db:+.2f}",
            f"{one.in_focus_db:.1f}",
            "" if one.own_planes_db is None else f"{one.own_planes_db:+.2f}",
        ]
        for one in standings
    ]
    return table(columns, rows)


def _advice_of(engine: Path) -> EngineAdvice:
    figures = read_card(engine).figures
    return EngineAdvice(str(figures.get("use")), str(figures.get("verdict")))


def _admit(engine: Path) -> None:
    """Add the engine to the user's; one that a killed call added stays."""
    there = user_engine_folder() / engine.name
    if (there / CARD_NAME).is_file():
        if read_card(there).sha256 == read_card(engine).sha256:
            return
        msg = f"there is another engine '{engine.name}' in '{there}' now; rename it"
        raise EngineError(msg)
    add_engine(engine)
