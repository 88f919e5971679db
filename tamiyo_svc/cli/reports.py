"""`tamiyo reports`: the field reports that are on the bus, filtered and exported."""

from __future__ import annotations

import csv
import heapq
import io
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Any, Final

from google.protobuf import json_format
from rich.table import Table
from rich.text import Text

from tamiyo_svc.adapters.oona.entries import id_order
from tamiyo_svc.adapters.oona.history import open_history
from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.service.settings import Settings

_PREFIX: Final = "FIELD_REPORT_OUTCOME_"
OUTCOMES: Final = tuple(
    name.removeprefix(_PREFIX).lower() for name in leyline.FieldReportOutcome.keys()[1:]
)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_COLUMNS: Final = (
    *("issued_at", "report_id", "command_id", "training_run_id", "outcome", "notes"),
    *("seed_id", "blueprint_id", "tamiyo_policy_version", "observation_window_epochs"),
)


def read_reports(
    settings: Settings,
    *,
    run_id: str = "",
    outcome: str = "",
    since: datetime | None = None,
    limit: int = 0,
) -> list[leyline.FieldReport]:
    """The reports that fit, oldest first; the newest `limit` of them when that is above 0.

    Raises:
        ConfigurationError: signatures are required and there is no secret.
        BusError: Redis did not answer.
    """
    keyring = settings.keyring() if settings.require_signatures else None
    since_ms = int(since.timestamp() * 1e3) if since is not None else 0
    wanted = leyline.FieldReportOutcome.Value(_PREFIX + outcome.upper()) if outcome else None
    found = []
    with open_history(settings.redis_url, keyring, settings.max_message_bytes) as history:
        kind = leyline.BUS_MESSAGE_TYPE_FIELD_REPORT
        streams = settings.in_partitions(settings.field_report_stream)
        partitions = (history.forward(stream, kind, since_ms) for stream in streams)
        for past in heapq.merge(*partitions, key=lambda past: id_order(past.entry.entry_id)):
            report = past.message
            assert isinstance(report, leyline.FieldReport)
            if run_id and report.training_run_id != run_id:
                continue
            if wanted is None or report.outcome == wanted:
                found.append(report)
    return found[-limit:] if limit > 0 else found


def parse_since(text: str, now: datetime) -> datetime:
    """A moment given as an age (`90s`, `15m`, `2h`, `1d`) or in ISO 8601, in UTC unless it says.

    Raises:
        ConfigurationError: it is neither.
    """
    if matched := re.fullmatch(r"(\d{1,9})([smhd])", text):
        return now - timedelta(**{_UNITS[matched[2]]: int(matched[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(
            f"--since: got {text!r}, takes an age such as 90s, 15m, 2h or 1d, or an ISO 8601 time"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def check_outcome(text: str) -> str:
    """The outcome in small letters.

    Raises:
        ConfigurationError: there is no such outcome.
    """
    if text.lower() not in OUTCOMES:
        raise ConfigurationError(f"--outcome: got {text!r}, takes {', '.join(OUTCOMES)}")
    return text.lower()


def reports_json(reports: Iterable[leyline.FieldReport]) -> str:
    """The reports as a JSON list of flat objects with their metrics."""
    rows = [{**_row(report), "metrics": _metrics(report)} for report in reports]
    return json.dumps(rows, indent=1)


def reports_csv(reports: Iterable[leyline.FieldReport]) -> str:
    """The reports as CSV with one column for each metric that any of them has."""
    listed = list(reports)
    metrics = sorted({name for report in listed for name in report.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *metrics])
    for report in listed:
        row = _row(report)
        values = _metrics(report)
        writer.writerow(
            [
                *(_cell(row[column]) for column in _COLUMNS),
                *(values.get(name, "") for name in metrics),
            ]
        )
    return text.getvalue()


def reports_table(reports: Iterable[leyline.FieldReport]) -> Table:
    """The reports for a terminal."""
    table = Table(title="Field reports", title_justify="left")
    for column in ("issued at", "run", "outcome", "note", "report"):
        table.add_column(column, overflow="fold")
    for report in reports:
        row = _row(report)
        table.add_row(
            *(
                Text(str(row[name]))
                for name in ("issued_at", "training_run_id", "outcome", "notes", "report_id")
            )
        )
    return table


def _row(report: leyline.FieldReport) -> dict[str, Any]:
    whole = json_format.MessageToDict(
        report, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    row = {column: whole.get(column, "") for column in _COLUMNS}
    row["outcome"] = str(row["outcome"]).removeprefix(_PREFIX).lower()
    return row


def _metrics(report: leyline.FieldReport) -> dict[str, float]:
    """The metrics by name; a value that is not finite is left out, as JSON cannot say it."""
    return {name: value for name, value in sorted(report.metrics.items()) if isfinite(value)}


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula; ids and notes come from other systems."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value
