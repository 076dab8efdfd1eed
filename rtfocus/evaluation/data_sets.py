"""Data sets: finds the frames that a name on the command line stands for."""

from pathlib import Path

from rtfocus.channel import OpticalSystem
from rtfocus.errors import InputError
from rtfocus.evaluation.real_sets import REAL_SETS, folder_set
from rtfocus.evaluation.samples import BBBC006, DataSet
from rtfocus.evaluation.synthetic_sets import VARIANTS, synthetic


def find_data_set(
    name: str,
    data_folder: Path | None,
    optics: OpticalSystem | None,
    *,
    offset_counts: float = 0.0,
) -> DataSet:
    """Return a data set by its name, or the pairs of a user's folder.

    Parameters
    ----------
    name
        Of `REAL_SETS` or `VARIANTS`, or a folder.
    data_folder
        Where the published images lie; only sets by name need it.
    optics
        Of a user's folder; None: those fitted to BBBC006.
    offset_counts
        Of the camera that took the images of a user's folder.

    Raises
    ------
    InputError
        If it is neither, or the published images are missing.
    """
    known = (*REAL_SETS, *VARIANTS)
    if name not in known:
        if not Path(name).is_dir():
            msg = f"data set '{name}' is no folder and none of {', '.join(known)}"
            raise InputError(msg)
        return folder_set(Path(name), optics or BBBC006, offset_counts=offset_counts)
    if data_folder is None or not data_folder.is_dir():
        msg = (
            f"data set '{name}' needs the published images, but there is no folder "
            f"'{data_folder}'; say where they lie with --data-folder"
        )
        raise InputError(msg)
    if name in REAL_SETS:
        return REAL_SETS[name](data_folder)
    return synthetic(name, data_folder)
