"""Outputs: where a command may write, so that nothing of the user's is lost.

One guard for every command that writes where a user says. It knows the command's
inputs with their companions, is asked about every target before the first pixel is
computed, and writes each target beside its place, to be moved there whole.

Images become TIFF, OME-TIFF or OME-Zarr by the output's ending. What the input says of
its pixels, channels and wells is kept; what it does not say stays unknown.
"""

import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtfocus import files
from rtfocus.errors import IncompleteError, InputError, OutputError, number_of
from rtfocus.files import same_name
from rtfocus.images.metadata import (
    TIFF_ENDINGS,
    OutputImage,
    json_mark,
    result_names,
    run_at,
    written_by_rtfocus,
)
from rtfocus.images.ome_xml import write_tiff
from rtfocus.images.reading import BrokenImage
from rtfocus.images.series import ImageSeries

if TYPE_CHECKING:
    from rtfocus.images.zarr_writing import ZarrForm

_IMAGE_ENDINGS = (*TIFF_ENDINGS, ".zarr", ".png", ".jpg", ".jpeg", ".bmp")

_JOURNAL_BEGIN = b'{"kind": '
"""Of every line that autofocus writes down."""

STANDARD_OUTPUT = ("-", "/dev/stdout")
"""What ``--json`` and ``--csv`` take for the output of the command."""

TextKind = Literal["json", "csv"]
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
        self._around: set[str] = set()
        for path in dict.fromkeys(filter(None, inputs)):
            if (identity := _identity(path)) is not None:
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
            ``--overwrite`` whatever program wrote it.

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

    def claim_text(self, target: Path, kind: TextKind) -> Path:
        """As `claim`, for a file of a kind; the name of an image is refused."""
        if target.suffix.lower() in _IMAGE_ENDINGS:
            msg = f"'{target}' is the name of an image; give --{kind} a name.{kind}"
            raise OutputError(msg)
        if str(target) in STANDARD_OUTPUT:
            self._refuse_twice(Path("-"))
            return target
        return self.claim(target)

    def claim_journal(self, target: Path) -> Path:
        """Refuse a file that lines of JSON cannot be appended to; it may hold some."""
        _refuse_reserved(target)
        self._refuse_inputs(target)
        if not os.path.lexists(target):
            _try_writing(target)
            return target
        try:
            with target.open("r+b") as file:
                begin = file.read(len(_JOURNAL_BEGIN))
        except OSError as error:
            raise _refusal(target, f"takes no lines ({error.strerror})") from error
        if begin not in (b"", _JOURNAL_BEGIN):
            raise _refusal(target, "exists and is no journal of rtfocus")
        return target

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

    def write_text(self, target: Path, text: str) -> None:
        """Write a claimed text whole, in UTF-8 on every system."""
        if str(target) in STANDARD_OUTPUT:
            # Not as text: the system's own letters may lack some of a file's name.
            sys.stdout.flush()
            sys.stdout.buffer.write(text.encode())
            return
        with self.whole(target) as part:
            part.write_bytes(text.encode())

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
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            part = Path(scratch)
            yield part
            written = sorted(path.name for path in part.iterdir())
            self.claim_report(folder, mark, written)
            content = json.loads((part / mark).read_text("utf-8"))
            (part / mark).write_text(json_text({"files": written, **content}), "utf-8")
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
                if run_at(folder):
                    raise _refusal(target, f"lies in the run folder '{folder}'")
            for parent in place.parents:
                if (around := _identity(parent)) in self._inputs:
                    raise _refusal(
                        target, f"lies inside the input '{self._inputs[around]}'"
                    )

    def _refuse_twice(self, target: Path) -> None:
        """Two outputs differ in more than letter case; none lies in another."""
        place = _resolved(target)
        key, around = same_name(str(place)), [same_name(str(p)) for p in place.parents]
        if key in self._around or not self._claimed.keys().isdisjoint(around):
            raise _refusal(target, "would hold another result, or lie in one")
        if key in self._claimed:
            msg = f"two results would both be '{target}'; choose different names"
            raise OutputError(msg)
        self._claimed[key] = target
        self._around.update(around)

    def _refuse_existing(self, target: Path, *, named: bool) -> None:
        try:
            status = target.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            msg = f"'{target}' cannot be an output: {error.strerror or error}"
            raise OutputError(msg) from error
        if stat.S_ISLNK(status.st_mode):
            msg = f"'{target}' is a link; give the place it should lead to"
            raise OutputError(msg)
        replaceable = written_by_rtfocus(target) or (
            named
            and stat.S_ISREG(status.st_mode)
            and target.suffix.lower() in TIFF_ENDINGS
        )
        if not replaceable:
            raise _refusal(target, "exists and was not written by rtfocus")
        if not self.overwrite:
            raise _refusal(target, "exists", "choose another output or --overwrite")


def json_text(content: Mapping[str, Any]) -> str:
    """Return a JSON file that is marked as a result of rtfocus."""
    return json.dumps({**json_mark(), **content}, indent=1, allow_nan=False) + "\n"


def _identity(path: Path) -> Identity | None:
    """Return what all names of a file share; None where there is no file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return path.absolute()


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
    if target.name == "-":
        msg = "'-' is no name for a file, and images go to none but files; give a name"
        raise OutputError(msg)
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
    parents = target.absolute().parents
    # On Windows a drive may be missing.
    place = next(filter(os.path.lexists, parents), parents[-1])
    if not place.is_dir():
        msg = f"'{target}' cannot be written: '{place}' is no folder"
        raise OutputError(msg)
    try:
        files.try_writing(place)
    except OSError as error:
        reason = error.strerror or error
        msg = (
            f"'{target}' cannot be written: '{place}' takes no files ({reason}); "
            "give another place"
        )
        raise OutputError(msg) from error


def _files_of_report(mark: Path) -> list[str]:
    """Return the files an earlier report lists; none if it is not rtfocus's."""
    if not written_by_rtfocus(mark):
        return []
    listed = json.loads(mark.read_text("utf-8")).get("files")
    return list(listed) if isinstance(listed, list) else []


class ImageOutput:
    """Where images will be written, checked before any of them is computed.

    Parameters
    ----------
    output
        ``.tif`` or ``.tiff``: one file (OME-TIFF; several images = several
        series); ``.zarr``: OME-Zarr 0.5, images of one plate as a plate; no ending,
        or a folder that exists: a folder with one TIFF per image, in the layout of
        the input.
    series
        At least one.
    guard
        Knows the inputs.
    root
        The input that the images were found in; None: that of the first.

    Raises
    ------
    OutputError
        If the ending is unknown, something must not be replaced, or the place takes
        no files.
    """

    def __init__(
        self,
        output: Path,
        series: Sequence[ImageSeries],
        guard: OutputGuard,
        root: Path | None = None,
    ) -> None:
        self.path = output
        self._guard = guard
        self.ending = output.suffix.lower()
        is_file = self.ending in (*TIFF_ENDINGS, ".zarr")
        self.is_folder = not is_file and (self.ending == "" or os.path.isdir(output))
        if self.is_folder:
            guard.claim_folder(output)
            names = result_names(series, root or series[0].path)
            self.targets = [guard.claim(output / name) for name in names]
        elif is_file:
            self.targets = [guard.claim(output, named=self.ending != ".zarr")]
        else:
            msg = (
                f"'{output}': unknown ending '{self.ending}'; use .tif, .ome.zarr, or "
                "a folder's name without ending"
            )
            raise OutputError(msg)

    def write(
        self, images: Sequence[OutputImage], form: "ZarrForm | None" = None
    ) -> list[BrokenImage]:
        """Write images plane by plane, each target whole.

        Parameters
        ----------
        images
            One for each series, in the same order.
        form
            Of an OME-Zarr; None: of version 0.5, in full size alone.

        Returns
        -------
        list of BrokenImage
            Inputs whose planes cannot be read: nothing is written of them. In one
            file for all there is none, it is all or nothing.

        Raises
        ------
        InputError
            If a plane cannot be read and all images go into one file.
        OutputError
            If the disk refuses it.
        IncompleteError
            If it does so after some files of a folder.
        """
        if not self.is_folder:
            with self._guard.whole(self.path) as part:
                if self.ending == ".zarr":
                    # A report writes none, and zarr takes long to load.
                    from rtfocus.images.zarr_writing import ZarrForm, write_zarr

                    write_zarr(part, images, form or ZarrForm())
                else:
                    write_tiff(part, images)
            return []
        broken, done = [], 0
        for image, target in zip(images, self.targets, strict=True):
            try:
                with self._guard.whole(target) as part:
                    write_tiff(part, [image])
                done += 1
            except InputError as error:
                broken.append(BrokenImage(image.like.path, str(error)))
            except OutputError as error:
                if not done:
                    raise
                of = number_of(len(self.targets), "file")
                msg = f"{error}; {done} of {of} written; --overwrite does them again"
                raise IncompleteError(msg) from error
        return broken

    def written(self) -> list[Path]:
        """Return the targets that are on disk now."""
        return [target for target in self.targets if target.exists()]
