"""The command lines of what an operator does on the bus: look, record, replay, mend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tamiyo_svc.cli.options import (
    AsJson,
    Assignments,
    Policy,
    RedisUrl,
    print_rich,
    settings_from,
)

# Everything heavier than typer is imported by the command that needs it.

stream_app = typer.Typer(help="The streams and who reads them.", no_args_is_help=True)
dlq_app = typer.Typer(help="Dead letters: what could not be processed.", no_args_is_help=True)

Since = Annotated[
    str | None, typer.Option("--since", help="Only since then: 90s, 5m, 2h, 1d or an entry id.")
]
Reason = Annotated[str | None, typer.Option("--reason", help="Only letters with this reason.")]
Origin = Annotated[str | None, typer.Option("--stream", help="Only letters from this stream.")]
Ids = Annotated[list[str] | None, typer.Argument(help="Ids of letters.", metavar="ID")]
Everything = Annotated[bool, typer.Option("--all", help="Every letter there is.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without this it is only said.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `tamiyo` command."""
    app.add_typer(stream_app, name="stream")
    app.add_typer(dlq_app, name="dlq")
    app.command("tail")(tail)
    app.command("capture")(capture)
    app.command("replay")(replay)


@stream_app.command("status")
def stream_status(
    redis_url: RedisUrl = None, assignments: Assignments = None, as_json: AsJson = False
) -> None:
    """Show length, lag, pending entries and consumers of every stream, and what is wrong."""
    from tamiyo_svc.cli.stream import status

    _show(status(settings_from(assignments, redis_url=redis_url), as_json=as_json))


def tail(
    streams: Annotated[
        list[str] | None,
        typer.Option("--stream", help="This stream; repeatable. Default: all but policies."),
    ] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Only of this run.")] = None,
    type_part: Annotated[
        str | None, typer.Option("--type", help="Only types with this in their name: command ...")
    ] = None,
    since: Since = None,
    newest: Annotated[
        int, typer.Option("-n", "--lines", help="How many, without --since.", min=0)
    ] = 10,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes.")] = False,
    output: Annotated[str, typer.Option("-o", "--output", help="text or json.")] = "text",
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
) -> None:
    """Print what passes over the bus, decoded; what does not verify is marked."""
    from tamiyo_svc.cli import tail as command

    wanted = command.Wanted(tuple(streams or ()), run_id, type_part, since, newest)
    command.tail(
        settings_from(assignments, redis_url=redis_url),
        wanted,
        command.output_format(output),
        follow=follow,
        show=typer.echo,
    )


@dlq_app.command("ls")
def dlq_ls(
    reason: Reason = None,
    stream: Origin = None,
    since: Since = None,
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the oldest first."""
    from tamiyo_svc.cli.dlq import Selection, listed

    selection = Selection(reason=reason, stream=stream, since=since)
    settings = settings_from(assignments, redis_url=redis_url)
    _show(listed(settings, selection, as_json=as_json))


@dlq_app.command("show")
def dlq_show(
    entry_id: Annotated[str, typer.Argument(help="Id of the letter.", metavar="ID")],
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
) -> None:
    """Print everything about one dead letter as JSON."""
    from tamiyo_svc.cli.dlq import shown

    typer.echo(shown(settings_from(assignments, redis_url=redis_url), entry_id))


@dlq_app.command("requeue")
def dlq_requeue(
    ids: Ids = None,
    reason: Reason = None,
    stream: Origin = None,
    since: Since = None,
    everything: Everything = False,
    yes: Yes = False,
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
) -> None:
    """Put letters back on the streams they came from, as they were."""
    from tamiyo_svc.cli.dlq import Selection, actions_text, requeue

    selection = Selection(tuple(ids or ()), reason, stream, since, everything)
    actions = requeue(settings_from(assignments, redis_url=redis_url), selection, act=yes)
    typer.echo(actions_text(actions, act=yes, done="put back", todo="put back"))


@dlq_app.command("purge")
def dlq_purge(
    ids: Ids = None,
    reason: Reason = None,
    stream: Origin = None,
    since: Since = None,
    everything: Everything = False,
    yes: Yes = False,
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
) -> None:
    """Remove letters for good."""
    from tamiyo_svc.cli.dlq import Selection, actions_text, purge

    selection = Selection(tuple(ids or ()), reason, stream, since, everything)
    actions = purge(settings_from(assignments, redis_url=redis_url), selection, act=yes)
    typer.echo(actions_text(actions, act=yes, done="removed", todo="removed"))


def capture(
    file: Annotated[Path, typer.Argument(help="The file to make; it must not exist.")],
    duration: Annotated[
        str | None, typer.Option("--for", help="Record what comes for so long: 60s, 5m.")
    ] = None,
    since: Since = None,
    redis_url: RedisUrl = None,
    assignments: Assignments = None,
) -> None:
    """Record a window of the bus to a file."""
    from tamiyo_svc.cli import capture as command

    settings = settings_from(assignments, redis_url=redis_url)
    typer.echo(command.capture(settings, file, duration=duration, since=since))


def replay(
    file: Annotated[Path, typer.Argument(help="A file that `tamiyo capture` made.")],
    policy: Policy = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write an HTML report here.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 unless every compared decision agrees.")
    ] = False,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Decide a recording again, offline, and compare with what was decided then."""
    from tamiyo_svc.cli import replay as command

    settings = settings_from(assignments, policy=policy)
    comparison = command.replay_file(settings, file)
    typer.echo(command.comparison_output(comparison, as_json=as_json))
    if page is not None:
        command.write_page(comparison, file, page)
        if not as_json:
            typer.echo(f"report:        {page.resolve()}")
    if check and not comparison.agrees:
        raise typer.Exit(1)


def _show(output: object) -> None:
    """JSON as it is, a table as rich lays it out."""
    if isinstance(output, str):
        typer.echo(output)
    else:
        print_rich(output)
