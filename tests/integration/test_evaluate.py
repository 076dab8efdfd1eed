"""``rtfocus evaluate``: engines and methods side by side, tables and pictures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.cli.commands import app
from rtfocus.errors import ConfigError, EngineError, InputError
from rtfocus.evaluation.contenders import contender
from rtfocus.evaluation.data_sets import VARIANTS, find_data_set, synthetic
from rtfocus.evaluation.evaluate import evaluate
from rtfocus.evaluation.parts import (
    Gathering,
    Wish,
    close_opened,
    measure_part,
    parts_of,
)
from rtfocus.evaluation.samples import LEVELS
from rtfocus.evaluation.scores import LevelScore
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_specimen

OPTICS = OpticalSystem(0.5, 451.0, 0.65, aberrations=Aberrations(spherical_waves=-0.3))


def run(*arguments: str | Path) -> str:
    """Call ``rtfocus evaluate``; raises what the command raises."""
    done = CliRunner().invoke(
        app, ["evaluate", *map(str, arguments)], catch_exceptions=False
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture
def field() -> np.ndarray:
    specimen = draw_specimen("nuclei", (240, 240), np.random.default_rng(8))
    return np.asarray(200.0 * specimen + 10.0, dtype=np.float32)


@pytest.fixture
def pairs(tmp_path: Path, field: np.ndarray) -> Path:
    """A user's data set: one field sharp, and blurred as at level 4."""
    folder = tmp_path / "mine"
    blurred = blur(field, compute_psf(OPTICS, 8.0))
    for name, image in (("sharp", field), ("blurred", blurred)):
        (folder / name).mkdir(parents=True)
        counts = np.rint(np.clip(image, 0, 255)).astype("u1")
        tifffile.imwrite(folder / name / "one.tif", counts)
    (tmp_path / "optics.yaml").write_text(
        "channels:\n- name: default\n  optics: {numerical_aperture: 0.5, "
        "wavelength_nm: 451, pixel_size_um: 0.65, "
        "aberrations: {spherical_waves: -0.3}}\n",
        encoding="utf-8",
    )
    return folder


def test_a_folder_of_pairs_gives_tables_and_pictures(
    pairs: Path, engine_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = run(
        *("sharpness", "wiener", "--data", pairs, "--tell", "both"),
        *("--classifier", "sharpness", "--engine-folder", engine_folder),
        *("--optics", tmp_path / "optics.yaml", "-o", out),
    )
    assert "mine: restored images" in said
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    titles = [one["title"] for one in report["outcomes"]]
    # Neither can be told optics: each stands there once.
    assert titles == ["sharpness", "wiener"]
    wiener = report["outcomes"][1]
    assert wiener["restored"]["all"]["gain_db"] > 1.0
    assert wiener["restored"]["blurred"]["frames"] == 1
    assert report["outcomes"][0]["multiply_adds_per_pixel"] > 0
    text = (out / "evaluation.md").read_text(encoding="utf-8")
    assert "| mine | wiener |" in text
    assert "optics NA=0.5,wavelength=451,pixel=0.65,spherical=-0.3, stated" in text
    # It names levels; those of the images are not known, and that is said.
    assert "sharpness is in no table of mine: the defocus of" in text
    assert "sharpness is in no table of mine" in said
    with Image.open(out / "images_mine.png") as picture:
        # blurred | wiener | sharp
        assert picture.size[0] > 3 * 240


def test_a_camera_offset_that_the_config_states_changes_nothing(
    pairs: Path, engine_folder: Path, tmp_path: Path
) -> None:
    optics = tmp_path / "optics.yaml"
    fields = {path: tifffile.imread(path) for path in pairs.glob("*/one.tif")}
    gains = []
    for offset, camera in ((0, ""), (400, "camera: {offset_counts: 400}\n")):
        for path, counts in fields.items():
            tifffile.imwrite(path, counts.astype("<u2") + offset)
        optics.write_text(camera + optics.read_text("utf-8"), encoding="utf-8")
        run(
            *("richardson_lucy", "--data", pairs, "--optics", optics),
            *("--classifier", "sharpness", "--engine-folder", engine_folder),
            *("-o", tmp_path / "out", "--overwrite"),
        )
        text = (tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")
        gains.append(json.loads(text)["outcomes"][0]["restored"]["all"]["gain_db"])
    assert gains[1] == pytest.approx(gains[0], abs=0.01)


def test_every_plane_of_a_stack_is_a_frame_of_its_own(
    pairs: Path, field: np.ndarray
) -> None:
    for place in pairs.iterdir():
        stack = np.stack([field + 20 * plane for plane in range(5)])
        tifffile.imwrite(place / "one.tif", stack.astype("u1"))
    assumed = find_data_set(str(pairs), None, None)
    assert assumed.title.endswith("assumed: nobody stated them (--optics CONFIG)")
    data = find_data_set(str(pairs), None, OPTICS)
    names = [sample.name for sample in data.samples()]
    assert len(names) == len(set(names)) == 5


def no_number(image: np.ndarray, value: float) -> np.ndarray:
    return np.where(image > 90, np.float32(value), image)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda blurred, sharp: (blurred, 0 * sharp + 700), "sharp one are equal"),
        (lambda blurred, sharp: (0 * blurred, sharp), "blurred one are equal"),
        (lambda blurred, sharp: (blurred, no_number(sharp, np.nan)), "NaN"),
        (lambda blurred, sharp: (no_number(blurred, np.inf), sharp), "infinite"),
        (lambda blurred, sharp: (blurred[:10], sharp[:10]), "a side needs 11 px"),
        (lambda blurred, sharp: (blurred[:99], sharp), "a pair has one size"),
    ],
)
def test_a_pair_that_has_no_figures_is_refused_by_name(
    pairs: Path, spoil: Any, why: str
) -> None:
    paths = [pairs / name / "one.tif" for name in ("blurred", "sharp")]
    images = [tifffile.imread(path).astype(np.float32) for path in paths]
    for path, image in zip(paths, spoil(*images), strict=True):
        tifffile.imwrite(path, image)
    (only,) = find_data_set(str(pairs), None, OPTICS).fields
    with pytest.raises(InputError, match=f"one.tif' cannot be compared with .*{why}"):
        list(only.samples())


def test_two_engines_of_one_name_are_refused(
    pairs: Path, engine_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "sharpness"
    shutil.copytree(engine_folder / "sharpness", other)
    with pytest.raises(ConfigError, match="both called 'sharpness'"):
        run(
            *("sharpness", other, "--data", pairs, "--engine-folder", engine_folder),
            *("-o", tmp_path / "out"),
        )


def test_two_data_sets_of_one_name_are_refused(pairs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "mine"
    shutil.copytree(pairs, other)
    with pytest.raises(ConfigError, match="two data sets are called 'mine'"):
        run("wiener", "--data", pairs, "--data", other, "-o", tmp_path / "out")


def synthetic_set(tmp_path: Path, field: np.ndarray, name: str = "synthetic"):
    tifffile.imwrite(tmp_path / "field.tif", field)
    variant = replace(VARIANTS[name], fields={"field.tif": 1.0})
    return synthetic(name, variant, tmp_path)


def test_synthetic_levels_are_scored_one_by_one(
    tmp_path: Path, field: np.ndarray, engine_folder: Path
) -> None:
    data = synthetic_set(tmp_path, field)
    one = contender(
        "sharpness", classifier="sharpness", blind=False, folders=[engine_folder]
    )
    config = one.config(data, folders=[engine_folder], threads=1)
    seen = []
    found = evaluate(one, data, config, on_frame=lambda: seen.append(1))
    assert len(seen) == LEVELS
    assert found.levels is not None
    assert list(found.levels_by_group) == [str(level) for level in range(LEVELS)]
    tiles = [score.tiles for score in found.levels_by_group.values()]
    assert found.levels.tiles == sum(tiles) > LEVELS
    # Its levels follow fine detail: the sharp plane lies below the blurred ones.
    counts = found.levels.confusion[:, :-1]
    mean = (counts @ np.arange(LEVELS)) / np.maximum(counts.sum(axis=1), 1)
    assert mean[0] < mean[4]
    assert found.levels.summary()["mean_error_um"] > 0
    assert found.ms_per_megapixel is not None
    # The first rank is the chosen label, but for tiles the engine calls empty.
    matched = found.levels.summary()["top_k"]
    assert matched == sorted(matched)
    assert matched[0] == pytest.approx(found.levels.summary()["accuracy"], abs=0.02)


def test_parts_in_any_order_are_what_one_process_finds(
    tmp_path: Path, field: np.ndarray, engine_folder: Path
) -> None:
    for number, pattern in enumerate(VARIANTS["synthetic"].fields):
        path = tmp_path / pattern
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, field[: 96 + 8 * number, :96])
    wish = Wish(
        sets=("synthetic",),
        data_folder=tmp_path,
        optics=None,
        offset_counts=0.0,
        classifier="sharpness",
        folders=(engine_folder,),
        threads=1,
        precision="f32",
    )
    (data,) = wish.data_sets()
    one = wish.contender("sharpness", blind=False)
    parts = parts_of(wish, [one], [data])
    assert [part.field for part in parts] == [place.name for place in data.fields]
    found = Gathering(parts, [one], [data])
    everywhere = wish.anywhere()
    try:
        for part in reversed(parts):
            done = measure_part(everywhere, part)
            assert all(frame.image is None for frame in done.frames)
            found.take(part, done)
        for wrong in ({"identity": "other weights"}, {"engine": "not there"}):
            with pytest.raises(EngineError):
                measure_part(everywhere, replace(parts[0], **wrong))
        with pytest.raises(InputError, match="is not there, or another one"):
            measure_part(everywhere, replace(parts[0], field="another"))
    finally:
        close_opened()
    (sheet,) = found.sheets()
    alone = evaluate(one, data, wish.config(one, data))
    assert sheet.levels is not None
    assert alone.levels is not None
    assert sheet.levels.tiles > 0
    for of in ("levels", "levels_by_group", "frames"):
        assert in_plain(getattr(sheet, of)) == in_plain(getattr(alone, of))
    assert sheet.ms_per_megapixel is not None


def in_plain(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: in_plain(one) for name, one in found.items()}
    return found.summary() if isinstance(found, LevelScore) else found


def test_a_synthetic_set_is_the_same_every_time(
    tmp_path: Path, field: np.ndarray
) -> None:
    data = synthetic_set(tmp_path, field, "synthetic_signed")
    first, second = (list(data.samples()) for _ in range(2))
    assert len(first) == 2 * LEVELS - 1
    for one, again in zip(first, second, strict=True):
        assert np.array_equal(one.pixels, again.pixels)
    assert [one.group for one in first[:2]] == ["-10", "-9"]
    assert first[0].defocus_um == (-22.0, -22.0)
    assert first[0].sided
    assert not first[LEVELS - 1].sided


def test_a_method_told_the_defocus_is_the_bound(
    tmp_path: Path, field: np.ndarray
) -> None:
    data = synthetic_set(tmp_path, field)
    one = contender("richardson_lucy:exact", classifier="none", blind=False)
    found = evaluate(one, data, one.config(data))
    groups = found.groups()
    assert groups["0"]["gain_db"] == 0.0
    assert groups["4"]["gain_db"] > 1.0
    assert found.levels is None


def test_orientations_are_part_of_a_name(tmp_path: Path, field: np.ndarray) -> None:
    data = synthetic_set(tmp_path, field)
    gains = []
    for name in ("rtfocus-2", "rtfocus-2:4"):
        one = contender(name, classifier="delpnet", blind=True)
        assert one.title == f"{name}, blind"
        found = evaluate(one, data, one.config(data))
        gains.append(found.groups()["4"]["gain_db"])
    # Which is better is a matter of weights and fields, and no fault of a name.
    assert gains[0] > 1
    assert 0 < abs(gains[1] - gains[0]) < 2


def test_what_cannot_be_evaluated_is_refused(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder and none of bbbc006_pairs"):
        find_data_set("nowhere", None, None)
    with pytest.raises(InputError, match="--data-folder"):
        find_data_set("synthetic", tmp_path / "none", None)
    with pytest.raises(InputError, match="a folder 'sharp'"):
        find_data_set(str(pairs / "sharp"), None, None)
    with pytest.raises(ConfigError, match="can be told the exact defocus"):
        contender("delpnet:exact", classifier="delpnet", blind=False)
    with pytest.raises(ConfigError, match="delpnet restores nothing; leave out ':8'"):
        contender("delpnet:8", classifier="delpnet", blind=False)
    for name in ("no_such_engine", "8"):
        with pytest.raises(EngineError, match=f"'{name}' not found"):
            contender(name, classifier="delpnet", blind=False)
    data = find_data_set(str(pairs), None, OPTICS)
    one = contender("wiener:exact", classifier="none", blind=False)
    with pytest.raises(ConfigError, match="nobody knows its defocus"):
        evaluate(one, data, one.config(data))


def test_real_actin_is_restored_and_labelled(shared_data: Path) -> None:
    data = find_data_set("bbbc006_factin", shared_data, None)
    wiener = contender("wiener", classifier="delpnet", blind=False)
    gains = evaluate(wiener, data, wiener.config(data, threads=1)).groups()
    assert gains["10 um"]["gain_db"] > 3.0
    delpnet = contender("delpnet", classifier="delpnet", blind=False)
    levels = evaluate(delpnet, data, delpnet.config(data, threads=1)).levels
    assert levels is not None
    assert levels.summary()["accuracy"] > 0.9


def test_an_engine_that_is_none_is_told_before_data_are_asked_for(monkeypatch) -> None:
    monkeypatch.delenv("RTFOCUS_DATA", raising=False)
    with pytest.raises(EngineError, match="engine 'no_such' not found"):
        run("no_such")


def test_what_is_told_is_said_once() -> None:
    with pytest.raises(ConfigError, match="--tell is 'optics'; give one of the two"):
        run("delpnet", "--blind", "--tell", "optics")


def test_images_of_packages_are_kinds_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fetch them with: python -m bench\.package"):
        find_data_set("packages", tmp_path, None)
    folder = tmp_path / "packages" / "unseen"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    for name in ("pollen", "neuron"):
        light = draw_specimen("nuclei", (160, 160), rng)
        tifffile.imwrite(folder / f"{name}.tif", light.astype(np.float32))
    found = find_data_set("packages", tmp_path, None)
    assert [field.name for field in found.fields] == ["neuron", "pollen"]
    frames = list(found.samples())
    assert len(frames) == 8
    assert {frame.pixels.shape for frame in frames} == {(160, 160)}
