"""The `tamiyo` command."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tamiyo_svc import __version__
from tamiyo_svc.cli.bus_commands import register
from tamiyo_svc.cli.catalog_commands import catalog_app
from tamiyo_svc.cli.options import (
    AsJson,
    Assignments,
    Device,
    HttpPort,
    LogFormatFlag,
    LogLevelFlag,
    Policy,
    RedisUrl,
    assigned,
    print_rich,
    settings_from,
)
from tamiyo_svc.cli.policy_commands import keys_app, policy_app
from tamiyo_svc.errors import BusError, ConfigurationError

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
app.add_typer(catalog_app, name="catalog")
app.add_typer(policy_app, name="policy")
app.add_typer(keys_app, name="keys")

register(app)


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
    settings = settings_from(
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
    for name in ("sklearn", "matplotlib"):
        if find_spec(name) is None:
            raise ConfigurationError(f"the demo needs {name}: pip install 'tamiyo-svc[demo]'")
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

    settings = settings_from(
        assignments, redis_url=redis_url, device=device, policy=policy, http_port=http_port
    )
    checks = examine(settings)
    if as_json:
        typer.echo(checks_json(checks))
    else:
        print_rich(checks_table(checks))
    raise typer.Exit(1 if has_failed(checks) else 0)


@app.command()
def explain(
    command_id: Annotated[str, typer.Argument(help="Id of the command.", metavar="COMMAND_ID")],
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Show why a command is what it is, from what is on the bus; exit 1 if nothing of it is."""
    from tamiyo_svc.cli.explain import explanation_json, explanation_view, find

    settings = settings_from(assignments, redis_url=redis_url)
    explanation = find(settings, command_id)
    if explanation is None:
        typer.echo(
            f"tamiyo: nothing of command {command_id} is on the bus; entries are kept for "
            f"{settings.message_ttl_ms / 60_000:g} minutes (OONA_MESSAGE_TTL_MS)",
            err=True,
        )
        raise typer.Exit(1)
    if as_json:
        typer.echo(explanation_json(explanation))
    else:
        print_rich(explanation_view(explanation))


@app.command()
def reports(
    run_id: Annotated[str, typer.Option("--run", help="Only of this training run.")] = "",
    outcome: Annotated[
        str, typer.Option("--outcome", help="Only success, neutral, regression or aborted.")
    ] = "",
    since: Annotated[
        str, typer.Option("--since", help="Only since then: 15m, 2h, 1d or an ISO 8601 time.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", help="Only the newest; 0 for all.", min=0)] = 0,
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """List or export the field reports that are on the bus."""
    from datetime import UTC, datetime

    from tamiyo_svc.cli import reports as listing

    if as_json and as_csv:
        raise ConfigurationError("--csv: got --json as well, takes one of the two")
    found = listing.read_reports(
        settings_from(assignments, redis_url=redis_url),
        run_id=run_id,
        outcome=listing.check_outcome(outcome) if outcome else "",
        since=listing.parse_since(since, datetime.now(UTC)) if since else None,
        limit=limit,
    )
    if as_json:
        typer.echo(listing.reports_json(found))
    elif as_csv:
        typer.echo(listing.reports_csv(found), nl=False)
    else:
        print_rich(listing.reports_table(found))


@app.command()
def top(
    redis_url: RedisUrl = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Most runs shown.")] = 20,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and stop.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--svg", help="Write one look to this SVG file and stop.")
    ] = None,
    assignments: Assignments = None,
) -> None:
    """Show runs, their newest commands and why, replicas and streams, as they change."""
    from tamiyo_svc.cli.top import top as show

    settings = settings_from(assignments, redis_url=redis_url)
    raise typer.Exit(show(settings, rows=rows, interval_s=interval_s, once=once, picture=picture))


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

    settings = settings_from(
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
        print_rich(settings_table(settings))


@app.command(hidden=True)
def docs(
    folder: Annotated[Path, typer.Argument(help="The folder of the documentation.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing, exit 1 if stale.")] = False,
) -> None:
    """Write the pages of the documentation that are generated."""
    from tamiyo_svc.cli.reference import stale_pages, write_pages

    if not check:
        write_pages(folder)
    elif stale := stale_pages(folder):
        typer.echo(f"not what `tamiyo docs {folder}` writes: {', '.join(stale)}", err=True)
        raise typer.Exit(1)


@config_app.command("docs")
def config_docs() -> None:
    """Print the reference page of every setting."""
    from tamiyo_svc.cli.config import settings_markdown

    typer.echo(settings_markdown(), nl=False)


@app.command()
def bench(
    trainers: Annotated[int, typer.Option("--trainers", help="Virtual trainers.", min=1)] = 1,
    rate: Annotated[
        float, typer.Option("--rate", help="Decisions a second of all; 0 is a closed loop.", min=0)
    ] = 50.0,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to measure.")] = 60.0,
    warm_up: Annotated[float, typer.Option("--warm-up", help="Seconds left out before.")] = 5.0,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds in a packet.", min=0)] = 4,
    catalog: Annotated[
        Path | None, typer.Option("--catalog", help="Blueprint catalogue; default: the demo's.")
    ] = None,
    blueprints: Annotated[
        list[str] | None, typer.Option("--blueprint", help="Candidate the packets name.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="A Redis to use; default: a private one.")
    ] = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Load a service of its own over a real Redis and print what that showed."""
    from tamiyo_svc.cli.bench import Load
    from tamiyo_svc.cli.bench import bench as run_bench

    load = Load(trainers, rate, seconds, warm_up, seeds, tuple(blueprints or ()))
    raise typer.Exit(run_bench(load, assigned(assignments or []), redis_url, catalog, as_json))


@app.command("compile")
def compile_engine(
    into: Annotated[
        Path | None, typer.Option("--into", help="Folder; default: where every service looks.")
    ] = None,
) -> None:
    """Compile the network's CPU form for every processor level, for images without a compiler."""
    from tamiyo_svc.adapters.compiler import SHARED_FOLDER, compile_all

    for path in compile_all(into or SHARED_FOLDER):
        typer.echo(path)


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
    except BusError as error:
        typer.echo(f"tamiyo: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
