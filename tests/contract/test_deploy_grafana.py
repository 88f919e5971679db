"""The dashboards: generated, well formed, over metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.exported_metrics import exported, unknown_references

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "grafana"
DASHBOARDS: dict[str, Any] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((FOLDER / "dashboards").glob("*.json"))
}
RULES: Any = yaml.safe_load((ROOT / "deploy/prometheus/tamiyo.rules.yml").read_text())


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_the_generated_dashboards_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "build.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_is_one_dashboard_for_each_question() -> None:
    assert set(DASHBOARDS) == {
        "tamiyo-service",
        "tamiyo-decisions",
        "tamiyo-coverage",
        "tamiyo-policy",
    }


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_metric_a_dashboard_uses_exists(name: str) -> None:
    samples = exported()
    recorded = {rule.get("record") for group in RULES["groups"] for rule in group["rules"]}
    expressions = queries(DASHBOARDS[name])
    assert expressions
    for expression in expressions:
        assert list(unknown_references(expression, samples)) == []
        used = set(re.findall(r"tamiyo:[\w:]+", expression))
        assert used <= recorded
        assert used or re.search(r"\b(tamiyo|process)_\w+|\bup\b", expression)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_well_formed(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == name
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for expression in queries(dashboard):
        assert set(re.findall(r"\$(\w+)", expression)) <= variables | {"__rate_interval"}
        assert expression.count("(") == expression.count(")")
    for panel in dashboard["panels"]:
        position = panel["gridPos"]
        assert 0 <= position["x"] < position["x"] + position["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in dashboard["panels"]), 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
