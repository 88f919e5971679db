"""Writes the Grafana dashboards; they are generated so that every panel is one line to review.

python deploy/grafana/build.py           write deploy/grafana/dashboards/*.json
python deploy/grafana/build.py --check   exit 1 if they are not what would be written
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent / "dashboards"

_SCHEMA_VERSION: Final = 39
_COLUMNS: Final = 24
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_SELECT: Final = 'job="$job"'
_NODES: Final = ', family=~"node.*"'
_DEGRADED: Final = ', event=~"degraded_inputs|nonfinite_inputs|graph_truncated|metadata_skipped"'
_EDGES: Final = ', family=~"edges.*"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `queries` maps a legend to a PromQL expression."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    text: str = ""
    steps: tuple[tuple[float, str], ...] = ()
    """Thresholds in ascending order: from this value on, this colour; below the first, green."""


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard: rows of panels in reading order."""

    uid: str
    title: str
    rows: dict[str, tuple[Panel, ...]]


def _rate(metric: str, by: str = "", labels: str = "") -> str:
    inner = f"rate({metric}{{{_SELECT}{labels}}}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def _quantile(share: float, metric: str, by: str = "", labels: str = "") -> str:
    group = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', group, labels)})"


def _now(metric: str, labels: str = "") -> str:
    return f"{metric}{{{_SELECT}{labels}}}"


def _coverage(labels: str = "") -> str:
    return f"avg by (family) ({_now('tamiyo_feature_coverage_ratio', labels)})"


SERVICE: Final = Dashboard(
    "tamiyo-service",
    "Tamiyo: service",
    {
        "Now": (
            Panel("Replicas up", {"": f"sum({_now('up')})"}, kind="stat", width=4),
            Panel("Decisions a second", {"": "tamiyo:decisions:rate5m"}, kind="stat", width=4),
            Panel(
                "Within the 5 ms budget",
                {"": "tamiyo:within_budget:ratio_rate5m"},
                "percentunit",
                "stat",
                width=4,
            ),
            Panel(
                "In flight", {"": f"sum({_now('tamiyo_in_flight_packets')})"}, kind="stat", width=4
            ),
            Panel(
                "Bus answers",
                {"": f"count({_now('tamiyo_stream_pending_entries')}) or vector(0)"},
                kind="stat",
                width=4,
                text="Streams whose position is known; 0 while Redis does not answer.",
            ),
            Panel(
                "Lag",
                {"{{stream}}": "tamiyo:stream_lag_entries:max"},
                kind="stat",
                width=4,
                steps=((100, "red"),),
            ),
        ),
        "Latency": (
            Panel(
                "Read to command",
                {
                    f"p{share * 100:g}": _quantile(share, "tamiyo_decision_duration_seconds")
                    for share in (0.5, 0.95, 0.99)
                },
                "s",
                steps=((0.005, "red"),),
            ),
            Panel(
                "Stages, p95",
                {"{{stage}}": _quantile(0.95, "tamiyo_stage_duration_seconds", "stage")},
                "s",
            ),
            Panel(
                "Age of packets when read",
                {
                    f"p{share * 100:g}": _quantile(share, "tamiyo_packet_age_seconds")
                    for share in (0.5, 0.99)
                },
                "s",
            ),
        ),
        "Outcomes": (
            Panel(
                "Packets by outcome",
                {"{{outcome}}": _rate("tamiyo_packets_total", "outcome")},
                "pps",
            ),
            Panel("Budgets missed", {"{{path}}": _rate("tamiyo_timeouts_total", "path")}, "ops"),
            Panel(
                "Late results and batch size",
                {
                    "late results": _rate("tamiyo_late_results_total"),
                    "batch, mean": (
                        f"{_rate('tamiyo_batch_size_sum')} / {_rate('tamiyo_batch_size_count')}"
                    ),
                },
            ),
        ),
        "Bus": (
            Panel("Lag", {"{{stream}} {{instance}}": _now("tamiyo_stream_lag_entries")}),
            Panel("Pending", {"{{stream}} {{instance}}": _now("tamiyo_stream_pending_entries")}),
            Panel(
                "Oldest unacknowledged",
                {"{{stream}} {{instance}}": _now("tamiyo_stream_oldest_unacked_seconds")},
                "s",
            ),
            Panel(
                "Dead letters", {"{{reason}}": _rate("tamiyo_dead_letters_total", "reason")}, "ops"
            ),
            Panel("Commit conflicts", {"conflicts": _rate("tamiyo_commit_conflicts_total")}, "ops"),
            Panel(
                "Entries ignored",
                {"{{reason}}": _rate("tamiyo_entries_ignored_total", "reason")},
                "ops",
            ),
        ),
        "Process": (
            Panel(
                "CPU",
                {"{{instance}}": f"rate({_now('process_cpu_seconds_total')}[$__rate_interval])"},
            ),
            Panel("Memory", {"{{instance}}": _now("process_resident_memory_bytes")}, "bytes"),
            Panel(
                "Log lines dropped",
                {"{{instance}}": _rate("tamiyo_log_lines_dropped_total", "instance")},
            ),
        ),
    },
)

DECISIONS: Final = Dashboard(
    "tamiyo-decisions",
    "Tamiyo: decisions and risk",
    {
        "Commands": (
            Panel(
                "Commands by type",
                {"{{type}}": _rate("tamiyo_commands_total", "type")},
                "ops",
                width=12,
            ),
            Panel(
                "Why commands differ from the policy",
                {"{{reason}}": _rate("tamiyo_commands_total", "reason", ', reason!="policy"')},
                "ops",
                width=12,
            ),
        ),
        "Events": (
            Panel(
                "Events by severity",
                {"{{severity}}": _rate("tamiyo_events_total", "severity")},
                "ops",
            ),
            Panel(
                "HIGH and CRITICAL events",
                {"{{event}}": _rate("tamiyo_events_total", "event", ', severity=~"high|critical"')},
                "ops",
            ),
            Panel(
                "WARNING events",
                {"{{event}}": _rate("tamiyo_events_total", "event", ', severity="warning"')},
                "ops",
            ),
        ),
        "Safety": (
            Panel(
                "Conservative runs",
                {"{{instance}}": _now("tamiyo_conservative_runs")},
                steps=((1, "orange"),),
            ),
            Panel(
                "Breakers",
                {"{{breaker}} {{instance}}": _now("tamiyo_breaker_state")},
                kind="state-timeline",
                text="1 closed, 2 open, 3 half open.",
                steps=((2, "red"), (3, "orange")),
            ),
            Panel(
                "Emergency telemetry",
                {
                    "published": _rate("tamiyo_emergency_published_total"),
                    "diverted by the rate limit": _rate("tamiyo_emergency_rate_limited_total"),
                },
                "ops",
            ),
            Panel(
                "Signature failures",
                {"{{reason}}": _rate("tamiyo_signature_failures_total", "reason")},
                "ops",
                width=24,
                steps=((0.000001, "red"),),
            ),
        ),
    },
)

COVERAGE: Final = Dashboard(
    "tamiyo-coverage",
    "Tamiyo: inputs coverage",
    {
        "Inputs present in the newest decision": (
            Panel(
                "Mean",
                {"{{instance}}": "tamiyo:feature_coverage:avg"},
                "percentunit",
                steps=((0.3, "orange"), (0.5, "green")),
            ),
            Panel(
                "Nodes",
                {"{{family}}": _coverage(_NODES)},
                "percentunit",
                "bargauge",
            ),
            Panel(
                "Edges",
                {"{{family}}": _coverage(_EDGES)},
                "percentunit",
                "bargauge",
            ),
        ),
        "Over time": (
            Panel(
                "By family",
                {"{{family}}": _coverage()},
                "percentunit",
                width=12,
            ),
            Panel(
                "Decisions on degraded inputs",
                {
                    "{{event}} {{severity}}": _rate(
                        "tamiyo_events_total",
                        "event, severity",
                        _DEGRADED,
                    )
                },
                "ops",
                width=12,
            ),
        ),
    },
)

POLICY: Final = Dashboard(
    "tamiyo-policy",
    "Tamiyo: policy lifecycle",
    {
        "Serving": (
            Panel(
                "Policy",
                {"{{policy_id}} {{version}} {{instance}}": _now("tamiyo_policy_info")},
                kind="table",
                width=16,
            ),
            Panel(
                "Compiled network",
                {"{{instance}}": _now("tamiyo_gnn_compile_enabled")},
                kind="stat",
            ),
        ),
        "Updates": (
            Panel(
                "Updates by outcome",
                {
                    "{{outcome}}": "sum by (outcome) (increase("
                    + _now("tamiyo_policy_updates_total")
                    + "[$__rate_interval]))"
                },
            ),
            Panel("Warm-up", {"{{instance}}": _now("tamiyo_gnn_compile_warm_seconds")}, "s"),
            Panel(
                "Falls back from compiled", {"": _rate("tamiyo_gnn_compile_fallback_total")}, "ops"
            ),
        ),
        "What a swap changed": (
            Panel("Commands by type", {"{{type}}": _rate("tamiyo_commands_total", "type")}, "ops"),
            Panel(
                "Inference, p95",
                {"p95": _quantile(0.95, "tamiyo_stage_duration_seconds", labels=', stage="infer"')},
                "s",
            ),
            Panel(
                "Policy risk events",
                {
                    "{{event}}": _rate(
                        "tamiyo_events_total", "event", ', event=~"policy_.*|inference_failed"'
                    )
                },
                "ops",
            ),
        ),
    },
)

DASHBOARDS: Final = (SERVICE, DECISIONS, COVERAGE, POLICY)


def build(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana's model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in dashboard.rows.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
                "panels": [],
            }
        )
        top += 1
        left = 0
        height = 4 if all(panel.kind == "stat" for panel in row) else 8
        for panel in row:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + height
            position = {"x": left, "y": top, "w": panel.width, "h": height}
            panels.append(_panel(panel, len(panels) + 1, position))
            left += panel.width
        top += height
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["tamiyo"],
        "schemaVersion": _SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _job_variable()]},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": color, "value": value} for value, color in panel.steps]
    defaults = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    instant = panel.kind in ("stat", "bargauge", "table")
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
            }
            for index, (legend, expression) in enumerate(panel.queries.items())
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
    }


def _job_variable() -> dict[str, Any]:
    return {
        "name": "job",
        "label": "Job",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": "label_values(tamiyo_build_info, job)",
        "refresh": 2,
        "current": {"text": "tamiyo", "value": "tamiyo"},
    }


def main() -> int:
    """Write the dashboards, or compare them."""
    wanted = {
        FOLDER / f"{dashboard.uid}.json": json.dumps(build(dashboard), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }
    if "--check" in sys.argv[1:]:
        stale = [
            path for path, text in wanted.items() if not path.exists() or path.read_text() != text
        ]
        for path in stale:
            print(f"{path}: not what build.py writes", file=sys.stderr)
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
