"""Optics of images: who states them, what completes them, what is refused."""

from dataclasses import asdict, astuple, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rtfocus.channel import Aberrations, OpticalSystem
from rtfocus.config import Config, parse_config
from rtfocus.errors import ConfigError, InputError
from rtfocus.image_set import BLIND_ENGINE, ImageSet, restoring_with
from rtfocus.images.optics import (
    StatedOptics,
    find_optics,
    in_short,
    read_optics,
    stated_optics,
)
from rtfocus.images.series import ImageChannel, ImageSeries

MINE = OpticalSystem(0.75, 520, 0.325)


def image(**facts: object) -> ImageSeries:
    plain = ImageSeries(
        "a",
        Path("a.tif"),
        {"t": 1, "c": 1, "z": 1},
        (64, 64),
        np.dtype("<u2"),
        lambda _t, _c, _z: np.zeros((64, 64), np.uint16),
    )
    return replace(plain, **facts)  # type: ignore[arg-type]


def pixels(size_um: float, **facts: object) -> ImageSeries:
    return image(pixel_size_y_um=size_um, pixel_size_x_um=size_um, **facts)


def stated(text: str) -> StatedOptics:
    return StatedOptics(stated_optics(text), text)


@given(
    st.floats(0.05, 0.99),
    st.floats(200, 2000),
    st.floats(0.01, 20),
    st.floats(1, 2),
    st.sampled_from(["pupil", "born_wolf"]),
    st.tuples(*[st.floats(-5, 5)] * 5),
    st.tuples(st.floats(0, 9), st.floats(-9, 9)),
)
def test_what_is_said_in_short_is_read_again(
    aperture, nm, um, index, model, waves, others
):
    waved = Aberrations(*waves)
    optics = OpticalSystem(aperture, nm, um, index, model, waved, *others)
    read = read_optics(in_short(optics))
    assert (read.apodisation, read.defocus_offset_um) == pytest.approx(others, rel=1e-5)
    assert in_short(read) == in_short(optics)
    assert read.psf_model == model
    numbers = (read.numerical_aperture, read.wavelength_nm, read.pixel_size_um)
    assert numbers == pytest.approx((aperture, nm, um), rel=1e-5)
    assert astuple(read.aberrations) == pytest.approx(waves, rel=1e-5)
    assert read.refractive_index == pytest.approx(index, rel=1e-5)


EXACT = st.builds(
    OpticalSystem,
    st.floats(0.05, 0.99),
    st.floats(200, 2000),
    st.floats(0.01, 20),
    st.floats(1, 2),
    st.sampled_from(["pupil", "born_wolf"]),
    st.builds(Aberrations, *[st.floats(-5, 5)] * 5),
    st.floats(0, 9),
    st.floats(-9, 9),
)


@settings(max_examples=20)
@given(EXACT, st.sampled_from(["alone", "optics", "channels"]))
def test_optics_of_a_file_are_read_to_the_last_digit(tmp_path_factory, optics, form):
    content: dict[str, object] = asdict(optics)
    if form != "alone":
        content = {"optics": content, "fit": {"wavelength_nm": 1}}
    if form == "channels":
        content = {"channels": [content, {"optics": {}}]}
    path = tmp_path_factory.mktemp("optics") / "o.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    assert read_optics(str(path)) == optics


@settings(max_examples=20)
@given(EXACT, st.randoms(use_true_random=False))
def test_values_are_told_in_any_order_and_each_once(optics, random):
    parts = in_short(optics).split(",")
    again = random.sample(parts, len(parts))
    assert read_optics(" , ".join(again)) == read_optics(",".join(parts))
    name = random.choice(parts).partition("=")[0]
    with pytest.raises(ConfigError, match=f"'{name}' is there twice"):
        read_optics(f"{','.join(again)},{name}=1")
    with pytest.raises(ConfigError, match="'NA2' is unknown; known are NA, wave"):
        read_optics(f"NA2=1,{','.join(again)}")


STATED = {"NA": 0.5, "wavelength": 610, "pixel": 0.33, "n": 1.4}


@settings(max_examples=50)
@given(st.sets(st.sampled_from(sorted(STATED))), st.sets(st.integers(0, 3)))
def test_what_is_stated_comes_first_and_the_file_completes_it(keys, known):
    """Each value is the user's, else the file's, else unknown or air."""
    waves = (ImageChannel(emission_nm=450), ImageChannel(emission_nm=520))
    facts = {"numerical_aperture": 0.75, "channels": waves, "refractive_index": 1.33}
    # As of two programs that round: no contradiction, and told apart.
    facts |= {"pixel_size_x_um": 0.331}
    of_file = dict(zip(STATED, (0.75, 520, 0.331, 1.33), strict=True))
    names = ("numerical_aperture", "channels", "pixel_size_x_um", "refractive_index")
    one = image(**{names[number]: facts[names[number]] for number in known})
    said = ",".join(f"{key}={STATED[key]}" for key in sorted(keys))
    found = find_optics(one, 1, stated=stated(said) if keys else None)
    right = {
        key: STATED[key] if key in keys else of_file[key]
        for number, key in enumerate(STATED)
        if key in keys or number in known
    }
    if not {"NA", "wavelength", "pixel"} <= right.keys():
        assert found.system is None
        return
    assert found.system is not None
    seen = found.system
    told = (seen.numerical_aperture, seen.wavelength_nm, seen.pixel_size_um)
    assert (*told, seen.refractive_index) == (
        *(right[key] for key in ("NA", "wavelength", "pixel")),
        right.get("n", 1),
    )


def test_a_channel_that_a_file_does_not_describe_has_no_wavelength_of_another():
    green = (ImageChannel(emission_nm=520),)
    whole = pixels(0.325, numerical_aperture=0.75, channels=green)
    assert find_optics(whole, 1).source == "no emission wavelength"


def test_the_option_is_completed_by_the_file():
    said = stated("NA=0.75,wavelength=520")
    found = find_optics(pixels(0.325), 0, stated=said)
    assert found.system == MINE
    assert found.source == "--optics, pixel size from the file"
    missing = find_optics(image(), 0, stated=said).source
    assert missing == "no pixel size; complete --optics by pixel="


def test_a_file_that_states_all_needs_nobody():
    green = (ImageChannel(emission_nm=520),)
    whole = pixels(0.325, numerical_aperture=0.75, channels=green)
    assert find_optics(whole, 0).system == MINE
    assert find_optics(whole, 0).source == "the file"


def test_the_config_comes_before_the_file_and_the_option_before_the_config():
    other = OpticalSystem(0.3, 600, 0.325)
    assert find_optics(pixels(0.325), 0, configured=other).system == other
    said = stated(in_short(MINE))
    assert find_optics(image(), 0, configured=other, stated=said).system == MINE


def test_rounding_is_no_contradiction_and_more_is():
    find_optics(pixels(0.3251), 0, configured=MINE)
    with pytest.raises(ConfigError, match=r"0\.1 um, the config's optics say 0\.325"):
        find_optics(pixels(0.1), 0, configured=MINE)
    with pytest.raises(ConfigError, match=r"0\.1 um, --optics say 0\.325"):
        find_optics(pixels(0.1), 0, stated=stated(in_short(MINE)))
    for side in ("x", "y"):  # pixels of which one side is stated are square
        one = image(**{f"pixel_size_{side}_um": 0.1})
        with pytest.raises(ConfigError, match=r"0\.1 um, the config's optics say"):
            find_optics(one, 0, configured=MINE)
    uneven = image(pixel_size_y_um=0.3, pixel_size_x_um=0.6)
    with pytest.raises(InputError, match="square"):
        find_optics(uneven, 0, configured=MINE)


def test_methods_that_compute_psfs_are_refused_without_optics():
    for method in ("wiener", "richardson_lucy", "learned_wiener"):
        with pytest.raises(ConfigError, match=r"give --optics .*--engine rtfocus-2"):
            ImageSet(restoring_with(Config(), method), [image()])
    with pytest.raises(ConfigError, match="no emission wavelength"):
        ImageSet(restoring_with(Config(), "wiener"), [pixels(0.65)])


def test_without_a_choice_unknown_optics_are_restored_blind_and_told():
    images = ImageSet(Config(), [image()], free_choice=True)
    (said,) = images.assumptions()
    assert f"engine '{BLIND_ENGINE}' runs blind, as if NA=0.36" in said
    in_part = {"stated": stated("NA=0.5,wavelength=461"), "free_choice": True}
    (told,) = ImageSet(Config(), [image()], **in_part).assumptions()
    assert "(no pixel size; complete --optics by pixel=)" in told
    made = images.made(0)
    assert made["engine"].startswith(f"{BLIND_ENGINE}@")
    assert "blind" in made["optics from"]
    known = ImageSet(
        Config(), [image()], stated=stated("NA=0.36,wavelength=451,pixel=0.65")
    )
    assert known.made(0)["engine"] == "wiener"
    assert known.made(0)["optics from"] == "--optics"


def test_a_blind_engine_is_refused_for_pixels_it_was_not_made_for():
    ImageSet(Config(), [pixels(0.65)], free_choice=True)
    with pytest.raises(ConfigError, match=r"pixels of 0\.1 um .*--optics NA="):
        ImageSet(Config(), [pixels(0.1)], free_choice=True)


def test_channels_find_their_optics_by_name_else_in_order():
    optics = {"numerical_aperture": 0.36, "pixel_size_um": 0.65}
    config = parse_config(
        {
            "channels": [
                {"name": "DAPI", "optics": {**optics, "wavelength_nm": 451}},
                {"name": "Cy5", "optics": {**optics, "wavelength_nm": 500}},
            ]
        }
    )
    two = {"t": 1, "c": 2, "z": 1}
    turned = (ImageChannel(name="Cy5"), ImageChannel(name="DAPI"))
    images = ImageSet(config, [image(sizes=two, channels=turned), image(sizes=two)])
    waves = [
        [found.system.wavelength_nm for c in range(2) if (found := images.optics(n, c))]
        for n in range(2)
    ]
    assert waves == [[500, 451], [451, 500]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NA=0.75;wavelength=520", "'numerical_aperture'.*valid number"),
        ("pixel=0", "'pixel_size_um'"),
        ("wavelength=x", "'wavelength_nm'"),
        ("n=1,NA=1.4", "1.4': numerical_aperture=1.4 is not below"),
    ],
)
def test_a_part_that_a_user_states_is_checked_though_others_lack(text, said):
    with pytest.raises(ConfigError, match=said):
        stated_optics(text)
    assert stated_optics("NA=1.4") == {"numerical_aperture": "1.4"}
