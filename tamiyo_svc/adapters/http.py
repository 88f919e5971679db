"""Metrics and health over HTTP, served from threads of their own."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import Final, Protocol, Self
from urllib.parse import parse_qs, urlsplit

import structlog

from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.errors import ConfigurationError

_REQUEST_TIMEOUT_S: Final = 5.0
_POLL_S: Final = 0.1

Checks = Mapping[str, str | None]
"""Name of a check -> None when it holds, else the reason why not."""


class Probes(Protocol):
    """What the service says about its health.

    Called on HTTP threads: implementations read plain attributes, wait for nothing and leave
    dependencies out of liveness.
    """

    def liveness(self) -> Checks:
        """Whether restarting this process would help."""
        ...

    def readiness(self) -> Checks:
        """Whether this replica takes work now."""
        ...

    def startup(self) -> Checks:
        """Whether it has finished starting."""
        ...


class HealthServer:
    """Serves `/metrics`, `/livez`, `/readyz` and `/startupz`; a context manager.

    A probe answers 200 when all its checks hold, else 503 with the failed ones; `?verbose` gives
    every check as JSON. Port 0 takes a free one, which `port` names once it is open.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, metrics: Metrics, probes: Probes) -> None:
        self._host = host
        self._port = port
        self._routes: dict[str, Callable[[bool], _Answer]] = {
            "/metrics": lambda _: _metrics_answer(metrics),
            "/livez": lambda verbose: _probe_answer(probes.liveness, verbose=verbose),
            "/readyz": lambda verbose: _probe_answer(probes.readiness, verbose=verbose),
            "/startupz": lambda verbose: _probe_answer(probes.startup, verbose=verbose),
        }
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._server.server_address[1] if self._server else self._port

    def __enter__(self) -> Self:
        self._server = open_server(self._host, self._port, self._routes)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="tamiyo-http", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = None


class _Answer:
    """Status, content type and body of a response."""

    __slots__ = ("body", "content_type", "status")

    def __init__(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that never finishes its request must not hold up the shutdown.
    block_on_close = False
    # With port reuse a second replica on the host would silently share our port.
    allow_reuse_port = False

    def __init__(
        self, address: tuple[str, int], routes: Mapping[str, Callable[[bool], _Answer]]
    ) -> None:
        self.address_family = _address_family(address)
        self.routes = routes
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without the reverse name lookup that HTTPServer does, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what broke a request; a client that hung up is its own affair."""
        if not isinstance(sys.exception(), ConnectionError):
            structlog.get_logger().warning("http.request_failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = _REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        answer = self._answer()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self) -> _Answer:
        target = urlsplit(self.path)
        route = self.server.routes.get(target.path)
        if route is None:
            return _text(HTTPStatus.NOT_FOUND, "not found")
        return route("verbose" in parse_qs(target.query, keep_blank_values=True))

    def version_string(self) -> str:
        return "tamiyo"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
        """Scrapes and probes are not worth a line each."""


def open_server(host: str, port: int, routes: Mapping[str, Callable[[bool], _Answer]]) -> _Server:
    """A server that listens on the address.

    Raises:
        ConfigurationError: the address is taken or is none of ours.
    """
    try:
        return _Server((host, port), routes)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(
            f"TAMIYO_HTTP_PORT: cannot listen on {host}:{port} ({reason}), "
            "takes a free port of an address in TAMIYO_HTTP_HOST"
        ) from None


def _address_family(address: tuple[str, int]) -> socket.AddressFamily:
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return found[0][0]


def _metrics_answer(metrics: Metrics) -> _Answer:
    return _Answer(HTTPStatus.OK, metrics.exposition(), metrics.content_type)


def _probe_answer(probe: Callable[[], Checks], *, verbose: bool) -> _Answer:
    try:
        checks = probe()
    except Exception as error:  # a probe that cannot tell is a probe that failed
        checks = {"probe": f"{type(error).__name__} while checking"}
    failed = {name: reason for name, reason in checks.items() if reason is not None}
    status = HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.OK
    if verbose:
        report = {
            "ok": not failed,
            "checks": {
                name: {"ok": reason is None, "reason": reason} for name, reason in checks.items()
            },
        }
        return _Answer(status, json.dumps(report).encode() + b"\n", "application/json")
    lines = [f"{name}: {reason}" for name, reason in failed.items()] or ["ok"]
    return _text(status, "\n".join(lines))


def _text(status: HTTPStatus, text: str) -> _Answer:
    return _Answer(status, text.encode() + b"\n", "text/plain; charset=utf-8")
