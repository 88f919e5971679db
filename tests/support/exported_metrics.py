"""What the service exports, and which of it an expression refers to."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client.parser import text_string_to_metric_families

from tamiyo_svc.adapters.metrics import Metrics, StreamPosition
from tamiyo_svc.graph.coverage import FAMILIES
from tamiyo_svc.risk.rules import RULES
from tamiyo_svc.taxonomy import CommandAction, Event, Severity

ADDED_BY_PROMETHEUS = {"job", "instance", "le"}

_SELECTOR = re.compile(
    r"(?<![\w:$\"])(?P<name>(?:tamiyo|process|python)_\w+|up)\b(?:\{(?P<labels>[^}]*)\})?"
)
_MATCHER = re.compile(r"(\w+)\s*(=~|!=|=)\s*\"([^\"]*)\"")

Samples = Mapping[str, Mapping[str, set[str]]]
"""Sample name -> label -> the values it can take."""


def exported() -> Samples:
    """Every sample the service can export, once everything has happened."""
    metrics = Metrics(("oona.normal", "oona.emergency"))
    metrics.coverage_seen(dict.fromkeys(FAMILIES, 1.0))
    metrics.compile_warmed(1.0)
    metrics.watch_log_drops(lambda: 0)
    metrics.policy_serving("id", "version", "digest")
    for stream in ("oona.normal", "oona.emergency"):
        metrics.stream_position(stream, StreamPosition(0, 0, 0.0))
    for reason in ("no_payload", "not_for_us"):
        metrics.entry_ignored(reason)
    for action in CommandAction:
        for reason in ("policy", *(rule.reason for rule in RULES)):
            metrics.command_issued(action, reason)
    for event in Event:
        for severity in Severity:
            metrics.event_reported(event, severity)
    samples: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    samples["up"]["job"].add("tamiyo")
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = samples[sample.name]
            for name, value in sample.labels.items():
                labels[name].add(value)
    return samples


def unknown_references(expression: str, samples: Samples) -> Iterator[str]:
    """What in a PromQL expression matches nothing that is exported."""
    for selector in _SELECTOR.finditer(expression):
        name = selector["name"]
        if name not in samples:
            yield name
            continue
        for label, operator, value in _MATCHER.findall(selector["labels"] or ""):
            if label in samples[name] and label != "job":
                known = samples[name][label]
                matches = re.compile(value).fullmatch if operator == "=~" else value.__eq__
                if not any(matches(each) for each in known):
                    yield f'{name}{{{label}{operator}"{value}"}}'
            elif label not in ADDED_BY_PROMETHEUS:
                yield f"{name}{{{label}}}"
