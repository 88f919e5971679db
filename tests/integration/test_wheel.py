"""The steps of the image, without a container engine: wheel, empty environment, constraints."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from support.served_process import command_for, serve

from tamiyo_svc.adapters.embedded import EmbeddedRedis

pytestmark = [pytest.mark.redis, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


def run(*command: str, cwd: Path) -> None:
    # The new environment must not find this one's packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_installed_wheel_serves_a_packet_in_an_empty_environment(tmp_path: Path) -> None:
    dist, environment, folder = (tmp_path / name for name in ("dist", "environment", "service"))
    folder.mkdir()
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)),
        str(ROOT),
        cwd=tmp_path,
    )
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ("py.typed", "adapters/oona/commit.lua", "leyline/leyline.proto"):
        assert f"tamiyo_svc/{needed}" in names
    assert all(name.startswith(("tamiyo_svc/", "tamiyo_svc-")) for name in names)

    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(
        *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("-c", str(CONSTRAINTS), str(wheel)),
        cwd=tmp_path,
    )
    with (
        EmbeddedRedis() as redis,
        serve(redis.url, folder, command=(str(environment / "bin" / "tamiyo"),)) as service,
    ):
        command = command_for(redis.url, "run-1", 1)
        assert command.issued_by == "tamiyo"
        assert service.metric('tamiyo_packets_total{outcome="decided"}') == 1
