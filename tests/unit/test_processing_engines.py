"""Cards, registry and fit: every fault names the value, the rule and the remedy."""

import shutil

import pytest
import yaml
from engine_kit import write_brightness_joint, write_shift_restorer

from rtfocus.channel import OpticalSystem
from rtfocus.engines.card import identity, read_card, verified_file
from rtfocus.engines.registry import (
    check_fit,
    find_engine,
    list_engines,
    step_um,
)
from rtfocus.errors import EngineError
from rtfocus.processing.classify import normalisation_of

REFERENCE = OpticalSystem(0.5, 451.0, 0.65)


@pytest.fixture
def folder(engine_folder, tmp_path):
    """A copy of the engine that a test may spoil."""
    return shutil.copytree(engine_folder / "sharpness", tmp_path / "sharpness")


def change(folder, **sections):
    path = folder / "engine.yaml"
    card = yaml.safe_load(path.read_text("utf-8"))
    for name, value in sections.items():
        if value is None:
            del card[name]
        else:
            card[name] = value
    path.write_text(yaml.safe_dump(card), "utf-8")


def test_card_is_read_whole(folder):
    card = read_card(folder)
    assert card.output.labels == [*range(11), "bg"]
    assert card.optics.reference == REFERENCE
    assert identity(card) == f"sharpness@{card.sha256['fp32'][:12]}"
    assert verified_file(folder, card).name == "model.fp32.onnx"


@pytest.mark.parametrize("name", [[], {"a": 1}, 5, "sharpest"])
def test_a_normalisation_that_is_none_is_named(folder, name):
    change(folder, normalisation={"name": name})
    with pytest.raises(EngineError, match=r"normalisation\.name is .*known are"):
        normalisation_of(read_card(folder))


@pytest.mark.parametrize(
    ("normalisation", "said"),
    [
        ({"name": "percentile_range", "low_percent": 99, "high_percent": 1}, "low < h"),
        ({"name": "percentile_range", "high_percent": 998}, "low < high <= 100"),
        ({"name": "percentile_range", "low_percent": "few"}, "not supported between"),
    ],
)
def test_a_normalisation_that_cannot_be_is_told(folder, normalisation, said):
    change(folder, normalisation=normalisation)
    with pytest.raises(EngineError, match=f"normalisation 'percentile_range'.*{said}"):
        normalisation_of(read_card(folder))


def test_frames_that_are_no_whole_cells_are_told_before_the_first(folder):
    card = read_card(folder)
    tiles = card.input.model_copy(update={"multiple_px": 16})
    with pytest.raises(EngineError, match=r"multiple_px is 16, but .* cells of 12 px"):
        normalisation_of(card.model_copy(update={"input": tiles}))


def test_changed_weights_are_refused(folder):
    with (folder / "model.fp32.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(EngineError, match=r"model\.fp32\.onnx' have sha256.*copy both"):
        verified_file(folder, read_card(folder))


def test_missing_weights_name_the_file_and_the_command(folder):
    (folder / "model.fp32.onnx").unlink()
    with pytest.raises(EngineError, match=r"lacks its weights.*rtfocus export"):
        verified_file(folder, read_card(folder))


def test_weights_of_a_precision_the_card_does_not_list_are_refused(folder):
    with pytest.raises(EngineError, match="has no int8 weights; it has fp32: choose"):
        verified_file(folder, read_card(folder), "int8")


@pytest.mark.parametrize(
    ("number", "rule"),
    [
        (float("inf"), r"no more than 1e\+12 can be \(got inf\)"),
        (float("nan"), r"Input should be .* \(got nan\)"),
        (True, r"a number is needed; YAML reads yes.* \(got True\)"),
    ],
)
def test_a_number_that_is_none_is_refused(folder, number, rule):
    optics = yaml.safe_load((folder / "engine.yaml").read_text("utf-8"))["optics"]
    change(folder, optics=optics | {"sampling_max": number})
    with pytest.raises(EngineError, match=f"'optics.sampling_max': {rule}"):
        read_card(folder)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"colour": "blue"}, "'colour': Extra inputs"),
        ({"kind": "oracle"}, "'kind': Input should be 'classifier'"),
        ({"levels": None}, "a classifier needs the sections levels"),
        ({"files": {}}, "needs files.fp32"),
        ({"implementation": "abacus"}, "'implementation'"),
        ({"second_look": True}, "a classifier cannot have the sections second_look"),
    ],
)
def test_faulty_cards_name_the_key_and_the_rule(folder, sections, message):
    change(folder, **sections)
    with pytest.raises(EngineError, match=r"engine\.yaml'") as caught:
        read_card(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"kind": "joint"}, "a joint needs the sections restored"),
        ({"restored": {"name": "r"}}, "a restorer cannot have the sections restored"),
        ({"sha256": {}}, "sha256 lacks the files fp32"),
        ({"output": {"name": "r", "labels": [0, 1]}}, "output has no labels"),
        ({"kernel_output": {"name": "k", "size_px": 4}}, "size_px=4 is even"),
        ({"condition": {"name": "c", "entries": ["colour"]}}, "condition.entries.0"),
        (
            {"condition": {"name": "c", "entries": ["level", "level"]}},
            "name one twice",
        ),
        (
            {"input": {"name": "t", "tile_px": 64, "halo_px": 32}},
            "halo_px=32 on both sides leaves nothing",
        ),
        (
            {"input": {"name": "t", "tile_px": 64, "multiple_px": 10}},
            "tile_px=64 is no multiple",
        ),
        (
            {"input": {"name": "t", "tile_px": 64, "stride_px": 32}},
            "a restorer has no input.stride_px",
        ),
    ],
)
def test_faulty_restorer_cards_name_the_key_and_the_rule(tmp_path, sections, message):
    folder = write_shift_restorer(tmp_path / "shift")
    assert read_card(folder).kernel_output.size_px == 5
    change(folder, **sections)
    with pytest.raises(EngineError, match=r"engine\.yaml'") as caught:
        read_card(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 11, "bg"], "[11] are no levels from -10 to 10"),
        ([0, 0, "bg"], "name a level twice"),
        ([0, "blur"], "['blur'] are no levels"),
        ([], "are fewer than two"),
    ],
)
def test_labels_must_be_levels_of_the_scale(tmp_path, labels, message):
    folder = write_brightness_joint(tmp_path / "brightness")
    assert len(read_card(folder).output.labels) == 22
    change(folder, output={"name": "logits", "labels": labels})
    with pytest.raises(EngineError) as caught:
        read_card(folder)
    assert message in str(caught.value)


def test_only_an_engine_that_can_be_told_its_defocus_looks_twice(tmp_path):
    folder = write_brightness_joint(tmp_path / "brightness", second_look=True)
    assert read_card(folder).second_look
    change(folder, condition={"name": "condition", "entries": ["defocus_levels"]})
    with pytest.raises(EngineError, match="second_look is for engines told defocus_"):
        read_card(folder)


def test_patches_begin_at_the_corner_unless_the_card_says_otherwise(tmp_path):
    card = read_card(write_brightness_joint(tmp_path / "brightness"))
    assert card.input.origin_px == 47.5


def test_card_that_is_no_yaml_names_the_file(folder):
    (folder / "engine.yaml").write_text("a: [", "utf-8")
    with pytest.raises(EngineError, match=r"engine\.yaml' is not valid YAML"):
        read_card(folder)


def test_engine_is_found_by_name_and_by_path(folder):
    assert find_engine("sharpness", [folder.parent]).folder == folder
    assert find_engine(str(folder)).folder == folder
    listed = {engine.name: engine for engine in list_engines([folder.parent])}
    assert listed["sharpness"].card.kind == "classifier"
    assert listed["sharpness"].card.implementation == "onnx"


def test_missing_engine_names_the_places_and_the_command(folder):
    with pytest.raises(EngineError, match="rtfocus train") as caught:
        find_engine("delphinet", [folder.parent])
    assert str(folder.parent / "delphinet") in str(caught.value)
    assert "sharpness" in str(caught.value)


def test_first_folder_wins_over_later_ones(folder, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(folder, second / "sharpness")
    found = find_engine("sharpness", [second, folder.parent])
    assert found.folder == second / "sharpness"


def test_optics_outside_the_trained_range_are_refused(folder):
    card = read_card(folder)
    check_fit(card, REFERENCE, ignore=False)
    coarse = OpticalSystem(0.5, 451.0, 6.5)
    with pytest.raises(EngineError, match=r"are 7\.21.*processing\.ignore_optics"):
        check_fit(card, coarse, ignore=False)
    check_fit(card, coarse, ignore=True)


def test_levels_keep_their_defocus_in_units_of_the_optics(folder):
    card = read_card(folder)
    assert step_um(card, REFERENCE) == pytest.approx(2.0)
    oil = OpticalSystem(1.4, 520.0, 0.1, refractive_index=1.518)
    ours = step_um(card, oil) * 1.4**2 / (1.518 * 0.520)
    assert ours == pytest.approx(2.0 * 0.5**2 / 0.451)
