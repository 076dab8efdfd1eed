"""Outputs: where a command may write, so that nothing of the user's is lost.

One guard for every command that writes where a user says. It knows the command's
inputs with their companions, is asked about every target before the first pixel is
computed, and writes each target beside its place, to be moved there whole.
"""

import json
import os
import stat
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from rtfocus import files
from rtfocus.errors import OutputError
from rtfocus.images.metadata import (
    RUN_ENDING,
    is_zarr,
    json_mark,
    written_by_rtfocus,
)
from rtfocus.images.series import ImageSeries

_TIFF_ENDINGS = (".tif", ".tiff")
_ENDINGS = (
    ".ome.tiff",
    ".ome.tif",
    ".ome.zarr",
    *_TIFF_ENDINGS,
    ".zarr",
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
)
_IMAGE_ENDINGS = (*_TIFF_ENDINGS, ".zarr", ".png", ".jpg", ".jpeg", ".bmp")

STANDARD_OUTPUT = ("-", "/dev/stdout")
"""What ``--json`` takes for the output of the command."""

Identity = tuple[int, int]
"""Device and inode: the same for all names and links of one file."""


class OutputGuard:
    """Says before the work whether a command may write somewhere, then writes whole.

    Parameters
    ----------
    inputs
        Files and folders the command reads, companions included
        (`ImageSeries.files`): none of them, nothing that holds one and nothing inside
        of one can be an output. Folders that are merely searched are not among them.
    overwrite
        The user allows to replace earlier results of rtfocus.
    """

    def __init__(
        self, inputs: Iterable[Path | None] = (), *, overwrite: bool = False
    ) -> None:
        self.overwrite = overwrite
        self._inputs: dict[Identity, Path] = {}
        self._holders: dict[Identity, Path] = {}
        self._names: dict[str, Path] = {}
        self._claimed: dict[str, Path] = {}
        for path in dict.fromkeys(filter(None, inputs)):
            identity = _identity(path)
            if identity is not None:
                self._inputs[identity] = path
            # Both the folders it is found in and those it really lies in.
            for place in {path.absolute(), _resolved(path)}:
                self._names[same_name(str(place))] = path
                self._hold(place.parents, path)

    def fresh(self, *, overwrite: bool) -> "OutputGuard":
        """Return a guard of the same inputs that has claimed nothing yet."""
        return OutputGuard(self._inputs.values(), overwrite=overwrite)

    def _hold(self, parents: Sequence[Path], path: Path) -> None:
        for parent in parents:
            identity = _identity(parent)
            if identity is None or identity in self._holders:
                break
            self._holders[identity] = path

    def claim(self, target: Path, *, named: bool = False) -> Path:
        """Refuse a target that must not or cannot be written; before any work.

        Parameters
        ----------
        target
            File or folder that will be written as one.
        named
            The user named this very path; an image file there may be replaced with
            ``--overwrite`` whoever wrote it.

        Returns
        -------
        Path
            `target`.

        Raises
        ------
        OutputError
            Says what stands in the way and what to do.
        """
        _refuse_reserved(target)
        self._refuse_inputs(target)
        self._refuse_twice(target)
        files.recover(target)
        self._refuse_existing(target, named=named)
        _try_writing(target)
        return target

    def claim_json(self, target: Path) -> Path:
        """As `claim`, for a JSON file; the name of an image is refused."""
        if target.suffix.lower() in _IMAGE_ENDINGS:
            msg = f"'{target}' is the name of an image; give --json a name.json"
            raise OutputError(msg)
        if str(target) in STANDARD_OUTPUT:
            return target
        return self.claim(target)

    def claim_folder(self, folder: Path) -> Path:
        """Refuse a folder that results cannot be put into; it may exist.

        The targets in it are claimed one by one.
        """
        _refuse_no_folder(folder)
        _refuse_reserved(folder)
        self._refuse_inputs(folder)
        _try_writing(folder / "result")
        return folder

    def whole(self, target: Path) -> AbstractContextManager[Path]:
        """Return a context: a part beside the claimed `target`, moved there whole."""
        return files.whole(target, overwrite=self.overwrite)

    def write_json(self, target: Path, content: Mapping[str, Any]) -> None:
        """Write a claimed JSON file whole, marked as a result of rtfocus."""
        marked = {**json_mark(), **content}
        text = json.dumps(marked, indent=1, allow_nan=False)
        if str(target) in STANDARD_OUTPUT:
            print(text)  # noqa: T201 (the user asked for it there)
            return
        with self.whole(target) as part:
            part.write_text(text, encoding="utf-8")

    @contextmanager
    def report(self, folder: Path, mark: str, names: Iterable[str]) -> Iterator[Path]:
        """Yield an empty folder whose files then go to `folder`, all or none.

        Parameters
        ----------
        folder
            May exist and hold other things.
        mark
            Name of the report's JSON file; it lists the report's files, and those
            alone may be replaced.
        names
            The files that will be written, as far as they are known.

        Raises
        ------
        OutputError
            As `claim`; also if a file came into the way during the work.
        """
        self.claim_report(folder, mark, names)
        with tempfile.TemporaryDirectory() as made:
            part = Path(made)
            yield part
            written = sorted(path.name for path in part.iterdir())
            self.claim_report(folder, mark, written)
            content = json.loads((part / mark).read_text("utf-8"))
            marked = {**json_mark(), "files": written, **content}
            text = json.dumps(marked, indent=1, allow_nan=False)
            (part / mark).write_text(text, encoding="utf-8")
            for name in written:
                with files.whole(folder / name, overwrite=self.overwrite) as place:
                    place.write_bytes((part / name).read_bytes())

    def claim_report(self, folder: Path, mark: str, names: Iterable[str]) -> None:
        """Refuse a report's folder before the work, see `report`."""
        self._refuse_inputs(folder, holding=False)
        _refuse_no_folder(folder)
        _refuse_reserved(folder)
        _try_writing(folder / mark)
        earlier = _files_of_report(folder / mark) if self.overwrite else ()
        for name in dict.fromkeys((mark, *names)):
            target = folder / name
            self._refuse_inputs(target)
            if target.is_symlink() or (target.exists() and name not in earlier):
                self._refuse_existing(target, named=False)

    def _refuse_inputs(self, target: Path, *, holding: bool = True) -> None:
        identity = _identity(target)
        if identity in self._inputs:
            raise _refusal(target, f"is the input '{self._inputs[identity]}'")
        if holding and identity in self._holders:
            raise _refusal(target, f"holds the input '{self._holders[identity]}'")
        for place in (target.absolute(), _resolved(target)):
            if (like := self._names.get(same_name(str(place)))) is not None:
                raise _refusal(target, f"is the input '{like}' but for letter case")
            for folder in (place, *place.parents):
                if _is_run(folder):
                    raise _refusal(target, f"lies in the run folder '{folder}'")
            for parent in place.parents:
                around = _identity(parent)
                if around in self._inputs:
                    raise _refusal(
                        target, f"lies inside the input '{self._inputs[around]}'"
                    )

    def _refuse_twice(self, target: Path) -> None:
        """Two outputs may differ in more than upper and lower case only."""
        key = same_name(str(_resolved(target)))
        if key in self._claimed:
            msg = f"two results would both be '{target}'; choose different names"
            raise OutputError(msg)
        self._claimed[key] = target

    def _refuse_existing(self, target: Path, *, named: bool) -> None:
        try:
            found = target.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            msg = f"'{target}' cannot be an output: {error.strerror or error}"
            raise OutputError(msg) from error
        if stat.S_ISLNK(found.st_mode):
            msg = f"'{target}' is a link; give the place it should lead to"
            raise OutputError(msg)
        replaceable = written_by_rtfocus(target) or (
            named
            and stat.S_ISREG(found.st_mode)
            and target.suffix.lower() in _TIFF_ENDINGS
        )
        if not replaceable:
            raise _refusal(target, "exists and was not written by rtfocus")
        if not self.overwrite:
            raise _refusal(target, "exists", "choose another output or --overwrite")


def companions(series: Iterable[ImageSeries]) -> list[Path]:
    """Return every file and folder that belongs to some images, Zarr parents too."""
    found: dict[Path, None] = {}
    for one in series:
        found |= dict.fromkeys((one.path, *one.files))
        around = [folder for folder in one.path.absolute().parents if is_zarr(folder)]
        found |= dict.fromkeys(around)
    return list(found)


def result_names(series: Sequence[ImageSeries], root: Path) -> list[PurePosixPath]:
    """Name one TIFF for each image, all different on every file system.

    Parameters
    ----------
    series
        Images of one input.
    root
        The input; of a folder, the layout below it is kept.

    Returns
    -------
    list of PurePosixPath
        Relative to the output folder. A file's name keeps all but its last known
        ending; where that makes two equal, the ending too. Images of a plate lie in a
        folder of their well.
    """
    number = Counter(one.path for one in series)
    folders = [_folder_of(one, root) for one in series]
    stems = [
        files.portable_name(_stem(one.path.name) if number[one.path] == 1 else one.name)
        for one in series
    ]
    equal = Counter(map(same_name, map(str, map(PurePosixPath, folders, stems))))
    paths = []
    for one, folder, stem in zip(series, folders, stems, strict=True):
        ending = one.path.suffix.lower()
        clashes = equal[same_name(str(folder / stem))] > 1
        if clashes and number[one.path] == 1 and ending not in _TIFF_ENDINGS:
            stem += ending
        paths.append(folder / stem)
    taken = {same_name(str(parent)) for path in paths for parent in path.parents}
    return [_free(path, taken) for path in paths]


def same_name(text: str) -> str:
    """Return what is equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", text).casefold()


def _folder_of(one: ImageSeries, root: Path) -> PurePosixPath:
    """Return where below the output folder an image lies."""
    parts = (
        one.path.parent.relative_to(root).parts
        if root != one.path and one.path.is_relative_to(root)
        else ()
    )
    if one.place is not None:
        rows, columns = one.place.rows, one.place.columns
        parts = (*parts, rows[one.place.row] + columns[one.place.column])
    return PurePosixPath(*map(files.portable_name, parts))


def _stem(name: str) -> str:
    ending = next((e for e in _ENDINGS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] or name


def _free(path: PurePosixPath, taken: set[str]) -> PurePosixPath:
    """Return `path` as a TIFF, numbered if that name is taken; it is then."""
    number, name = 1, f"{path.name}.tif"
    while same_name(str(path.with_name(name))) in taken:
        number += 1
        name = f"{path.name}_{number}.tif"
    taken.add(same_name(str(path.with_name(name))))
    return path.with_name(name)


def _identity(path: Path) -> Identity | None:
    """Return what all names of a file share; None where there is no file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return path.absolute()


def _is_run(folder: Path) -> bool:
    return folder.suffix == RUN_ENDING and (folder / "series.json").is_file()


def _refusal(
    target: Path, why: str, remedy: str = "choose another output"
) -> OutputError:
    return OutputError(f"'{target}' {why}; {remedy}")


def _refuse_no_folder(folder: Path) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        msg = f"'{folder}' exists and is no folder; choose another output"
        raise OutputError(msg)


def _refuse_reserved(target: Path) -> None:
    """Refuse to make what Windows cannot hold: results travel between systems."""
    for place in (target, *target.parents):
        if os.path.lexists(place):
            return
        if files.is_reserved_name(place.name):
            msg = (
                f"'{target}' cannot be an output: Windows reserves the name "
                f"'{place.name}' (con, nul, com1 ...; a dot or space at the end); "
                "choose another output"
            )
            raise OutputError(msg)


def _try_writing(target: Path) -> None:
    """Refuse a place in which no file can be made, by making one."""
    place = next(p for p in target.absolute().parents if os.path.lexists(p))
    if not place.is_dir():
        msg = f"'{target}' cannot be written: '{place}' is no folder"
        raise OutputError(msg)
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".rtfocus-"):
            pass
    except OSError as error:
        reason = error.strerror or error
        msg = f"'{target}' cannot be written: '{place}' takes no files ({reason})"
        raise OutputError(msg) from error


def _files_of_report(mark: Path) -> list[str]:
    """Return the files an earlier report lists; none if it is not rtfocus's."""
    if not written_by_rtfocus(mark):
        return []
    listed = json.loads(mark.read_text("utf-8")).get("files")
    return list(listed) if isinstance(listed, list) else []
