"""A comparison of decisions as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Final

from tamiyo_svc.cli.bus_message import shown_time
from tamiyo_svc.cli.decision_diff import Agreement, Compared, Comparison

_COLOURS: Final = {
    Agreement.IDENTICAL: "#2a9d6f",
    Agreement.SAME_DECISION: "#9fc3e7",
    Agreement.DIFFERENT: "#c23030",
    Agreement.UNANSWERED: "#f3c969",
    Agreement.NOT_RECORDED: "#cbd2d9",
}
_STRIP_WIDTH: Final = 920
_MOST_RUNS: Final = 200
_MOST_ROWS: Final = 2000
_STYLE: Final = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1f2933;background:#f5f7fa;
margin:0}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:17px;margin:0 0 4px}
p{color:#52606d;margin:0 0 12px}
section{background:#fff;border:1px solid #e4e7eb;border-radius:10px;padding:20px;margin-top:20px;
overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin-top:20px}
.tile{background:#fff;border:1px solid #e4e7eb;border-left-width:6px;border-radius:10px;
padding:12px 16px}
.tile b{display:block;font-size:24px}
.tile span{color:#52606d;font-size:13px}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid #e4e7eb;vertical-align:top;
overflow-wrap:anywhere}
th{white-space:nowrap}
td.number{text-align:right;font-variant-numeric:tabular-nums}
code{font-size:13px;overflow-wrap:anywhere}
svg{width:100%;height:18px;display:block;margin:2px 0 10px}
details summary{cursor:pointer;color:#52606d}
"""


def render_page(comparison: Comparison, source: str) -> str:
    """The page: what agrees, where along each run it does not, and every decision that differs."""
    title = f"Replay of {source}"
    different = [row for row in comparison.rows if row.agreement is Agreement.DIFFERENT]
    sections = [_section("Along the runs", _LEGEND, _strips(comparison.rows))]
    transitions = [(before, after, str(count)) for before, after, count in comparison.transitions()]
    if transitions:
        heads = ("Recorded", "Replayed", "Packets")
        sections.append(
            _section("What became of what", "Reasons in brackets.", _table(heads, transitions))
        )
    details = [(name, str(count)) for name, count in comparison.changed_fields().most_common()]
    if details:
        text = "Fields that differ where the order is the same."
        sections.append(_section("Other details", text, _table(("Field", "Packets"), details)))
    if different:
        text = ""
        if len(different) > _MOST_ROWS:
            text = f"The first {_MOST_ROWS} of {len(different)}; the JSON output has all."
        sections.append(_section("Decisions that differ", text, _rows(different[:_MOST_ROWS])))
    sections.append(_section("The recording", "", _table(("", ""), _facts(comparison))))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(_verdict(comparison))}</p>"
        f"{_tiles(comparison)}{''.join(sections)}</main></body></html>\n"
    )


def _verdict(comparison: Comparison) -> str:
    if not comparison.compared:
        return f"Decided with {comparison.policy}; the recording holds no commands to compare with."
    before = ", ".join(comparison.recorded_policies)
    agreed = comparison.count(Agreement.IDENTICAL) + comparison.count(Agreement.SAME_DECISION)
    proposed = agreed + comparison.count(Agreement.DIFFERENT)
    return (
        f"Recorded with {before}, replayed with {comparison.policy}: "
        f"{agreed} of {proposed} decisions agree."
    )


def _tiles(comparison: Comparison) -> str:
    tiles = "".join(
        f'<div class="tile" style="border-left-color:{_COLOURS[kind]}">'
        f"<b>{comparison.count(kind)}</b><span>{kind.value}</span></div>"
        for kind in Agreement
    )
    return f'<div class="tiles">{tiles}</div>'


_LEGEND: Final = "One mark for each decided packet, oldest on the left, in the colours above."


def _strips(rows: Sequence[Compared]) -> str:
    runs: dict[str, list[Compared]] = {}
    for row in rows:
        runs.setdefault(row.run_id, []).append(row)
    # The runs with the most to see come first.
    ordered = sorted(
        runs.items(),
        key=lambda run: (-sum(row.agreement is Agreement.DIFFERENT for row in run[1]), run[0]),
    )
    parts = [_strip(run_id, run) for run_id, run in ordered[:_MOST_RUNS]]
    if len(ordered) > _MOST_RUNS:
        parts.append(f"<p>and {len(ordered) - _MOST_RUNS} more runs</p>")
    return "".join(parts)


def _strip(run_id: str, rows: Sequence[Compared]) -> str:
    width = _STRIP_WIDTH / len(rows)
    marks = []
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place].agreement is not rows[start].agreement:
            marks.append(
                f'<rect x="{start * width:.2f}" width="{(place - start) * width:.2f}" '
                f'height="18" fill="{_COLOURS[rows[start].agreement]}"><title>'
                f"steps {rows[start].step} to {rows[place - 1].step}: "
                f"{rows[start].agreement.value}</title></rect>"
            )
            start = place
    return (
        f"<div>{html.escape(run_id)}, {len(rows)} decisions</div>"
        f'<svg viewBox="0 0 {_STRIP_WIDTH} 18" preserveAspectRatio="none" role="img" '
        f'aria-label="agreement along {html.escape(run_id)}">{"".join(marks)}</svg>'
    )


def _rows(rows: Iterable[Compared]) -> str:
    heads = ("Run", "Step", "Added", "Recorded", "Replayed", "All that differs")
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(cell)}</td>"
            for cell in (
                row.run_id,
                str(row.step),
                shown_time(row.added_ms),
                f"{row.recorded} ({row.recorded_reason})",
                f"{row.replayed} ({row.replayed_reason})",
            )
        )
        + f"<td>{_changes(row)}</td></tr>"
        for row in rows
    )
    return f"<table>{_head(heads)}{body}</table>"


def _changes(row: Compared) -> str:
    lines = "<br>".join(
        f"<code>{html.escape(name)}: {html.escape(before or '–')} → {html.escape(after or '–')}"
        "</code>"
        for name, (before, after) in row.changes.items()
    )
    return f"<details><summary>{len(row.changes)} fields</summary>{lines}</details>"


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = [
        ("Packets decided again", str(len(comparison.rows))),
        ("Commands recorded without their packet", str(comparison.unmatched)),
        ("SHA-256 of the replayed commands", comparison.digest),
    ]
    facts += [(f"Packets not decided: {name}", str(n)) for name, n in comparison.others.items()]
    facts += [(f"Entries refused: {name}", str(n)) for name, n in comparison.refused.items()]
    facts += [
        (f"Recorded with policy {name}", str(n)) for name, n in comparison.recorded_policies.items()
    ]
    return facts


def _section(title: str, text: str, body: str) -> str:
    paragraph = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph}{body}</section>"


def _head(names: Sequence[str]) -> str:
    if not any(names):
        return ""
    return f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table>{_head(heads)}{body}</table>"
