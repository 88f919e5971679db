"""`tamiyo demo`: a private Redis, the real service, a real trainer, and what they did."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tamiyo_svc.adapters.embedded import EmbeddedRedis
from tamiyo_svc.cli.child import child_service, free_port, outcomes, stop
from tamiyo_svc.client.client import TamiyoClient, from_environment
from tamiyo_svc.taxonomy import ClientMode
from tamiyo_svc.trainer.blueprints import write_catalog
from tamiyo_svc.trainer.loop import Trainer, TrainerSettings
from tamiyo_svc.trainer.records import RunSummary, StepOutcome, StepRecord
from tamiyo_svc.trainer.report import quantile, write_report

_LINE_EVERY_STEPS: Final = 20
_DEFAULT_PORT: Final = 9464
_STEP_BUDGET_MS: Final = 5.0


@dataclass(slots=True)
class Progressed:
    """What the run has shown so far."""

    records: list[StepRecord] = field(default_factory=list)

    def table(self) -> Table:
        """The newest step and the decisions so far."""
        table = Table.grid(padding=(0, 3))
        if not self.records:
            return table
        last = self.records[-1]
        kinds = Counter(_decision(record) for record in self.records)
        latency = "-" if last.latency_ms is None else f"{last.latency_ms:.1f} ms"
        table.add_row("loss", f"{last.loss:.3f}", "accuracy", f"{last.accuracy:.3f}")
        table.add_row("decision", _decision(last), "because", last.reason or "-")
        table.add_row("latency", latency, "result", last.rejection or last.outcome.value)
        table.add_row("so far", ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
        for seed in last.seeds:
            table.add_row(seed.seed_id, seed.stage.lower(), "alpha", f"{seed.alpha:.2f}")
        return table

    def line(self) -> str:
        """The newest step as one line."""
        last = self.records[-1]
        latency = "-" if last.latency_ms is None else f"{last.latency_ms:.1f} ms"
        return (
            f"step {last.step:4d}  loss {last.loss:.3f}  accuracy {last.accuracy:.3f}  "
            f"{_decision(last)} ({last.reason or '-'})  {latency}"
        )


def demo(report: Path, seed: int) -> int:
    """Run the demo; the exit code is 1 when a packet or a command went astray.

    Raises:
        ConfigurationError: no Redis server can be found, or the service does not start.
    """
    console = Console()
    secret = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="tamiyo-demo-") as folder, EmbeddedRedis() as redis:
        catalog = Path(folder, "catalog.db")
        write_catalog(catalog)
        port = free_port(_DEFAULT_PORT)
        environment = {
            **os.environ,
            "REDIS_URL": redis.url,
            "ESPER_LEYLINE_SECRET": secret,
            "URZA_DATABASE_URL": f"sqlite:///{catalog}",
            "TAMIYO_CLIENT_MODE": ClientMode.ONLINE,
            "TAMIYO_POLICY": "bootstrap",
            "TAMIYO_STATE_DIR": folder,
            "TAMIYO_HTTP_HOST": "127.0.0.1",
            "TAMIYO_HTTP_PORT": str(port),
            "TAMIYO_LOG_FORMAT": "json",
        }
        url = f"http://127.0.0.1:{port}"
        with child_service(environment, Path(folder, "service.log"), url) as service:
            console.print(f"service ready, metrics at {url}/metrics, Redis at {redis.socket}")
            with from_environment(f"demo-{seed}", environment) as client:
                records, summary = _train(client, seed, console)
            ended = outcomes(url)
            stop(service)
    write_report(report, records, summary)
    problems = list(_problems(summary, ended, service.returncode))
    console.print(_summary(summary, records, ended))
    console.print(f"report: {report.resolve()}")
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    return 1 if problems else 0


def _train(
    client: TamiyoClient, seed: int, console: Console
) -> tuple[list[StepRecord], RunSummary]:
    import torch

    torch.set_num_threads(1)
    progressed = Progressed()
    trainer = Trainer(client, TrainerSettings(random_seed=seed))
    if not console.is_terminal:

        def report_line(record: StepRecord) -> None:
            progressed.records.append(record)
            if record.step % _LINE_EVERY_STEPS == 0:
                console.print(progressed.line(), highlight=False, soft_wrap=True)

        trainer.on_step = report_line
        return progressed.records, trainer.run()
    progress = Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    task = progress.add_task("training", total=trainer.settings.steps)
    with Live(console=console, refresh_per_second=8) as live:

        def show(record: StepRecord) -> None:
            progressed.records.append(record)
            progress.update(task, completed=record.step)
            live.update(Group(progress, progressed.table()))

        trainer.on_step = show
        return progressed.records, trainer.run()


def _problems(
    summary: RunSummary, outcomes: Mapping[str, int], exit_code: int | None
) -> Iterator[str]:
    ended = sum(outcomes.values())
    if ended != summary.published:
        yield f"{summary.published} packets were published but {ended} ended"
    answered = summary.received + summary.late + summary.unverifiable
    if answered != outcomes.get("decided", 0):
        yield f"{outcomes.get('decided', 0)} packets were decided but {answered} commands arrived"
    if summary.unverifiable:
        yield f"{summary.unverifiable} commands did not verify"
    if exit_code:
        yield f"the service ended with exit code {exit_code}"


def _summary(summary: RunSummary, records: list[StepRecord], outcomes: Mapping[str, int]) -> Table:
    latencies = [record.latency_ms for record in records if record.latency_ms is not None]
    within = sum(latency <= _STEP_BUDGET_MS for latency in latencies)
    others = {name: count for name, count in outcomes.items() if count and name != "decided"}
    table = Table(title="Demo", title_justify="left", show_header=False)
    rows = {
        "steps": f"{summary.steps} in {summary.duration_s:.1f} s",
        "test accuracy": f"{summary.accuracy:.4f}",
        "packets published": str(summary.published),
        "commands received": f"{summary.received} in time, {summary.late} late",
        "other outcomes": ", ".join(f"{k} {v}" for k, v in others.items()) or "none",
        "unverifiable commands": str(summary.unverifiable),
        "applied / refused": f"{summary.applied} / {summary.rejected}",
        "publish to command": (
            f"p50 {quantile(latencies, 0.5):.2f} ms, p99 {quantile(latencies, 0.99):.2f} ms, "
            f"{within} of {len(latencies)} within {_STEP_BUDGET_MS:g} ms"
            if latencies
            else "no command arrived"
        ),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for seed in summary.seeds:
        table.add_row(seed.seed_id, f"{seed.stage.lower()} ({seed.blueprint_id or 'none'})")
    return table


def _decision(record: StepRecord) -> str:
    if record.outcome is StepOutcome.MISSED:
        return "none in time"
    return f"{record.command_type} {record.operation}".strip()
