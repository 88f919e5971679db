"""A finished run as one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tamiyo_svc.trainer.records import RunSummary, SeedView, StepOutcome, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUDGET_MS: Final = 5.0
"""The service's own budget from packet to command; a trainer sees the bus on top of it."""

_INK: Final = "#1f2933"
_MUTED: Final = "#7b8794"
_BLUE: Final = "#2563a8"
_ORANGE: Final = "#d9822b"
_RED: Final = "#c23030"
_OUTCOME_COLOURS: Final = {
    StepOutcome.APPLIED: "#2a9d6f",
    StepOutcome.REJECTED: _ORANGE,
    StepOutcome.MISSED: _RED,
}
_STAGE_COLOURS: Final = {
    "DORMANT": "#e4e7eb",
    "GERMINATED": "#d8e8c0",
    "TRAINING": "#a8d0a0",
    "BLENDING": "#f3c969",
    "SHADOWING": "#9fc3e7",
    "PROBATIONARY": "#5b95cf",
    "FOSSILIZED": "#1f5f99",
    "CULLED": "#d98880",
}
_LEGEND_ABOVE: Final[dict[str, Any]] = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "ncols": 8,
    "frameon": False,
    "columnspacing": 1.2,
    "handlelength": 1.0,
    "handletextpad": 0.4,
}
_STYLE: Final = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1f2933;background:#f5f7fa;
margin:0}
main{max-width:960px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:17px;margin:0 0 4px}
p{color:#52606d;margin:0 0 12px}
section{background:#fff;border:1px solid #e4e7eb;border-radius:10px;padding:20px;margin-top:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;
margin-top:20px}
.tile{background:#fff;border:1px solid #e4e7eb;border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:24px}
.tile span{color:#52606d;font-size:13px}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid #e4e7eb}
td.number{text-align:right;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto}
"""


def write_report(path: Path, records: Sequence[StepRecord], summary: RunSummary) -> None:
    """Write the report of a run."""
    path.write_text(render_report(records, summary), encoding="utf-8")


def render_report(records: Sequence[StepRecord], summary: RunSummary) -> str:
    """The report as HTML: tiles, four figures as inline SVG, and tables."""
    latencies = [record.latency_ms for record in records if record.latency_ms is not None]
    title = html.escape(f"Training run {summary.run_id}")
    sections = [
        _section(
            "Learning",
            "Training loss of each batch, loss and accuracy on the validation set.",
            _figure("learning", lambda axes: _draw_learning(axes, records), 3.2),
        ),
        _section(
            "Life of the seeds",
            "The stage of every seed after each step.",
            _figure("seeds", lambda axes: _draw_seeds(axes, records), 2.4),
        ),
        _section(
            "Decisions",
            "The command answered to each step and what the trainer made of it.",
            _figure("decisions", lambda axes: _draw_decisions(axes, records), 2.4),
        ),
        _section(
            "Latency",
            "From publishing a packet to holding its verified command, bus included. "
            f"{_latency_sentence(latencies)}",
            _figure("latencies", lambda axes: _draw_latencies(axes, latencies), 2.6),
        ),
        _section("Seeds at the end", "", _seed_table(summary.seeds)),
        _section("Summary", "", _table(_summary_rows(records, summary))),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{title}</h1><p>{summary.steps} steps in {summary.duration_s:.1f} s, "
        f"one command for each.</p>{_tiles(summary, latencies)}{''.join(sections)}"
        "</main></body></html>\n"
    )


def _section(title: str, text: str, body: str) -> str:
    paragraph = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{paragraph}{body}</section>"


def _tiles(summary: RunSummary, latencies: Sequence[float]) -> str:
    grafted = sum(seed.stage == "FOSSILIZED" for seed in summary.seeds)
    tiles = (
        (f"{summary.accuracy:.1%}", "test accuracy"),
        (f"{grafted} of {len(summary.seeds)}", "seeds grafted for good"),
        (f"{summary.received} of {summary.published}", "packets answered in time"),
        (f"{quantile(latencies, 0.5):.1f} ms" if latencies else "–", "median latency"),
        (str(summary.unverifiable), "commands not verifiable"),
    )
    cells = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _summary_rows(records: Sequence[StepRecord], summary: RunSummary) -> list[tuple[str, str]]:
    rows = [
        ("Packets published", str(summary.published)),
        ("Commands received in time", str(summary.received)),
        ("Steps without a command", str(summary.missed)),
        ("Commands late", str(summary.late)),
        ("Commands not verifiable", str(summary.unverifiable)),
        ("Commands applied", str(summary.applied)),
        ("Commands rejected by the trainer", str(summary.rejected)),
        ("Isolation violations", str(summary.isolation_violations)),
    ]
    rows += [(f"Rejected: {why}", str(n)) for why, n in sorted(summary.rejections.items())]
    reasons = Counter(record.reason for record in records if record.reason)
    rows += [(f"Reason: {reason}", str(n)) for reason, n in reasons.most_common()]
    return rows


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{body}</table>"


def _seed_table(seeds: Sequence[SeedView]) -> str:
    body = "".join(
        f"<tr><td>{html.escape(seed.seed_id)}</td><td>{html.escape(seed.blueprint_id or '–')}</td>"
        f'<td>{html.escape(seed.stage.lower())}</td><td class="number">{seed.alpha:.2f}</td></tr>'
        for seed in seeds
    )
    head = "<tr><th>Seed</th><th>Blueprint</th><th>Stage</th><th>Alpha</th></tr>"
    return f"<table>{head}{body}</table>"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def _latency_sentence(latencies: Sequence[float]) -> str:
    if not latencies:
        return "No command arrived."
    within = sum(latency <= BUDGET_MS for latency in latencies) / len(latencies)
    p50, p99 = quantile(latencies, 0.5), quantile(latencies, 0.99)
    return (
        f"Median {p50:.2f} ms, 99th percentile {p99:.2f} ms; "
        f"{within:.1%} within the service's {BUDGET_MS:g} ms budget."
    )


def _figure(name: str, draw: Callable[[Axes], None], height: float) -> str:
    """One set of axes as an inline SVG element."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text, so the reader's own font is used and the file stays small; the salt keeps
    # the figures' element ids apart within one document and the same from run to run.
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}
    ):
        figure = Figure(figsize=(9, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_MUTED)
        axes.tick_params(colors=_INK)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_learning(axes: Axes, records: Sequence[StepRecord]) -> None:
    steps = [record.step for record in records]
    axes.plot(steps, [r.loss for r in records], color=_BLUE, alpha=0.3, lw=1, label="training loss")
    axes.plot(
        steps, [r.validation_loss for r in records], color=_BLUE, lw=1.6, label="validation loss"
    )
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.spines[["top", "left"]].set_visible(False)
    right.plot(steps, [r.accuracy for r in records], color=_ORANGE, lw=1.6, label="accuracy")
    right.set_ylim(0, 1.02)
    right.set_ylabel("validation accuracy")
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="center right", frameon=False)


def _draw_seeds(axes: Axes, records: Sequence[StepRecord]) -> None:
    ids = [seed.seed_id for seed in records[0].seeds] if records else []
    for row in range(len(ids)):
        for stage, first, width in _spans([record.seeds[row].stage for record in records]):
            left = records[first].step - 0.5
            axes.barh(row, width, left=left, height=0.6, color=_STAGE_COLOURS.get(stage, _MUTED))
    axes.set_yticks(range(len(ids)), ids)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    seen = {seed.stage for record in records for seed in record.seeds}
    for stage, colour in _STAGE_COLOURS.items():
        if stage in seen:
            axes.bar(0, 0, color=colour, label=stage.lower())
    if seen:
        axes.legend(**_LEGEND_ABOVE)


def _spans(stages: Sequence[str]) -> list[tuple[str, int, int]]:
    spans: list[tuple[str, int, int]] = []
    for index, stage in enumerate(stages):
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], spans[-1][2] + 1)
        else:
            spans.append((stage, index, 1))
    return spans


def _draw_decisions(axes: Axes, records: Sequence[StepRecord]) -> None:
    kinds = list(dict.fromkeys(_kind(record) for record in records))
    for outcome, colour in _OUTCOME_COLOURS.items():
        chosen = [record for record in records if record.outcome is outcome]
        if chosen:
            axes.scatter(
                [record.step for record in chosen],
                [kinds.index(_kind(record)) for record in chosen],
                color=colour,
                marker="|",
                s=60,
                label=f"{outcome} ({len(chosen)})",
            )
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_xlabel("step")
    if records:
        axes.legend(**_LEGEND_ABOVE)


def _kind(record: StepRecord) -> str:
    if record.outcome is StepOutcome.MISSED:
        return "no command"
    return record.operation.replace("_", " ") or record.command_type.replace("_", " ")


def _draw_latencies(axes: Axes, latencies: Sequence[float]) -> None:
    if latencies:
        axes.hist(latencies, bins=60, color=_BLUE)
    axes.axvline(BUDGET_MS, color=_RED, lw=1.4, ls="--")
    axes.annotate(
        f"{BUDGET_MS:g} ms budget",
        (BUDGET_MS, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -10),
        textcoords="offset points",
        color=_RED,
    )
    axes.set_xlim(left=0)
    axes.set(xlabel="latency (ms)", ylabel="steps")
