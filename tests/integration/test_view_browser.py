"""View in a real browser: Debian's Chromium draws what was stored or sent."""

import base64
import http.client
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from loop_kit import run_loop, small
from numpy.typing import NDArray
from transport_kit import until
from view_kit import GRID, SATURATION, frame_of, result_of
from writer_kit import make_series, numbered, recording

from rtfocus.view.scene import LiveSource, RunSource, Scene
from rtfocus.view.server import Listening, PageServer

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1440,900",
)
RAW, RESTORED = 0, 1
MARK = [255, 43, 214]
Page = Callable[..., Any]
"""Runs a script in the page and returns what it returns."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for the module; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    for program in (CHROMIUM, DRIVER):
        if not program.exists():
            pytest.skip(f"needs {program}: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(str(DRIVER))
        )
        driver.set_script_timeout(30)
        try:
            yield driver
        finally:
            driver.quit()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, engine_folder: Path) -> Path:
    """A run of eight frames with defocus maps, restored."""
    return run_loop(
        small(
            tmp_path_factory.mktemp("view"),
            engine_folder,
            microscope={
                "height_px": 144,
                "width_px": 192,
                "specimen": {"kind": "tissue", "seed": 7},
                "photons": 2000,
            },
        )
    ).folder


@contextmanager
def served(source: Callable[[Scene], Any]) -> Iterator[tuple[Scene, PageServer]]:
    scene = Scene()
    with source(scene), PageServer(scene, Listening()) as server:
        yield scene, server


def opened(browser: Any, server: PageServer, query: str = "") -> Page:
    """Open the page and wait for its first picture."""
    browser.get(f"{server.url}{query}")

    def page(script: str, *values: Any) -> Any:
        return browser.execute_script(script, *values)

    until(
        lambda: page("return window.rtfocusView?.state.pictures > 0"),
        "the first picture",
    )
    return page


def shown(page: Page) -> tuple[int, int]:
    """Return time point and sequence of what is shown."""
    return tuple(page("const p = rtfocusView.state.picture; return [p.t, p.sequence]"))


def drawn(page: Page, kind: int, places: list[tuple[int, int]]) -> NDArray[Any]:
    """Return the colours that stand on the canvas at pixels (y, x) of the frame."""
    return np.array(
        page(
            "return rtfocusView.coloursAt(arguments[0], arguments[1])"
            ".map((colour) => colour.slice(0, 3))",
            kind,
            places,
        )
    )


def expected(
    pixels: NDArray[Any], places: list[tuple[int, int]], window: tuple[int, int]
) -> NDArray[Any]:
    """Return the greys of pixels through a window, as three colours."""
    values = np.array([float(pixels[y, x]) for y, x in places])
    grey = np.clip((values - window[0]) / (window[1] - window[0]), 0, 1) * 255
    return np.repeat(np.rint(grey)[:, None], 3, axis=1)


def spread(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return pixels all over a frame, its corners among them."""
    rng = np.random.default_rng(5)
    height, width = shape[:2]
    corners = [(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)]
    ys, xs = rng.integers(0, height, 60), rng.integers(0, width, 60)
    return corners + [(int(y), int(x)) for y, x in zip(ys, xs, strict=True)]


def set_windows(page: Page, low: int, high: int) -> None:
    page(
        "for (const held of rtfocusView.state.windows.values()) "
        "{ held.mode = 'hand'; held.window = [arguments[0], arguments[1]]; }",
        low,
        high,
    )


@pytest.mark.parametrize("renderer", ["webgl", "2d"])
def test_the_pixels_drawn_are_the_stored_ones_through_the_window(
    browser: Any, run_folder: Path, renderer: str
) -> None:
    with served(lambda scene: RunSource(scene, run_folder)) as (scene, server):
        page = opened(browser, server, f"?renderer={renderer}")
        assert page("return rtfocusView.drawing.name") == (
            "WebGL 2" if renderer == "webgl" else "canvas 2-D"
        )
        until(lambda: shown(page) == (7, 7), "the newest frame")
        assert scene.stored is not None
        run = scene.stored.run
        places = spread(run.raw.shape[-2:])
        low, middle, high = (int(n) for n in np.percentile(run.raw[7], (1, 50, 99)))
        for window in ((low, high), (middle - 4, middle + 5)):
            set_windows(page, *window)
            for kind, image in ((RAW, run.raw), (RESTORED, run.restored)):
                found = drawn(page, kind, places)
                wanted = expected(image[7, 0, 0], places, window)
                np.testing.assert_allclose(found, wanted, atol=1)
                assert len(np.unique(found)) > 2


def test_graphics_that_were_taken_away_are_told_and_come_back(
    browser: Any, run_folder: Path
) -> None:
    with served(lambda scene: RunSource(scene, run_folder)) as (scene, server):
        page = opened(browser, server, "?renderer=webgl")
        until(lambda: shown(page) == (7, 7), "the newest frame")
        assert scene.stored is not None
        run = scene.stored.run
        places, window = spread(run.raw.shape[-2:]), (0, 2000)
        hidden = "return document.getElementById('lost').hidden"
        assert page(hidden)
        page(
            "window.taken = rtfocusView.drawing.gl.getExtension('WEBGL_lose_context');"
            "window.taken.loseContext();"
        )
        until(lambda: not page(hidden), "the word that it is lost")
        # A frame that comes meanwhile is drawn afterwards.
        page("rtfocusView.scrub({ t: 3 })")
        until(lambda: shown(page) == (3, 3), "another frame")
        page("window.taken.restoreContext();")
        until(lambda: page(hidden), "the graphics")
        set_windows(page, *window)
        wanted = expected(run.raw[3, 0, 0], places, window)
        np.testing.assert_allclose(drawn(page, RAW, places), wanted, atol=1)


def test_scrubbing_splitting_snapshots_and_a_second_viewer(
    browser: Any, run_folder: Path, tmp_path: Path
) -> None:
    with served(lambda scene: RunSource(scene, run_folder)) as (scene, server):
        page = opened(browser, server)
        assert scene.stored is not None
        run = scene.stored.run
        until(lambda: shown(page) == (7, 7), "the newest frame")
        # The slider stops following, Home resumes.
        page(
            "const t = document.getElementById('t'); t.value = 2;"
            "t.dispatchEvent(new Event('input'))"
        )
        until(lambda: shown(page) == (2, 2), "what was scrubbed to")
        assert page("return rtfocusView.state.follow") is False
        low, high = (int(n) for n in np.percentile(run.raw[2], (1, 99)))
        set_windows(page, low, high)
        places = spread(run.raw.shape[-2:])
        found = drawn(page, RAW, places)
        np.testing.assert_allclose(
            found, expected(run.raw[2, 0, 0], places, (low, high)), atol=1
        )
        # The split: raw on its left, restored on its right, at the same place.
        page(
            "document.querySelector('input[value=split]').click();"
            "const s = document.getElementById('split'); s.value = 500;"
            "s.dispatchEvent(new Event('input'))"
        )
        width = run.raw.shape[-1]
        for kind, image, xs in (
            (RAW, run.raw, (10, width // 2 - 4)),
            (RESTORED, run.restored, (width // 2 + 4, width - 10)),
        ):
            places = [(int(y), int(x)) for y in (20, 77, 120) for x in xs]
            found = drawn(page, kind, places)
            wanted = expected(image[2, 0, 0], places, (low, high))
            np.testing.assert_allclose(found, wanted, atol=1)
        # Snapshots are the stored planes.
        for kind, image in (("raw", run.raw), ("restored", run.restored)):
            text = browser.execute_async_script(
                "const done = arguments[1];"
                "fetch(document.getElementById(arguments[0]).href)"
                ".then((answer) => answer.bytes()).then((bytes) => done(btoa("
                "Array.from(bytes, (b) => String.fromCharCode(b)).join(''))))",
                f"tiff-{kind}",
            )
            path = tmp_path / f"{kind}.tif"
            path.write_bytes(base64.b64decode(text))
            np.testing.assert_array_equal(tifffile.imread(path), image[2, 0, 0])
        browser.execute_cdp_cmd(
            "Browser.setDownloadBehavior",
            {"behavior": "allow", "downloadPath": str(tmp_path)},
        )
        page("document.getElementById('png').click()")
        until(lambda: any(tmp_path.glob("small_t2*.png")), "the PNG")
        # A second viewer looks at something else.
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        try:
            other = opened(browser, server)
            until(lambda: shown(other) == (7, 7), "the newest frame")
            until(lambda: scene.viewers == 2, "two viewers")
        finally:
            browser.close()
            browser.switch_to.window(first)
        assert shown(page) == (2, 2)
        browser.find_element("tag name", "body").send_keys("\ue011")  # Home
        until(lambda: shown(page) == (7, 7), "following again")


def touch(browser: Any, kind: str, *fingers: tuple[float, float]) -> None:
    """Let fingers touch the screen at places (x, y), as a tablet tells it."""
    points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(fingers)]
    browser.execute_cdp_cmd(
        "Input.dispatchTouchEvent", {"type": kind, "touchPoints": points}
    )


def test_fingers_move_and_zoom_as_on_a_tablet(browser: Any, run_folder: Path) -> None:
    with served(lambda scene: RunSource(scene, run_folder)) as (_, server):
        page = opened(browser, server)
        left, top = page(
            "const b = rtfocusView.stage.box.getBoundingClientRect();"
            "return [b.left, b.top]"
        )

        def view() -> tuple[float, float, float]:
            return tuple(
                page(
                    "const s = rtfocusView.stage;"
                    "return [s.view.x, s.view.y, s.view.zoom / s.ratio]"
                )
            )

        x, y, zoom = view()
        # What is under the finger goes with it.
        touch(browser, "touchStart", (left + 100, top + 100))
        touch(browser, "touchMove", (left + 130, top + 80))
        touch(browser, "touchEnd")
        assert view() == pytest.approx((x - 30 / zoom, y + 20 / zoom, zoom))
        # Twice as far apart is twice as large, about what lies between the fingers.
        before = view()
        touch(browser, "touchStart", (left + 80, top + 120))
        touch(browser, "touchStart", (left + 80, top + 120), (left + 160, top + 120))
        touch(browser, "touchMove", (left + 80, top + 120), (left + 200, top + 120))
        touch(browser, "touchMove", (left + 40, top + 120), (left + 200, top + 120))
        touch(browser, "touchEnd")
        assert view()[2] == pytest.approx(2 * before[2])
        # A second finger makes no region of what the first one began.
        page("rtfocusView.stage.drawsRoi = true")
        touch(browser, "touchStart", (left + 80, top + 90))
        touch(browser, "touchStart", (left + 80, top + 90), (left + 150, top + 150))
        touch(browser, "touchMove", (left + 80, top + 90), (left + 190, top + 190))
        touch(browser, "touchEnd")
        assert page("return rtfocusView.stage.roi") is None
        # The slider of the split goes with the finger too.
        page(
            "rtfocusView.stage.drawsRoi = false;"
            "document.querySelector('input[value=split]').click()"
        )
        width = page("return rtfocusView.stage.box.getBoundingClientRect().width")
        touch(browser, "touchStart", (left + width / 2, top + 60))
        touch(browser, "touchMove", (left + width / 4, top + 60))
        touch(browser, "touchEnd")
        assert page("return rtfocusView.stage.split") == pytest.approx(0.25, abs=0.01)


def test_a_run_is_browsed_while_it_is_written(browser: Any, tmp_path: Path) -> None:
    series = make_series(sizes={"t": None})
    with ExitStack() as stack:
        run = stack.enter_context(
            recording(tmp_path / "r.rtfocus", series, store={"shard_frames": 1})
        )

        def write(*numbers: int) -> None:
            for number in numbers:
                run.send(number, {"t": number})
            until(lambda: numbers[-1] in run.durable, f"frame {numbers[-1]} on disk")

        write(0, 1, 2)
        _, server = stack.enter_context(
            served(lambda scene: RunSource(scene, tmp_path / "r.rtfocus"))
        )
        page = opened(browser, server)
        until(lambda: shown(page) == (2, 2), "the newest frame so far")
        write(3)
        until(lambda: shown(page) == (3, 3), "the frame that came")
        page("rtfocusView.scrub({t: 1})")
        until(lambda: shown(page) == (1, 1), "what was scrubbed to")
        write(4, 5)
        until(
            lambda: page("return Number(document.getElementById('t').max)") == 5,
            "that the slider reaches what came",
        )
        assert shown(page) == (1, 1)
        stored = numbered(1, series)
        places = spread(stored.shape)
        window = tuple(int(n) for n in np.percentile(stored, (1, 99)))
        set_windows(page, *window)
        np.testing.assert_allclose(
            drawn(page, RAW, places), expected(stored, places, window), atol=1
        )
        browser.find_element("tag name", "body").send_keys("\ue011")  # Home
        until(lambda: shown(page) == (5, 5), "following again")
        run.close(6)
        until(
            lambda: (
                page("return document.getElementById('state').dataset.state")
                == "finished"
            ),
            "that the run is over",
        )
        assert shown(page) == (5, 5)


@contextmanager
def child(endpoint: str, uid: str) -> Iterator[tuple[str, Callable[[int], None], Any]]:
    """Start a preview in a process of its own; say where, how to show, what to kill."""
    script = Path(__file__).parents[1] / "view_kit.py"
    with subprocess.Popen(
        [sys.executable, str(script), endpoint, uid],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin = process.stdin

        def show(number: int) -> None:
            stdin.write(f"{number}\n")
            stdin.flush()

        try:
            yield process.stdout.readline().strip(), show, process
        finally:
            process.kill()


def test_a_live_run_and_a_processor_that_is_killed_and_comes_back(
    browser: Any,
) -> None:
    with ExitStack() as stack:
        endpoint, show, process = stack.enter_context(
            child("tcp://127.0.0.1:*", "first")
        )
        scene, server = stack.enter_context(
            served(lambda scene: LiveSource(scene, endpoint, None))
        )
        browser.get(server.url)

        def page(script: str, *values: Any) -> Any:
            return browser.execute_script(script, *values)

        def follows(number: int, uid: str) -> bool:
            show(number)
            return page(
                "const s = window.rtfocusView?.state; "
                "return s?.picture && [s.picture.sequence, s.series.uid]"
            ) == [number, uid]

        until(lambda: follows(3, "first"), "frame 3")
        until(lambda: follows(4, "first"), "frame 4")
        # Pixels, restored pixels, the saturated one, and the map over them.
        set_windows(page, 100, 3000)
        places = [place for place in spread((96, 128)) if place != (4, 5)]
        for kind, pixels in ((RAW, frame_of(4)), (RESTORED, result_of(4).restored)):
            assert pixels is not None
            wanted = expected(pixels, places, (100, 3000))
            np.testing.assert_allclose(drawn(page, kind, places), wanted, atol=1)
        assert frame_of(4)[4, 5] == SATURATION
        assert drawn(page, RAW, [(4, 5)]).tolist() == [MARK]
        assert "1 px" in page("return document.getElementById('saturated').innerText")
        assert overlaid(page, 40, 30) == [0, 0, 0, 0]
        page("document.getElementById('map').click()")
        for row, column, colour in (
            # -8 and +8 of a scale to 10 um: nearly at the ends of blue and orange.
            (0, 0, (27, 99, 169)),
            (1, 1, (178, 92, 12)),
        ):
            y, x = (GRID.origin_px + GRID.stride_px * n for n in (row, column))
            *found, alpha = overlaid(page, y, x)
            assert alpha == pytest.approx(0.55 * 255, abs=3)
            np.testing.assert_allclose(found, colour, atol=5)
        y, x = (GRID.origin_px + GRID.stride_px * n for n in (1, 2))
        assert overlaid(page, y, x)[3] == 0  # background has no colour
        said = page("return document.getElementById('loop-facts').innerText")
        assert "12.5 frames/s" in said
        assert "gap 2" in said
        # Without the folder there is nothing to browse, and the page says so.
        page("rtfocusView.scrub({t: 0})")
        assert "not on this machine" in page(
            "return document.getElementById('message').innerText"
        )
        process.kill()
        until(
            lambda: (
                page("return document.getElementById('state').dataset.state") == "gone"
            ),
            "that the processor is gone",
        )
        _, show, _ = stack.enter_context(child(endpoint, "second"))
        until(lambda: follows(9, "second"), "the processor that came back")
        assert scene.refused == {}
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        link.request("GET", "/state")
        assert json.loads(link.getresponse().read())["state"] == "running"
        link.close()


ERROR = "expected error"


def test_every_map_that_is_stated_can_be_chosen_and_no_other(browser: Any) -> None:
    tile = [GRID.origin_px + GRID.stride_px * n for n in (1, 0)]
    key = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'n'}))"
    with ExitStack() as stack:
        endpoint, show, _ = stack.enter_context(child("tcp://127.0.0.1:*", "one"))
        _, server = stack.enter_context(
            served(lambda scene: LiveSource(scene, endpoint, None))
        )
        browser.get(server.url)
        page = browser.execute_script

        def follows(number: int) -> bool:
            show(number)
            shown = "return window.rtfocusView?.state.picture?.sequence"
            return page(shown) == number

        until(lambda: follows(4), "frame 4")
        page("document.getElementById('map').click()")
        assert choice(page) == (["defocus", "deviation", ERROR], "defocus")
        # 1.5 um of a scale to 2, 40 counts of a scale to 50.
        for name, share in (("deviation", 0.75), (ERROR, 0.8)):
            page(key)
            assert choice(page)[1] == name
            script = (
                "return import('/maps.js').then((m) => m.colour(false, arguments[0]))"
            )
            wanted = page(script, share)
            np.testing.assert_allclose(overlaid(page, *tile)[:3], wanted, atol=5)
        assert "33.2 counts rms" in text(page, "frame-facts")
        point(page, *tile)
        said = "+4.00 ± 1.50 µm"
        assert f"{said}, expected error 40 counts" in text(page, "frame-facts")
        # Of the next frame no error is stated, which what is pointed at follows.
        until(lambda: follows(5), "frame 5")
        assert choice(page) == (["defocus", "deviation"], "defocus")
        assert said in text(page, "frame-facts")
        assert ERROR not in text(page, "frame-facts")
        until(lambda: follows(6), "frame 6")
        assert choice(page) == (["defocus", "deviation", ERROR], ERROR)
        page(
            "const s = document.getElementById('map-of'); s.value = '4';"
            "s.dispatchEvent(new Event('change')); rtfocusView.draw();"
        )
        assert choice(page)[1] == "deviation"


def point(page: Page, y: float, x: float) -> None:
    """Move the pointer to a place of the raw pane."""
    page(
        "const s = rtfocusView.stage, v = s.view, r = s.ratio;"
        "const box = s.overlay.getBoundingClientRect();"
        "s.overlay.dispatchEvent(new PointerEvent('pointermove', {"
        "clientX: box.left + (arguments[1] - v.x) * v.zoom / r,"
        "clientY: box.top + (arguments[0] - v.y) * v.zoom / r}))",
        y,
        x,
    )


def choice(page: Page) -> tuple[list[str], str]:
    """Return what the map can show, and what it does."""
    found, chosen = page(
        "const s = document.getElementById('map-of');"
        "return [[...s.options].map((o) => o.text), s.selectedOptions[0].text]"
    )
    return found, chosen


def text(page: Page, name: str) -> str:
    return str(page(f"return document.getElementById('{name}').innerText"))


def overlaid(page: Page, y: float, x: float) -> list[int]:
    """Return the colour over a place of the raw pane, red green blue alpha."""
    return page(
        "rtfocusView.draw(); const s = rtfocusView.stage, v = s.view;"
        "const [ox, oy] = s.lastPanes[0].origin;"
        "const at = [ox + (arguments[1] - v.x) * v.zoom, oy + (arguments[0] - v.y) *"
        " v.zoom];"
        "return [...s.overlay.getContext('2d').getImageData(...at, 1, 1).data]",
        y,
        x,
    )
