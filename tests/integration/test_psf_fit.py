"""``rtfocus psf fit``: images in, a config's optics out, faults named."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.cli.commands import app
from rtfocus.config import load_config
from rtfocus.errors import ConfigError, InputError
from rtfocus.optics.formation import blur
from rtfocus.optics.psf import compute_psf
from rtfocus.specimens import draw_specimen

TRUTH = OpticalSystem(0.45, 500.0, 0.5, aberrations=Aberrations(spherical_waves=-0.35))
OPTICS = ("--na", "0.45", "--wavelength-nm", "500", "--pixel-size-um", "0.5")


def run(*arguments: str | Path) -> str:
    """Call ``rtfocus psf fit``; raises what the command raises."""
    done = CliRunner().invoke(
        app, ["psf", "fit", *map(str, arguments)], catch_exceptions=False
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def specimen(seed: int, side: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 180.0 * draw_specimen("nuclei", (side, side), rng) + 10.0


@pytest.fixture
def pair_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two registered pairs and one shifted by half a pixel, blurred by z = 7 um."""
    folders = tmp_path / "sharp", tmp_path / "blurred"
    psf = compute_psf(TRUTH, 7.0, size_px=61)
    for folder in folders:
        folder.mkdir()
    for number in range(2):
        sharp = specimen(number, 220)
        for folder, image in zip(folders, (sharp, blur(sharp, psf)), strict=True):
            tifffile.imwrite(
                folder / f"f{number}.tif", np.rint(np.clip(image, 0, 255)).astype("u1")
            )
    return folders


def test_pairs_become_the_optics_of_a_config(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = run(
        *("--pairs", *pair_folders, "--defocus-um", "8", *OPTICS),
        *("--fixed-na", "--channel", "DAPI", "-o", out),
    )
    assert "doubtful" not in said
    optics = load_config(out / "optics.yaml").channel("DAPI").optics
    assert optics is not None
    assert optics.aberrations.spherical_waves == pytest.approx(-0.35, abs=0.05)
    assert (optics.numerical_aperture, optics.defocus_offset_um) == (0.45, 0.0)
    figures = json.loads((out / "fit.json").read_text(encoding="utf-8"))
    assert figures["best"]["defocus_um"] == pytest.approx(7.0, abs=0.4)
    assert figures["offset_of_nominal_um"] == pytest.approx(-1.0, abs=0.4)
    assert [pair["name"] for pair in figures["pairs"]] == ["f0", "f1"]
    with Image.open(out / "fit.png") as picture:
        assert min(picture.size) > 3 * 256


def test_an_exact_defocus_tells_the_aperture(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = run(
        *("--pairs", *pair_folders, "--only", "f0", "--defocus-um", "7"),
        *("--exact-defocus", "--na", "0.5", *OPTICS[2:], "-o", out),
    )
    assert "exact" in said
    optics = load_config(out / "optics.yaml").channel("default").optics
    assert optics is not None
    assert optics.numerical_aperture == pytest.approx(0.45, rel=0.06)


def test_an_exact_defocus_tells_the_aperture_without_aberration_too(
    tmp_path: Path,
) -> None:
    plain = OpticalSystem(0.45, 500.0, 0.5)
    sharp = specimen(0, 200)
    for name, image in (("a", sharp), ("b", blur(sharp, compute_psf(plain, 7.0)))):
        tifffile.imwrite(tmp_path / f"{name}.tif", image.astype("f4"))
    said = run(
        *("--pairs", tmp_path / "a.tif", tmp_path / "b.tif", "--defocus-um", "7"),
        *("--exact-defocus", "--na", "0.5", *OPTICS[2:], "-o", tmp_path / "out"),
    )
    assert "exact" in said
    optics = load_config(tmp_path / "out" / "optics.yaml").channel("default").optics
    assert optics is not None
    assert optics.numerical_aperture == pytest.approx(0.45, rel=0.06)


def test_a_stack_with_its_z_in_a_file(tmp_path: Path) -> None:
    z_um = np.arange(-6.0, 6.1, 2.0)
    flat = specimen(7, 90)
    planes = [blur(flat, compute_psf(TRUTH, z - 0.5)) for z in z_um]
    tifffile.imwrite(tmp_path / "stack.tif", np.stack(planes).astype("f4"))
    text = "z_um\n" + "\n".join(f"{n},{z}" for n, z in enumerate(-z_um))
    (tmp_path / "z.csv").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    run(
        *("--stack", tmp_path / "stack.tif", "--z-csv", tmp_path / "z.csv"),
        *("--z-increases", "nearer", "--fixed-na", *OPTICS, "-o", out),
    )
    optics = load_config(out / "optics.yaml").channel("default").optics
    assert optics is not None
    assert optics.aberrations.spherical_waves == pytest.approx(-0.35, abs=0.08)
    figures = json.loads((out / "fit.json").read_text(encoding="utf-8"))
    assert figures["best"]["focus_um"] == pytest.approx(0.5, abs=0.4)


def test_beads_with_a_step(tmp_path: Path) -> None:
    z_um = np.arange(-5.0, 5.1, 1.0)
    rng = np.random.default_rng(1)
    field = np.zeros((60, 100))
    field[29, 30] = field[31, 72] = 3e4
    planes = [blur(field, compute_psf(TRUTH, z, size_px=41)) for z in z_um]
    counts = rng.poisson(np.maximum(np.stack(planes), 0.0) + 20.0)
    tifffile.imwrite(tmp_path / "beads.tif", counts.astype("u2"))
    config = tmp_path / "nominal.yaml"
    config.write_text(
        "channels:\n- name: red\n  optics: {numerical_aperture: 0.45, "
        "wavelength_nm: 500, pixel_size_um: 0.5}\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    said = run(
        *("--beads", tmp_path / "beads.tif", "--step-um", "1", "--fixed-na"),
        *("--config", config, "-o", out),
    )
    assert "The 2 beads" in said
    assert [one.name for one in load_config(out / "optics.yaml").channels] == ["red"]
    stack = ("--beads", tmp_path / "beads.tif", "--step-um", "1", "--config", config)
    with pytest.raises(ConfigError, match=r"no channel 'rde'.*has red.*--channel"):
        run(*stack, "--channel", "rde", "-o", tmp_path / "none")
    config.write_text("channels: [{name: red}, {name: blue}]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"which channel.*red, blue.*--channel"):
        run(*stack, "-o", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no optics for channel 'red'; give it num"):
        run(*stack, "--channel", "red", "-o", tmp_path / "none")
    figures = json.loads((out / "fit.json").read_text(encoding="utf-8"))
    assert figures["best"]["spherical_waves"] == pytest.approx(-0.35, abs=0.05)
    assert figures["best"]["focus_um"] == pytest.approx(5.0, abs=0.3)
    assert {bead["column"] for bead in figures["beads"]} == {30, 72}


def test_what_cannot_be_fitted_is_refused_by_name(
    pair_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    sharp, blurred = pair_folders
    pairs = ("--defocus-um", "8", *OPTICS)
    shifted = tmp_path / "shifted.tif"
    tifffile.imwrite(shifted, np.roll(tifffile.imread(blurred / "f0.tif"), 9, axis=0))
    with pytest.raises(InputError, match=r"\+[89]\.\d px in y"):
        run("--pairs", sharp / "f0.tif", shifted, *pairs)
    flat = tmp_path / "flat.tif"
    tifffile.imwrite(flat, np.full((220, 220), 7, "u1"))
    with pytest.raises(InputError, match=r"flat\.tif' is flat, every pixel is 7"):
        run("--pairs", sharp / "f0.tif", flat, *pairs)
    small = tmp_path / "small.tif", tmp_path / "small_blurred.tif"
    for cut, whole in zip(small, (sharp, blurred), strict=True):
        tifffile.imwrite(cut, tifffile.imread(whole / "f0.tif")[60:120, 60:120])
    with pytest.raises(InputError, match="too small"):
        run("--pairs", *small, *pairs)
    with pytest.raises(InputError, match="both images are the same, pixel for pixel"):
        run("--pairs", sharp, sharp, *pairs)
    with pytest.raises(InputError, match="no image 'x' of"):
        run("--pairs", sharp, blurred, "--only", "x", *pairs)
    with pytest.raises(InputError, match="single plane"):
        run("--stack", sharp / "f0.tif", "--step-um", "1", *OPTICS)
    with pytest.raises(ConfigError, match="--defocus-um"):
        run("--pairs", sharp, blurred, *OPTICS)
    with pytest.raises(ConfigError, match="one of --pairs, --stack or --beads"):
        run(*OPTICS)
    with pytest.raises(ConfigError, match="--na, --wavelength-nm"):
        run("--pairs", sharp, blurred, "--defocus-um", "8")
    for options, said in (
        (
            ("--pairs", sharp, blurred, *pairs, "--step-um", "1"),
            "--step-um .* have their own",
        ),
        (
            ("--stack", sharp, "--only", "f0", *OPTICS),
            "--only cannot .* have their own",
        ),
        (("--stack", sharp, "--config", "demo", "--na", "1"), "--na cannot .*--config"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(*options)


def test_a_stack_without_distances_is_refused(tmp_path: Path) -> None:
    stack = tmp_path / "stack.tif"
    tifffile.imwrite(stack, np.zeros((5, 64, 64), "u2"))
    with pytest.raises(InputError, match="--step-um or --z-csv"):
        run("--stack", stack, *OPTICS)
    short = tmp_path / "z.csv"
    short.write_text("0\n1\n", encoding="utf-8")
    with pytest.raises(InputError, match="2 z positions for 5 planes"):
        run("--stack", stack, "--z-csv", short, *OPTICS)
    for wrong in ("0\n1\nnan\n3\n4\n", "0\n1\n1e999\n3\n4\n", "0\n1\n1\n3\n4\n"):
        short.write_text(wrong, encoding="utf-8")
        with pytest.raises(InputError, match=r"z\.csv' must list another z for every"):
            run("--stack", stack, "--z-csv", short, *OPTICS)
    # A spreadsheet begins a file with a mark.
    short.write_text("4\n3\n2\n1\n0\n", encoding="utf-8-sig")
    with pytest.raises(InputError, match="no structure"):
        run("--stack", stack, "--z-csv", short, *OPTICS)
    with pytest.raises(InputError, match="no bright bead"):
        run("--beads", stack, "--step-um", "1", *OPTICS)


def test_a_stack_that_tells_no_optics_is_refused(tmp_path: Path) -> None:
    stack = tmp_path / "stack.ome.tif"
    noise = np.random.default_rng(4).poisson(100, (7, 64, 64)).astype("f4")
    arguments = ("--stack", stack, "--step-um", "1", "--fixed-na", *OPTICS)
    tifffile.imwrite(stack, noise, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=r"no optics predict more than \d\.\d % of"):
        run(*arguments)
    tifffile.imwrite(stack, np.stack([noise, noise]), metadata={"axes": "TZYX"})
    with pytest.raises(InputError, match="2 time points of 7 planes each"):
        run(*arguments)
    noise[3, 5, 5] = np.nan
    tifffile.imwrite(stack, noise, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=r"stack\.ome\.tif' has NaN or infinite pix"):
        run(*arguments)


def test_real_stack_and_bead(shared_data: Path, tmp_path: Path) -> None:
    """Figures measured once; here only that they are found again, NA kept."""
    bead = shared_data / "bead_lightsheet" / "psf_zyx.tif"
    run(
        *("--beads", bead, "--step-um", "0.1", "--na", "0.9", "--fixed-na"),
        *("--wavelength-nm", "520", "--pixel-size-um", "0.101"),
        *("--refractive-index", "1.33", "-o", tmp_path),
    )
    figures = json.loads((tmp_path / "fit.json").read_text(encoding="utf-8"))
    assert figures["explained"] > 0.95
    assert figures["best"]["focus_um"] == pytest.approx(2.75, abs=0.1)
