"""Checks of everything that serving needs, each with how to mend it, all within seconds."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry
from rich.table import Table

from tamiyo_svc.adapters.http import open_server
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline.partition import tag_in
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.variables import redacted

TIMEOUT_S: Final = 3.0
_MIN_VERSION: Final = (6, 2)
_CLOCK_WARN_S: Final = 0.5
_CLOCK_FAIL_S: Final = 5.0
"""Consumers refuse commands issued more than this ahead of their clock."""
_DEVICE_TIMEOUT_S: Final = 15.0


class Status(StrEnum):
    """How a check ended; only `failed` keeps the service from serving."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `mend` says what to do unless the status is ok."""

    name: str
    status: Status
    detail: str
    mend: str = ""


Examination = Callable[[], Iterator[Check]]


def examine(
    settings: Settings,
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], float] = time.time,
) -> list[Check]:
    """Run every check; Redis gets `timeout_s` in all, whatever its network does."""
    redis = _bounded(
        "redis",
        lambda: check_redis(settings.redis_url, settings.input_streams, timeout_s, clock),
        timeout_s,
        "find out why the server does not answer; REDIS_URL says which one is meant",
    )
    device = _bounded(
        "device",
        lambda: iter([check_device(settings.device)]),
        _DEVICE_TIMEOUT_S,
        "find out why importing torch takes so long",
    )
    local = [
        check_secret(settings),
        check_policy(settings.policy),
        check_catalog(settings.catalog_path, optional=settings.catalog_is_optional),
        check_http(settings.http_host, settings.http_port),
        check_state_dir(settings.state_dir),
    ]
    return [*redis(), *local, *device()]


def has_failed(checks: Sequence[Check]) -> bool:
    """Whether any check failed."""
    return any(check.status is Status.FAILED for check in checks)


def checks_table(checks: Sequence[Check]) -> Table:
    """The findings as a table."""
    colors = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "red"}
    table = Table(title="Doctor", title_justify="left", show_lines=False)
    for column in ("Check", "Status", "Found", "How to mend it"):
        table.add_column(column, overflow="fold")
    for check in checks:
        status = f"[{colors[check.status]}]{check.status.value}[/]"
        detail, mend = (text.replace("[", "\\[") for text in (check.detail, check.mend))
        table.add_row(check.name, status, detail, mend)
    return table


def checks_json(checks: Sequence[Check]) -> str:
    """The findings as JSON."""
    report = {"ok": not has_failed(checks), "checks": [asdict(check) for check in checks]}
    return json.dumps(report, indent=2)


def check_redis(
    url: str, streams: Sequence[str], timeout_s: float, clock: Callable[[], float]
) -> Iterator[Check]:
    """Reachability, version, cluster, clock, eviction, persistence; stops where the server does."""
    mend = f"start a Redis or Valkey server there, or point REDIS_URL elsewhere ({redacted(url)})"
    client = Redis.from_url(
        url,
        protocol=2,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )
    with client:
        try:
            info: dict[str, Any] = client.info()
            seconds, microseconds = client.time()
            clustered = bool(info.get("cluster_enabled"))
            cluster = [check_cluster(client, streams)] if clustered else []
        except (RedisError, OSError) as error:
            yield Check("redis", Status.FAILED, redacted(f"{error}"), mend)
            return
        ahead_s = clock() - (seconds + microseconds / 1e6)
    yield Check("redis", Status.OK, f"answers at {redacted(url)}")
    yield check_version(info)
    yield from cluster
    yield check_clock(ahead_s)
    yield check_eviction(info)
    yield check_persistence(info)


def check_version(info: dict[str, Any]) -> Check:
    """The server has the stream commands in use."""
    version = str(info.get("redis_version", ""))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    name = f"valkey {info['valkey_version']}" if "valkey_version" in info else f"redis {version}"
    if numbers < _MIN_VERSION:
        return Check(
            "redis version", Status.FAILED, name, "upgrade to Redis 6.2 or later, or Valkey"
        )
    return Check("redis version", Status.OK, name)


def check_cluster(client: Redis, streams: Sequence[str]) -> Check:
    """All that one decision touches lies in one slot, and this server answers for every slot."""
    if not tag_in(streams[0]):
        mend = "set OONA_PARTITIONS to 2 or more, for trainers too: one partition has no hash tag"
        return Check("redis cluster", Status.FAILED, "cluster mode with one partition", mend)
    try:
        for stream in streams:
            client.exists(stream)
    except ResponseError as error:
        mend = "point REDIS_URL at what answers for all slots: redirections are not followed"
        return Check("redis cluster", Status.FAILED, f"{error}", mend)
    return Check("redis cluster", Status.OK, "answers for every partition")


def check_clock(ahead_s: float) -> Check:
    """Our clock agrees with the server's; commands carry ours, packet ages the server's."""
    detail = f"{ahead_s:+.3f} s against the server"
    mend = "synchronise the clocks of this host and the Redis host (NTP)"
    if abs(ahead_s) > _CLOCK_FAIL_S:
        return Check("clock", Status.FAILED, detail, mend)
    if abs(ahead_s) > _CLOCK_WARN_S:
        return Check("clock", Status.WARNING, detail, mend)
    return Check("clock", Status.OK, detail)


def check_eviction(info: dict[str, Any]) -> Check:
    """The server does not throw away streams or run states when memory runs short."""
    policy = str(info.get("maxmemory_policy", "unknown"))
    limit_bytes = int(info.get("maxmemory", 0))
    detail = f"{policy}, maxmemory {limit_bytes or 'unlimited'}"
    if policy == "noeviction":
        return Check("redis eviction", Status.OK, detail)
    return Check(
        "redis eviction",
        Status.WARNING,
        detail,
        "set maxmemory-policy noeviction: eviction loses packets and run states silently",
    )


def check_persistence(info: dict[str, Any]) -> Check:
    """A crash of the server does not forget streams and run states."""
    if int(info.get("aof_enabled", 0)):
        return Check("redis persistence", Status.OK, "append-only file on")
    return Check(
        "redis persistence",
        Status.WARNING,
        "append-only file off",
        "set appendonly yes if packets, reports and run states must survive a server crash",
    )


def check_secret(settings: Settings) -> Check:
    """There is a secret to sign and verify with; its length was checked when it was read."""
    if settings.secret is None and settings.require_signatures:
        return Check(
            "secret",
            Status.FAILED,
            "not set",
            "set ESPER_LEYLINE_SECRET or ESPER_LEYLINE_SECRET_FILE, at least 16 bytes",
        )
    if not settings.require_signatures:
        return Check(
            "secret",
            Status.WARNING,
            "signatures are not required: anyone on the bus can forge packets",
            "set ESPER_LEYLINE_SECRET and TAMIYO_REQUIRE_SIGNATURES=true",
        )
    return Check(
        "secret", Status.OK, "set" + (", with a previous one" * bool(settings.secret_previous))
    )


def check_device(device: str) -> Check:
    """The device can be used."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("device", Status.FAILED, f"torch: {error}", "install torch for this machine")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"torch {torch.__version__}, {count} CUDA device{'s' * (count != 1)}"
    wanted = int(device.partition(":")[2] or 0) + 1 if device.startswith("cuda") else 0
    if wanted > count:
        mend = "set TAMIYO_DEVICE=auto or cpu, or give the container a GPU and its driver"
        return Check("device", Status.FAILED, f"{device} is not there: {found}", mend)
    chosen = device if device != "auto" else "cuda" if count else "cpu"
    return Check("device", Status.OK, f"{chosen}: {found}")


def check_policy(policy: str | None) -> Check:
    """The policy to start with can be read; what is in it is checked when it loads."""
    if policy is None:
        return Check("policy", Status.OK, "last known good, else untrained")
    if policy in ("untrained", "bootstrap"):
        return Check("policy", Status.OK, policy)
    try:
        with Path(policy).open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        mend = "set TAMIYO_POLICY to a checkpoint that can be read, untrained or bootstrap"
        return Check("policy", Status.FAILED, f"{policy}: {error.strerror}", mend)
    if empty:
        mend = "copy the checkpoint again: the file is empty"
        return Check("policy", Status.FAILED, f"{policy}: empty file", mend)
    return Check("policy", Status.OK, policy)


def check_catalog(path: Path, *, optional: bool = False) -> Check:
    """The blueprint catalogue can be read; the service runs without one."""
    if not path.exists():
        detail = f"{path}: no such file, so no blueprints"
        if optional:
            detail = "none is configured, so blueprints that trainers name are used as they are"
        mend = f"make one with `tamiyo catalog init {path}`, or point URZA_DATABASE_URL at one"
        return Check("catalogue", Status.WARNING, detail, mend)
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            (count,) = database.execute("SELECT count(*) FROM blueprints").fetchone()
    except sqlite3.Error as error:
        mend = "point URZA_DATABASE_URL at a readable SQLite file with a table `blueprints`"
        return Check("catalogue", Status.FAILED, f"{path}: {error}", mend)
    if not count:
        mend = f"add to it with `tamiyo catalog add {path} BLUEPRINT_ID`"
        return Check("catalogue", Status.WARNING, f"{path}: no blueprints", mend)
    return Check("catalogue", Status.OK, f"{path}: {count} blueprint{'s' * (count != 1)}")


def check_http(host: str, port: int) -> Check:
    """The port of metrics and health is free."""
    try:
        open_server(host, port, {}).server_close()
    except ConfigurationError as error:
        mend = "stop what uses it (or is it this service, running?), or set TAMIYO_HTTP_PORT"
        return Check("http port", Status.FAILED, str(error), mend)
    return Check("http port", Status.OK, f"{host}:{port} is free")


def check_state_dir(path: Path) -> Check:
    """Policies and vocabularies can be kept; nothing is left behind."""
    mend = "set TAMIYO_STATE_DIR to a folder that this user may write to"
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        return Check("state folder", Status.FAILED, f"{nearest}: not a folder", mend)
    try:
        # Asking for permission bits says yes to root on a read-only file system.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Check("state folder", Status.FAILED, f"{nearest}: {error.strerror}", mend)
    return Check(
        "state folder", Status.OK, str(path) if nearest == path else f"{path}: will be made"
    )


def _bounded(
    name: str, examination: Examination, timeout_s: float, mend: str
) -> Callable[[], list[Check]]:
    """Start an examination on its own thread; the result gives what it found in time.

    Name lookups and imports take no timeout of their own, so one that hangs is left behind on
    its daemon thread.
    """
    found: list[Check] = []
    deadline_s = time.monotonic() + timeout_s

    def run() -> None:
        try:
            found.extend(examination())
        except Exception as error:  # an examination that breaks off is a finding too
            detail = redacted(f"{type(error).__name__}: {error}")
            found.append(Check(name, Status.FAILED, detail, mend))

    thread = threading.Thread(target=run, name=f"doctor-{name}", daemon=True)
    thread.start()

    def collect() -> list[Check]:
        thread.join(max(0.0, deadline_s - time.monotonic()))
        if thread.is_alive():
            late = Check(name, Status.FAILED, f"no answer within {timeout_s:g} s", mend)
            return [*found, late]
        return found

    return collect
