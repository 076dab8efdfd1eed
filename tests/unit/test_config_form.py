"""Files as editors of all systems save them: read right, or refused in one line."""

import pytest

from rtfocus.config import load_config
from rtfocus.config.loading import decode, parse_yaml
from rtfocus.errors import ConfigError
from rtfocus.microscope.sequence import read_sequence

MICRO = "# pixel size in \u00b5m\nrun: {name: \u00fcber}\n"


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"],
)
def test_every_unicode_file_with_a_mark_is_read(encoding, tmp_path):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    data = (mark + MICRO.replace("\n", "\r\n")).encode(encoding)
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    assert load_config(path).run.name == "\u00fcber"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (MICRO.encode("cp1252"), "byte 0xb5 in line 1"),
        (("run: {}\n" + MICRO).encode("cp1252"), "byte 0xb5 in line 2"),
        (MICRO.encode("cp1252"), "save the file as UTF-8"),
        (bytes(range(256)), "binary"),
        (b"run: {}\n\0", "binary"),
        (MICRO.encode("utf-16-le"), "binary"),
        (b"run:\n\tname: a\n", "line 2, column 1: indent with spaces, here is a tab"),
        (b"run: [", "line 1"),
        (b"run: {name: a}\nrun: {name: b}\n", "line 2, column 1: 'run' is given twice"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
    ],
)
def test_anything_else_is_refused_in_one_line(data, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    for read in (load_config, read_sequence):
        with pytest.raises(ConfigError) as refused:
            read(path)
        assert said in str(refused.value)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_merged_keys_are_no_doubles():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n"
    assert parse_yaml(text)["b"] == {"x": 3, "y": 2}


def test_a_tab_within_a_value_is_none_of_our_business():
    assert parse_yaml(decode(b'a: "x\ty"')) == {"a": "x\ty"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("store.codec=[", "not valid YAML"),
        ("store.codec={a: 1, a: 2}", "twice"),
        ("=3", "empty part"),
        ("a..b=1", "empty part"),
        ("channels.5.name=x", "no index"),
        ("store", "not of the form"),
    ],
)
def test_overrides_are_refused_in_one_line(override, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("channels: [{name: default}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(path, [override])
    assert "\n" not in str(refused.value)
    assert f"--set '{override}'" in str(refused.value)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_optics_are_finite(value, tmp_path):
    path = tmp_path / "c.yaml"
    optics = f"{{numerical_aperture: 0.5, wavelength_nm: {value}, pixel_size_um: 1}}"
    path.write_text(f"channels: [{{optics: {optics}}}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="wavelength_nm"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: !!bool maybe", "line 1, column 7: 'maybe' is no bool"),
        ("a: 1\nname: 2020-99-99", "line 2, column 7: '2020-99-99' is no timestamp"),
        (
            "name: !!timestamp now",
            "'now' is no timestamp; if a text is meant, quote",
        ),
        ("name: !!int x", "'x' is no int"),
        ("name: !!float x", "'x' is no float"),
        ("seed: " + "9" * 5000, r"'9{40,}\.\.\. is no int"),
    ],
)
def test_a_value_that_yaml_cannot_make_is_told_with_its_place(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=f"is not valid YAML: .*{said}"):
        load_config(path)


def test_a_file_that_is_no_config_for_its_length_is_refused_unread(tmp_path):
    path = tmp_path / "stack.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(
        ConfigError, match="is 100 MB long, 64 MB at most; give another"
    ):
        load_config(path)
