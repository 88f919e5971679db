from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tamiyo_svc.adapters.blueprint_rows import SKIPPED_PARTS, parse_blueprint
from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.leyline import leyline_pb2 as leyline


def parsed(value: Any, skipped: Counter[str] | None = None) -> Blueprint:
    return parse_blueprint("bp", json.dumps(value), Counter() if skipped is None else skipped)


def sheet(**fields: Any) -> tuple[leyline.BSDS | None, int]:
    """The safety sheet of a row with these fields, and how many were counted as odd."""
    skipped: Counter[str] = Counter()
    blueprint = parsed({"risk": 0.25, "_urza": {"bsds": fields}}, skipped)
    return blueprint.bsds, skipped["bsds"]


def test_descriptor_extras_and_sheet_are_read() -> None:
    blueprint = parsed(
        {
            "blueprint_id": "another",
            "tier": "BLUEPRINT_TIER_HIGH_RISK",
            "risk": 0.5,
            "stage": 2,
            "allowed_parameters": {"alpha": {"min_value": 0.1, "max_value": 0.5}},
            "unknown": 1,
            "_urza": {
                "graph_metadata": {"layers": []},
                "guard_spec": [{"shape": [1]}],
                "tags": ["a", 2, {}, None],
                "bsds": {
                    "risk_score": 0.75,
                    "hazard_band": "high",
                    "handling_class": "HANDLING_CLASS_RESTRICTED",
                    "resource_profile": "gpu",
                    "provenance": "urabrask",
                    "issued_at": "2026-01-01T00:00:00Z",
                },
            },
        }
    )
    assert blueprint.blueprint_id == "bp"
    assert blueprint.descriptor.tier == leyline.BLUEPRINT_TIER_HIGH_RISK
    assert blueprint.descriptor.allowed_parameters["alpha"].max_value == pytest.approx(0.5)
    assert blueprint.graph_metadata == {"layers": []}
    assert blueprint.tags == ("a", "2")
    assert blueprint.bsds is not None
    assert blueprint.bsds.hazard_band == leyline.HAZARD_BAND_HIGH
    assert blueprint.bsds.handling_class == leyline.HANDLING_CLASS_RESTRICTED
    assert blueprint.bsds.provenance == leyline.PROVENANCE_URABRASK
    assert blueprint.risk == pytest.approx(0.75)


@pytest.mark.parametrize(
    "fields",
    [
        {"provenance": "nobody"},
        {"handling_class": {}},
        {"resource_profile": 7},
        {"issued_at": "yesterday"},
        {"risk_score": "much"},
        {"risk_score": float("nan")},
        {"risk_score": 10**400},
        {"risk_score": None},
    ],
    ids=str,
)
def test_one_odd_field_does_not_cost_the_hazard(fields: dict[str, Any]) -> None:
    found, odd = sheet(**{"risk_score": 0.5, "hazard_band": "CRITICAL", **fields})
    assert found is not None
    assert found.hazard_band == leyline.HAZARD_BAND_CRITICAL
    assert odd == 1
    expected = 0.25 if "risk_score" in fields else 0.5
    assert found.risk_score == pytest.approx(expected)


@pytest.mark.parametrize(("risk", "kept"), [(-1.0, 0.0), (2.0, 1.0)])
def test_a_sheets_risk_is_clamped(risk: float, kept: float) -> None:
    found, odd = sheet(risk_score=risk)
    assert found is not None
    assert (found.risk_score, odd) == (kept, 0)


@pytest.mark.parametrize(
    ("extras", "part"),
    [
        ({"bsds": [1]}, "bsds"),
        ({"graph_metadata": []}, "graph_metadata"),
        ({"guard_spec": {}}, "guard_spec"),
        ({"tags": "a"}, "tags"),
    ],
)
def test_a_part_of_the_wrong_kind_is_left_out_and_counted(
    extras: dict[str, Any], part: str
) -> None:
    skipped: Counter[str] = Counter()
    parsed({"risk": 0.1, "_urza": extras}, skipped)
    assert skipped == {part: 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"x"',
        "[" * 100_000,
        '{"risk": "high"}',
        '{"risk": NaN}',
        '{"risk": 1e999}',
        '{"allowed_parameters": 3}',
        '{"stage": -1}',
    ],
    ids=lambda text: text[:20],
)
def test_a_row_without_a_readable_descriptor_is_one_documented_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_blueprint("bp", text, Counter())


_NAMES = st.sampled_from(
    [
        *(
            "risk",
            "tier",
            "stage",
            "allowed_parameters",
            "quarantine_only",
            "_urza",
            "bsds",
            "tags",
        ),
        *("risk_score", "hazard_band", "issued_at", "graph_metadata", "guard_spec", "alpha"),
    ]
)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["CRITICAL", "\ud800", "2026-01-01T00:00:00Z"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES, inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_NAMES, _JSON, max_size=6) | _JSON)
@example({"allowed_parameters": {"risk": "\ud800"}})
@example({"allowed_parameters": {"\ud800": {"min_value": 0}}})
def test_no_row_raises_anything_else(value: Any) -> None:
    skipped: Counter[str] = Counter()
    try:
        blueprint = parsed(value, skipped)
    except ValueError:
        return
    assert blueprint.blueprint_id == "bp"
    assert blueprint.candidate_score >= 0.0
    assert set(skipped) <= set(SKIPPED_PARTS)
