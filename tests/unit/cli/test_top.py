"""What the board keeps of telemetry and how it looks."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tamiyo_svc.adapters.oona.housekeeping import StreamStatus
from tamiyo_svc.cli.top import Board, board_view
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.taxonomy import BreakerName, BreakerState

NOW_MS = 1_760_000_000_000.0


def telemetry(
    step: int, *, replica: str = "tamiyo-0", reason: str = "policy", mode: str = "0"
) -> leyline.TelemetryPacket:
    packet = leyline.TelemetryPacket(packet_id=f"p-{step}", level=leyline.TELEMETRY_LEVEL_INFO)
    packet.system_health.indicators.update(
        {
            "step_index": str(step),
            "replica": replica,
            "command": "seed",
            "reason": reason,
            "mode": mode,
            "policy_version": "v1",
            "device": "cpu",
        }
    )
    packet.metrics.add(name="tamiyo.step.latency_ms", value=3.25)
    packet.metrics.add(name="tamiyo.breaker.inference_state", value=2.0)
    return packet


def run(name: str) -> dict[str, str]:
    return {"training_run_id": name}


def text_of(board: Board, statuses: dict[str, StreamStatus], rows: int = 20) -> str:
    console = Console(width=110, record=True, file=StringIO())
    console.print(board_view(board, statuses, NOW_MS, rows))
    return console.export_text()


def steps(order: Iterable[int]) -> Board:
    board = Board()
    for step in order:
        board.take(NOW_MS + step, run("a"), telemetry(step))
    return board


@given(st.permutations(range(6)))
def test_the_newest_decision_stays_whatever_order_packets_come_in(order: list[int]) -> None:
    assert steps(order).runs["a"].step == 5


def test_a_packet_without_a_decision_shows_the_replica_and_no_run() -> None:
    board = Board()
    notice = telemetry(1)
    del notice.system_health.indicators["step_index"]
    board.take(NOW_MS, run("a"), notice)
    board.take(NOW_MS, {}, telemetry(2))
    assert board.runs == {}
    assert board.replicas["tamiyo-0"].breakers == {BreakerName.INFERENCE: BreakerState.OPEN}


def test_the_view_tells_run_command_reason_breaker_and_lag() -> None:
    board = Board()
    board.take(NOW_MS - 90_000, run("old"), telemetry(7, replica="tamiyo-1"))
    board.take(NOW_MS - 1_000, run("new"), telemetry(9, reason="loss_spike", mode="1"))
    text = text_of(
        board,
        {
            "oona.normal": StreamStatus(12, 3, 1, f"{int(NOW_MS) - 2_000}-0"),
            "oona.emergency": StreamStatus(0),
        },
    )
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert rows["new"].split()[3:6] == ["9", "│", "1.0"]
    for word in ("seed", "loss_spike", "3.2 ms"):
        assert word in rows["new"]
    assert "2 min" in rows["old"]
    assert "open" in rows["tamiyo-0"]
    assert [cell.strip() for cell in rows["oona.normal"].split("│")[2:6]] == [
        "12",
        "3",
        "1",
        "2.0 s",
    ]
    assert "unknown" in rows["oona.emergency"]
    assert text.index(" new ") < text.index(" old ")


def test_no_more_runs_are_shown_than_asked_for() -> None:
    board = Board()
    for number in range(5):
        board.take(NOW_MS - number, run(f"run-{number}"), telemetry(1))
    text = text_of(board, {}, rows=2)
    assert "Runs (5)" in text
    assert "run-1" in text
    assert "run-2" not in text


def test_markup_in_names_is_shown_as_it_is() -> None:
    board = Board()
    board.take(NOW_MS, run("[red]x[/red]"), telemetry(1))
    assert "[red]x[/red]" in text_of(board, {})


def test_refused_entries_are_not_passed_over_in_silence() -> None:
    assert "refused" not in text_of(Board(), {})
    assert "3 entries were refused" in text_of(Board(refused=3), {})
