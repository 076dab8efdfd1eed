"""Cards, registry and fit: every fault names the value, the rule and the remedy."""

import shutil

import pytest
import yaml

from rtfocus.channel import OpticalSystem
from rtfocus.errors import EngineError
from rtfocus.processing.engines.card import identity, read_card, verified_file
from rtfocus.processing.engines.fit import check_fit, step_um
from rtfocus.processing.engines.registry import find_engine, list_engines

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


def test_changed_weights_are_refused(folder):
    with (folder / "model.fp32.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(EngineError, match=r"model\.fp32\.onnx' have sha256.*export"):
        verified_file(folder, read_card(folder))


def test_missing_weights_name_the_file_and_the_command(folder):
    (folder / "model.fp32.onnx").unlink()
    with pytest.raises(EngineError, match=r"lacks its weights.*rtfocus export"):
        verified_file(folder, read_card(folder))


def test_weights_of_a_precision_the_card_does_not_list_are_refused(folder):
    with pytest.raises(EngineError, match="has no int8 weights"):
        verified_file(folder, read_card(folder), "int8")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"colour": "blue"}, "'colour': Extra inputs"),
        ({"kind": "oracle"}, "'kind': Input should be 'classifier'"),
        ({"levels": None}, "a classifier needs the sections levels"),
        ({"files": {}}, "needs files.fp32"),
        ({"implementation": "abacus"}, "'implementation'"),
    ],
)
def test_faulty_cards_name_the_key_and_the_rule(folder, sections, message):
    change(folder, **sections)
    with pytest.raises(EngineError, match=r"engine\.yaml'") as caught:
        read_card(folder)
    assert message in str(caught.value)


def test_card_that_is_no_yaml_names_the_file(folder):
    (folder / "engine.yaml").write_text("a: [", "utf-8")
    with pytest.raises(EngineError, match=r"engine\.yaml' is not valid YAML"):
        read_card(folder)


def test_engine_is_found_by_name_and_by_path(folder):
    assert find_engine("sharpness", [folder.parent]).folder == folder
    assert find_engine(str(folder)).folder == folder
    listed = {engine.name: engine for engine in list_engines([folder.parent])}
    assert listed["sharpness"].kind == "classifier"
    assert listed["sharpness"].implementation == "onnx"


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
