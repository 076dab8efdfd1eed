"""Config: defaults, overrides, and errors that help."""

import json
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from rtfocus.config import Config, load_config, parse_config
from rtfocus.config.loading import overridden, restoring_in, with_engine
from rtfocus.config.sections import RestorationConfig, types_within
from rtfocus.engines.registry import find_engine, why_unfit
from rtfocus.errors import ConfigError, EngineError, InputError, WriterError
from rtfocus.files import resource_folder
from rtfocus.frame import Position, SeriesStart
from rtfocus.images.reading import find_images
from rtfocus.writers.header import read_header

OPTICS = {"numerical_aperture": 0.5, "wavelength_nm": 451, "pixel_size_um": 0.65}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that says nothing."""
    return write(tmp_path_factory.mktemp("configs"), {})


def write(folder: Path, data: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"transprot": {}}, "unknown key 'transprot'; did you mean 'transport'"),
        ({"transport": {"slts": 3}}, "'transport.slts'; did you mean 'slots'"),
        (
            {"microscope": {"source": "virtual", "specimen": {"knd": "nuclei"}}},
            "'microscope.specimen.knd'; did you mean 'kind'",
        ),
        (
            {"microscope": {"source": "democamera", "photons": 3}},
            "'microscope.photons' is of another microscope.source than 'democamera'",
        ),
        (
            {"microscope": {"source": "democamera", "photos": 3}},
            "unknown key 'microscope.photos'; did you mean 'properties'",
        ),
        (
            {"channels": [{"name": "a", "optics": OPTICS | {"NA": 1}}]},
            r"unknown key 'channels\.0\.optics\.NA'; ",
        ),
        (
            {"restoration": "wiener"},
            r"mean 'channels\[\]\.restoration' or 'processing\.restoration'\?",
        ),
        ({"processing": {"codec": "zstd"}}, r"did you mean 'store\.codec'\?"),
        ({"transport": {"slots": 1}}, r"'transport\.slots': .*greater.*got 1"),
        (
            {"channels": [{"optics": OPTICS | {"numerical_aperture": 1.4}}]},
            r"refractive_index=1\.0; set the refractive index",
        ),
        ({"channels": [{"name": "a"}, {"name": "a"}]}, "listed twice"),
        ({"microscope": {"source": "virtual", "specimen": {"kind": "stack"}}}, "path"),
        ({"acquisition": {"mda": {}, "live": {}}}, "keep one"),
        ({"autofocus": {"low_um": 5, "high_um": -5}}, "low_um 5 is not below high_um"),
        ({"autofocus": {"low_um": 5, "high_um": 5}}, "high_um 5; swap them"),
        (
            {"processing": {"gpu": {"index": [1, 0, 1]}}},
            r"gpu\.index'.* twice in \[1, 0",
        ),
        ({"processing": {"gpu": {"index": []}}}, r"gpu\.index'.*at least 1"),
        ({"processing": {"gpu": {"index": -1}}}, r"gpu\.index\.0'.*got -1"),
        ([1, 2], "mapping of sections"),
    ],
)
def test_a_bad_config_names_key_rule_and_remedy(
    tmp_path: Path, data: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        load_config(write(tmp_path, data))
    assert "--set" not in str(told.value)


def test_a_missing_file_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml.*cannot be read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [", "utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    path = write(tmp_path, {"channels": [{"name": "a", "optics": OPTICS}]})
    config = load_config(
        path,
        [
            "transport.slots=7",
            "channels.0.optics.numerical_aperture=0.75",
            "store.raw=false",
            "processing.gpu.index=2",
        ],
    )
    assert config.processing.gpu.index == [2]
    assert config.transport.slots == 7
    assert config.channels[0].optics is not None
    assert config.channels[0].optics.numerical_aperture == 0.75
    assert config.store.raw is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("transport.slots", "section.key=value"),
        ("channels.3.name=x", "no index below 1"),
        ("run.name.x=1", "below a value|is a value"),
        ("foo=1", r"\.yaml with --set foo=1: unknown key 'foo'"),
        (
            "acquisition.mda=5",
            r"'acquisition\.mda': [^\[]*; 'acquisition\.mda': .* valid path \(got 5\)$",
        ),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, {"run": {"name": "a"}, "channels": [{"name": "a"}]})
    with pytest.raises(ConfigError, match=message):
        load_config(path, ["store.overwrite=true", override])


def test_input_paths_are_relative_to_the_file_and_run_folder_is_not(
    tmp_path: Path,
) -> None:
    path = write(
        tmp_path,
        {
            "run": {"folder": "out"},
            "microscope": {"source": "replay", "path": "stack.tif"},
            "camera": {"flat_field": "flat.tif"},
        },
    )
    config = load_config(path)
    assert config.run.folder == Path("out")
    assert config.microscope.source == "replay"
    assert config.microscope.path == (tmp_path / "stack.tif").resolve()
    assert config.camera.flat_field == (tmp_path / "flat.tif").resolve()
    # What is typed is meant from where one works, as every other path of a command.
    typed = load_config(path, ["microscope.path=other.tif"])
    assert typed.microscope.source == "replay"
    assert typed.microscope.path == Path("other.tif").resolve()
    assert typed.camera.flat_field == config.camera.flat_field


def test_a_path_from_where_one_works_is_answered_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "configs").mkdir()
    (flat := tmp_path / "flat.tif").touch()
    path = write(folder, {"camera": {"flat_field": "flat.tif"}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"camera\.flat_field: .*its folder"
    ) as caught:
        load_config(path)
    assert f"write '{flat}'" in str(caught.value)
    (folder / "flat.tif").touch()
    assert load_config(path).camera.flat_field == folder / "flat.tif"


def test_the_key_on_is_a_word_and_no_truth_value(tmp_path: Path) -> None:
    path = tmp_path / "alarm.yaml"
    path.write_text("alarm: {on: [disk, end], sound: on}", "utf-8")
    alarm = load_config(path).alarm
    assert (list(alarm.on), alarm.sound) == (["disk", "end"], True)


def test_channels_fall_back_to_default() -> None:
    config = Config.model_validate(
        {"channels": [{"name": "default", "optics": OPTICS}, {"name": "DAPI"}]}
    )
    assert config.channel("DAPI").optics is None
    assert config.channel("FITC").optics is not None
    assert config.channel("FITC").name == "FITC"
    for names, number, meant in (
        ([], 1, ["default"]),
        ([], 3, ["default", "DAPI", "default"]),
        (["FITC"], 2, ["FITC", "default"]),
        (["a", "b", "c"], 2, ["a", "b"]),
    ):
        assert [one.name for one in config.channels_of(names, number)] == meant


def test_the_optics_of_a_channel_are_named_or_refused_with_what_there_is() -> None:
    fallback = {"name": "default", "optics": OPTICS | {"wavelength_nm": 600}}
    dapi, bare = {"name": "DAPI", "optics": OPTICS}, {"name": "bare"}
    for channels, asked, found in (
        ([dapi], None, ("DAPI", 451)),
        ([dapi, fallback], None, ("default", 600)),
        ([dapi, fallback], "DAPI", ("DAPI", 451)),
        ([dapi, fallback], "FITC", ("FITC", 600)),
        ([dapi, bare], "DAPI", ("DAPI", 451)),
    ):
        name, optics = parse_config({"channels": channels}).optics_of(asked)
        assert (name, optics.wavelength_nm) == found
    for channels, asked, said in (
        ([dapi, bare], None, "which channel is meant.* DAPI, bare; choose one"),
        ([dapi, bare], "FITC", "no channel 'FITC': the config has DAPI, bare; give"),
        ([dapi, bare], "bare", "no optics for channel 'bare'"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config({"channels": channels}).optics_of(asked)


def test_a_seed_may_be_large_and_an_image_be_shown() -> None:
    shown = {"kind": "image", "path": "a.tif", "seed": 2**53}
    config = parse_config({"microscope": {"source": "virtual", "specimen": shown}})
    assert config.microscope.source == "virtual"
    assert config.microscope.specimen.seed == 2**53
    assert config.microscope.specimen.path == Path("a.tif")


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted(resource_folder("configs").glob("*.yaml"))
        if not path.stem.startswith("train_")
    ],
    ids=lambda p: p.stem,
)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load_config(path)
    engine = config.processing.classifier
    for channel in config.channels:
        if engine is not None and channel.optics is not None:
            assert why_unfit(find_engine(engine).card, channel.optics) is None


def test_a_config_survives_its_own_dump() -> None:
    config = Config.model_validate({"channels": [{"optics": OPTICS}]})
    dumped = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert Config.model_validate(dumped) == config


def leaves(section: BaseModel, *at: str) -> Iterator[tuple[str, st.SearchStrategy]]:
    """Yield the keys of a section that hold one plain value, and what they may hold."""
    for name, info in type(section).model_fields.items():
        value, kinds = getattr(section, name), types_within(info.annotation)
        words = [word for word in kinds if isinstance(word, str)]
        key = ".".join((*at, name))
        if isinstance(value, BaseModel):
            yield from leaves(value, *at, name)
        elif words:
            yield key, st.sampled_from(sorted(words))
        elif isinstance(value, bool):
            yield key, st.booleans()
        elif isinstance(value, int):
            yield key, st.integers(2, 20)
        elif float in kinds and (value is None or isinstance(value, float)):
            unset = st.none() if value is None else st.nothing()
            yield key, unset | st.floats(0.1, 1.0)


SET = st.lists(
    st.sampled_from(sorted(leaves(Config()), key=lambda leaf: leaf[0])).flatmap(
        lambda leaf: st.tuples(st.just(leaf[0]), leaf[1])
    ),
    max_size=6,
    unique_by=lambda one: one[0],
)


@settings(max_examples=25)
@given(SET)
def test_a_config_is_the_same_by_option_by_file_and_by_its_own_dump(empty, keys):
    options = [f"{key}={json.dumps(value)}" for key, value in keys]
    try:
        config = load_config(empty, options)
    except ConfigError:
        assume(False)  # two keys that exclude one another
    dumped = config.model_dump(mode="json")
    assert parse_config(yaml.safe_load(yaml.safe_dump(dumped))).model_dump() == (
        config.model_dump()
    )
    nested: dict[str, Any] = {}
    for key, value in keys:
        *parents, last = key.split(".")
        reduce(lambda node, name: node.setdefault(name, {}), parents, nested)[last] = (
            value
        )
    assert parse_config(nested).model_dump() == config.model_dump()


def test_optics_travel_on_the_wire_unchanged() -> None:
    channel = Config.model_validate({"channels": [{"optics": OPTICS}]}).channels[0]
    start = SeriesStart(
        version=1,
        series_uid="u",
        name="n",
        started_ns=0,
        shape=(4, 4),
        dtype="<u2",
        sizes={"t": None, "c": 1},
        channels=[channel.channel],
        positions=[Position("p0", x_um=1.5)],
        pixel_size_um=0.65,
    )
    packed = msgspec.msgpack.encode(start)
    assert msgspec.msgpack.decode(packed, type=SeriesStart) == start


@pytest.mark.parametrize(
    "name",
    ["con", "NUL", "com1.day", "ab.", "ab ", "a" * 201, "\u00fc" * 101, "../up", "a/b"],
)
def test_run_names_are_refused_that_some_system_does_not_take(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        parse_config({"run": {"name": name}})


def test_a_run_folder_is_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path("home").absolute()))
    folder = parse_config({"run": {"folder": "~/data"}}).run.folder
    assert folder == Path("home").absolute() / "data"
    for folder in ("$HOME/data", "${DATA}", "%USERPROFILE%/data"):
        with pytest.raises(ConfigError, match=r"run\.folder.* not filled in here"):
            parse_config({"run": {"folder": folder}})


@pytest.mark.parametrize("name", ["console", "a" * 200, "\u00fc\u03bc 1.2+3-4", "a.b"])
def test_run_names_are_taken_that_every_system_takes(name: str) -> None:
    assert parse_config({"run": {"name": name}}).run.name == name


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("processing", "threads", True, "a number is needed"),
        ("processing", "classifier", "", "leave the key out"),
        ("run", "folder", "", "leave the key out"),
        ("run", "folder", "a\0b", "such characters"),
        ("transport", "heartbeat_s", 1e7, r"no more than 1e\+06"),
        ("store", "min_free_mb", 1e308, r"no more than 1e\+12"),
        ("microscope", "height_px", 10**9, "16384"),
        ("microscope", "seed", -1, "greater than or equal to 0"),
        ("microscope", "source", "\x1b[31m" + "x" * 5000, "choose 'virtual'"),
    ],
)
def test_what_no_key_can_mean_is_refused_with_key_and_value(section, key, value, said):
    data = {section: {key: value}}
    if section == "microscope":
        data[section] = {"source": "virtual", **data[section]}
    with pytest.raises(ConfigError, match=said) as told:
        parse_config(data)
    assert section in str(told.value)
    assert key in str(told.value)
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 600


def test_names_too_long_for_a_path_are_not_found_like_others():
    name = "x" * 5000
    with pytest.raises(ConfigError, match="no shipped config"):
        load_config(name)
    with pytest.raises(EngineError, match="not found"):
        find_engine(name)
    with pytest.raises(WriterError, match="no run folder"):
        read_header(Path(name))
    with pytest.raises(InputError, match="does not exist"):
        find_images(Path(name))


def numbers(section: dict[str, Any], *at: str) -> Iterator[tuple[str, ...]]:
    """Yield the keys of a dumped config that hold a number."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from numbers(value, *at, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield *at, name


def test_no_number_of_any_section_is_a_truth_value_or_beyond_all_measure() -> None:
    keys = list(numbers(Config().model_dump()))
    assert ("microscope", "surface", "z_um") in keys
    for key in keys:
        bad = [True, "x", float("nan")]
        bad += [] if key[-1] == "seed" else [1.1e12, -1.1e12]
        bad += [1.1e6] if key[-1].endswith("_s") else []
        for value in bad:
            data = Config().model_dump()
            reduce(lambda node, name: node[name], key[:-1], data)[key[-1]] = value
            with pytest.raises(ConfigError, match=f"'{re.escape('.'.join(key))}[.']"):
                parse_config(data)


def test_what_is_chosen_for_all_channels_is_chosen_for_those_with_their_own() -> None:
    own = {"classifier": None, "restoration": {"method": "none", "halo_px": 7}}
    config = parse_config({"channels": [{"name": "a", **own}, {"name": "b"}]})
    turned = restoring_in(config, 4)
    for name in "ab":
        (classifier, before), after = config.engines_of(name), turned.engines_of(name)
        assert after == (classifier, before.model_copy(update={"orientations": 4}))
    with_one = with_engine(turned, "classifier", "mine")
    for name in "ab":
        assert with_one.engines_of(name) == ("mine", turned.engines_of(name)[1])
    plain = with_engine(turned, "restoration", {"method": "wiener"})
    for name in "ab":
        said = turned.engines_of(name)[0]
        assert plain.engines_of(name) == (said, RestorationConfig(method="wiener"))


def test_every_path_of_a_typed_list_begins_where_one_works(tmp_path: Path) -> None:
    path = write(tmp_path, {"processing": {"engine_folders": ["a"]}})
    assert load_config(path).processing.engine_folders == [tmp_path / "a"]
    typed = load_config(path, ["processing.engine_folders=[a, b]"])
    here = [Path("a").resolve(), Path("b").resolve()]
    assert typed.processing.engine_folders == here
    again = overridden(load_config(path), ["camera.flat_field=f.tif"])
    assert again.camera.flat_field == Path("f.tif").resolve()
    assert again.processing.engine_folders == [tmp_path / "a"]


def test_one_gpu_is_a_list_of_one_and_none_is_named_twice() -> None:
    for given_index, right in ((1, [1]), ("2", [2]), ([2, 0], [2, 0])):
        config = parse_config({"processing": {"gpu": {"index": given_index}}})
        assert config.processing.gpu.index == right
    for bad in ([1, 0, 1], [], -1):
        with pytest.raises(ConfigError, match=r"'processing\.gpu\.index"):
            parse_config({"processing": {"gpu": {"index": bad}}})
