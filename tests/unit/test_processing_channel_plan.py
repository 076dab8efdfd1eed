"""What happens to the frames of a channel is decided once, before any device."""

import numpy as np
import pytest
import yaml
from engine_kit import write_brightness_joint

from rtfocus.channel import Channel, OpticalSystem
from rtfocus.config import parse_config
from rtfocus.engines.registry import find_engine
from rtfocus.errors import ConfigError, EngineError
from rtfocus.frame import PROTOCOL_VERSION, Position, SeriesStart
from rtfocus.processing.channel_plan import (
    compare_pixel_size,
    find_classifier,
    plan_channel,
)

SHAPE = (200, 260)


def plan(method, classifier="delpnet", shape=SHAPE, optics=None, **settings):
    """Plan the channel of a config in the optics its classifier was trained for."""
    if optics is None:
        reference = find_engine(classifier).card.optics.reference
        optics = {
            "numerical_aperture": reference.numerical_aperture,
            "wavelength_nm": reference.wavelength_nm,
            "pixel_size_um": reference.pixel_size_um,
        }
    restoration = {"method": method, **settings}
    config = parse_config(
        {
            "processing": {"classifier": classifier, "restoration": restoration},
            "channels": [{"name": "DAPI", "optics": optics or None}],
        }
    )
    series = SeriesStart(
        version=PROTOCOL_VERSION,
        series_uid="series",
        name="plan",
        started_ns=0,
        shape=shape,
        dtype="<u2",
        sizes={"t": None},
        channels=[Channel("DAPI")],
        positions=[Position("p")],
        pixel_size_um=optics["pixel_size_um"] if optics else 1.0,
    )
    return plan_channel(config, series, series.channels[0])


@pytest.mark.parametrize(
    ("method", "classifier", "way"),
    [
        ("wiener", "delpnet", "by_level"),
        ("richardson_lucy", "delpnet", "by_level"),
        ("richardson_lucy_tiles", "delpnet", "by_patch"),
        ("richardson_lucy_blind", "delpnet", "blind"),
        ("wei_unet", "delpnet", "by_tile"),
        ("rtfocus-1", "rtfocus-1", "same_pass"),
        ("rtfocus-1", "delpnet", "own_pass"),
        ("learned_wiener", "delpnet", "learned_wiener"),
    ],
)
def test_a_restoration_goes_the_way_of_its_kind(method, classifier, way):
    found = plan(method, classifier)
    assert found.restoration.way == way
    assert found.skipped is None
    assert found.classifier.restores == (way == "same_pass")
    assert (found.restoration.own_pass is not None) == (way == "own_pass")
    assert found.engines["classifier"].startswith(f"{classifier}@")
    name = f"{method}@builtin" if found.restoration.found is None else f"{method}@"
    assert found.engines["restorer"].startswith(name)


def test_frames_too_small_to_tell_their_defocus_are_refused_before_a_run():
    with pytest.raises(ConfigError, match=r"\(15, 260\) is too small .*or set"):
        plan("wiener", shape=(15, 260))
    assert plan("wiener", shape=(16, 16)).classifier is not None
    # Recorded only, or restored without a look at defocus.
    assert plan("none", shape=(15, 260), optics={}).classifier is None


def test_colours_go_through_a_joint_network_one_by_one():
    assert plan("rtfocus-1", "rtfocus-1").classifier.images == 1
    colour = plan("rtfocus-1", "rtfocus-1", shape=(*SHAPE, 3))
    one_channel = colour.classifier.card.input.channels == 1
    assert colour.classifier.images == (4 if one_channel else 1)


def test_every_level_but_focus_has_a_psf_and_a_given_side():
    found = plan("wiener")
    levels = found.classifier.card.levels
    assert set(found.psfs) == set(range(1, levels.count))
    assert all(psf.sum() == pytest.approx(1, abs=1e-4) for psf in found.psfs.values())
    assert {psf.shape for psf in found.psfs_of_size(31).values()} == {(31, 31)}
    areas = [np.square(psf).sum() for psf in found.psfs.values()]
    assert areas[0] > areas[-1]


def test_without_optics_or_restoration_the_reason_is_kept():
    blind = plan("wiener", optics={})
    assert blind.classifier is None
    assert blind.skipped == "channel 'DAPI' has no optics in the config"
    assert blind.engines == {}
    seen = plan("none")
    assert seen.classifier is not None
    assert seen.skipped == "restoration.method is none"
    assert set(seen.engines) == {"classifier"}


@pytest.mark.parametrize(
    ("method", "classifier", "message"),
    [
        ("delpnet", "delpnet", "'delpnet' is a classifier .* does not restore"),
        ("nosuch", "delpnet", "'nosuch' not found"),
        ("wiener", "wei_unet", "'wei_unet' restores .* or joint engine: .*delpnet"),
    ],
)
def test_what_cannot_be_is_refused_before_any_device(method, classifier, message):
    with pytest.raises(EngineError, match=message):
        plan(method, classifier)


@pytest.mark.parametrize("method", ["wiener", "richardson_lucy_tiles", "rtfocus-1"])
def test_restoration_by_a_classifier_that_knows_focus_alone_is_refused(
    tmp_path, method
):
    folder = write_brightness_joint(tmp_path / "focus_or_not")
    card = yaml.safe_load((folder / "engine.yaml").read_text("utf-8"))
    card["levels"] = {"step_um": 2.0, "count": 1}
    card["output"]["labels"] = [0, "bg"]
    (folder / "engine.yaml").write_text(yaml.safe_dump(card), encoding="utf-8")
    with pytest.raises(EngineError, match=r"'focus_or_not' has no level .* none, or"):
        plan(method, str(folder))
    assert plan("none", str(folder)).classifier is not None


def test_a_method_that_restores_is_no_classifier():
    with pytest.raises(EngineError, match=r"'wiener' restores .*: delpnet, rtfocus-1"):
        find_classifier("wiener")


@pytest.mark.parametrize(
    ("ratio", "warns"), [(1.019, False), (1.021, True), (0.979, True)]
)
def test_another_pixel_size_than_the_optics_is_warned_of(ratio, warns, caplog):
    optics = OpticalSystem(0.5, 451.0, 0.65)
    compare_pixel_size("DAPI", optics, 0.65 * ratio)
    assert bool(caplog.records) == warns


def test_levels_with_a_sign_have_a_psf_on_either_side():
    found = plan("wiener", "rtfocus-1")
    levels = found.classifier.card.levels
    assert levels.signed
    sides = set(range(1, levels.count))
    assert set(found.psfs_of_size(9)) == sides | {-level for level in sides}
