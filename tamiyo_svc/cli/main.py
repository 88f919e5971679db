"""The `tamiyo` command."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tamiyo_svc import __version__
from tamiyo_svc.errors import ConfigurationError

if TYPE_CHECKING:
    from tamiyo_svc.service.settings import Settings

# Everything heavier than typer is imported by the command that needs it.

_CONFIGURATION_EXIT = 2

app = typer.Typer(
    name="tamiyo",
    help="Strategic controller for morphogenetic training: one signed command per step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="The settings and where they come from.", no_args_is_help=True)
app.add_typer(config_app, name="config")

RedisUrl = Annotated[str | None, typer.Option("--redis-url", help="REDIS_URL")]
Device = Annotated[str | None, typer.Option("--device", help="TAMIYO_DEVICE")]
Policy = Annotated[str | None, typer.Option("--policy", help="TAMIYO_POLICY")]
HttpPort = Annotated[str | None, typer.Option("--http-port", help="TAMIYO_HTTP_PORT")]
LogLevelFlag = Annotated[str | None, typer.Option("--log-level", help="TAMIYO_LOG_LEVEL")]
LogFormatFlag = Annotated[str | None, typer.Option("--log-format", help="TAMIYO_LOG_FORMAT")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="VARIABLE=VALUE", help="Any other setting; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def serve(
    redis_url: RedisUrl = None,
    device: Device = None,
    policy: Policy = None,
    http_port: HttpPort = None,
    log_level: LogLevelFlag = None,
    log_format: LogFormatFlag = None,
    assignments: Assignments = None,
) -> None:
    """Answer state packets until stopped."""
    settings = _settings(
        assignments,
        redis_url=redis_url,
        device=device,
        policy=policy,
        http_port=http_port,
        log_level=log_level,
        log_format=log_format,
    )
    module = importlib.import_module("tamiyo_svc.cli.serve")
    raise typer.Exit(module.serve(settings) or 0)


@app.command()
def demo(
    report: Annotated[
        Path, typer.Option("--report", help="Where the HTML report of the run goes.")
    ] = Path("tamiyo-demo.html"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the training run.")] = 7,
) -> None:
    """Train a small network beside a private service and show every decision."""
    module = importlib.import_module("tamiyo_svc.cli.demo")
    raise typer.Exit(module.demo(report=report, seed=seed) or 0)


@app.command()
def doctor(
    redis_url: RedisUrl = None,
    device: Device = None,
    policy: Policy = None,
    http_port: HttpPort = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Check what serving needs and say how to mend what fails; exit 1 if anything does."""
    from tamiyo_svc.cli.doctor import checks_json, checks_table, examine, has_failed

    settings = _settings(
        assignments, redis_url=redis_url, device=device, policy=policy, http_port=http_port
    )
    checks = examine(settings)
    if as_json:
        typer.echo(checks_json(checks))
    else:
        _print(checks_table(checks))
    raise typer.Exit(1 if has_failed(checks) else 0)


@config_app.command("show")
def config_show(
    redis_url: RedisUrl = None,
    device: Device = None,
    policy: Policy = None,
    http_port: HttpPort = None,
    log_level: LogLevelFlag = None,
    log_format: LogFormatFlag = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Print every value and where it came from; secrets are redacted."""
    from tamiyo_svc.cli.config import settings_json, settings_table

    settings = _settings(
        assignments,
        redis_url=redis_url,
        device=device,
        policy=policy,
        http_port=http_port,
        log_level=log_level,
        log_format=log_format,
    )
    if as_json:
        typer.echo(settings_json(settings))
    else:
        _print(settings_table(settings))


@config_app.command("docs")
def config_docs() -> None:
    """Print the reference page of every setting."""
    from tamiyo_svc.cli.config import settings_markdown

    typer.echo(settings_markdown(), nl=False)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    typer.echo(json.dumps({"version": __version__}) if as_json else f"tamiyo {__version__}")


def main() -> None:
    """Run the command line; a configuration error is one line on stderr and exit code 2."""
    try:
        app()
    except ConfigurationError as error:
        typer.echo(f"tamiyo: {error}", err=True)
        sys.exit(_CONFIGURATION_EXIT)


def _settings(assignments: list[str] | None, **flags: str | None) -> Settings:
    from tamiyo_svc.service.settings import load_settings

    return load_settings(**_assigned(assignments or []), **flags)


def _assigned(assignments: list[str]) -> dict[str, str]:
    """The `--set` flags by variable."""
    values = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise ConfigurationError(f"--set: got {assignment!r}, takes VARIABLE=VALUE")
        if name.startswith("ESPER_LEYLINE_SECRET") and not name.endswith("_FILE"):
            # Command lines are visible to every user of the machine.
            raise ConfigurationError(f"--set: takes no secrets, put {name} in the environment")
        values[name] = value
    return values


def _print(table: object) -> None:
    from rich.console import Console

    Console().print(table)


if __name__ == "__main__":
    main()
