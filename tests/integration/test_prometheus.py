"""A real Prometheus scrapes the real service, and an outage of Redis reaches the pager."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.served_process import command_for, free_port, serve, until

from tamiyo_svc.adapters.embedded import EmbeddedRedis

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "tamiyo.rules.yml"
OUTAGE_S = 30.0
EXPECTED = {"TamiyoBusUnreachable"}
ALLOWED = EXPECTED | {"TamiyoBreakerOpen"}
"""A breaker may open as well while Redis is away."""


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expression: str) -> list[Any]:
        """An instant vector."""
        text = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self._url}/api/v1/query?{text}", timeout=5) as answer:
            result: list[Any] = json.load(answer)["data"]["result"]
            return result

    def firing(self) -> set[str]:
        """The alerts that fire now."""
        with urllib.request.urlopen(f"{self._url}/api/v1/alerts", timeout=5) as answer:
            alerts = json.load(answer)["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


@contextmanager
def prometheus(target_port: int, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with our rules, looking every second instead of every 15."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    target = {"job_name": "tamiyo", "static_configs": [{"targets": [f"127.0.0.1:{target_port}"]}]}
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [target],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        server = Prometheus(port)
        until(server.ready, 30)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def test_an_outage_of_redis_fires_the_right_alert_and_only_that_and_then_resolves(
    tmp_path: Path,
) -> None:
    with (
        EmbeddedRedis() as redis,
        serve(redis.url, tmp_path) as service,
        prometheus(service.port, tmp_path) as server,
    ):
        assert command_for(redis.url, "run-1", 1).command_id
        decided = 'tamiyo_packets_total{outcome="decided"}'
        until(lambda: [row for row in server.query(decided) if row["value"][1] == "1"], 30)
        assert server.firing() == set()

        alive: list[int] = []
        fired: set[str] = set()
        ready: set[int] = set()
        redis.kill()
        stopped_s = time.monotonic()
        while time.monotonic() - stopped_s < OUTAGE_S:
            alive.append(service.get("/livez")[0])
            ready.add(service.get("/readyz")[0])
            fired |= server.firing()
            time.sleep(0.1)
        assert server.firing() >= EXPECTED
        assert fired <= ALLOWED, fired
        redis.start()

        assert command_for(redis.url, "run-1", 2).command_id
        until(lambda: not server.firing(), 60)
        assert service.get("/readyz")[0] == 200
        alive.append(service.get("/livez")[0])
        assert set(alive) == {200}
        assert len(alive) > 20
        assert 503 in ready
        assert server.query("max_over_time(up[5m]) == 1")
        assert not server.query("min_over_time(up[5m]) == 0")
