"""What the doctor finds, on a real server and on networks that do not answer."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from rich.console import Console
from support.catalogs import write_rows

from tamiyo_svc.cli.doctor import (
    Check,
    Status,
    check_catalog,
    check_clock,
    check_device,
    check_eviction,
    check_http,
    check_persistence,
    check_policy,
    check_redis,
    check_secret,
    check_state_dir,
    check_version,
    checks_json,
    checks_table,
    examine,
    has_failed,
)
from tamiyo_svc.service.settings import Settings

STREAMS = ("oona.normal", "oona.emergency")
SECRET = "correct-horse-battery-staple"
CATALOG = Path(__file__).parents[2] / "data" / "urza_catalog.db"


def settings_for(url: str, folder: Path, **changes: Any) -> Settings:
    given = {
        "redis_url": url,
        "secret": SECRET,
        "device": "cpu",
        "http_host": "127.0.0.1",
        "http_port": 0,
        "state_dir": folder / "state",
        "urza_database_url": f"sqlite:///{CATALOG}",
    }
    return Settings(**{**given, **changes})


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://:{SECRET}@127.0.0.1:{server.getsockname()[1]}/0"


@pytest.mark.redis
def test_on_a_real_server_nothing_fails(redis_url: str, tmp_path: Path) -> None:
    checks = examine(settings_for(redis_url, tmp_path))
    assert [check for check in checks if check.status is Status.FAILED] == []
    assert [check.name for check in checks] == [
        "redis",
        "redis version",
        "clock",
        "redis eviction",
        "redis persistence",
        "secret",
        "policy",
        "catalogue",
        "http port",
        "state folder",
        "device",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.redis
def test_a_clock_far_from_the_servers_fails(redis_url: str) -> None:
    late = by_name(list(check_redis(redis_url, STREAMS, 3.0, lambda: time.time() - 60)))["clock"]
    assert late.status is Status.FAILED
    assert late.detail.startswith("-")
    assert late.mend


@pytest.mark.redis
def test_an_evicting_server_is_warned_about(redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            check = by_name(list(check_redis(redis_url, STREAMS, 3.0, time.time)))["redis eviction"]
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert check.status is Status.WARNING
    assert "noeviction" in check.mend


def test_a_server_that_is_not_there_fails_with_its_url_and_no_password(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"redis://:{SECRET}@127.0.0.1:{port}/0"
    checks = examine(settings_for(url, tmp_path))
    assert by_name(checks)["redis"].status is Status.FAILED
    assert f"127.0.0.1:{port}" in by_name(checks)["redis"].mend
    assert by_name(checks)["secret"].status is Status.OK
    assert has_failed(checks)
    assert SECRET not in checks_json(checks)


def test_a_server_that_never_answers_fails_within_the_limit(silent_url: str) -> None:
    (check,) = check_redis(silent_url, STREAMS, 0.05, time.time)
    assert check.status is Status.FAILED
    assert SECRET not in check.detail + check.mend


def test_a_network_that_hangs_is_left_behind(silent_url: str, tmp_path: Path) -> None:
    checks = examine(settings_for(silent_url, tmp_path), timeout_s=0.05)
    assert by_name(checks)["redis"].status is Status.FAILED


@pytest.mark.parametrize(
    ("version", "status"),
    [("6.0.16", Status.FAILED), ("6.2.0", Status.OK), ("7.2.4", Status.OK), ("", Status.FAILED)],
)
def test_versions_before_6_2_fail(version: str, status: Status) -> None:
    check = check_version({"redis_version": version})
    assert check.status is status
    assert bool(check.mend) is (status is not Status.OK)


def test_valkey_is_named_as_such() -> None:
    check = check_version({"redis_version": "7.2.4", "valkey_version": "8.0.1"})
    assert (check.status, check.detail) == (Status.OK, "valkey 8.0.1")


@pytest.mark.parametrize(
    ("ahead_s", "status"),
    [
        (0.0, Status.OK),
        (0.5, Status.OK),
        (-0.6, Status.WARNING),
        (5.0, Status.WARNING),
        (5.1, Status.FAILED),
        (-5.1, Status.FAILED),
    ],
)
def test_the_clock_may_differ_a_little(ahead_s: float, status: Status) -> None:
    assert check_clock(ahead_s).status is status


def test_eviction_and_persistence_hints() -> None:
    assert check_eviction({"maxmemory_policy": "noeviction"}).status is Status.OK
    assert check_eviction({"maxmemory_policy": "volatile-lru"}).status is Status.WARNING
    assert check_eviction({}).status is Status.WARNING
    assert check_persistence({"aof_enabled": 1}).status is Status.OK
    assert check_persistence({"aof_enabled": 0}).status is Status.WARNING


def test_the_secret_must_be_set_unless_signatures_are_off() -> None:
    assert check_secret(Settings(secret=SecretStr(SECRET))).status is Status.OK
    assert check_secret(Settings()).status is Status.FAILED
    assert check_secret(Settings(require_signatures=False)).status is Status.WARNING


def test_a_device_that_is_not_there_fails() -> None:
    assert check_device("cpu").status is Status.OK
    assert check_device("auto").status is Status.OK
    missing = check_device("cuda:200")
    assert missing.status is Status.FAILED
    assert "TAMIYO_DEVICE" in missing.mend


def test_the_policy_must_be_a_name_or_a_readable_file(tmp_path: Path) -> None:
    good, empty = tmp_path / "good", tmp_path / "empty"
    good.write_bytes(b"x")
    empty.touch()
    for policy in (None, "untrained", "bootstrap", str(good)):
        assert check_policy(policy).status is Status.OK
    for policy in (str(empty), str(tmp_path), str(tmp_path / "missing")):
        check = check_policy(policy)
        assert check.status is Status.FAILED
        assert check.mend


def test_a_missing_catalogue_is_a_warning_and_a_broken_one_a_failure(tmp_path: Path) -> None:
    assert check_catalog(CATALOG).status is Status.OK
    assert check_catalog(tmp_path / "missing.db").status is Status.WARNING
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"not a database at all" * 100)
    assert check_catalog(broken).status is Status.FAILED
    assert check_catalog(tmp_path).status is Status.FAILED


def test_who_has_no_catalogue_is_told_what_makes_one(tmp_path: Path) -> None:
    path = tmp_path / "urza" / "catalog.db"
    for optional, detail in ((True, "blueprints that trainers name"), (False, "no blueprints")):
        check = check_catalog(path, optional=optional)
        assert check.status is Status.WARNING
        assert detail in check.detail
        assert f"`tamiyo catalog init {path}`" in check.mend


def test_an_empty_catalogue_is_warned_about(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "empty.db", {})
    check = check_catalog(path)
    assert check.status is Status.WARNING
    assert "tamiyo catalog add" in check.mend


def test_a_catalogue_may_have_any_file_name(tmp_path: Path) -> None:
    odd = tmp_path / "odd ?#%41.db"
    odd.write_bytes(CATALOG.read_bytes())
    assert check_catalog(odd).status is Status.OK


def test_a_taken_port_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check = check_http("127.0.0.1", server.getsockname()[1])
    assert check.status is Status.FAILED
    assert "TAMIYO_HTTP_PORT" in check.mend
    assert check_http("127.0.0.1", 0).status is Status.OK


def test_the_state_folder_must_be_writable_and_is_left_as_it_was(tmp_path: Path) -> None:
    assert check_state_dir(tmp_path).status is Status.OK
    assert check_state_dir(tmp_path / "a" / "b").status is Status.OK
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert check_state_dir(file).status is Status.FAILED
    assert check_state_dir(file / "below").status is Status.FAILED


@pytest.mark.parametrize("path", [Path("/proc/tamiyo"), Path("/proc")])
def test_a_folder_that_takes_no_files_fails(path: Path) -> None:
    assert check_state_dir(path).status is Status.FAILED


@pytest.mark.redis
def test_a_check_that_breaks_off_is_a_failure(redis_url: str, tmp_path: Path) -> None:
    def broken_clock() -> float:
        raise ArithmeticError("no time")

    checks = by_name(examine(settings_for(redis_url, tmp_path), clock=broken_clock))
    assert checks["redis"].status is Status.FAILED
    assert checks["redis"].detail == "ArithmeticError: no time"


def test_only_failures_make_the_whole_fail() -> None:
    ok, warning, failed = (Check("x", status, "d", "m") for status in Status)
    assert not has_failed([ok, warning])
    assert has_failed([ok, failed])


def test_the_table_and_the_json_carry_every_finding() -> None:
    checks = [Check("redis", Status.FAILED, "no [route]", "mend [it]")]
    stream = io.StringIO()
    Console(file=stream, width=120).print(checks_table(checks))
    assert all(text in stream.getvalue() for text in ("redis", "failed", "no [route]", "mend [it]"))
    assert json.loads(checks_json(checks)) == {
        "ok": False,
        "checks": [
            {"name": "redis", "status": "failed", "detail": "no [route]", "mend": "mend [it]"}
        ],
    }
