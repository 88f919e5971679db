"""What several commands share: their options, the settings those make, and printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tamiyo_svc.errors import ConfigurationError

if TYPE_CHECKING:
    from tamiyo_svc.service.settings import Settings

# Everything heavier than typer is imported by the command that needs it.

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


def settings_from(assignments: list[str] | None, **flags: str | None) -> Settings:
    """The settings with the flags of a command line before everything else.

    Raises:
        ConfigurationError: a flag or a setting is wrong.
    """
    from tamiyo_svc.service.settings import load_settings

    return load_settings(**assigned(assignments or []), **flags)


def assigned(assignments: list[str]) -> dict[str, str]:
    """The `--set` flags by variable.

    Raises:
        ConfigurationError: one is no assignment, or names a secret.
    """
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


def print_rich(renderable: object) -> None:
    """Print a table or whatever else rich lays out."""
    from rich.console import Console

    Console().print(renderable)
