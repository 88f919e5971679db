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
from support.pages import DOCS, ROOT, commands, serve_as_written, shell
from support.served_process import SECRET, command_for, serve, until

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.client import State, from_environment
from tamiyo_svc.client.seeds.blueprints import BLUEPRINTS

pytestmark = [pytest.mark.redis, pytest.mark.timeout(900)]

SHOWN = {
    "operator-guide.md": (
        "redis",
        "next-1",
        "oona.normal",
        "run-1",
        "policy_untrained",
        "missing_signature",
        "my-adapter",
    ),
    "getting-started.md": ("tamiyo ", "packets answered in time", "oona.normal", "plain-1"),
}
"""What the output of a page's commands must contain."""


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_the_commands_of_a_page_work_one_after_the_other(name: str, tmp_path: Path) -> None:
    page = DOCS / name
    assert commands(page)
    service_folder, folder = tmp_path / "service", tmp_path / "operator"
    service_folder.mkdir()
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
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


def is_answered(environment: dict[str, str], step: int) -> bool:
    """Whether a trainer with these variables gets a command that it can verify."""
    with from_environment(f"run-{step}", environment) as trainer:
        trainer.publish(State(training_loss=0.7), step)
        return trainer.wait(step, 1.0) is not None


def test_a_service_starts_with_the_lines_of_getting_started(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with EmbeddedRedis() as redis, serve_as_written(redis.url, tmp_path, path) as service:
        secret = str(tmp_path / "leyline.secret")
        trainer = {"REDIS_URL": redis.url, "ESPER_LEYLINE_SECRET_FILE": secret}
        assert is_answered(trainer, 1)
        until(lambda: service.metric("tamiyo_catalog_blueprints") == len(BLUEPRINTS), 60.0)


def test_a_key_is_rotated_as_written_without_losing_a_command(tmp_path: Path) -> None:
    for name in ("leyline.secret", "leyline.new"):
        (tmp_path / name).write_text(f"the contents of {name}")
    steps = [{"ESPER_LEYLINE_SECRET_FILE": "leyline.secret"}]
    steps += [
        dict(re.findall(r"(\w+)=(\S+?)(?:;|\s|$)", line))
        for line in shell(DOCS / "operator-guide.md", "Rotating the key")
    ]
    assert len(steps) == 4
    variables = [
        {name: str(tmp_path / file) for name, file in environment.items()} for environment in steps
    ]
    with EmbeddedRedis() as redis:
        for place, service in enumerate(variables):
            with serve(redis.url, tmp_path, service):
                # Trainers are a step behind, at the same one, or one ahead.
                for other, trainer in enumerate(variables):
                    answered = is_answered({"REDIS_URL": redis.url, **trainer}, 10 * place + other)
                    assert answered == (abs(place - other) <= 1), (place, other)
