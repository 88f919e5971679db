"""`tamiyo serve` as an operator runs it: bad starts, signals, and a bare script as its client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from support.bus import CATALOG, SECRET, as_fields, state_packet
from support.policies import checkpoint

from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring

EXAMPLE = Path(__file__).parents[2] / "examples" / "bare_packet.py"
UNUSED_PORT = 1

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(redis_url: str, tmp_path: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    return {
        **kept,
        "REDIS_URL": redis_url,
        "ESPER_LEYLINE_SECRET": SECRET,
        "URZA_DATABASE_URL": f"sqlite:///{CATALOG}",
        "TAMIYO_STATE_DIR": str(tmp_path / "state"),
        "TAMIYO_HTTP_HOST": "127.0.0.1",
        "TAMIYO_HTTP_PORT": str(free_port()),
        "TAMIYO_POLICY": "bootstrap",
        "TAMIYO_STEP_TIMEOUT_MS": "2000",
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tamiyo_svc.cli.main", *arguments]


@contextmanager
def serving(environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command("serve"), env=dict(environment), stdout=sink, stderr=sink
        )
    url = f"http://127.0.0.1:{environment['TAMIYO_HTTP_PORT']}/startupz"
    try:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(url, timeout=1):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def bare_packet(environment: Mapping[str, str], loss: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), environment["REDIS_URL"], loss],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bare_script_gets_its_command_and_a_jump_in_loss_pauses(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with (
        serving(environment, tmp_path / "log") as process,
        Redis.from_url(environment["REDIS_URL"]) as redis,
    ):
        assert bare_packet(environment, "0.5").startswith("COMMAND_SEED policy ")
        assert redis.xlen("oona.telemetry") == 1
        assert redis.xlen("oona.emergency") == 0
        assert bare_packet(environment, "0.7").startswith("COMMAND_PAUSE loss_spike ")
        assert redis.xlen("oona.emergency") == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert SECRET not in (tmp_path / "log").read_text()


def test_no_file_is_written_but_the_state(environment: dict[str, str], tmp_path: Path) -> None:
    home, temporary, policy = (tmp_path / name for name in ("home", "temporary", "policy"))
    home.mkdir()
    temporary.mkdir()
    environment |= {"HOME": str(home), "TMPDIR": str(temporary)}
    policy.write_bytes(checkpoint(1.0))
    with serving(environment, tmp_path / "log"):
        assert bare_packet(environment, "0.5").startswith("COMMAND_SEED policy ")
        publish = subprocess.run(
            command("policy", "publish", str(policy)),
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert publish.returncode == 0, publish.stdout
        assert any((tmp_path / "state").iterdir())
        written = [path for folder in (home, temporary) for path in folder.rglob("*")]
    # Torch makes the folder of its compile cache when it is imported.
    assert [path for path in written if path.is_file()] == []


def test_second_signal_exits_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    environment["TAMIYO_DRAIN_TIMEOUT_S"] = "3600"
    packet = as_fields(seal(state_packet("run-1", 1), Keyring(SECRET.encode())))
    with (
        serving(environment, tmp_path / "log") as process,
        Redis.from_url(environment["REDIS_URL"]) as redis,
    ):
        # The packet is delivered, and from then on nothing can be written to answer it. Both come
        # in one read of the server; in a transaction the second would crash Redis 6.2.
        pipeline = redis.pipeline(transaction=False)
        pipeline.xadd("oona.normal", packet)
        pipeline.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
        pipeline.execute()
        try:
            wait_until(lambda: in_flight(environment) == 1)
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT
        finally:
            redis.client_unpause()


def in_flight(environment: Mapping[str, str]) -> float:
    url = f"http://127.0.0.1:{environment['TAMIYO_HTTP_PORT']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    name = "tamiyo_in_flight_packets "
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "named", "hint"),
    [
        ({"ESPER_LEYLINE_SECRET": ""}, "ESPER_LEYLINE_SECRET", "16 bytes"),
        ({"ESPER_LEYLINE_SECRET": "short"}, "ESPER_LEYLINE_SECRET", "16 bytes"),
        ({"REDIS_URL": f"redis://127.0.0.1:{UNUSED_PORT}/0"}, "REDIS_URL", "start a Redis"),
        ({"REDIS_URL": "http://localhost"}, "REDIS_URL", "redis://"),
        ({"TAMIYO_DEVICE": "abacus"}, "TAMIYO_DEVICE", "cuda"),
        ({"TAMIYO_STEP_TIMEOUT_MS": "soon"}, "TAMIYO_STEP_TIMEOUT_MS", "number"),
        ({"TAMIYO_POLICY": "/no/such/policy"}, "TAMIYO_POLICY", "bootstrap"),
        ({"TAMIYO_STATE_DIR": "/proc/nowhere"}, "TAMIYO_STATE_DIR", "write"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_start_is_one_line_that_names_the_setting_and_the_fix(
    environment: dict[str, str], change: dict[str, str], named: str, hint: str
) -> None:
    result = subprocess.run(
        command("serve"),
        env={**environment, **change},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert named in line
    assert hint in line
    assert SECRET not in line


def test_port_in_use_is_named(environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment["TAMIYO_HTTP_PORT"] = str(taken.getsockname()[1])
        result = subprocess.run(
            command("serve"),
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "TAMIYO_HTTP_PORT" in line
