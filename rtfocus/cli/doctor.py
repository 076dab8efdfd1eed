"""Doctor command: what this machine has, what is missing, and the remedy."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import typer
from rich.console import Console
from rich.markup import escape

from rtfocus import __version__
from rtfocus.errors import EngineError
from rtfocus.machine import Finding, processor_name
from rtfocus.microscope.core import describe as describe_microscope
from rtfocus.processing.cpu.backends import BACKENDS
from rtfocus.processing.engines.registry import list_engines
from rtfocus.processing.gpu.backends import GPU_BACKENDS
from rtfocus.processing.gpu.cuda.driver import list_devices
from rtfocus.processing.gpu.engine import Gpu


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(doctor)


def doctor() -> None:
    """Show what this machine has, what is missing, and the remedy.

    Exits with 1 when something that rtfocus needs is missing.

    [bold]Example:[/] rtfocus doctor
    """
    console = Console()
    missing = False
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
        if finding.remedy not in (None, "see there"):
            remedy = f"          {finding.remedy}"
            console.print(escape(remedy), soft_wrap=True, highlight=False)
    if missing:
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    yield Finding("rtfocus", f"{__version__}, Python {platform.python_version()}")
    yield Finding("system", platform.platform())
    yield Finding("cpu", f"{processor_name()}, {os.cpu_count()} cores{_cpu_features()}")
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    memory_gb = psutil.virtual_memory().available / 1e9
    yield Finding("memory and disk", f"{memory_gb:.0f} and {free_gb:.0f} GB free here")
    yield from describe_microscope()
    yield from _cpu_runtimes()
    yield from _gpu()
    yield from _shipped_engines()


def _cpu_features() -> str:
    """Name the instruction sets that decide about bf16, where the system tells."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in text]
    return f" ({', '.join(found)})" if found else ""


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
        major, minor = device.compute_capability
        yield Finding(
            f"gpu {device.gpu_index}",
            f"{device.name}, compute capability {major}.{minor}, "
            f"{device.memory_bytes / 1e9:.0f} GB",
        )
    first = devices[0] if devices else None
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
        names = [f"{card.name} ({card.kind})" for card in list_engines([])]
    except EngineError as error:
        yield Finding("engines", str(error), "reinstall rtfocus")
        return
    yield Finding("engines", ", ".join(names))
