"""Package: the files of a model package, a zip or a folder, read without trusting it.

Nothing is unpacked: a file is read by its name, into memory and within a limit, and
whoever admits it writes it under a name of its own. No name in a package ever becomes
a path. From an address a package is fetched whole before it is looked at.
"""

import hashlib
import os
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, url2pathname

from rtfocus.engines.registry import refuse_link
from rtfocus.errors import EngineError

MOST_FILES = 1000
TEXT_BYTES = 1 << 20
TENSOR_BYTES = 64 << 20
"""A float32 image of 4096 x 4096."""
WEIGHTS_BYTES = 1 << 30
FETCHED_BYTES = 4 << 30
PATIENCE_S = 30.0
"""How long a server may say nothing."""

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
_DOI = re.compile(r"10\.\d{4,9}/\S+")
_NICKNAME = re.compile(r"(bioimage-io/)?[a-z]{3,}-[a-z]{3,}")
_CRUFT = ("__MACOSX", ".DS_Store")


def page_of(name: str) -> str | None:
    """Return the page of what looks like a DOI, or one of bioimage.io's nicknames."""
    doi = _DOI.search(name)
    if doi is not None:
        return f"https://doi.org/{doi[0]}"
    if _NICKNAME.fullmatch(name):
        return f"https://bioimage.io/#/artifacts/{name.rpartition('/')[2]}"
    return None


@dataclass(frozen=True, slots=True)
class Package:
    """The files of a package by their names in it, with ``/`` between folders."""

    origin: str
    """The zip, folder or address, as the user named it."""
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
def open_package(path: Path, origin: str) -> Iterator[Package]:
    """Open a zip or a folder; a zipped folder is taken for what it holds.

    Parameters
    ----------
    path
        Where it lies.
    origin
        What the user knows it by.

    Raises
    ------
    EngineError
        If it cannot be read, or holds what no package has: links, names that lead
        out of it, a name twice, thousands of files.
    """
    if path.is_dir():
        yield _folder(path, origin)
        return
    with _reading(f"'{origin}'", "is no zip, or a damaged one"):
        archive = zipfile.ZipFile(path)
    with archive:
        yield _zip(origin, archive)


@contextmanager
def _reading(what: str, damaged: str = "is damaged") -> Iterator[None]:
    """Tell what cannot be read in the block, or makes the library stumble."""
    try:
        yield
    except OSError as error:
        msg = f"{what} cannot be read: {error.strerror or error}"
        raise EngineError(msg) from error
    except _DAMAGED as error:
        msg = f"{what} {damaged} ({error}); get it again"
        raise EngineError(msg) from error


def _zip(origin: str, archive: zipfile.ZipFile) -> Package:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    _refuse_many(origin, len(entries))
    for entry in entries:
        _refuse_unsafe(origin, entry)
    counts = Counter(entry.filename for entry in entries)
    name, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        msg = f"'{origin}' holds '{name}' {count} times; only one of them can be meant"
        raise EngineError(msg)
    top = _top_folder([entry.filename for entry in entries])
    files = {entry.filename.removeprefix(top): entry for entry in entries}

    def fetch(name: str) -> bytes:
        with (
            _reading(f"'{name}' in '{origin}'"),
            archive.open(files[name]) as file,
        ):
            return file.read(files[name].file_size + 1)

    return Package(origin, {n: entry.file_size for n, entry in files.items()}, fetch)


def _top_folder(names: list[str]) -> str:
    """Return the folder, with its slash, that holds everything; empty: none does."""
    tops = {name.partition("/")[0] for name in names} - set(_CRUFT)
    if len(tops) == 1 and not any(name in tops for name in names):
        return f"{tops.pop()}/"
    return ""


def _refuse_many(origin: str, count: int) -> None:
    if count > MOST_FILES:
        msg = (
            f"'{origin}' holds more than {MOST_FILES} files; a model package has a "
            "few: name the package itself"
        )
        raise EngineError(msg)


def _refuse_unsafe(origin: str, entry: zipfile.ZipInfo) -> None:
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
        msg = f"'{origin}': its file '{name}' {why}; nothing of it is unpacked"
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


def _folder(path: Path, origin: str) -> Package:
    sizes: dict[str, int] = {}
    for place, folders, names in os.walk(path):
        for name in (*folders, *names):
            file = Path(place) / name
            refuse_link(file)
            if file.is_file():
                sizes[file.relative_to(path).as_posix()] = file.stat().st_size
        _refuse_many(origin, len(sizes))

    def fetch(name: str) -> bytes:
        with _reading(f"'{path / name}'"):
            return (path / name).read_bytes()

    return Package(origin, sizes, fetch)


def is_address(source: str) -> bool:
    """Tell an address from a path; a drive's letter is none."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


@contextmanager
def fetched(address: str, tell: Callable[[str], None]) -> Iterator[Path]:
    """Fetch what lies at an address, whole, into a file that is there for the block.

    Parameters
    ----------
    address
        ``https://``; ``http://`` of this machine alone; ``file://``.
    tell
        Gets a line with the length and SHA-256 of what came.

    Raises
    ------
    EngineError
        If it cannot be fetched, or not all of it.
    """
    parts = _parts(address)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            msg = f"'{address}' is on another machine; give a path to its drive"
            raise EngineError(msg)
        yield Path(url2pathname(parts.path))
        return
    if not _may_be_fetched(address):
        if parts.scheme == "https" and not parts.hostname:
            msg = f"'{address}' is not fetched: it names no server; give all of it"
            raise EngineError(msg)
        msg = (
            f"'{address}' is not fetched: by {parts.scheme} it may be changed on its "
            "way; give an https:// address without a password, or a file"
        )
        raise EngineError(msg)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        file = Path(scratch) / "package.zip"
        try:
            size, sha256 = _download(address, file)
        except HTTPError as error:
            error.close()
            why = " ".join(str(error.reason).split())
            msg = f"'{address}' answers {error.code} {why}; look it up again"
            raise EngineError(msg) from error
        except (OSError, HTTPException, ValueError) as error:
            why = " ".join(str(getattr(error, "reason", None) or error).split())
            msg = (
                f"'{address}' cannot be fetched: {why}; try again, or fetch it with a "
                "browser and add the file"
            )
            raise EngineError(msg) from error
        tell(f"fetched {size} bytes, sha256 {sha256}")
        yield file


def _download(address: str, file: Path) -> tuple[int, str]:
    """Write what an address answers to a file; return its length and SHA-256."""
    opener = build_opener(_SafeRedirects)
    opener.addheaders = [("User-Agent", "rtfocus")]
    size, digest = 0, hashlib.sha256()
    with opener.open(address, timeout=PATIENCE_S) as answer, file.open("wb") as into:
        stated = answer.headers.get("Content-Length", "")
        expected = int(stated) if stated.isdecimal() else None
        _refuse_long(address, expected or 0)
        while piece := answer.read(1 << 20):
            size += len(piece)
            _refuse_long(address, size)
            digest.update(piece)
            into.write(piece)
        if expected is not None and size != expected:
            msg = f"it ended after {size} of {expected} bytes"
            raise HTTPException(msg)
        if answer.headers.get_content_type() == "text/html":
            msg = (
                f"'{address}' is a page for people; give the address of the package "
                "itself, which its download button has"
            )
            raise EngineError(msg)
    return size, digest.hexdigest()


def _refuse_long(address: str, size: int) -> None:
    if size > FETCHED_BYTES:
        msg = (
            f"'{address}' has more than {FETCHED_BYTES} bytes, which no model package "
            "needs; nothing is added"
        )
        raise EngineError(msg)


class _SafeRedirects(HTTPRedirectHandler):
    """Follows redirections to https alone; on this machine to itself, too."""

    def redirect_request(
        self,
        req: Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> Request | None:
        """Return the request that follows a redirection."""
        to_https = _parts(newurl).scheme == "https"
        from_here = _parts(req.full_url).scheme == "http"
        if not _may_be_fetched(newurl) or not (to_https or from_here):
            fp.close()
            text = f"'{req.full_url}' sends on to '{newurl}', which is not https"
            raise EngineError(text)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _may_be_fetched(address: str) -> bool:
    parts = _parts(address)
    if parts.username is not None or not parts.hostname:
        return False
    here = parts.hostname in ("localhost", "127.0.0.1", "::1")
    return parts.scheme == "https" or (parts.scheme == "http" and here)


def _parts(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError as error:
        msg = f"'{address}' is no address: {error}"
        raise EngineError(msg) from error


def in_one_line(text: str) -> str:
    """Return a text of others as a terminal may show it: one line, no controls.

    Examples
    --------
    >>> in_one_line("a  model" + chr(27) + "[2J")
    'a model [2J'
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())


def verified(
    package: Package, source: str, sha256: str | None, most_bytes: int
) -> bytes:
    """Return a file that a description names, after comparing its checksum.

    Raises
    ------
    EngineError
        If it is not in the package, or is not the one that is described.
    """
    if "://" in source or not is_safe(source):
        msg = (
            f"'{package.origin}': its description names the file '{source}', which is "
            "not in the package; get the whole package, as one zip"
        )
        raise EngineError(msg)
    data = package.read(source.removeprefix("./"), most_bytes)
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        msg = (
            f"'{source}' in '{package.origin}' has sha256 {digest}, its description "
            f"says {sha256}; the package is damaged or was changed: get it again"
        )
        raise EngineError(msg)
    return data
