"""Health and metrics over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping

import pytest

from tamiyo_svc.adapters.http import HealthServer
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.errors import ConfigurationError

PATHS = ["/livez", "/readyz", "/startupz"]


class FakeProbes:
    """Probes that answer what they are told to."""

    def __init__(self) -> None:
        self.checks: dict[str, dict[str, str | None]] = {path: {"all": None} for path in PATHS}
        self.broken = False

    def liveness(self) -> Mapping[str, str | None]:
        if self.broken:
            raise RuntimeError("secret detail")
        return self.checks["/livez"]

    def readiness(self) -> Mapping[str, str | None]:
        return self.checks["/readyz"]

    def startup(self) -> Mapping[str, str | None]:
        return self.checks["/startupz"]


@pytest.fixture
def probes() -> FakeProbes:
    return FakeProbes()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def server(metrics: Metrics, probes: FakeProbes) -> Iterator[HealthServer]:
    with HealthServer("127.0.0.1", 0, metrics, probes) as server:
        yield server


def fetch(
    server: HealthServer, path: str, method: str = "GET"
) -> tuple[int, Mapping[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()
    finally:
        connection.close()


def test_metrics_are_served_as_prometheus_text(server: HealthServer, metrics: Metrics) -> None:
    metrics.late_result()
    status, headers, body = fetch(server, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "tamiyo_late_results_total 1.0" in body


@pytest.mark.parametrize("path", PATHS)
def test_a_probe_is_200_when_all_its_checks_hold(server: HealthServer, path: str) -> None:
    status, _, body = fetch(server, path)
    assert (status, body) == (200, "ok\n")


@pytest.mark.parametrize("path", PATHS)
def test_a_failed_check_fails_its_own_probe_alone(
    server: HealthServer, probes: FakeProbes, path: str
) -> None:
    probes.checks[path] = {"fine": None, "redis": "not seen for 12 s"}
    assert {each: fetch(server, each)[0] for each in PATHS} == {
        each: 503 if each == path else 200 for each in PATHS
    }
    assert fetch(server, path)[2] == "redis: not seen for 12 s\n"


def test_a_probe_recovers(server: HealthServer, probes: FakeProbes) -> None:
    probes.checks["/readyz"] = {"redis": "gone"}
    assert fetch(server, "/readyz")[0] == 503
    probes.checks["/readyz"] = {"redis": None}
    assert fetch(server, "/readyz")[0] == 200


def test_verbose_gives_every_check_as_json(server: HealthServer, probes: FakeProbes) -> None:
    probes.checks["/readyz"] = {"policy": None, "redis": "gone"}
    status, headers, body = fetch(server, "/readyz?verbose")
    assert status == 503
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == {
        "ok": False,
        "checks": {
            "policy": {"ok": True, "reason": None},
            "redis": {"ok": False, "reason": "gone"},
        },
    }


def test_a_probe_that_raises_is_a_failed_probe(server: HealthServer, probes: FakeProbes) -> None:
    probes.broken = True
    status, _, body = fetch(server, "/livez")
    assert (status, body) == (503, "probe: RuntimeError while checking\n")


def test_head_has_the_status_and_no_body(server: HealthServer) -> None:
    status, headers, body = fetch(server, "/readyz", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, "3", "")


@pytest.mark.parametrize("path", ["/", "/metricsx", "/livez/", "/../etc/passwd"])
def test_other_paths_are_not_found(server: HealthServer, path: str) -> None:
    assert fetch(server, path)[0] == 404


def test_other_methods_are_refused(server: HealthServer) -> None:
    assert fetch(server, "/metrics", "POST")[0] == 501


def test_a_client_that_never_finishes_holds_up_nobody(server: HealthServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as silent:
        silent.sendall(b"GET /livez HTT")
        assert fetch(server, "/livez")[0] == 200


def test_garbage_is_answered_with_an_error(server: HealthServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"\x00\xff\x00\r\n\r\n")
        assert b"400" in client.recv(4096)


def test_a_taken_port_names_the_variable(
    server: HealthServer, metrics: Metrics, probes: FakeProbes
) -> None:
    second = HealthServer("127.0.0.1", server.port, metrics, probes)
    with pytest.raises(ConfigurationError, match=rf"^TAMIYO_HTTP_PORT: .*:{server.port} "), second:
        pass
    assert fetch(server, "/livez")[0] == 200


def test_an_address_that_is_not_ours_is_a_configuration_error(
    metrics: Metrics, probes: FakeProbes
) -> None:
    elsewhere = HealthServer("192.0.2.1", 0, metrics, probes)
    with pytest.raises(ConfigurationError, match="TAMIYO_HTTP_HOST"), elsewhere:
        pass


def test_closing_frees_the_port(metrics: Metrics, probes: FakeProbes) -> None:
    with HealthServer("127.0.0.1", 0, metrics, probes) as first:
        port = first.port
        assert fetch(first, "/livez")[0] == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    with HealthServer("127.0.0.1", port, metrics, probes) as second:
        assert fetch(second, "/livez")[0] == 200


def test_closing_does_not_wait_for_an_open_connection(metrics: Metrics, probes: FakeProbes) -> None:
    with HealthServer("127.0.0.1", 0, metrics, probes) as server:
        silent = socket.create_connection(("127.0.0.1", server.port))
        silent.sendall(b"GET /livez HTT")
        assert fetch(server, "/livez")[0] == 200
    silent.close()
