"""The alert rules: generated, valid, tested alert by alert, over metrics that exist."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.exported_metrics import exported, unknown_references

from tamiyo_svc.adapters.metrics import SECONDS_BUCKETS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES: Any = yaml.safe_load((FOLDER / "tamiyo.rules.yml").read_text())
TESTS: Any = yaml.safe_load((FOLDER / "tamiyo.rules.test.yml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDED = [rule for group in RULES["groups"] for rule in group["rules"] if "record" in rule]


def promtool(*arguments: str) -> None:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(
        [binary, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def firing(case: dict[str, Any]) -> set[str]:
    (test,) = case["promql_expr_test"]
    return {
        name
        for sample in test["exp_samples"]
        for name in re.findall(r'alertname="(\w+)"', sample["labels"])
    }


def test_the_generated_files_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "render.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_threshold_that_no_rule_uses_and_a_placeholder_without_value_are_errors() -> None:
    render = runpy.run_path(str(FOLDER / "render.py"))["render"]
    thresholds = '[service]\nrunbook_url = "u"\n'
    template = "  - alert: One\n    expr: up == [[bus.lag]]\n      summary: text\n"
    with pytest.raises(KeyError):
        render(template, thresholds)
    with pytest.raises(ValueError, match=r"bus\.other"):
        render(template, f"{thresholds}[bus]\nlag = 1\nother = 2\n")
    rendered = render(template, f"{thresholds}[bus]\nlag = 1\n")
    assert "expr: up == 1\n" in rendered
    assert "runbook_url: u#one\n" in rendered


def test_prometheus_accepts_rules_and_configuration() -> None:
    promtool("check", "rules", "tamiyo.rules.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_the_rules_pass_their_unit_tests() -> None:
    promtool("test", "rules", "tamiyo.rules.test.yml")


@pytest.mark.parametrize("name", [alert["alert"] for alert in ALERTS])
def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(name: str) -> None:
    cases = [firing(case) for case in TESTS["tests"]]
    assert any(name in case for case in cases)
    assert any(name not in case for case in cases)
    healthy = next(case for case in TESTS["tests"] if case["name"] == "a healthy replica")
    assert firing(healthy) == set()


def test_every_metric_and_label_the_rules_use_exists() -> None:
    samples = exported()
    unknown = [
        reference
        for rule in (*ALERTS, *RECORDED)
        for reference in unknown_references(rule["expr"], samples)
    ]
    assert unknown == []


def test_a_metric_that_does_not_exist_is_noticed() -> None:
    samples = exported()
    wrong = 'rate(tamiyo_nothing_total[5m]) + tamiyo_packets_total{outcome="lost", colour="red"}'
    assert list(unknown_references(wrong, samples)) == [
        "tamiyo_nothing_total",
        'tamiyo_packets_total{outcome="lost"}',
        "tamiyo_packets_total{colour}",
    ]


def test_every_recorded_series_that_is_used_is_recorded() -> None:
    recorded = {rule["record"] for rule in RECORDED}
    used = {
        name for rule in (*ALERTS, *RECORDED) for name in re.findall(r"tamiyo:[\w:]+", rule["expr"])
    }
    assert used <= recorded


def test_bucket_edges_in_rules_are_edges_of_the_histograms() -> None:
    edges = {float(edge) for rule in RECORDED for edge in re.findall(r'le="([^"]+)"', rule["expr"])}
    assert edges
    assert edges <= set(SECONDS_BUCKETS)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    anchor = alert["annotations"]["runbook_url"].partition("#")[2]
    assert anchor == alert["alert"].lower()
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert f"\n### {alert['alert']}\n" in runbook
