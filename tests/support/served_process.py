"""`tamiyo serve` as a process of its own, and its trainer's side of the bus."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import open_envelope, parse_payload, seal
from tamiyo_svc.leyline.signing import Keyring

SECRET = "a secret for the tests"
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ServiceProcess:
    """A running service."""

    process: subprocess.Popen[bytes]
    port: int
    redis_url: str
    log_file: Path

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a request to the service's HTTP port."""
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, sample: str) -> float:
        """One sample, named as it is exported, labels included."""
        _, text = self.get("/metrics")
        (value,) = re.findall(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        return float(value)


@contextmanager
def serve(
    redis_url: str,
    folder: Path,
    environment: dict[str, str] | None = None,
    command: Sequence[str] = (sys.executable, "-m", "tamiyo_svc.cli.main"),
) -> Iterator[ServiceProcess]:
    """A service that is ready; it is stopped and must stop cleanly at the end.

    `environment` adds to the settings; a secret in a file takes the place of the usual one.
    """
    port = free_port()
    log_file = folder / "service.log"
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TAMIYO_", "OONA_", "ESPER_", "URZA_", "REDIS_"))
    }
    settings = {
        "REDIS_URL": redis_url,
        "ESPER_LEYLINE_SECRET": SECRET,
        "TAMIYO_POLICY": "bootstrap",
        "TAMIYO_STATE_DIR": str(folder / "state"),
        "TAMIYO_HTTP_HOST": "127.0.0.1",
        "TAMIYO_HTTP_PORT": str(port),
        "TAMIYO_STEP_TIMEOUT_MS": "2000",
        "TAMIYO_STATE_MAX_AGE_MS": "20000",
        "OMP_NUM_THREADS": "1",
    }
    settings |= environment or {}
    if "ESPER_LEYLINE_SECRET_FILE" in settings:
        del settings["ESPER_LEYLINE_SECRET"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "serve"],
            env={**inherited, **settings},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    service = ServiceProcess(process, port, redis_url, log_file)
    try:
        until(lambda: started(service), START_TIMEOUT_S)
        yield service
        process.terminate()
        assert process.wait(30) == 0, log_file.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def started(service: ServiceProcess) -> bool:
    """Whether the service has started.

    Raises:
        AssertionError: it has ended instead.
    """
    assert service.process.poll() is None, service.log_file.read_text()
    try:
        return service.get("/startupz")[0] == 200
    except OSError:
        return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Any, timeout_s: float, interval_s: float = 0.05) -> Any:
    """Ask until the answer is true; what it then is."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(interval_s)
    return found


def command_for(redis_url: str, run_id: str, step: int, timeout_s: float = 20.0) -> Any:
    """Publish a packet as a trainer does and wait for the verified command."""
    keyring = Keyring(SECRET.encode())
    reply_to = f"oona.commands.{run_id}"
    packet = leyline.SystemStatePacket(
        version=1,
        training_run_id=run_id,
        packet_id=f"{run_id}-{step}",
        global_step=step,
        validation_loss=0.5,
        training_loss=0.5,
        timestamp_ns=time.time_ns(),
    )
    packet.seed_states.add(seed_id="seed-0", stage=leyline.SEED_STAGE_DORMANT)
    with Redis.from_url(redis_url, protocol=2) as redis:
        fields: Any = seal(packet, keyring, {"reply_to": reply_to}).fields()
        redis.xadd("oona.normal", fields)

        def answer() -> Any:
            entries: Any = redis.xrange(reply_to)
            for _, stored in entries:
                command: Any = parse_payload(open_envelope(stored, keyring))
                if command.annotations["packet_id"] == packet.packet_id:
                    assert keyring.verify_command(command)
                    return command
            return None

        return until(answer, timeout_s)
