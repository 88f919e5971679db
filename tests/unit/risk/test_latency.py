"""What a run's own latencies make of the next one, step by step through its stored state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.engine import assess
from tamiyo_svc.risk.latency import KEPT, Latencies, find_rise
from tamiyo_svc.risk.mode import INACTIVE
from tamiyo_svc.risk.signals import Inference, Metadata, read_signals
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.runs.state import EMPTY, RunState, advance, fold, packet_digest
from tamiyo_svc.taxonomy import CommandAction, Event, Severity

THRESHOLDS = Thresholds()
TOLD, PAUSED = "told", "paused"
_MARKS = {Severity.WARNING: TOLD, Severity.HIGH: PAUSED}


def packet(
    step: int, latency_ms: float, metric: str = "step_latency_ms"
) -> leyline.SystemStatePacket:
    return leyline.SystemStatePacket(
        training_run_id="run-1",
        global_step=step,
        training_metrics={metric: latency_ms},
        seed_states=[leyline.SeedState(seed_id="s", stage=leyline.SEED_STAGE_DORMANT)],
    )


def decide(
    state: RunState, given_packet: leyline.SystemStatePacket, thresholds: Thresholds
) -> tuple[RunState, str]:
    """The stored state after a step, and whether its latency was told, paused on, or neither."""
    signals = read_signals(
        given_packet,
        state.last_validation_loss,
        inference=Inference(coverage_mean=0.9, policy_risk_score=0.1),
        metadata=Metadata(candidates=1),
        latencies=state.latencies_before(given_packet),
    )
    verdict = assess(signals, thresholds, CommandAction.SEED)
    marks = [
        _MARKS[fired.severity]
        for fired in verdict.events
        if fired.event in (Event.STEP_LATENCY_HIGH, Event.HOOK_BUDGET)
    ]
    pauses = verdict.action is CommandAction.PAUSE
    assert pauses is (PAUSED in marks)
    assert pauses or verdict.action is CommandAction.SEED
    advanced = advance(
        state,
        given_packet,
        packet_digest(given_packet.SerializeToString()),
        mode=INACTIVE,
        severity=verdict.severity,
        now_ns=1,
        window_max_age_s=3600.0,
    )
    return RunState.from_bytes(advanced.state.to_bytes()), marks[0] if marks else ""


def marks_of(
    latencies: Iterable[float],
    thresholds: Thresholds = THRESHOLDS,
    metric: str = "step_latency_ms",
) -> list[str]:
    state, marks = EMPTY, []
    for step, latency_ms in enumerate(latencies, start=1):
        state, mark = decide(state, packet(step, latency_ms, metric), thresholds)
        marks.append(mark)
    return marks


def steps_with(mark: str, marks: Sequence[str]) -> list[int]:
    return [index for index, each in enumerate(marks) if each == mark]


@pytest.mark.parametrize(
    ("metric", "latency_ms"), [("step_latency_ms", 200.0), ("hook_latency_ms", 60.0)]
)
def test_a_jump_is_told_then_paused_on_then_the_level(metric: str, latency_ms: float) -> None:
    steady, jumped = [latency_ms] * 300, [3 * latency_ms] * 100
    marks = marks_of([*steady, *jumped, *steady[:100]], metric=metric)
    assert not any(marks[:300])
    assert marks[300:307] == [TOLD] * 7
    assert marks[307:324] == [PAUSED] * 17
    assert not any(marks[324:])


def test_a_rise_that_ends_is_over_at_once_and_the_next_one_is_told_again() -> None:
    jump = [600.0] * 12
    marks = marks_of([*[200.0] * 100, *jump, *[200.0] * 40, *jump, *[200.0] * 40])
    assert steps_with(PAUSED, marks) == [*range(107, 112), *range(159, 164)]
    assert steps_with(TOLD, marks) == [*range(100, 107), *range(152, 159)]


@pytest.mark.parametrize("every", [2, 3, 5, 10, 16, 30])
@pytest.mark.parametrize("times", [2.6, 5.0, 100.0])
def test_slow_steps_that_belong_to_the_run_are_not_a_rise(every: int, times: float) -> None:
    marks = marks_of([100.0 * (times if step % every == 0 else 1.0) for step in range(1, 301)])
    assert not any(marks[2 * every :])
    assert PAUSED not in marks


def test_two_slow_steps_of_every_five_are_not_a_rise() -> None:
    assert not any(marks_of([20.0, 20.0, 20.0, 90.0, 90.0] * 60))


def test_rare_slow_steps_are_told_and_never_pause() -> None:
    marks = marks_of([100.0 * (5.0 if step % 60 == 0 else 1.0) for step in range(1, 301)])
    assert steps_with(TOLD, marks) == [59, 119, 179, 239, 299]
    assert PAUSED not in marks


def test_a_rise_is_told_in_a_run_that_has_slow_steps_of_its_own() -> None:
    """Later than in a steady run by as many steps as are slow now and then."""
    evaluated = [100.0 * (5.0 if step % 10 == 0 else 1.0) for step in range(1, 201)]
    marks = marks_of([*evaluated, *[400.0] * 60])
    assert not any(marks[:200])
    assert TOLD in marks[200:206]
    assert PAUSED in marks[200:210]
    assert not any(marks[230:])


@pytest.mark.parametrize("first", [[20_000.0], [5000.0] * 5, [900.0, 700.0, 500.0, 300.0]])
def test_the_first_steps_are_no_measure(first: list[float]) -> None:
    assert not any(marks_of([*first, *[200.0] * 300]))


def test_a_latency_that_grows_slowly_is_the_level_all_along() -> None:
    assert not any(marks_of([50.0 * 1.02**step for step in range(300)]))


def test_a_latency_that_grows_fast_is_a_rise() -> None:
    marks = marks_of([50.0 * 1.08**step for step in range(100)])
    assert PAUSED in marks


def test_noise_of_short_steps_lies_below_the_floor() -> None:
    assert not any(marks_of([2.0, 2.5, 9.0, 2.0, 11.0] * 40))
    assert TOLD in marks_of([2.0] * 40 + [13.0])


@pytest.mark.parametrize("garbage", [nan, inf, -inf, 0.0, -5.0, -1e30])
def test_garbage_neither_enters_nor_ends_the_memory(garbage: float) -> None:
    state = EMPTY
    for step in range(1, 40):
        state, mark = decide(state, packet(step, 200.0), THRESHOLDS)
        state, other = decide(state, packet(step, garbage), THRESHOLDS)
        assert mark == other == ""
    assert state.latencies.step == (200.0,) * KEPT
    assert decide(state, packet(41, 600.0), THRESHOLDS)[1] == TOLD


def test_the_largest_and_the_smallest_numbers_are_ordinary() -> None:
    marks = marks_of([*[200.0] * 40, 3.4e38, *[200.0] * 40, 1e-45, *[200.0] * 40])
    assert steps_with(TOLD, marks) == [40]


def test_a_packet_without_a_latency_changes_nothing() -> None:
    state = EMPTY
    for step in range(1, 40):
        state, _ = decide(state, packet(step, 200.0), THRESHOLDS)
    after, mark = decide(state, packet(40, 1.0, "loss_ewma"), THRESHOLDS)
    assert (after.latencies, mark) == (state.latencies, "")


def test_a_superseded_packet_counts_as_a_decided_one() -> None:
    state = EMPTY
    for step in range(1, 304):
        slow = packet(step, 200.0 if step <= 300 else 600.0)
        state = fold(state, slow)
    signals_before = state.latencies
    assert signals_before.step[-4:] == (200.0, 600.0, 600.0, 600.0)
    state, mark = decide(state, packet(304, 600.0), THRESHOLDS)
    assert mark == TOLD
    for step in range(305, 308):
        state = fold(state, packet(step, 600.0))
    assert decide(state, packet(308, 600.0), THRESHOLDS)[1] == PAUSED


def test_a_run_that_is_started_again_brings_its_own_level() -> None:
    state = EMPTY
    for step in range(1, 301):
        state, _ = decide(state, packet(step, 20.0), THRESHOLDS)
    marks = []
    for step in range(100, 200):
        latency_ms = 9000.0 if step < 104 else 400.0
        state, mark = decide(state, packet(step, latency_ms), THRESHOLDS)
        marks.append(mark)
    assert not any(marks)
    assert decide(state, packet(200, 1200.0), THRESHOLDS)[1] == TOLD


def test_a_run_that_goes_on_with_a_slower_model_is_normal_before_long() -> None:
    marks = marks_of([*[20.0] * 300, *[400.0] * 100])
    assert len(steps_with(PAUSED, marks)) == 17
    assert not any(marks[324:])


def test_the_rise_that_counts_the_floor_and_the_row_are_settings() -> None:
    jump = [200.0] * 40 + [600.0] * 4
    assert marks_of(jump, Thresholds(latency_rise_steps=2))[40:] == [TOLD, PAUSED, PAUSED, PAUSED]
    assert not any(marks_of(jump, Thresholds(step_latency_rise_ratio=3.0)))
    assert not any(marks_of(jump, Thresholds(latency_rise_ms=400.0)))
    assert not any(marks_of(jump, Thresholds(step_latency_rise_ratio=0.0)))


@given(
    st.lists(st.floats(1.0, 1e6, width=32), min_size=KEPT, max_size=KEPT).map(tuple),
    st.floats(1.0, 1e6, width=32),
    st.floats(1.0, 10.0),
)
def test_a_rise_is_what_it_says(known: tuple[float, ...], value: float, ratio: float) -> None:
    rise = find_rise(known, value, ratio, 10.0)
    if rise is not None:
        assert value > rise.limit_ms >= max(ratio * rise.median_ms, rise.median_ms + 10.0)
        assert all(latency > rise.limit_ms for latency in (*known, value)[-rise.steps :])
        assert 1 <= rise.steps <= KEPT // 2 + 1


@settings(max_examples=25)
@given(st.lists(st.floats(width=32) | st.floats(0.5, 500.0, width=32), max_size=80))
def test_no_value_keeps_a_later_steady_level_from_being_one(values: list[float]) -> None:
    state = EMPTY
    for step, value in enumerate([*values, *[200.0] * 100], start=1):
        state, mark = decide(state, packet(step, value), THRESHOLDS)
        if step > len(values) + 24:
            assert mark == ""
    assert state.latencies == Latencies(step=(200.0,) * KEPT)
