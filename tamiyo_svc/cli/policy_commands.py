"""The command lines of `tamiyo policy` and `tamiyo keys`; what they do is in their modules."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamiyo_svc.cli.options import AsJson, RedisUrl, print_rich, settings_from
from tamiyo_svc.errors import BusError, ConfigurationError, InferenceError, PolicyRejectedError

if TYPE_CHECKING:
    from tamiyo_svc.graph.vocabulary import Vocabularies
    from tamiyo_svc.service.settings import Settings
    from tamiyo_svc.taxonomy import PolicyUpdateAction

policy_app = typer.Typer(
    help="Make, look into, test, publish and take back policies.", no_args_is_help=True
)
keys_app = typer.Typer(help="The secret that signs everything on the bus.", no_args_is_help=True)

StateDir = Annotated[str | None, typer.Option("--state-dir", help="TAMIYO_STATE_DIR")]
Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint file.", show_default=False)]
Timeout = Annotated[
    float, typer.Option("--timeout", help="Seconds to wait for the replicas' answers.")
]


@policy_app.command()
def init(
    out: Annotated[Path, typer.Argument(help="The new file.", show_default=False)],
    start: Annotated[str, typer.Option("--from", help="untrained or bootstrap")] = "untrained",
    small: Annotated[bool, typer.Option("--small", help="Tiny layers, for tests.")] = False,
    state_dir: StateDir = None,
) -> None:
    """Write a new checkpoint to start training from."""
    from tamiyo_svc.cli import policy
    from tamiyo_svc.policy.network import NetworkConfig

    config = NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4, attention_heads=2)
    vocabularies = _vocabularies(state_dir)
    # Without a choice, the built-in's own sizes.
    policy.init(out, start, vocabularies, config if small else None)
    typer.echo(f"{out}: {start}, {out.stat().st_size} bytes")


@policy_app.command()
def inspect(path: Checkpoint, as_json: AsJson = False) -> None:
    """Print what a checkpoint says about itself, without loading its weights."""
    from tamiyo_svc.cli import policy

    with _refusals(path):
        _show("Checkpoint", policy.inspect(path), as_json)


@policy_app.command()
def verify(path: Checkpoint, state_dir: StateDir = None) -> None:
    """Check a checkpoint as a service does before it swaps; exit 1 if it would be refused."""
    from tamiyo_svc.cli import policy

    vocabularies = _vocabularies(state_dir)
    with _refusals(path):
        checked = policy.verify(path, vocabularies)
        typer.echo(f"{path}: good, {checked.policy_id} {checked.version}, weights {checked.digest}")


@policy_app.command()
def diff(
    first: Checkpoint, second: Checkpoint, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """Show how two checkpoints differ; exit 1 if they do."""
    from tamiyo_svc.cli import policy

    vocabularies = _vocabularies(state_dir)
    with _refusals(first):
        one = policy.read(first, vocabularies)
    with _refusals(second):
        other = policy.read(second, vocabularies)
    found = policy.diff(one, other)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show("Metadata", found["metadata"], as_json)
        _show(f"Weights that differ, of {found['compared']}", found["weights"], as_json)
    raise typer.Exit(int(bool(found["metadata"] or found["weights"])))


@policy_app.command()
def pack(
    path: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="The new file.", show_default=False)],
    packets: Annotated[
        Path | None,
        typer.Option("--packets", help='JSON lines, each {"packet": base64}; else samples.'),
    ] = None,
    policy_id: Annotated[str | None, typer.Option("--policy-id")] = None,
    version: Annotated[str | None, typer.Option("--version")] = None,
    state_dir: StateDir = None,
) -> None:
    """Embed packets with what the policy decides on them, for services to replay."""
    from tamiyo_svc.cli import policy

    vocabularies = _vocabularies(state_dir)
    with _refusals(path):
        count = policy.pack(path, packets, out, vocabularies, policy_id, version)
    typer.echo(f"{out}: {count} golden packets")


@policy_app.command()
def publish(
    path: Checkpoint,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Run it beside the live policy; it decides nothing.")
    ] = False,
    policy_id: Annotated[str | None, typer.Option("--policy-id")] = None,
    version: Annotated[str | None, typer.Option("--version")] = None,
    timeout_s: Timeout = 120.0,
    redis_url: RedisUrl = None,
) -> None:
    """Sign and publish a checkpoint; exit 1 unless every live replica takes it."""
    from tamiyo_svc.cli import policy
    from tamiyo_svc.taxonomy import PolicyUpdateAction

    with _refusals(path):
        about = policy.inspect(path)
    policy_id = policy_id or str(about["policy_id"] or "")
    version = version or str(about["version"] or "")
    for name, option in ((policy_id, "--policy-id"), (version, "--version")):
        if not name:
            raise ConfigurationError(f"{option}: {path} does not say one, so it has to be given")
    action = PolicyUpdateAction.SHADOW if shadow else PolicyUpdateAction.APPLY
    _publish(
        settings_from(None, redis_url=redis_url),
        action,
        timeout_s,
        payload=policy.read_payload(path),
        policy_id=policy_id,
        version=version,
    )


@policy_app.command("ls")
def list_policies(redis_url: RedisUrl = None, as_json: AsJson = False) -> None:
    """Show what every live replica serves, could go back to, and runs in shadow."""
    from dataclasses import asdict

    from tamiyo_svc.cli import policy

    with _bus_errors():
        statuses = policy.replicas(settings_from(None, redis_url=redis_url))
    if as_json:
        typer.echo(json.dumps([asdict(status) for status in statuses], indent=2))
    elif statuses:
        print_rich(policy.replicas_table(statuses))
    else:
        typer.echo("no replica is running")


@policy_app.command()
def rollback(timeout_s: Timeout = 60.0, redis_url: RedisUrl = None) -> None:
    """Have every replica serve the policy it served before; exit 1 unless all do."""
    from tamiyo_svc.taxonomy import PolicyUpdateAction

    _publish(settings_from(None, redis_url=redis_url), PolicyUpdateAction.ROLLBACK, timeout_s)


@policy_app.command()
def promote(timeout_s: Timeout = 60.0, redis_url: RedisUrl = None) -> None:
    """Have every replica serve the policy in its shadow; exit 1 unless all do."""
    from tamiyo_svc.taxonomy import PolicyUpdateAction

    _publish(settings_from(None, redis_url=redis_url), PolicyUpdateAction.PROMOTE, timeout_s)


@keys_app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="The new file.", show_default=False)],
) -> None:
    """Write a new secret to a file for ESPER_LEYLINE_SECRET_FILE; nothing is printed of it."""
    from tamiyo_svc.cli import keys

    keys.generate(out)
    typer.echo(
        f"{out}: set ESPER_LEYLINE_SECRET_FILE to it; to rotate, set "
        "ESPER_LEYLINE_SECRET_PREVIOUS_FILE to it everywhere first"
    )


def _publish(
    settings: Settings, action: PolicyUpdateAction, timeout_s: float, **update: Any
) -> None:
    from tamiyo_svc.cli import policy

    def on_answer(answer: policy.Answer) -> None:
        verdict = "took it" if answer.accepted else "did not take it"
        typer.echo(f"{answer.replica}: {verdict}, {answer.detail}")

    with _bus_errors():
        if not policy.replicas(settings):
            typer.echo("no replica is running; those that start will read the update", err=True)
        taken = policy.publish(settings, action, timeout_s=timeout_s, on_answer=on_answer, **update)
    raise typer.Exit(0 if taken else 1)


def _vocabularies(state_dir: str | None) -> Vocabularies:
    from tamiyo_svc.adapters.vocabulary_store import load_vocabularies

    return load_vocabularies(settings_from(None, state_dir=state_dir).state_dir)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn a refused checkpoint into one line and exit code 1."""
    try:
        yield
    except (PolicyRejectedError, InferenceError) as error:
        typer.echo(f"{path}: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _bus_errors() -> Iterator[None]:
    try:
        yield
    except BusError as error:
        from tamiyo_svc.service.variables import redacted

        raise ConfigurationError(f"REDIS_URL: {redacted(str(error))}") from None


def _show(title: str, values: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    from tamiyo_svc.cli.policy import details_table

    print_rich(details_table(title, values))
