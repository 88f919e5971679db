from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.decision.observation import ObservationWindow
from tamiyo_svc.decision.record import command_id_for
from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.graph.normalizer import METRICS
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.mode import INACTIVE, ConservativeMode
from tamiyo_svc.runs.state import (
    EMPTY,
    MAX_DECIDED,
    Advanced,
    RunState,
    advance,
    fold,
    is_duplicate,
    packet_digest,
)
from tamiyo_svc.runs.windows import MAX_WINDOWS
from tamiyo_svc.taxonomy import Event, Severity

SECOND_NS = 1_000_000_000
NOW_NS = 1_760_000_000 * SECOND_NS
FINITE = st.floats(-1e30, 1e30)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
REASON = st.text(st.characters(codec="ascii"), max_size=64)

MODES = st.just(INACTIVE) | st.builds(
    ConservativeMode, active=st.just(True), reason=REASON, calm_steps=U32
)
WINDOWS = st.builds(
    ObservationWindow,
    command_id=st.uuids().map(str),
    start_epoch=U32,
    epochs=U32,
    opened_at_ns=U64,
    steps=U32,
    losses=U32,
    loss_delta_total=FINITE,
    loss_delta_min=FINITE,
    loss_delta_max=FINITE,
    hooks=U32,
    hook_latency_total_ms=FINITE,
    critical=st.booleans(),
)
STATES = st.builds(
    RunState,
    last_validation_loss=st.none() | FINITE,
    statistics=st.dictionaries(
        st.sampled_from(METRICS), st.tuples(FINITE, st.floats(0.0, 1e30)), max_size=len(METRICS)
    ),
    mode=MODES,
    decided=st.lists(st.binary(min_size=8, max_size=8), max_size=MAX_DECIDED).map(tuple),
    newest_timestamp_ns=U64,
    windows=st.lists(WINDOWS, max_size=MAX_WINDOWS).map(tuple),
)


def packet(
    loss: float = 0.5, *, epoch: int = 0, at_ns: int = NOW_NS, **metrics: float
) -> leyline.SystemStatePacket:
    return leyline.SystemStatePacket(
        training_run_id="run-1",
        validation_loss=loss,
        current_epoch=epoch,
        timestamp_ns=at_ns,
        training_metrics=metrics,
    )


def decided(
    state: RunState,
    given: leyline.SystemStatePacket,
    digest: bytes = b"digest-1",
    *,
    severity: Severity = Severity.INFO,
    mode: ConservativeMode = INACTIVE,
    now_ns: int = NOW_NS,
    window_epochs: int = 1,
) -> Advanced:
    return advance(
        state,
        given,
        digest,
        mode=mode,
        severity=severity,
        now_ns=now_ns,
        window_epochs=window_epochs,
        window_max_age_s=3600.0,
    )


@given(STATES)
def test_a_stored_state_is_the_same_state(state: RunState) -> None:
    assert RunState.from_bytes(state.to_bytes()) == state


def test_the_largest_state_is_small() -> None:
    window = ObservationWindow(str(uuid.UUID(int=1)), 0, 5, NOW_NS)
    state = RunState(
        last_validation_loss=0.5,
        statistics=dict.fromkeys(METRICS, (1.0, 1.0)),
        mode=ConservativeMode(active=True, reason="r" * 64),
        decided=(b"12345678",) * MAX_DECIDED,
        windows=(window,) * MAX_WINDOWS,
    )
    assert len(state.to_bytes()) <= 1536
    assert len(replace(state, windows=()).to_bytes()) <= 1024


@given(st.binary(max_size=200))
def test_garbage_is_one_documented_error(data: bytes) -> None:
    try:
        state = RunState.from_bytes(data)
    except StoredStateError:
        return
    assert RunState.from_bytes(state.to_bytes()) == state


@given(STATES, st.integers(0, 2000), st.integers(0, 255), st.integers(-40, 40))
def test_damage_is_one_documented_error(
    state: RunState, position: int, value: int, shift: int
) -> None:
    damaged = bytearray(state.to_bytes())
    damaged[position % len(damaged)] = value
    cut = bytes(damaged[:shift]) if shift < 0 else bytes(damaged) + b"\x00" * shift
    try:
        restored = RunState.from_bytes(cut)
    except StoredStateError:
        return
    assert RunState.from_bytes(restored.to_bytes()) == restored


def test_another_version_is_named() -> None:
    stored = bytes([9]) + EMPTY.to_bytes()[1:]
    with pytest.raises(StoredStateError, match="version 9"):
        RunState.from_bytes(stored)
    with pytest.raises(StoredStateError, match="version none"):
        RunState.from_bytes(b"")


def test_a_decided_packet_is_a_duplicate() -> None:
    state = decided(EMPTY, packet(), b"digest-1").state
    assert is_duplicate(state, b"digest-1", NOW_NS, 60.0)
    assert not is_duplicate(state, b"digest-2", NOW_NS, 60.0)


def test_the_last_64_decisions_are_remembered() -> None:
    state = EMPTY
    for n in range(MAX_DECIDED + 1):
        state = decided(state, packet(), n.to_bytes(8, "big")).state
    assert not is_duplicate(state, (0).to_bytes(8, "big"), NOW_NS, 60.0)
    assert is_duplicate(state, (1).to_bytes(8, "big"), NOW_NS, 60.0)


@pytest.mark.parametrize(("behind_s", "duplicate"), [(59.9, False), (60.0, False), (60.1, True)])
def test_a_packet_far_behind_the_newest_is_a_duplicate(behind_s: float, duplicate: bool) -> None:
    state = decided(EMPTY, packet()).state
    timestamp_ns = NOW_NS - int(behind_s * SECOND_NS)
    assert is_duplicate(state, b"digest-2", timestamp_ns, 60.0) is duplicate


def test_a_packet_without_a_timestamp_is_known_by_its_digest_alone() -> None:
    state = decided(EMPTY, packet()).state
    assert not is_duplicate(state, b"digest-2", 0, 60.0)
    assert is_duplicate(state, b"digest-1", 0, 60.0)


def test_a_clock_that_ran_ahead_does_not_turn_later_packets_into_replays() -> None:
    state = decided(EMPTY, packet(at_ns=2**63)).state
    assert not is_duplicate(state, b"digest-2", NOW_NS + SECOND_NS, 60.0)


def test_the_newest_timestamp_never_goes_back() -> None:
    state = decided(EMPTY, packet()).state
    state = decided(state, packet(at_ns=NOW_NS - SECOND_NS), b"digest-2").state
    assert state.newest_timestamp_ns == NOW_NS


def test_a_folded_packet_counts_its_metrics_and_nothing_else() -> None:
    before = decided(EMPTY, packet(0.5)).state
    after = fold(before, packet(0.75, at_ns=NOW_NS + SECOND_NS, gradient_norm=3.0))
    assert after.last_validation_loss == 0.75
    assert after.statistics["gradient_norm"] != before.statistics.get("gradient_norm")
    assert (after.decided, after.newest_timestamp_ns) == (
        before.decided,
        before.newest_timestamp_ns,
    )


def test_a_packet_without_a_loss_keeps_the_last_one() -> None:
    state = fold(EMPTY, packet(0.5))
    for loss in (0.0, float("nan"), float("inf")):
        assert fold(state, packet(loss)).last_validation_loss == 0.5


def test_a_decision_stores_the_mode() -> None:
    mode = ConservativeMode(active=True, reason="loss_spike")
    assert decided(EMPTY, packet(), mode=mode).state.mode == mode


def test_one_epoch_opens_no_window() -> None:
    assert decided(EMPTY, packet(), window_epochs=1).state.windows == ()


def test_a_window_sees_what_follows_its_command_and_closes_by_epoch() -> None:
    state = decided(EMPTY, packet(1.0, epoch=3), b"digest-1", window_epochs=2).state
    state = fold(state, packet(0.75, epoch=4, hook_latency_ms=2.0))
    advanced = decided(state, packet(0.5, epoch=5, hook_latency_ms=4.0), b"digest-2")
    (window,) = advanced.closed
    assert advanced.state.windows == ()
    assert window.command_id == command_id_for("run-1", b"digest-1")
    assert (window.start_epoch, window.epochs, window.steps) == (3, 2, 2)
    assert window.loss_delta_total == -0.5
    assert (window.loss_delta_min, window.loss_delta_max) == (-0.25, -0.25)
    assert window.hook_latency_total_ms == 6.0
    assert not window.critical


def test_a_critical_step_marks_the_windows_that_are_open() -> None:
    state = decided(EMPTY, packet(epoch=3), b"1" * 8, window_epochs=2).state
    state = decided(
        state, packet(epoch=3), b"2" * 8, window_epochs=2, severity=Severity.CRITICAL
    ).state
    assert [window.critical for window in state.windows] == [True, False]


def test_the_oldest_window_is_closed_early_when_there_are_too_many() -> None:
    state = EMPTY
    for n in range(MAX_WINDOWS):
        advanced = decided(state, packet(), n.to_bytes(8, "big"), window_epochs=2)
        assert advanced.closed == ()
        state = advanced.state
    advanced = decided(state, packet(), b"the last", window_epochs=2)
    (window,) = advanced.closed
    assert window.closed_early
    assert window.command_id == command_id_for("run-1", (0).to_bytes(8, "big"))
    assert len(advanced.state.windows) == MAX_WINDOWS


@pytest.mark.parametrize(
    ("epoch", "later_s", "reason"), [(2, 1.0, "run_rewound"), (3, 3601.0, "expired")]
)
def test_a_window_that_can_say_nothing_is_given_up(epoch: int, later_s: float, reason: str) -> None:
    state = decided(EMPTY, packet(epoch=3), window_epochs=2).state
    now_ns = NOW_NS + int(later_s * SECOND_NS)
    advanced = decided(state, packet(epoch=epoch), b"digest-2", now_ns=now_ns)
    (event,) = advanced.events
    assert event.event is Event.OBSERVATION_WINDOW_DROPPED
    assert event.attributes["reason"] == reason
    assert (advanced.closed, advanced.state.windows) == ((), ())


@given(st.lists(st.tuples(st.floats(width=32), st.integers(0, 6), st.booleans()), max_size=25))
def test_storing_between_any_two_packets_changes_nothing(
    steps: list[tuple[float, int, bool]],
) -> None:
    kept = stored = EMPTY
    for n, (loss, epoch, folds) in enumerate(steps):
        given_packet = packet(loss, epoch=epoch, hook_latency_ms=loss)
        if folds:
            kept, stored = fold(kept, given_packet), fold(stored, given_packet)
        else:
            digest = packet_digest(bytes([n]))
            ours = decided(kept, given_packet, digest, window_epochs=3)
            theirs = decided(stored, given_packet, digest, window_epochs=3)
            assert ours == theirs
            kept, stored = ours.state, theirs.state
        stored = RunState.from_bytes(stored.to_bytes())
        assert stored == kept


def test_digest_is_of_the_bytes() -> None:
    assert packet_digest(b"a") == packet_digest(b"a")
    assert packet_digest(b"a") != packet_digest(b"b")
    assert len(packet_digest(b"a")) == 8
