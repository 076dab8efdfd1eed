"""Who may record a series, who does, and that both sides say so."""

import getpass
import logging
import re
import socket
import threading
from pathlib import Path

import pytest
from loop_kit import (
    DEADLINE_S,
    assert_whole,
    failed,
    lines_written,
    process_of,
    small,
    started,
    wait_for,
    write_config,
)

from rtfocus.app import serve
from rtfocus.config import Config, load_config, parse_config
from rtfocus.errors import TransportError
from rtfocus.launch import on_free_ports, paired
from rtfocus.transport.preview import open_preview
from rtfocus.transport.publisher import FramePublisher


def unpaired(config: Config) -> Config:
    """Return a config on free ports whose sides find each other by themselves."""
    config = on_free_ports(config)
    transport = config.transport.model_copy(update={"pairing": None})
    return config.model_copy(update={"transport": transport})


def test_only_the_processor_of_the_same_config_gets_the_series(tmp_path: Path) -> None:
    endless = {"live": {"frames": None, "exposure_ms": 1}}
    config = unpaired(small(tmp_path / "mine", None, acquisition=endless))
    mine = write_config(tmp_path / "mine.yaml", config)
    run = config.run.model_copy(update={"folder": tmp_path / "other"})
    other = write_config(
        tmp_path / "other.yaml", config.model_copy(update={"run": run})
    )
    folder = tmp_path / "mine" / "small.rtfocus"
    with started("acquire", mine, cwd=tmp_path) as microscope:
        said = failed(process_of("process", other, "--once", "-q", cwd=tmp_path))
        assert str(mine) in said
        assert str(other) in said
        assert "transport.pairing" in said
        assert not (tmp_path / "other").exists()
        with started("process", mine, "--once", "-q", cwd=tmp_path) as processor:
            wait_for(
                lambda: lines_written(folder) > 3 or processor.poll() is not None,
                "frames of the right processor",
            )
            assert processor.poll() is None, processor.communicate()
            who = f"process {processor.pid} ({getpass.getuser()}) on host "
            who += f"{socket.gethostname()} in '{folder}'"
            said = failed(process_of("process", mine, "--once", "-q", cwd=tmp_path))
            assert who in said
            microscope.terminate()
            out, errors = microscope.communicate(timeout=DEADLINE_S)
            assert f"recorded by {who}" in out, errors
            assert processor.wait(DEADLINE_S) == 0
    assert_whole(folder)


def test_a_pairing_tells_whose_run_it_is(tmp_path, monkeypatch) -> None:
    def pairing(config: Config) -> str | None:
        return paired(config).transport.pairing

    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("{}", "utf-8")
    a, again, b = (load_config(tmp_path / f"{x}.yaml") for x in "aab")
    changed = load_config(tmp_path / "a.yaml", ["run.folder=elsewhere"])
    assert pairing(a) == pairing(again) == pairing(changed) != pairing(b)
    mine = pairing(a)
    # Two users may well run the same shipped config.
    monkeypatch.setattr(getpass, "getuser", lambda: "somebody else")
    assert pairing(a) != mine
    # Between two machines neither user nor path is the same.
    far = ["transport.control=tcp://scope:5572", "run.name=night"]
    scope = load_config(tmp_path / "a.yaml", far)
    assert pairing(scope) == pairing(load_config(tmp_path / "b.yaml", far))
    word = parse_config({"transport": {"pairing": "violet"}})
    assert pairing(word) == "violet"
    one, two = on_free_ports(a), on_free_ports(a)
    assert one.transport.pairing != two.transport.pairing


def test_a_run_shows_its_preview_where_it_is_configured_or_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        config = small(tmp_path, None, transport={"preview": {"endpoint": endpoint}})
        with open_preview(config.transport, any_port=True) as preview:
            assert preview.endpoint not in (None, endpoint)
            (record,) = caplog.records
            assert endpoint in record.getMessage()
            assert str(preview.endpoint) in record.getMessage()
            assert record.levelno == logging.WARNING
    with open_preview(config.transport, any_port=True) as preview:
        assert preview.endpoint == endpoint
    assert len(caplog.records) == 1


def test_what_a_script_started_records_even_where_another_shows_at_its_port(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()
    over.set()
    with socket.socket() as taken, socket.socket() as asked:
        for one in (taken, asked):
            one.bind(("127.0.0.1", 0))
        endpoint, control = (
            f"tcp://127.0.0.1:{one.getsockname()[1]}" for one in (taken, asked)
        )
        preview = {"endpoint": endpoint, "control": control}
        config = small(tmp_path, None, transport={"preview": preview})
        with pytest.raises(
            TransportError, match=r"^transport\.preview\.endpoint: cannot bind"
        ):
            serve(config, stop=over)
        serve(config, stop=over, any_port=True)
    assert "in use; this run shows at tcp://127.0.0.1:" in caplog.text


def test_a_refusal_shows_no_word_that_somebody_chose(tmp_path: Path) -> None:
    config = small(tmp_path, None, transport={"pairing": "violet"})
    endpoints = {"frames": "tcp://127.0.0.1:*", "control": "tcp://127.0.0.1:*"}
    ours = config.transport.model_copy(update=endpoints)
    with FramePublisher(ours) as publisher:
        frames, control = publisher.endpoints
        update = {"frames": frames, "control": control, "pairing": "ultramarine"}
        theirs = config.transport.model_copy(update=update)
        path = write_config(
            tmp_path / "other.yaml", config.model_copy(update={"transport": theirs})
        )
        said = failed(process_of("process", path, "--once", "-q", cwd=tmp_path))
    assert not re.search("violet|ultramarine", said)
