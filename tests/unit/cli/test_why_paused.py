"""The page on pauses knows every word that a pause or a refusal can be explained with."""

from __future__ import annotations

import re
from pathlib import Path

from tamiyo_svc.client.seeds.executor import Refusal
from tamiyo_svc.client.seeds.gates import GateFailure
from tamiyo_svc.risk.engine import POLICY_REASON
from tamiyo_svc.risk.rules import RULES, Effect
from tamiyo_svc.service.settings import VARIABLES
from tamiyo_svc.taxonomy import Event

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "why-paused.md").read_text(encoding="utf-8")
CELLS = {
    word
    for row in re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    for word in re.findall(r"`([a-z_]+)(?:: \.\.\.)?`", row)
}
"""What the first column of the page's tables names."""


def test_every_reason_for_a_pause_has_a_row() -> None:
    pausing = (Effect.PAUSE, Effect.SEED_TO_PAUSE, Effect.SAFE_COMMAND)
    reasons = {rule.reason for rule in RULES if rule.effect in pausing}
    assert reasons | {POLICY_REASON, Event.COMMAND_FAILED} <= CELLS


def test_every_refusal_and_every_gate_has_a_row() -> None:
    assert {*Refusal, *GateFailure} <= CELLS


def test_every_setting_it_names_exists() -> None:
    named = set(re.findall(r"`(TAMIYO_[A-Z_]+)(?:=\w+)?`", PAGE))
    assert named
    assert named <= {variable.name for variable in VARIABLES}


def test_it_is_linked_from_where_a_trainer_looks() -> None:
    for page in ("index.md", "trainer-guide.md", "operator-guide.md"):
        assert "why-paused.md" in (DOCS / page).read_text(encoding="utf-8")
