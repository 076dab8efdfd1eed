"""Engines from anywhere: packages back in, foreign models, and doors that stay shut."""

import hashlib
import shutil
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from engine_kit import write_shift_restorer, write_smooth_restorer
from foreign_kit import zipped
from loop_kit import command, succeeded

from rtfocus.engines.registry import (
    find_engine,
    list_engines,
    remove_engine,
)
from rtfocus.errors import EngineError, OutputError
from rtfocus.sharing import package as packages
from rtfocus.sharing.admission import add_model, read_network, with_weights_inside
from rtfocus.sharing.export import export_bioimageio

SAID = {
    "authors": ["Jane Doe"],
    "cite": "https://example.org/paper",
    "licence": "BSD-3-Clause",
}


CARD_OF_TUTORIAL = "name kind implementation files sha256 input output".split()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Folder of the user's engines."""
    folder = tmp_path / "mine"
    monkeypatch.setenv("RTFOCUS_ENGINES", str(folder))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Files of a package that rtfocus exported, by name."""
    folder = tmp_path_factory.mktemp("exported")
    found = find_engine(str(write_smooth_restorer(folder / "smooth")))
    target = export_bioimageio(found, folder / "smooth.zip", **SAID)
    with zipfile.ZipFile(target) as package:
        return {name: package.read(name) for name in package.namelist()}


LAUGHS = b"a0: &a0 [1]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)
"""A line more doubles what its last value stands for."""


def refused(path: Path | str, mine: Path, said: str) -> None:
    """The error is one line, and nothing is left of what was refused."""
    with pytest.raises(EngineError, match=said) as caught:
        add_model(path)
    assert "\n" not in str(caught.value)
    assert not mine.exists() or not list(mine.iterdir())


def rewritten(folder: Path, change) -> Path:
    """Return an engine's folder whose network was changed, its card's sum with it."""
    file, card = folder / "model.fp32.onnx", folder / "engine.yaml"
    network = onnx.load(file)
    change(network)
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    onnx.save(network, file)
    after = hashlib.sha256(file.read_bytes()).hexdigest()
    card.write_text(card.read_text("utf-8").replace(before, after), "utf-8")
    return folder


def name_the_output_otherwise(network: onnx.ModelProto) -> None:
    (node,) = (one for one in network.graph.node if "restored" in one.output)
    node.output[:] = ["sharp"]
    network.graph.output[0].name = "sharp"


def take_doubles(network: onnx.ModelProto) -> None:
    network.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (name_the_output_otherwise, r"gives \['sharp'\], its card says .*\['restored'"),
        (take_doubles, r"takes \['tiles DOUBLE'\].*its card says \['tiles FLOAT'\]"),
        (lambda network: network.ClearField("graph"), "holds no network"),
    ],
)
def test_a_network_that_its_card_does_not_describe_is_not_added(
    change, said, mine, tmp_path
):
    folder = write_smooth_restorer(tmp_path / "smooth")
    refused(rewritten(folder, change), mine, said)


def name_no_normalisation(card: dict[str, Any]) -> None:
    card["normalisation"]["name"] = "percentile"


def name_no_background(card: dict[str, Any]) -> None:
    card["background"] = {"name": "darkness"}


def list_a_label_less(card: dict[str, Any]) -> None:
    card["output"]["labels"].pop()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (name_no_normalisation, "'percentile', known are local_.*name one of those"),
        (name_no_background, "background.name is 'darkness', known are"),
        (
            list_a_label_less,
            r"has 12 labels, its card lists 11; correct output\.labels",
        ),
    ],
)
def test_a_card_that_no_frame_could_be_processed_by_is_not_added(
    change, said, mine, tmp_path
):
    folder = shutil.copytree(find_engine("delpnet").folder, tmp_path / "delpnet")
    card = yaml.safe_load((folder / "engine.yaml").read_text("utf-8"))
    change(card)
    (folder / "engine.yaml").write_text(yaml.safe_dump(card), "utf-8")
    refused(folder, mine, said)
    # A zip of it says the same.
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    refused(packed, mine, said)


@pytest.mark.parametrize("inside", ["", "smooth-model/"])
def test_what_was_exported_comes_back_as_it_was(inside, exported, mine, tmp_path):
    files = {inside + name: data for name, data in exported.items()}
    files["__MACOSX/._rdf.yaml"] = b"a Macintosh was here"
    found = add_model(zipped(tmp_path / "model.zip", files))
    assert found.folder == mine / "smooth"
    for name in ("engine.yaml", "model.fp32.onnx", "README.md"):
        assert (found.folder / name).read_bytes() == exported[name]
    assert len(list(found.folder.iterdir())) == 3
    assert find_engine("smooth") == found


def test_without_its_card_an_export_comes_back_by_its_description(
    exported, mine, tmp_path
):
    rdf = yaml.safe_load(exported["rdf.yaml"])
    rdf["attachments"] = []
    files = {**exported, "bioimageio.yaml": yaml.safe_dump(rdf).encode()}
    del files["engine.yaml"], files["rdf.yaml"]
    found = add_model(zipped(tmp_path / "model.zip", files), name="another")
    assert found.name == found.card.name == "another"
    assert found.card.input.tile_px == 64
    refusal = "there is an engine 'another'.*--name"
    with pytest.raises(EngineError, match=refusal):
        add_model(tmp_path / "model.zip", name="another")


def test_a_zipped_engine_folder_is_an_engine(mine, tmp_path):
    folder = write_shift_restorer(tmp_path / "shift")
    files = {f"shift/{p.name}": p.read_bytes() for p in folder.iterdir()}
    found = add_model(zipped(tmp_path / "shift.zip", files))
    assert found.card == find_engine(str(folder)).card


def test_an_engine_with_steps_claims_no_test_and_no_package(mine, tmp_path):
    # As the tutorial's: it was proved by nobody, and came from no model package.
    folder = write_smooth_restorer(tmp_path / "own")
    card = yaml.safe_load((folder / "engine.yaml").read_text("utf-8"))
    card = {key: card[key] for key in CARD_OF_TUTORIAL} | {"steps": {}}
    (folder / "engine.yaml").write_text(yaml.safe_dump(card), "utf-8")
    said = succeeded(command("engines", "add", folder))
    assert said.splitlines() == [f"added restorer 'own' in {mine / 'own'}"]
    refusal = "'own' has steps around its network, which are not exported; "
    with pytest.raises(EngineError, match=refusal):
        export_bioimageio(find_engine("own"), tmp_path / "own.zip", **SAID)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("model.fp32.onnx", b"other weights", r"has sha256 .* says .* get it again"),
        ("test_restored.npy", b"other numbers", r"test_restored\.npy.*sha256"),
        ("engine.yaml", None, r"lacks its file 'engine\.yaml'"),
        ("rdf.yaml", b"a: [", "is not valid YAML: line 1"),
        ("rdf.yaml", b"a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("rdf.yaml", b"a: &a [1]\n" + b"b: [*a]\n" * 99, "'b' is given twice"),
        ("rdf.yaml", b"- a", "it is no mapping"),
        ("rdf.yaml", LAUGHS, "more than 100000 values by its anchors"),
        ("rdf.yaml", b"a: &a [*a]", "more than 100000 values"),
        ("rdf.yaml", b"#" * (2 << 20), "more than the 1048576"),
        ("rdf.yaml", b"\xff\xfe\x00", "is no"),
        ("rdf.yaml", None, r"no bioimageio.yaml or rdf.yaml.*neither"),
        ("../outside", b"", "'../outside' leads out of the package"),
        ("a/../../outside", b"", "leads out"),
        ("/outside", b"", "leads out"),
        ("C:\\outside", b"", "leads out"),
    ],
)
def test_a_package_that_is_not_in_order_is_refused(
    name, data, said, exported, mine, tmp_path
):
    files = {**exported, name: data}
    if data is None:
        del files[name]
        if name == "rdf.yaml":
            del files["engine.yaml"]
    refused(zipped(tmp_path / "model.zip", files), mine, said)


def test_a_package_whose_two_cards_differ_is_refused(exported, mine, tmp_path):
    rdf = yaml.safe_load(exported["rdf.yaml"])
    rdf["config"]["rtfocus"]["input"]["halo_px"] = 4
    files = {**exported, "rdf.yaml": yaml.safe_dump(rdf).encode()}
    refused(zipped(tmp_path / "model.zip", files), mine, "says something else")
    rdf["config"]["rtfocus"] = ["restorer"]
    files = {**exported, "rdf.yaml": yaml.safe_dump(rdf).encode()}
    refused(zipped(tmp_path / "model.zip", files), mine, r"config\.rtfocus")


def _entry(name: str, mode: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


def test_links_bombs_and_names_given_twice_are_refused(exported, mine, tmp_path):
    path = zipped(tmp_path / "linked.zip", exported)
    with zipfile.ZipFile(path, "a") as package:
        package.writestr(_entry("notes", stat.S_IFLNK | 0o777), "/etc")
    refused(path, mine, "'notes' is a link")

    path = zipped(tmp_path / "twice.zip", exported)
    with (
        zipfile.ZipFile(path, "a") as package,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        package.writestr("model.fp32.onnx", b"the other one")
    refused(path, mine, r"holds 'model\.fp32\.onnx' 2 times")

    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("rdf.yaml", exported["rdf.yaml"])
        with package.open("model.fp32.onnx", "w") as grows:
            for _ in range(66):
                grows.write(bytes(1 << 20))
    refused(path, mine, "would grow from")

    many = {f"{n}.txt": b"" for n in range(1001)}
    refused(
        zipped(tmp_path / "many.zip", exported | many), mine, "more than 1000 files"
    )


def test_damaged_zips_are_refused_in_one_line(exported, mine, tmp_path):
    whole = zipped(tmp_path / "whole.zip", exported).read_bytes()
    path = tmp_path / "model.zip"
    path.write_bytes(b"no zip")
    refused(path, mine, "is no zip")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, mine, "is no zip, or a damaged one")
    weights = whole.index(b"model.fp32.onnx") + 40
    path.write_bytes(whole[:weights] + b"\xff" * 20 + whole[weights + 20 :])
    refused(path, mine, "damaged")
    encrypted = bytearray(whole)
    for mark, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = encrypted.find(mark)
        while place >= 0:
            encrypted[place + flags] |= 1
            place = encrypted.find(mark, place + 4)
    path.write_bytes(encrypted)
    refused(path, mine, "is encrypted")
    refused(tmp_path / "gone.zip", mine, "does not exist")
    for name, page in (
        ("10.5281/zenodo.5869899", r"https://doi.org/10.5281/zenodo.5869899"),
        ("doi:10.5281/zenodo.1", r"https://doi.org/10.5281/zenodo.1"),
        ("affable-shark", "https://bioimage.io/#/artifacts/affable-shark"),
    ):
        with pytest.raises(EngineError, match=f"open {page}, and give the address"):
            add_model(name)


def test_weights_in_other_files_are_found_however_deep_they_lie(exported):
    whole = exported["model.fp32.onnx"]
    asked = []

    def inside(weights):
        return with_weights_inside(weights, lambda path: asked.append(path) or b"", 99)

    assert inside(whole) is whole
    model = onnx.load_from_string(whole)
    weights = model.graph.initializer[0]
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../../secret")
    weights.external_data.add(key="length", value="1")
    with pytest.raises(EngineError, match=r"at bytes 0 to 1 of '../../secret'"):
        inside(model.SerializeToString())
    constant = onnx.helper.make_node("Constant", [], ["c"], value=weights)
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    del model.graph.initializer[0]
    model.graph.node.append(
        onnx.helper.make_node("If", ["b"], ["d"], then_branch=branch)
    )
    with pytest.raises(EngineError, match=r"at bytes 0 to 1 of '../../secret'"):
        inside(model.SerializeToString())
    assert asked == ["../../secret"] * 2
    with pytest.raises(EngineError, match="more weights in other files than"):
        with_weights_inside(model.SerializeToString(), lambda _: b"0", len(whole))
    for damaged in (b"", b"\x08", b"\xff" * 30, whole[:100]):
        with pytest.raises(EngineError, match="again"):
            read_network(damaged)


class Answers(BaseHTTPRequestHandler):
    """A server's answers by path; what is not there is not found."""

    package = b""

    def do_GET(self) -> None:
        answer = getattr(self, f"answer_{self.path.strip('/')}", None)
        if answer is None:
            self.send_error(404)
        else:
            answer()

    def answer_model(self) -> None:
        self._send(self.package, len(self.package))

    def answer_short(self) -> None:
        self._send(self.package[:-10], len(self.package))

    def answer_endless(self) -> None:
        self._send(self.package, 5 << 30)

    def answer_unstated(self) -> None:
        self._send(self.package, None)

    def answer_page(self) -> None:
        self._send(b"<html>", 6, kind="text/html; charset=utf-8")

    def answer_on(self) -> None:
        self._send(b"", 0, to="/model")

    def answer_out(self) -> None:
        self._send(b"", 0, to="http://192.0.2.1/model")

    def answer_local(self) -> None:
        self._send(b"", 0, to="file:///etc/hostname")

    def answer_round(self) -> None:
        self._send(b"", 0, to="/round")

    def answer_broken(self) -> None:
        self.wfile.write(b"this is no HTTP")

    def _send(
        self, body: bytes, length: int | None, *, kind: str = "zip", to: str = ""
    ) -> None:
        self.send_response(302 if to else 200)
        self.send_header("Content-Type", kind)
        if to:
            self.send_header("Location", to)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(exported, tmp_path, monkeypatch):
    """Address of a server that has the exported package."""
    monkeypatch.setenv("no_proxy", "*")
    package = zipped(tmp_path / "served.zip", exported).read_bytes()
    handler = type("Served", (Answers,), {"package": package})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("place", ["model", "on", "unstated"])
def test_an_engine_comes_from_an_address(place, server, mine, exported, tmp_path):
    said = []
    found = add_model(f"{server}/{place}", tell=said.append)
    assert found.folder == mine / "smooth"
    data = (tmp_path / "served.zip").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert said == [f"fetched {len(data)} bytes, sha256 {sha256}"]


def test_what_does_not_come_whole_is_not_added(server, mine, monkeypatch):
    for place, said in {
        "gone": "answers 404 Not Found",
        "short": r"it ended after \d+ of \d+ bytes",
        "endless": "has more than 4294967296 bytes",
        "page": "is a page for people",
        "out": "sends on to 'http://192.0.2.1/model', which is not https",
        "local": "'file:///etc/hostname' is not allowed",
        "round": "answers 302",
        "broken": "cannot be fetched",
    }.items():
        refused(f"{server}/{place}", mine, said)
    monkeypatch.setattr(packages, "FETCHED_BYTES", 100)
    refused(f"{server}/unstated", mine, "has more than 100 bytes")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://example.org/model.zip", "by http it may be changed on its way"),
        ("ftp://example.org/model.zip", "is not fetched: by ftp"),
        ("https://jane:secret@example.org/model.zip", "without a password"),
        ("http://localhost.example.org/model.zip", "is not fetched"),
        ("https://", "it names no server"),
        ("https://[half", "is no address"),
        ("file://server/share/model.zip", "on another machine"),
        ("file:///no/such/model.zip", "does not exist"),
        ("http://127.0.0.1:1/model.zip", "cannot be fetched: .*; try again"),
    ],
)
def test_what_cannot_be_fetched_says_why(address, said, mine, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    refused(address, mine, said)


def test_a_file_has_an_address_too(exported, mine, tmp_path):
    path = zipped(tmp_path / "a model.zip", exported)
    assert add_model(path.as_uri()).folder == mine / "smooth"


def test_an_unpacked_package_is_added_by_its_description(exported, mine, tmp_path):
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for name, data in exported.items():
        (folder / name).write_bytes(data)
    found = add_model(folder, name="renamed")
    assert found.card.input == find_engine(str(folder)).card.input
    (folder / "engine.yaml").unlink()
    (folder / "test_tiles.npy").unlink()
    (folder / "test_tiles.npy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="is a link or no plain file"):
        add_model(folder, name="linked")
    assert [found.name for found in list_engines() if found.folder.parent == mine] == [
        "renamed"
    ]


def test_one_of_my_engines_is_removed_and_no_other(mine, tmp_path):
    kept = write_smooth_restorer(tmp_path / "kept")
    for name in ("gone", "stays"):
        add_model(kept, name=name)
    assert remove_engine("gone") == mine / "gone"
    assert [path.name for path in mine.iterdir()] == ["stays"]
    with pytest.raises(EngineError, match=r"no engine 'gone' among .*there are: stays"):
        remove_engine("gone")
    with pytest.raises(EngineError, match=r"'rrdb' lies in .* goes with the package"):
        remove_engine("rrdb")
    for name in ("../kept", str(kept), "", ".", "stays/"):
        with pytest.raises(EngineError, match="there is no engine"):
            remove_engine(name)
    assert kept.is_dir()
    assert find_engine("stays")


def test_a_killed_removal_leaves_no_engine_in_the_list(mine, tmp_path, monkeypatch):
    add_model(write_smooth_restorer(tmp_path / "smooth"))

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_engine("smooth")
    assert len(list(mine.iterdir())) == 1
    assert not [found for found in list_engines() if found.folder.parent == mine]
    monkeypatch.undo()
    monkeypatch.setenv("RTFOCUS_ENGINES", str(mine))
    assert add_model(tmp_path / "smooth").folder == mine / "smooth"


def test_an_engine_that_cannot_lose_its_name_stays_whole(mine, tmp_path, monkeypatch):
    add_model(write_smooth_restorer(tmp_path / "smooth"))

    def read_only(path, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(OutputError, match="cannot be removed"):
        remove_engine("smooth")
    monkeypatch.undo()
    assert find_engine(str(mine / "smooth"))
