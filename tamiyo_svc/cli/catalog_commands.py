"""The command lines of `tamiyo catalog`; what they do is in `cli.catalog`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tamiyo_svc.cli.options import AsJson, print_rich

catalog_app = typer.Typer(
    help="Make a blueprint catalogue, add to it, list it.", no_args_is_help=True
)

CatalogFile = Annotated[Path, typer.Argument(metavar="PATH", help="The catalogue's SQLite file.")]


@catalog_app.command()
def init(
    path: CatalogFile,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a catalogue with every blueprint of the client's seed library."""
    from tamiyo_svc.cli import catalog

    count = catalog.init(path, force=force)
    typer.echo(f"{path}: {count} blueprints; set URZA_DATABASE_URL=sqlite:///{path.absolute()}")


@catalog_app.command()
def add(
    path: CatalogFile,
    blueprint_id: Annotated[str, typer.Argument(help="The id by which trainers grow it.")],
    name: Annotated[str | None, typer.Option("--name", help="Default: the id.")] = None,
    tier: Annotated[
        str, typer.Option("--tier", help="unspecified, safe, experimental or high_risk")
    ] = "unspecified",
    risk: Annotated[
        float | None,
        typer.Option("--risk", min=0.0, max=1.0, help="From 0 to 1; default: 0.25, nothing known."),
    ] = None,
    stage: Annotated[int, typer.Option("--stage", min=0, help="How mature it is.")] = 0,
    description: Annotated[str, typer.Option("--description")] = "",
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Pause whoever asks for it.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace one with that id.")] = False,
) -> None:
    """Add a blueprint of one's own to a catalogue."""
    from tamiyo_svc.cli import catalog

    descriptor = catalog.describe(blueprint_id, name, tier, risk, stage, description)
    descriptor.quarantine_only = quarantine
    catalog.add(path, descriptor, replace=replace)
    typer.echo(f"{path}: {blueprint_id}, risk {descriptor.risk:g}, tier {tier}")


@catalog_app.command("ls")
def list_blueprints(path: CatalogFile, as_json: AsJson = False) -> None:
    """List what a service would find in a catalogue."""
    from tamiyo_svc.cli import catalog

    snapshot = catalog.read(path)
    if as_json:
        typer.echo(json.dumps(catalog.listed(snapshot), indent=2))
    else:
        print_rich(catalog.catalog_table(snapshot))
    if skipped := snapshot.skipped.get("row", 0):
        typer.echo(f"{path}: {skipped} rows cannot be read", err=True)
