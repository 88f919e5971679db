"""The HTML report."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tamiyo_svc.trainer.records import RunSummary, SeedView, StepOutcome, StepRecord
from tamiyo_svc.trainer.report import quantile, render_report, write_report

RUN_ID = "run <1> & more"


def make_records() -> list[StepRecord]:
    applied = StepRecord(
        step=1,
        epoch=1,
        loss=2.0,
        validation_loss=1.9,
        accuracy=0.3,
        learning_rate=1e-3,
        outcome=StepOutcome.APPLIED,
        command_type="seed",
        operation="germinate",
        target_seed_id="seed-0",
        reason="policy",
        latency_ms=3.0,
        seeds=(SeedView("seed-0", "GERMINATED", 0.0, "seed-depthwise-conv"),),
    )
    missed = StepRecord(
        step=2,
        epoch=1,
        loss=1.5,
        validation_loss=1.4,
        accuracy=0.5,
        learning_rate=1e-3,
        outcome=StepOutcome.MISSED,
        seeds=(SeedView("seed-0", "CULLED", 0.0, "seed-depthwise-conv"),),
    )
    return [applied, missed]


SUMMARY = RunSummary(
    run_id=RUN_ID,
    steps=2,
    accuracy=0.975,
    duration_s=1.5,
    published=2,
    received=1,
    late=1,
    missed=1,
    unverifiable=0,
    applied=1,
    rejected=0,
    isolation_violations=0,
    rejections={"gate: min_steps": 3},
    seeds=(SeedView("seed-0", "CULLED", 0.0, "seed-depthwise-conv"),),
)
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Balance(HTMLParser):
    """Fails on an element closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_is_one_well_formed_file_that_loads_nothing() -> None:
    page = render_report(make_records(), SUMMARY)
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    assert page.count("<svg") == 4
    assert not re.search(r'(src=|href="(?!#)(?!http://www\.w3\.org)|@import|url\((?!#))', page)
    assert "<script" not in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_says_what_happened_and_escapes_it() -> None:
    parser = Balance()
    page = render_report(make_records(), SUMMARY)
    parser.feed(page)
    for said in ("97.5%", "1 of 2", RUN_ID, "germinate", "no command", "gate: min_steps", "policy"):
        assert said in parser.text
    assert "run <1>" not in page


def test_a_run_without_steps_or_commands_still_has_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, [], SUMMARY)
    assert "No command arrived." in path.read_text(encoding="utf-8")
    assert "No command arrived." in render_report(make_records()[1:], SUMMARY)


def test_the_same_run_gives_the_same_file() -> None:
    assert render_report(make_records(), SUMMARY) == render_report(make_records(), SUMMARY)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([1.0], 0.5, 1.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([*range(1, 101)], 0.99, 99),
        ([1, 2], 1.0, 2),
    ],
)
def test_quantile_is_the_smallest_value_that_covers_the_share(
    values: list[float], share: float, expected: float
) -> None:
    assert quantile(values, share) == expected


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, tamiyo_svc.trainer.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
