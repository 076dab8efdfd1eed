"""Package: the files of a model package, a zip or a folder, read without trusting it.

Nothing is unpacked: a file is read by its name, into memory and within a limit, and
whoever admits it writes it under a name of its own. No name in a package ever becomes
a path.
"""

import os
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rtfocus.errors import EngineError
from rtfocus.processing.engines.registry import refuse_link

MOST_FILES = 1000
TEXT_BYTES = 1 << 20
TENSOR_BYTES = 256 << 20
WEIGHTS_BYTES = 1 << 30

RDF_NAMES = ("bioimageio.yaml", "rdf.yaml", "model.yaml")
"""What a model's description may be called, the name of today first."""

_SUSPICIOUS_BYTES = 64 << 20
_MOST_PACKED = 200
"""Times that a large file may be longer than it is packed; weights reach 2."""
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,  # NotImplementedError for packings unknown here, too
)
_CRUFT = ("__MACOSX", ".DS_Store")


@dataclass(frozen=True, slots=True)
class Package:
    """The files of a package by their names in it, with ``/`` between folders."""

    origin: Path
    """The zip or folder."""
    sizes: Mapping[str, int]
    """Bytes of every file."""
    fetch: Callable[[str], bytes]
    """Reads one whole."""

    def __contains__(self, name: str) -> bool:
        """Tell whether there is such a file."""
        return name in self.sizes

    def read(self, name: str, most_bytes: int) -> bytes:
        """Return what a file holds.

        Raises
        ------
        EngineError
            If it is not there, is larger than `most_bytes`, or damaged.
        """
        size = self.sizes.get(name)
        if size is None:
            msg = f"'{self.origin}' lacks its file '{name}'; get the whole package"
            raise EngineError(msg)
        if size > most_bytes:
            msg = (
                f"'{name}' in '{self.origin}' has {size} bytes, more than the "
                f"{most_bytes} that such a file may have; it is not read"
            )
            raise EngineError(msg)
        data = self.fetch(name)
        if len(data) != size:
            msg = f"'{name}' in '{self.origin}' is cut off or damaged; get it again"
            raise EngineError(msg)
        return data


@contextmanager
def open_package(path: Path) -> Iterator[Package]:
    """Open a zip or a folder; a zipped folder is taken for what it holds.

    Raises
    ------
    EngineError
        If it cannot be read, or holds what no package has: links, names that lead
        out of it, a name twice, thousands of files.
    """
    if path.is_dir():
        yield _folder(path)
        return
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        msg = f"'{path}' cannot be read: {error.strerror or error}"
        raise EngineError(msg) from error
    except _DAMAGED as error:
        msg = f"'{path}' is no zip, or a damaged one ({error}); get it again"
        raise EngineError(msg) from error
    with archive:
        yield _zip(path, archive)


def _zip(path: Path, archive: zipfile.ZipFile) -> Package:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    _refuse_many(path, len(entries))
    for entry in entries:
        _refuse_unsafe(path, entry)
    counts = Counter(entry.filename for entry in entries)
    name, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        msg = f"'{path}' holds '{name}' {count} times; only one of them can be meant"
        raise EngineError(msg)
    top = _top_folder([entry.filename for entry in entries])
    files = {entry.filename.removeprefix(top): entry for entry in entries}

    def fetch(name: str) -> bytes:
        try:
            with archive.open(files[name]) as file:
                return file.read(files[name].file_size + 1)
        except OSError as error:
            msg = f"'{path}' cannot be read: {error.strerror or error}"
            raise EngineError(msg) from error
        except _DAMAGED as error:
            msg = f"'{name}' in '{path}' is damaged ({error}); get it again"
            raise EngineError(msg) from error

    return Package(path, {n: entry.file_size for n, entry in files.items()}, fetch)


def _top_folder(names: list[str]) -> str:
    """Return the folder, with its slash, that holds everything; empty: none does."""
    tops = {name.partition("/")[0] for name in names} - set(_CRUFT)
    if len(tops) == 1 and not any(name in tops for name in names):
        return f"{tops.pop()}/"
    return ""


def _refuse_many(path: Path, count: int) -> None:
    if count > MOST_FILES:
        msg = (
            f"'{path}' holds more than {MOST_FILES} files; a model package has a few: "
            "name the package itself"
        )
        raise EngineError(msg)


def _refuse_unsafe(path: Path, entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    why = None
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if not is_safe(name):
        why = "leads out of the package, or has no name that every system takes"
    elif kind not in (0, stat.S_IFREG):
        why = "is a link or no plain file"
    elif entry.flag_bits & 0x1:
        why = "is encrypted"
    elif entry.file_size > _SUSPICIOUS_BYTES and entry.file_size > _MOST_PACKED * max(
        1, entry.compress_size
    ):
        why = f"would grow from {entry.compress_size} to {entry.file_size} bytes"
    if why is not None:
        msg = f"'{path}': its file '{name}' {why}; nothing of it is unpacked"
        raise EngineError(msg)


def is_safe(name: str) -> bool:
    """Tell whether a name stays in its folder, on every system."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and not name.startswith("/")
        and ".." not in parts
        and not any(character in name for character in ":\\\0\r\n")
    )


def _folder(path: Path) -> Package:
    sizes: dict[str, int] = {}
    for place, folders, names in os.walk(path):
        for name in (*folders, *names):
            file = Path(place) / name
            refuse_link(file)
            if file.is_file():
                sizes[file.relative_to(path).as_posix()] = file.stat().st_size
        _refuse_many(path, len(sizes))

    def fetch(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            msg = f"'{path / name}' cannot be read: {error.strerror or error}"
            raise EngineError(msg) from error

    return Package(path, sizes, fetch)
