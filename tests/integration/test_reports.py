"""`tamiyo reports`: listing, filtering and exporting the field reports on the bus."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis import Redis
from support.bus import SECRET, Bus, state_packet
from support.running import StartService

from tamiyo_svc.cli.main import main
from tamiyo_svc.cli.reports import parse_since
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring

pytestmark = pytest.mark.redis

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


def make_report(
    number: int, run_id: str, outcome: leyline.FieldReportOutcome, notes: str = "", **metrics: float
) -> leyline.FieldReport:
    report = leyline.FieldReport(
        version=1,
        report_id=f"fr-{number}",
        command_id=str(number),
        training_run_id=run_id,
        outcome=outcome,
        notes=notes,
        metrics=metrics,
    )
    report.issued_at.FromDatetime(NOW)
    return report


@pytest.fixture
def stream(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four reports, the first two an hour before the others, and a forged one."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", SECRET)
    reports = (
        make_report(1, "run-a", leyline.FIELD_REPORT_OUTCOME_SUCCESS, loss_delta=-0.5),
        make_report(2, "run-b", leyline.FIELD_REPORT_OUTCOME_NEUTRAL, "=1+1"),
        make_report(3, "run-a", leyline.FIELD_REPORT_OUTCOME_REGRESSION, risk_score=0.25),
        make_report(4, "run-a", leyline.FIELD_REPORT_OUTCOME_SUCCESS),
    )
    first_ms = int(NOW.timestamp() * 1e3)
    forger = Keyring(b"another secret 16")
    with Redis.from_url(redis_url) as redis:
        for index, report in enumerate(reports):
            added_ms = first_ms + index // 2 * 3_600_000
            fields: Any = seal(report, Keyring(SECRET.encode())).fields()
            redis.xadd("oona.normal", fields, id=f"{added_ms}-{index + 1}")
        fields = seal(reports[0], forger).fields()
        redis.xadd("oona.normal", fields)
        yield


def listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    monkeypatch.setattr(sys, "argv", ["tamiyo", "reports", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ["fr-1", "fr-2", "fr-3", "fr-4"]),
        (("--run", "run-a"), ["fr-1", "fr-3", "fr-4"]),
        (("--run", "run-a", "--outcome", "success"), ["fr-1", "fr-4"]),
        (("--outcome", "Regression"), ["fr-3"]),
        (("--since", "2026-01-02T12:30:00"), ["fr-3", "fr-4"]),
        (("--since", "2026-01-02T13:30:00+01:00"), ["fr-3", "fr-4"]),
        (("--limit", "1"), ["fr-4"]),
        (("--run", "nobody"), []),
    ],
)
def test_reports_are_filtered(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    expected: list[str],
) -> None:
    found = json.loads(listed(monkeypatch, capsys, *arguments, "--json"))
    assert [row["report_id"] for row in found] == expected


@pytest.mark.usefixtures("stream")
def test_csv_has_a_column_for_every_metric_and_no_formula(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader(io.StringIO(listed(monkeypatch, capsys, "--csv"))))
    assert [row["report_id"] for row in rows] == ["fr-1", "fr-2", "fr-3", "fr-4"]
    assert [row["loss_delta"] for row in rows] == ["-0.5", "", "", ""]
    assert [row["risk_score"] for row in rows] == ["", "", "0.25", ""]
    assert rows[1]["notes"] == "'=1+1"
    assert rows[2]["outcome"] == "regression"


@pytest.mark.usefixtures("stream")
def test_the_table_names_every_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = listed(monkeypatch, capsys)
    assert all(f"fr-{number}" in shown for number in range(1, 5))


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("1d", timedelta(days=1)),
    ],
)
def test_ages_count_from_now(text: str, age: timedelta) -> None:
    assert parse_since(text, NOW) == NOW - age


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--since: got 'yesterday'"):
        parse_since("yesterday", NOW)


def test_an_unknown_outcome_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tamiyo", "reports", "--outcome", "splendid"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error == (
        "tamiyo: --outcome: got 'splendid', takes success, neutral, regression, aborted\n"
    )


async def test_what_the_service_reports_is_listed_with_its_observation_windows(
    bus: Bus,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    redis_url: str,
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", SECRET)
    await start_service(fr_obs_window_epochs=2)
    ids = []
    for epoch, loss in enumerate((0.5, 0.45, 0.4), start=1):
        packet = state_packet("run-1", epoch, loss=loss)
        packet.current_epoch = epoch
        await bus.publish(packet, blueprint_id="demo-safe")
        ids.append((await bus.command_for(packet)).command_id)
    capsys.readouterr()
    found = json.loads(await asyncio.to_thread(listed, monkeypatch, capsys, "--json"))
    assert [row["report_id"] for row in found] == [
        *(f"fr-{command_id}" for command_id in ids),
        f"fr-synth-{ids[0]}-1+2",
    ]
    synthesised = found[-1]
    assert synthesised["outcome"] == "success"
    assert synthesised["metrics"]["loss_delta_total"] == pytest.approx(-0.1, abs=1e-6)
    assert synthesised["notes"] == "field_report_synthesised:policy"
    assert synthesised["observation_window_epochs"] == 2
    same = ("seed_id", "blueprint_id", "issued_at", "tamiyo_policy_version")
    assert [synthesised[name] for name in same] == [found[0][name] for name in same]
    assert synthesised["seed_id"]
