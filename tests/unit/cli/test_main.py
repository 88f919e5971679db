"""The command line: what it prints, how it fails, and how little it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from tamiyo_svc import __version__
from tamiyo_svc.cli.main import main
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.service.settings import VARIABLES, Settings

SECRET = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting from the machine the tests run on."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `tamiyo <arguments>`."""
    monkeypatch.setattr(sys, "argv", ["tamiyo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "version") == 0
    assert capsys.readouterr().out == f"tamiyo {__version__}\n"
    assert run(monkeypatch, "version", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"version": __version__}


@pytest.mark.parametrize("name", ["sklearn", "matplotlib"])
def test_a_demo_without_its_extra_says_which_one(name: str, tmp_path: Path) -> None:
    wall = Path(__file__).parents[2] / "packages" / "wall.py"
    program = tmp_path / "program.py"
    program.write_text("from tamiyo_svc.cli.main import main; main()")
    result = subprocess.run(
        [sys.executable, wall, name, program, "demo"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 2
    expected = f"tamiyo: the demo needs {name}: pip install 'tamiyo-svc[demo]'\n"
    assert result.stderr == expected


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tamiyo_svc.cli import main; "
        "heavy = {'torch', 'numpy', 'redis', 'structlog', 'pydantic', 'google.protobuf'}; "
        "sys.exit(', '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert result.returncode == 0


def test_showing_the_settings_does_not_import_torch() -> None:
    code = (
        "import sys; from tamiyo_svc.cli.config import settings_markdown; settings_markdown(); "
        "sys.exit(int('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_config_show_takes_flags_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAMIYO_HTTP_PORT", "11")
    monkeypatch.setenv("TAMIYO_DEVICE", "cpu")
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", SECRET)
    flags = ("--http-port", "21", "--set", "OONA_READ_COUNT=7")
    assert run(monkeypatch, "config", "show", "--json", *flags) == 0
    output = capsys.readouterr().out
    rows = json.loads(output)
    assert rows["TAMIYO_HTTP_PORT"] == {"value": 21, "from": "flag"}
    assert rows["OONA_READ_COUNT"] == {"value": 7, "from": "flag"}
    assert rows["TAMIYO_DEVICE"] == {"value": "cpu", "from": "environment"}
    assert SECRET not in output


def test_config_show_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "config", "show") == 0
    assert "TAMIYO_HTTP_PORT" in capsys.readouterr().out


def test_config_docs_prints_the_reference_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "config", "docs") == 0
    assert capsys.readouterr().out.startswith("# Settings\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("config", "show", "--http-port", "x"),
            "tamiyo: TAMIYO_HTTP_PORT: got 'x', takes a whole number from 0 to 65535\n",
        ),
        (
            ("serve", "--set", "TAMIYO_DEVICE=tpu"),
            "tamiyo: TAMIYO_DEVICE: got 'tpu', takes auto, cpu, cuda or cuda:<index>\n",
        ),
        (
            ("doctor", "--set", "OONA_BLOCK_MS"),
            "tamiyo: --set: got 'OONA_BLOCK_MS', takes VARIABLE=VALUE\n",
        ),
        (
            ("serve", "--set", f"ESPER_LEYLINE_SECRET={SECRET}"),
            "tamiyo: --set: takes no secrets, put ESPER_LEYLINE_SECRET in the environment\n",
        ),
    ],
)
def test_a_configuration_error_is_one_line_on_stderr_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert run(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", message)


def command_module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    module = ModuleType(f"tamiyo_svc.cli.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_serve_hands_the_settings_over_and_exits_with_its_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Settings] = []

    def serve(settings: Settings) -> int:
        seen.append(settings)
        return 3

    command_module(monkeypatch, "serve").serve = serve  # type: ignore[attr-defined]
    assert run(monkeypatch, "serve", "--device", "cpu", "--log-level", "debug") == 3
    (settings,) = seen
    assert (settings.device, settings.log_level) == ("cpu", "DEBUG")


def test_a_configuration_error_while_serving_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(settings: Settings) -> NoReturn:
        raise ConfigurationError("TAMIYO_HTTP_PORT: taken")

    command_module(monkeypatch, "serve").serve = serve  # type: ignore[attr-defined]
    assert run(monkeypatch, "serve") == 2
    assert capsys.readouterr().err == "tamiyo: TAMIYO_HTTP_PORT: taken\n"


def test_demo_hands_its_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path | None, int]] = []

    def demo(report: Path | None, seed: int) -> None:
        seen.append((report, seed))

    command_module(monkeypatch, "demo").demo = demo  # type: ignore[attr-defined]
    assert run(monkeypatch, "demo", "--report", "run.html", "--seed", "7") == 0
    assert seen == [(Path("run.html"), 7)]
