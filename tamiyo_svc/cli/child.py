"""A service in a process of its own, for the demo and the benchmark."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.error import URLError

from prometheus_client.parser import text_string_to_metric_families

from tamiyo_svc.errors import ConfigurationError

_READY_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 15.0


@contextmanager
def child_service(
    environment: Mapping[str, str], log_file: Path, url: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `tamiyo serve` until the end of the block; `url` is where its health is served.

    Raises:
        ConfigurationError: it does not become ready.
    """
    with log_file.open("wb") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "tamiyo_svc.cli.main", "serve"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _wait_ready(service, url, log_file)
        yield service
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()


def stop(service: subprocess.Popen[bytes]) -> None:
    """End a service as an operator would, and by force if it takes too long."""
    service.send_signal(signal.SIGTERM)
    try:
        service.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()


def scrape(url: str) -> dict[str, float]:
    """Every sample of a service's metrics, as `name{label="value"}`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:  # noqa: S310  loopback
        text = answer.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def outcomes(url: str) -> dict[str, int]:
    """How the service counts its packets to have ended."""
    prefix = 'tamiyo_packets_total{outcome="'
    return {
        name.removeprefix(prefix).removesuffix('"}'): int(value)
        for name, value in scrape(url).items()
        if name.startswith(prefix)
    }


def free_port(preferred: int) -> int:
    """The preferred port if nobody listens there, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigurationError("no free port on 127.0.0.1")


def _wait_ready(service: subprocess.Popen[bytes], url: str, log_file: Path) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/startupz", timeout=1):  # noqa: S310  loopback
                return
        except (URLError, OSError):
            stopped = service.poll() is not None
            if stopped or time.monotonic() > deadline_s:
                lines = log_file.read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "it said nothing"
                raise ConfigurationError(f"the service did not start: {last}") from None
            time.sleep(0.05)
