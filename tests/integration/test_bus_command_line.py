"""The bus commands as they are typed: options, output, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.bus import CATALOG, SECRET, as_fields, state_packet

from tamiyo_svc.cli.main import main
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.service.settings import VARIABLES

pytestmark = pytest.mark.redis

KEYRING = Keyring(SECRET.encode())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redis_url: str) -> None:
    """Only the settings of the test."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", SECRET)
    monkeypatch.setenv("URZA_DATABASE_URL", f"sqlite:///{CATALOG}")
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `tamiyo <arguments>`."""
    monkeypatch.setattr(sys, "argv", ["tamiyo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def letter(redis_url: str) -> str:
    """A dead letter and a packet on the normal stream."""
    fields = as_fields(seal(state_packet("run-1", 1), KEYRING))
    with Redis.from_url(redis_url) as redis:
        was: Any = redis.xadd("oona.normal", as_fields(seal(state_packet("run-2", 1), KEYRING)))
        meta = {"dead.stream": "oona.normal", "dead.id": was, "dead.reason": "oversized"}
        entry_id: bytes = redis.xadd("oona.dead", fields | meta)
    return entry_id.decode()


def test_stream_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], letter: str
) -> None:
    assert run(monkeypatch, "stream", "status") == 0
    output = capsys.readouterr().out
    assert "oona.dead: 1 entry could not be processed" in output.replace("\n", " ")
    assert run(monkeypatch, "stream", "status", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["streams"]) == 5


def test_tail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], letter: str
) -> None:
    assert run(monkeypatch, "tail", "--run", "run-2", "-o", "json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["run_id"] == "run-2"
    assert run(monkeypatch, "tail", "-o", "yaml") == 2
    assert capsys.readouterr().err == "tamiyo: --output: got 'yaml', takes text or json\n"


def test_dlq(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], letter: str
) -> None:
    assert run(monkeypatch, "dlq", "ls", "--json", "--reason", "oversized") == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == [letter]
    assert run(monkeypatch, "dlq", "show", letter) == 0
    assert json.loads(capsys.readouterr().out)["original"]["message"]["global_step"] == "1"
    assert run(monkeypatch, "dlq", "requeue") == 2
    assert run(monkeypatch, "dlq", "requeue", letter) == 0
    assert "1 letter would be put back; --yes does it" in capsys.readouterr().out
    assert run(monkeypatch, "dlq", "requeue", letter, "--yes") == 0
    assert "1 letter put back" in capsys.readouterr().out
    assert run(monkeypatch, "dlq", "purge", letter, "--yes") == 2
    assert "no such dead letter" in capsys.readouterr().err
    assert run(monkeypatch, "dlq", "purge", "--all", "--yes") == 0
    assert "0 letters removed" in capsys.readouterr().out


def test_capture_and_replay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], letter: str
) -> None:
    assert run(monkeypatch, "capture", "window.jsonl", "--since", "1h") == 0
    assert "entries recorded: 1 (oona.normal 1)" in capsys.readouterr().out
    flags = ("--policy", "bootstrap", "--html", "page.html", "--check")
    assert run(monkeypatch, "replay", "window.jsonl", *flags) == 0
    assert "decided again: 1, with policy bootstrap-1" in capsys.readouterr().out
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(monkeypatch, "replay", "missing.jsonl") == 2
    assert capsys.readouterr().err == "tamiyo: missing.jsonl: No such file or directory\n"


@pytest.mark.parametrize(
    "command",
    [("stream", "status"), ("tail",), ("dlq", "ls"), ("capture", "w.jsonl", "--for", "1s")],
)
def test_server_that_is_away_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *command, "--redis-url", "unix:///nowhere/redis.sock") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert list(Path.cwd().iterdir()) == []
