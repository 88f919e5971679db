"""The commands in the documentation, run as they stand against a real service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.served_process import SECRET, command_for, serve

from tamiyo_svc.adapters.embedded import EmbeddedRedis

pytestmark = [pytest.mark.redis, pytest.mark.timeout(900)]

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = {
    "operator-guide.md": (
        "redis",
        "next-1",
        "oona.normal",
        "run-1",
        "policy_untrained",
        "missing_signature",
    ),
    "getting-started.md": ("tamiyo ", "oona.normal", "run-1"),
}
"""What the output of a page's commands must contain."""


def commands(page: Path) -> list[str]:
    """The commands of a page, one a line, in order."""
    blocks = re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), page
    return [line.removeprefix("$ ") for line in lines]


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_the_commands_of_a_page_work_one_after_the_other(name: str, tmp_path: Path) -> None:
    page = DOCS / name
    assert commands(page)
    service_folder, folder = tmp_path / "service", tmp_path / "operator"
    service_folder.mkdir()
    folder.mkdir()
    with EmbeddedRedis() as redis, serve(redis.url, service_folder) as service:
        assert command_for(redis.url, "run-1", 1).command_id
        with Redis.from_url(redis.url) as client:
            unsigned: Any = {"payload": b"nobody signed this"}
            client.xadd("oona.normal", unsigned)
        command_for(redis.url, "run-1", 2)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "COLUMNS": "160",
            "OMP_NUM_THREADS": "1",
            "REDIS_URL": redis.url,
            "ESPER_LEYLINE_SECRET": SECRET,
            "TAMIYO_STATE_DIR": str(folder / "state"),
            "TAMIYO_POLICY": "bootstrap",
        }
        output = ""
        for command in commands(page):
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            output += done.stdout
        for word in SHOWN[name]:
            assert word in output
        assert SECRET not in output
        assert service.get("/livez")[0] == 200
