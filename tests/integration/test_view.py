"""View without a browser: pictures as they travel, who is let in, what is read."""

import http.client
import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from loop_kit import LOCAL, read_report, run_loop, small
from transport_kit import Background, make_series, until
from view_kit import Looking, unpacked
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rtfocus import app
from rtfocus.config import load_config
from rtfocus.config.sections import PreviewConfig
from rtfocus.errors import InputError
from rtfocus.files import resource_folder
from rtfocus.focusing import MOST_REQUESTS, Focusing
from rtfocus.frame import Act
from rtfocus.monitor import Monitor
from rtfocus.transport.preview import PreviewPublisher
from rtfocus.transport.sockets import create_keys
from rtfocus.transport.viewer import PreviewViewer, ShownSeries
from rtfocus.view.codec import (
    PlaneKind,
    pack,
)
from rtfocus.view.scene import LiveSource, Scene
from rtfocus.view.server import Listening, PageServer
from rtfocus.view.stored_run import (
    Cutout,
    StoredRun,
    Traces,
    note_focus_line,
    numbers_of,
)
from rtfocus.view.viewer import MOST_ASKED
from rtfocus.writers.check import check_run
from rtfocus.writers.header import JOURNAL_NAME


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, engine_folder: Path) -> Path:
    """A run of eight frames with defocus maps."""
    return run_loop(small(tmp_path_factory.mktemp("view"), engine_folder)).folder


@pytest.fixture
def scene(run_folder: Path) -> Scene:
    scene, traces = Scene(), Traces()
    stored = StoredRun.open(run_folder, traces)
    stored.read_on()
    scene.begin(stored.series, stored, traces, stored.saturation_counts)
    return scene


def test_a_finished_run_has_the_numbers_of_its_report(scene: Scene) -> None:
    assert scene.is_finished()
    assert (scene.state, scene.numbers["written"]) == ("finished", 8)
    assert scene.numbers["frames_per_s"] > 0
    unknown = SimpleNamespace(report={"throughput": {"frames_per_s": None}})
    assert "frames_per_s" not in numbers_of(unknown)


def test_a_run_is_read_place_by_place(scene: Scene, run_folder: Path) -> None:
    stored = scene.stored
    assert stored is not None
    assert (stored.written, stored.newest(), stored.is_finished) == (
        8,
        (7, 0, 0, 0),
        True,
    )
    picture = stored.picture((3, 0, 0, 0))
    kinds = {plane.kind: plane for plane in picture.planes}
    frame = stored.run.raw[3, 0, 0]
    np.testing.assert_array_equal(kinds[PlaneKind.RAW].pixels, frame)
    tiles = kinds[PlaneKind.DEFOCUS]
    np.testing.assert_array_equal(tiles.pixels, stored.run.defocus[3, 0, 0])
    detail = stored.picture((3, 0, 0, 0), Cutout(10, 20, 50, 80))
    np.testing.assert_array_equal(detail.planes[0].pixels, frame[10:50, 20:80])
    for place in ((0, 1, 0, 0), (0, 0, 0, -1)):
        with pytest.raises(InputError, match="the run has no"):
            stored.picture(place)
    rows = scene.traces.since(0, 0)
    assert rows is not None
    assert len(rows["rows"]) == 8
    assert scene.traces.since(8, 0) is None


def test_a_frame_that_a_repair_found_is_seen_without_its_time(
    run_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "cut.rtfocus")
    journal = folder / JOURNAL_NAME
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    assert check_run(folder, repair=True).repaired
    traces = Traces()
    stored = StoredRun.open(folder, traces)
    stored.read_on()
    assert (stored.written, stored.newest()) == (8, (7, 0, 0, 0))
    picture = stored.picture((7, 0, 0, 0))
    assert picture.captured_s is None
    assert np.isnan(unpacked(pack(picture))[0][11])
    np.testing.assert_array_equal(picture.planes[0].pixels, stored.run.raw[7, 0, 0])
    rows = traces.since(0, 0)
    assert rows is not None
    assert len(rows["rows"]) == 7


def get(
    server: PageServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Ask for a path exactly as it is written."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    link.request(method, path, headers=headers)
    answer = link.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    link.close()
    return found


@contextmanager
def page(server: PageServer, **headers: str) -> Iterator[ClientConnection]:
    """Open a socket as the page does; other headers as given."""
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    with connect(
        f"ws://127.0.0.1:{server.port}/socket",
        additional_headers={k: v for k, v in (own | headers).items() if v},
        proxy=None,
    ) as socket:
        yield socket


def test_the_page_and_nothing_else_is_served(scene: Scene) -> None:
    with PageServer(scene, Listening()) as server:
        status, headers, text = get(server, "/")
        assert status == 200
        assert b"rtfocus view" in text
        assert "script-src 'self'" in headers["content-security-policy"]
        assert b"uPlot" in get(server, "/uPlot.js")[2]
        for path in (
            "/series.json",
            "/../series.json",
            "/..%2f..%2fetc%2fpasswd",
            "/%2e%2e/series.json",
            "/page/index.html",
            "//etc/passwd",
            "/vendor/uPlot.min.css",
            "/snapshot.tif/../../series.json",
            "/raw.ome.zarr/zarr.json",
        ):
            assert get(server, path)[0] == 404
        assert get(server, "/", "POST")[0] == 405
        assert get(server, "/x" * 4_000)[0] == 414
    assert scene.refused == {"method": 1, "oversize": 1}


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"Origin": "http://evil.example"}, "origin"),
        ({"Origin": ""}, "origin"),
        ({"Origin": "null"}, "origin"),
    ],
)
def test_sockets_of_other_pages_are_refused(
    scene: Scene, headers: dict[str, str], reason: str
) -> None:
    with PageServer(scene, Listening()) as server:
        with pytest.raises(InvalidStatus), page(server, **headers):
            pass
        assert get(server, "/", Host="evil.example")[0] == 403
    assert scene.refused == {reason: 1, "host": 1}


def test_beyond_this_machine_a_token_is_required(scene: Scene) -> None:
    with PageServer(scene, Listening(host="0.0.0.0")) as server:
        token = server.listening.token
        assert token is not None
        assert len(token) > 20
        assert token in server.url
        for path in ("/", "/?token=wrong", "/snapshot.tif", "/state"):
            assert get(server, path)[0] == 403
        with pytest.raises(InvalidStatus), page(server):
            pass
        assert scene.refused == {"token": 5}
        _, headers, _ = get(server, f"/?token={token}")
        assert headers["location"] == "/"
        kept = headers["set-cookie"]
        assert "HttpOnly; SameSite=Strict" in kept
        cookie = {"Cookie": kept.split(";")[0]}
        assert get(server, "/", **cookie)[0] == 200
        with page(server, **cookie) as socket:
            assert json.loads(socket.recv())["type"] == "series"
        wrong = {"Cookie": f"{kept.split('=')[0]}=wrong"}
        assert get(server, "/", **wrong)[0] == 403


def picture_of(socket: ClientConnection, *, acknowledged: bool = True) -> bytes:
    """Return the next picture, before a minute of states has come."""
    for _ in range(240):
        if not isinstance(said := socket.recv(timeout=20), str):
            break
    assert isinstance(said, bytes)
    if acknowledged:
        number = unpacked(said)[0][4]
        socket.send(json.dumps({"type": "ack", "number": number}))
    return said


def test_one_picture_at_a_time_and_what_is_asked_for(scene: Scene) -> None:
    assert scene.stored is not None
    with PageServer(scene, Listening()) as server, page(server) as socket:
        assert unpacked(picture_of(socket))[0][5:10] == (7, 7, 0, 0, 0)
        select = {"type": "select", "follow": False, "t": 2, "p": 0, "c": 0, "z": 0}
        socket.send(json.dumps(select))
        header, planes = unpacked(picture_of(socket))
        assert header[6:10] == (2, 0, 0, 0)
        np.testing.assert_array_equal(planes[0][1], scene.stored.run.raw[2, 0, 0])
        socket.send(json.dumps(select | {"t": 3}))
        held = picture_of(socket, acknowledged=False)
        # Nothing further leaves before the receipt; numbers go on arriving.
        socket.send(json.dumps(select | {"t": 4}))
        assert [type(socket.recv(timeout=20)) for _ in range(4)] == [str] * 4
        socket.send(json.dumps({"type": "ack", "number": unpacked(held)[0][4]}))
        assert unpacked(picture_of(socket))[0][6] == 4


def test_a_region_outside_the_frame_is_refused_and_the_run_followed_on(
    scene: Scene,
) -> None:
    assert scene.stored is not None
    order = scene.stored._order
    newest = order.pop()
    with PageServer(scene, Listening()) as server, page(server) as socket:
        assert unpacked(picture_of(socket))[0][6] == 6
        corners = {"y0": 9000, "x0": 0, "y1": 9001, "x1": 1}
        socket.send(json.dumps({"type": "detail", **corners}))
        said = (str(socket.recv(timeout=20)) for _ in range(240))
        assert any("is not in a frame of" in one for one in said)
        order.append(newest)
        scene.changed()
        assert unpacked(picture_of(socket))[0][6] == 7


def test_a_page_that_sleeps_does_not_count_as_looking(scene: Scene) -> None:
    scene.stalled_s = 0.05
    with PageServer(scene, Listening()) as server, page(server) as socket:
        held = picture_of(socket, acknowledged=False)
        until(lambda: not scene.watched.is_set(), "nobody looks")
        socket.send(json.dumps({"type": "ack", "number": unpacked(held)[0][4]}))
        until(scene.watched.is_set, "it looks again")
        select = {"type": "select", "follow": False, "t": 2, "p": 0, "c": 0, "z": 0}
        socket.send(json.dumps(select))
        assert unpacked(picture_of(socket))[0][6] == 2
    until(lambda: scene.viewers == 0, "nobody looks")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "malformed"),
        ("{", "malformed"),
        ('{"type":"select"}', "malformed"),
        ('{"type":"select","follow":true,"t":-1}', "malformed"),
        ('{"type":"write","path":"/etc/passwd"}', "malformed"),
        ('{"type":"ask","what":"format the disk"}', "malformed"),
        ('{"type":"ack","number":1,"more":2}', "malformed"),
        ("[" * 3000, "malformed"),
        (" " * 5000, "oversize"),
    ],
)
def test_what_is_not_understood_is_refused_and_counted(
    scene: Scene, text: str, kind: str
) -> None:
    with PageServer(scene, Listening()) as server, page(server) as socket:
        socket.send(text)
        assert said(socket, "refused")["why"]
    assert scene.refused == {kind: 1}


def said(socket: ClientConnection, kind: str) -> dict:
    """Return the next message of a kind."""
    while True:
        message = socket.recv(timeout=20)
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)


def test_who_goes_on_with_nonsense_or_sends_too_much_is_sent_away(
    scene: Scene,
) -> None:
    def drained(socket: ClientConnection) -> None:
        while True:
            socket.recv(timeout=20)

    with PageServer(scene, Listening()) as server:
        with page(server) as socket:
            for _ in range(20):
                socket.send("nonsense")
            with pytest.raises(ConnectionClosed) as closed:
                drained(socket)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008
        with page(server) as socket:
            socket.send("x" * 100_000)
            with pytest.raises(ConnectionClosed) as closed:
                drained(socket)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
    assert scene.refused == {"malformed": 20, "oversize": 1}


def test_a_request_is_refused_where_the_config_allows_none(scene: Scene) -> None:
    asked: list[str] = []

    def act(what: str) -> str:
        asked.append(what)
        return ""

    scene.act = act
    with PageServer(scene, Listening()) as server, page(server) as socket:
        socket.send('{"type":"ask","what":"stop"}')
        assert "allows no requests" in said(socket, "answer")["why"]
        assert asked == []
        scene.may_ask = True
        socket.send('{"type":"ask","what":"stop"}')
        assert said(socket, "answer")["why"] == ""
    assert asked == ["stop"]
    assert scene.refused == {"request": 1}


AGAIN = "ask again after them"


def answer(what: str) -> dict[str, str]:
    return {"type": "answer", "what": what, "why": ""}


def test_a_page_that_asks_without_end_waits_for_its_answers(scene: Scene) -> None:
    asked: list[str] = []
    go_on = threading.Event()

    def act(what: str) -> str:
        asked.append(what)
        return "" if go_on.wait(20) else "it waited for nothing"

    scene.act, scene.may_ask = act, True
    with PageServer(scene, Listening()) as server, page(server) as socket:
        for _ in range(3 * MOST_ASKED):
            socket.send('{"type":"ask","what":"hold_on"}')
        for _ in range(2 * MOST_ASKED):
            why = said(socket, "answer")["why"]
            assert why == f"{MOST_ASKED} requests wait for their answers: " + AGAIN
        assert len(asked) == MOST_ASKED
        with page(server) as another:
            another.send('{"type":"ask","what":"stop"}')
            until(lambda: "stop" in asked, "the request of another page")
            go_on.set()
            assert said(another, "answer") == answer("stop")
        for _ in range(MOST_ASKED):
            assert said(socket, "answer") == answer("hold_on")
        socket.send('{"type":"ask","what":"hold_off"}')
        assert said(socket, "answer") == answer("hold_off")
    assert scene.refused == {"request": 2 * MOST_ASKED}


def test_requests_of_many_pages_leave_the_server_threads_for_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rtfocus.view.scene._ANSWER_S", 1.0)
    scene = Scene()
    LiveSource(scene, "tcp://127.0.0.1:1", None)  # nobody answers
    with ThreadPoolExecutor(11) as pages:
        whys = list(pages.map(lambda _: scene.act("autofocus"), range(11)))
    told = Counter(whys)
    refused = f"8 requests of viewers wait: {AGAIN}"
    assert told == {"the processor does not answer": 8, refused: 3}
    assert scene.act("autofocus") == "the processor does not answer"


@pytest.mark.parametrize(
    ("mode", "plan", "cannot"),
    [
        ("hold", None, set()),
        ("off", {"channels": ["A"]}, {"hold_on", "hold_off"}),
        ("off", None, {"hold_on", "hold_off", "autofocus"}),
    ],
)
def test_what_a_run_cannot_do_is_told_before_it_is_asked_for(
    tmp_path: Path, mode: str, plan: dict[str, Any] | None, cannot: set[str]
) -> None:
    config = small(tmp_path, None, autofocus={"mode": mode})
    monitor = Monitor()
    monitor.begin(make_series("u", mda_sequence=plan))
    asked: list[Act] = []
    anywhere = "tcp://127.0.0.1:*"
    ports = PreviewConfig(endpoint=anywhere, control=anywhere)
    with closing(PreviewPublisher(ports)) as preview:
        preview.begin(monitor.shown(config, tmp_path, asked.append))
        assert preview.endpoint is not None
        scene = Scene()
        with (
            LiveSource(scene, preview.endpoint, None),
            PageServer(scene, Listening()) as server,
            page(server) as socket,
        ):
            until(lambda: said(socket, "state")["state"] == "running", "the run")
            told = said(socket, "state")["cannot"]
            assert set(told) == cannot
            for what in ("autofocus", "hold_on", "stop"):
                socket.send(f'{{"type":"ask","what":"{what}"}}')
                assert said(socket, "answer")["why"] == told.get(what, "")
    assert set(asked) == {"autofocus", "hold_on", "stop"} - cannot


def test_what_was_called_unanswered_is_not_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Act] = []
    anywhere = "tcp://127.0.0.1:*"
    ports = PreviewConfig(endpoint=anywhere, control=anywhere)
    with closing(PreviewPublisher(ports)) as preview:
        preview.begin(ShownSeries(make_series("u"), tmp_path, dict, act=asked.append))
        assert preview.endpoint is not None
        scene = Scene()
        source = LiveSource(scene, preview.endpoint, None)
        with monkeypatch.context() as at_once:
            at_once.setattr("rtfocus.view.scene._ANSWER_S", 0.01)
            assert scene.act("stop") == "the processor does not answer"
        with source:
            scene.listen(lambda: None)
            until(lambda: scene.state == "running", "the run")
            assert scene.act("autofocus") == ""
    assert asked == ["autofocus"]


def test_a_viewer_focuses_holds_and_stops_a_run_whose_config_allows_it(
    tmp_path: Path,
) -> None:
    anywhere = "tcp://127.0.0.1:*"
    config = load_config(
        resource_folder("configs") / "demo.yaml",
        (
            *LOCAL,
            f"run.folder={tmp_path}",
            "microscope.height_px=256",
            "microscope.width_px=256",
            "microscope.specimen.kind=nuclei",
            "microscope.surface={z_um: 3.0, drift_um_per_min: 60.0}",
            "autofocus.mode=hold",
            "processing.restoration.method=none",
            "store.restored=false",
            f"transport.preview={{endpoint: '{anywhere}', control: '{anywhere}'}}",
            "acquisition.mda={axis_order: tpcz, "
            "time_plan: {interval: 0.1, loops: 5000}, "
            "stage_positions: [{x: 0, y: 0, z: 0}], "
            "channels: [{config: DAPI, exposure: 10.0}]}",
        ),
    )
    previews: list[PreviewPublisher] = []
    folders: list[Path | None] = []

    def run() -> None:
        folder = app.run(
            config,
            stop=threading.Event(),
            abandon=threading.Event(),
            on_preview=previews.append,
        )
        folders.append(folder)

    with Background(run):
        until(lambda: bool(previews), "the preview")
        endpoint, control = previews[0].endpoint, previews[0].control
        assert endpoint is not None
        assert control is not None
        with PreviewViewer(endpoint) as viewer:
            look = Looking(viewer, control)
            look.until(lambda: look.searches() >= 1, "the first search")
            assert not look.ask("stop", "another run").done
            assert look.ask("autofocus").done
            look.until(lambda: look.searches() >= 2, "the search that was asked for")
            assert look.ask("hold_off").done
            look.until(lambda: look.has_noted("hold_off"), "holding off")
            last = look.newest + 30
            look.until(lambda: look.newest > last, "frames that nothing holds")
            assert not look.moves_since("hold_off")
            assert look.ask("hold_on").done
            look.until(lambda: look.has_noted("hold_on"), "holding on")
            look.until(lambda: look.moves_since("hold_on") > 0, "a correction")
            assert look.ask("stop").done
    (folder,) = folders
    assert folder is not None
    terms = read_report(folder)["accounting"]
    assert terms["unaccounted"] == 0
    assert 0 < terms["written"] < 5000


def test_keys_open_an_encrypted_preview(tmp_path: Path) -> None:
    keys = create_keys(tmp_path / "keys")
    config = PreviewConfig(endpoint="tcp://127.0.0.1:*")
    with closing(PreviewPublisher(config, curve_keys=keys)) as preview:
        assert preview.endpoint is not None
        scene = Scene()
        with (
            LiveSource(scene, preview.endpoint, keys),
            PageServer(scene, Listening()) as server,
            page(server) as socket,
        ):
            until(lambda: said(socket, "state")["state"] == "waiting", "its state")
    assert scene.refused == {}


def test_the_microscope_side_asks_its_own_config(tmp_path: Path) -> None:
    told: list[str] = []
    for control, stops in ((None, False), ("tcp://127.0.0.1:*", True)):
        preview = {"endpoint": None, "control": control}
        config = small(tmp_path, None, transport={"preview": preview})
        stop = threading.Event()
        Focusing(config, told.append).asked("stop", stop.set)
        assert stop.is_set() is stops
    assert told == ["'stop' was asked for; transport.preview.control allows none"]


def test_requests_that_wait_are_bounded_and_not_doubled(tmp_path: Path) -> None:
    told: list[str] = []
    preview = {"endpoint": None, "control": "tcp://127.0.0.1:*"}
    config = small(tmp_path, None, transport={"preview": preview})
    focusing = Focusing(config, told.append)
    for _ in range(3):
        focusing.asked("autofocus", threading.Event().set)
    assert list(focusing.requests) == ["autofocus"]
    for what in ("hold_off", "hold_on") * MOST_REQUESTS:
        focusing.asked(what, threading.Event().set)
    assert len(focusing.requests) == MOST_REQUESTS
    assert (
        told
        == [
            f"'{what}' is refused: {MOST_REQUESTS} requests wait already"
            for what in ("hold_off", "hold_on") * MOST_REQUESTS
        ][MOST_REQUESTS - 1 :]
    )


def test_a_snapshot_is_the_stored_plane_with_its_metadata(
    scene: Scene, tmp_path: Path
) -> None:
    assert scene.stored is not None
    queries = {
        "kind=raw&t=5": np.s_[:, :],
        "kind=restored&t=5": np.s_[:, :],
        "kind=raw&t=5&region=8,16,40,80": np.s_[8:40, 16:80],
    }
    wrong = ("t=99", "t=x", "kind=config", "region=1,2", "region=900,0,950,9")
    with PageServer(scene, Listening()) as server:
        files = [get(server, f"/snapshot.tif?{query}")[2] for query in queries]
        assert [get(server, f"/snapshot.tif?{q}")[0] for q in wrong] == [404] * 5
    for (query, part), content in zip(queries.items(), files, strict=True):
        path = tmp_path / "snapshot.tif"
        path.write_bytes(content)
        with tifffile.TiffFile(path) as file:
            image = scene.stored.run.image("raw" if "raw" in query else "restored")
            np.testing.assert_array_equal(file.asarray(), image[5, 0, 0][part])
            assert file.asarray().dtype == np.uint16
            told = file.ome_metadata
        assert told is not None
        for word in ('PhysicalSizeX="0.65"', "small", "sequence", "ExposureTime"):
            assert word in told


def test_a_log_line_becomes_a_mark_and_a_strange_one_nothing() -> None:
    traces = Traces()
    look = {"kind": "look", "z_um": 4.0, "way_um": 1.0, "refusal": None}
    held = {"kind": "hold", "step_um": 0.5, "error_um": 0.5, "drift_um": 0.5}
    for line in (
        look | {"time_ns": 3_000_000_000, "decision": "Move"},
        look | {"time_ns": 4_000_000_000, "decision": "Stay", "refusal": "blank"},
        held | {"time_ns": 5_000_000_000, "reason": "drift"},
        {"kind": "look", "z_um": "here"},
        {"kind": 3, "time_ns": "x"},
    ):
        note_focus_line(traces, line, 1_000_000_000)
    new = traces.since(0, 0)
    assert new is not None
    assert [mark[:2] for mark in new["marks"]] == [
        ["move", 2.0],
        ["refusal", 3.0],
        ["move", 4.0],
    ]
