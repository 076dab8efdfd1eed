"""Doctor and init: what this machine and its microscope have, and a config made of it.

Both ask the same: the Micro-Manager core, the runtimes and the engines that are here.
"""

import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from rtfocus import __version__
from rtfocus.channel import OpticalSystem
from rtfocus.cli.commands import write_new
from rtfocus.config import load_config, parse_config
from rtfocus.engines.registry import list_engines, why_unfit
from rtfocus.errors import ConfigError, EngineError, ExitCode, OutputError
from rtfocus.images.outputs import OutputGuard
from rtfocus.launch import preflight
from rtfocus.machine import Finding, memory, processor_name
from rtfocus.microscope.core import Inventory, take_inventory
from rtfocus.microscope.core import describe as describe_microscope
from rtfocus.processing.gpu.cuda.driver import list_devices
from rtfocus.runtimes.cpu_backends import BACKENDS
from rtfocus.runtimes.gpu import GPU_BACKENDS, Gpu


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(doctor)
    app.command()(init)


def doctor() -> None:
    """Show what this machine has, what is missing, and the remedy.

    The exit code is 1 if something that rtfocus needs is missing.

    [bold]Example:[/] rtfocus doctor
    """
    console, missing = Console(), False
    for finding in _findings():
        if finding.remedy is None:
            mark = "[green]ok[/]      "
        elif finding.needed:
            mark, missing = "[red]missing[/] ", True
        else:
            mark = "[dim]optional[/]"
        # A path that is broken in two cannot be copied: words are kept whole.
        text = f"{mark}  [bold]{escape(finding.topic)}[/]: {escape(finding.found)}"
        console.print(text, soft_wrap=True, highlight=False)
        if finding.remedy and finding.remedy != "see there":
            remedy = f"{'':10}{escape(finding.remedy)}"
            console.print(remedy, soft_wrap=True, highlight=False)
    raise typer.Exit(int(missing))


def _findings() -> Iterator[Finding]:
    yield Finding("rtfocus", f"{__version__}, Python {platform.python_version()}")
    yield Finding("system", platform.platform())
    yield Finding("cpu", f"{processor_name()}, {os.cpu_count()} cores{_cpu_features()}")
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    memory_gb = memory().free / 1e9
    yield Finding("memory and disk", f"{memory_gb:.0f} and {free_gb:.0f} GB free here")
    yield from describe_microscope()
    yield from _cpu_runtimes()
    yield from _gpu()
    yield from _shipped_engines()


def _cpu_features() -> str:
    """Name the instruction sets that decide about bf16, where the system tells."""
    text = info.read_text("utf-8") if (info := Path("/proc/cpuinfo")).is_file() else ""
    features = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in text]
    return f" ({', '.join(features)})" if features else ""


def _cpu_runtimes() -> Iterator[Finding]:
    chosen = False
    for backend in BACKENDS:
        why_not = backend.why_unavailable()
        # The second runtime is a reference and a fallback: one is enough.
        if why_not is not None:
            yield Finding(backend.name, why_not, "see there", needed=not chosen)
            continue
        role = "reference and fallback" if chosen else "runs the networks"
        chosen = True
        yield Finding(backend.name, f"{version(backend.name)}, {role}")


def _gpu() -> Iterator[Finding]:
    """Tell which GPUs there are, and what could run networks on the first."""
    devices: list[Gpu] = []
    try:
        devices = list_devices()
    except EngineError as error:
        yield Finding("gpu", str(error), "see there", needed=False)
    for device in devices:
        capability = ".".join(map(str, device.compute_capability))
        detail = f"{device.name}, compute capability {capability}, "
        detail += f"{device.memory_bytes / 1e9:.0f} GB"
        yield Finding(f"gpu {device.gpu_index}", detail)
    first = next(iter(devices), None)
    for backend in GPU_BACKENDS:
        why_not = backend.why_unavailable(first)
        if why_not is not None:
            yield Finding(backend.name, why_not, "see there", needed=False)
        elif first is None:
            yield Finding(backend.name, "installed, waits for a GPU")
        else:
            yield Finding(backend.name, f"runs networks on {first.name}")


def _shipped_engines() -> Iterator[Finding]:
    try:
        names = ", ".join(f"{e.name} ({e.card.kind})" for e in list_engines([]))
    except EngineError as error:
        yield Finding("engines", str(error), "reinstall rtfocus")
    else:
        yield Finding("engines", names)


_CLASSIFIERS = ("delpnet", "rtfocus-1")
"""Tried in this order: the faster first."""
# Emission maxima of usual dyes in nm, by what presets are called.
_EMISSION_NM = {
    r"dapi|hoechst": 461,
    r"cfp": 475,
    r"gfp|fitc|488": 509,
    r"yfp": 527,
    r"cy3|tritc|rhod|561": 575,
    r"mcherry|texas|rfp|594": 610,
    r"cy5|647|far": 668,
}


@dataclass
class Answers:
    """What the user says; the defaults are what the core says."""

    name: str
    presets: list[str]
    exposure_ms: float
    time_points: int = 10
    interval_s: float = 1.0
    pixel_size_um: float | None = None
    """None: what the core says is right."""
    aperture: float | None = None
    """None: not known, nothing is restored."""
    index: float = 1.0
    wavelengths_nm: dict[str, float] = field(default_factory=dict)
    camera: str | None = None
    """Another camera than the one in use."""


def init(
    file: Annotated[Path, typer.Argument(help="Config to write.")] = Path(
        "my_microscope.yaml"
    ),
    mm_config: Annotated[
        Path | None,
        typer.Option(
            "--mm-config",
            help="Micro-Manager's .cfg; default: its demo with the DemoCamera.",
        ),
    ] = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Of device adapters; repeatable."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take what the core says.")
    ] = False,
) -> None:
    """Write a first config from what Micro-Manager finds and what you answer.

    Loads the devices and moves none. An existing file is never replaced.

    [bold]Example:[/] rtfocus init my_microscope.yaml --mm-config MMConfig.cfg
    """
    if file.exists():
        msg = f"'{file}' is there already; give another name, or move it away"
        raise OutputError(msg)
    OutputGuard().claim(file)  # before anybody is asked
    stock = take_inventory(mm_config, adapters or ())
    typer.echo(_inventory_text(stock))
    answers = Answers(
        name=re.sub(r"[^\w .+-]", "_", file.stem) or "run",
        presets=[stock.preset] if stock.preset else [],
        exposure_ms=stock.exposure_ms or 10.0,
        aperture=_aperture_in(stock.objective),
    )
    if not yes:
        try:
            _ask(stock, answers)
        except typer.Abort as error:
            if isinstance(error.__context__, EOFError):
                msg = "standard input ended before the last answer; or give --yes"
                raise ConfigError(msg) from error
            raise
    text = config_text(stock, answers, mm_config, adapters or ())
    parse_config(yaml.safe_load(text), origin=str(file))
    write_new(file, text)
    typer.echo(f"wrote {file}; checking it as 'rtfocus run {file} --dry-run' does:")
    faults = [check.error for check in preflight(load_config(file)) if check.error]
    for fault in faults:
        typer.echo(f"error: {fault}", err=True)
    if faults:
        raise typer.Exit(ExitCode.CONFIG)
    typer.echo(f"nothing stands in the way. Next: rtfocus run {file}")


def config_text(
    stock: Inventory, answers: Answers, mm_config: Path | None, adapters: Sequence[Path]
) -> str:
    """Return the config as commented YAML."""
    lines = [
        "# First config, written by rtfocus init from what Micro-Manager said.",
        "# Every key: rtfocus configs --reference. Check: rtfocus run THIS --dry-run",
        "",
        "run:",
        f"  name: {_yaml(answers.name)}   # the run folder is {answers.name}.rtfocus",
        "  folder: runs   # where run folders are made",
        "",
        *_microscope(stock, answers, mm_config, adapters),
        "",
        *_acquisition(stock, answers),
        "",
        "camera:",
        "  offset_counts: 0   # <-- counts in the dark: mean of a frame, cap on",
        "",
        *_channels(stock, answers),
    ]
    return "\n".join(lines) + "\n"


def _inventory_text(stock: Inventory) -> str:
    rows, columns = stock.shape
    sizes = ", ".join(f"{name} {um:g} um" for name, um in stock.calibrations)
    parts = [
        f"camera:     {stock.camera}, {columns} x {rows} pixels, {stock.bit_depth} bit"
        + (f" (of {', '.join(stock.cameras)})" if len(stock.cameras) > 1 else ""),
        f"z-stage:    {stock.focus_stage or 'none'}",
        f"xy-stage:   {stock.xy_stage or 'none'}",
        f"objective:  {stock.objective or 'not told'}",
        f"pixel size: {stock.pixel_size_um:g} um now" + (f"; {sizes}" if sizes else ""),
        f"channels:   {', '.join(stock.presets) or 'none'}"
        + (f" (group {stock.channel_group})" if stock.channel_group else ""),
    ]
    return "\n".join(parts)


def _ask(stock: Inventory, answers: Answers) -> None:
    """Ask for what the core cannot know; an empty answer is the default."""
    answers.name = typer.prompt("name of the run", answers.name)
    if len(stock.cameras) > 1:
        chosen = typer.prompt(f"camera ({', '.join(stock.cameras)})", stock.camera)
        answers.camera = None if chosen == stock.camera else chosen
    if stock.presets:
        query, usual = "channels, with commas between", ", ".join(answers.presets)
        listed = partial(_listed, stock.presets)
        answers.presets = typer.prompt(query, usual, value_proc=listed)
    answers.exposure_ms = _number("exposure (ms)", answers.exposure_ms, (0, 1e7))
    answers.time_points = int(_number("time points", answers.time_points, (1, 1e9)))
    answers.interval_s = _number("interval (s)", answers.interval_s, (0, 1e7))
    pixel_um = _number(
        "pixel size in the specimen (um), 0: not known", stock.pixel_size_um, (0, 1e3)
    )
    answers.pixel_size_um = None if pixel_um == stock.pixel_size_um else pixel_um
    query = "NA of the objective, 0: do not restore"
    answers.aperture = _number(query, answers.aperture or 0.0, (0, 2)) or None
    if answers.aperture is None:
        return
    medium = 1.518 if answers.aperture >= 1.0 else 1.0
    answers.index = _number("immersion: 1 air, 1.33 water, 1.518 oil", medium, (1, 2))
    for preset in answers.presets or ["default"]:
        answers.wavelengths_nm[preset] = _number(
            f"wavelength of {preset} (nm)", emission_nm(preset), (200, 3000)
        )


def _number(query: str, default: float, limits: tuple[float, float]) -> float:
    """Ask for a number, again until it lies within the limits."""

    def understood(answer: object) -> float:
        try:
            value = float(str(answer).replace(",", "."))
        except ValueError:
            value = math.nan
        if not limits[0] <= value <= limits[1]:
            msg = f"'{answer}' is no number from {limits[0]:g} to {limits[1]:g}"
            raise typer.BadParameter(msg)
        return value

    answer: float = typer.prompt(query, default, value_proc=understood)
    return answer


def _listed(presets: Sequence[str], answer: str) -> list[str]:
    """Read the names of channels, each one of the presets."""
    names = [name.strip() for name in answer.split(",") if name.strip()]
    if unknown := [name for name in names if name not in presets]:
        msg = f"no channel '{unknown[0]}'; there are {', '.join(presets)}"
        raise typer.BadParameter(msg)
    return names


def emission_nm(preset: str) -> float:
    """Guess the emission of a channel by its name; 520 nm where it says nothing."""
    for pattern, wavelength in _EMISSION_NM.items():
        if re.search(pattern, preset, re.IGNORECASE):
            return float(wavelength)
    return 520.0


def _aperture_in(label: str) -> float | None:
    """Find an NA in what a turret calls its objective: ``40x/0.75``, ``NA 1.4``."""
    match = re.search(r"(?:NA\s*=?\s*|/)([01]\.\d+)", label, re.IGNORECASE)
    return float(match[1]) if match else None


def _microscope(
    stock: Inventory,
    answers: Answers,
    mm_config: Path | None,
    adapters: Sequence[Path],
) -> list[str]:
    lines = ["microscope:"]
    if mm_config is None:
        lines.append("  source: democamera   # yours: micromanager, with config_file")
    else:
        lines += [
            "  source: micromanager",
            f"  config_file: {_yaml(mm_config.absolute().as_posix())}",
        ]
        if adapters:
            folders = [path.absolute().as_posix() for path in adapters]
            lines.append(f"  adapter_paths: {_yaml(folders)}")
    if answers.camera is not None:
        lines.append(f"  properties: {{Core: {{Camera: {_yaml(answers.camera)}}}}}")
    size = answers.pixel_size_um
    if size:
        lines.append(f"  pixel_size_um: {size:g}   # um, binning included")
    elif stock.pixel_size_um:
        lines.append(f"  # pixel_size_um: {stock.pixel_size_um:g}  (the core says so)")
    else:
        lines.append("  pixel_size_um: 1.0   # <-- um; the core does not know it")
    return lines


def _acquisition(stock: Inventory, answers: Answers) -> list[str]:
    lines = [
        "acquisition:",
        "  mda:   # a useq plan",
        f"    time_plan: {{interval: {answers.interval_s:g}, "
        f"loops: {answers.time_points}}}   # s, number",
    ]
    if answers.presets:
        lines.append("    channels:   # preset, ms")
        group = stock.channel_group
        lines += [
            f"      - {{config: {_yaml(name)}, group: {_yaml(group)}, "
            f"exposure: {answers.exposure_ms:g}}}"
            for name in answers.presets
        ]
    if stock.focus_stage:
        lines.append("    # z_plan: {range: 6.0, step: 1.0}   # um")
    return lines


def _channels(stock: Inventory, answers: Answers) -> list[str]:
    """Return channels and processing: restored where an engine fits the optics."""
    lines, restores = ["channels:"], False
    for name in answers.presets or ["default"]:
        lines.append(f"  - name: {_yaml(name)}")
        optics = OpticalSystem(
            answers.aperture or 0.5,
            answers.wavelengths_nm.get(name, emission_nm(name)),
            _size(stock, answers),
            refractive_index=answers.index,
        )
        engine = engine_for(optics) if answers.aperture else None
        if engine is not None:
            lines += [*_optics(optics), f"    classifier: {engine}"]
            restores = True
            continue
        lines += [f"    # {line[4:]}" for line in _optics(optics)]
        lines.append(
            "    #   <-- no shipped engine fits these optics: see rtfocus train"
            if answers.aperture
            else "    #   <-- the NA is on the objective; with optics: restored"
        )
    lines += ["", "processing:"]
    if not restores:
        lines.append("  classifier: null   # frames are recorded, not restored")
    return [
        *lines,
        "  restoration:",
        f"    method: {'wiener' if restores else 'none'}",
        "",
        "store:",
        f"  restored: {'true' if restores else 'false'}",
    ]


def _optics(optics: OpticalSystem) -> list[str]:
    return [
        "    optics:",
        f"      numerical_aperture: {optics.numerical_aperture:g}",
        f"      wavelength_nm: {optics.wavelength_nm:g}   # emission",
        f"      pixel_size_um: {optics.pixel_size_um:g}",
        f"      refractive_index: {optics.refractive_index:g}",
    ]


def _size(stock: Inventory, answers: Answers) -> float:
    return answers.pixel_size_um or stock.pixel_size_um or 1.0


def engine_for(optics: OpticalSystem) -> str | None:
    """Return the first shipped classifier that was trained for such optics."""
    cards = {engine.name: engine.card for engine in list_engines()}
    fits = (n for n in _CLASSIFIERS if n in cards and not why_unfit(cards[n], optics))
    return next(fits, None)


def _yaml(value: str | list[str]) -> str:
    """Write a text or list so that YAML reads the same again, in a list too."""
    inside = yaml.safe_dump([value], default_flow_style=True, width=math.inf)
    return inside.strip()[1:-1]
