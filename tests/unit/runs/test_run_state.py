from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.decision.observation import ObservationWindow, ObservedCommand, Sums
from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.graph.normalizer import METRICS
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.latency import KEPT, Latencies
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
NAME = st.text(max_size=24)
VERSION_1 = bytes.fromhex(
    "0101000000000000e03f0000b0d4acc66c1868656172646f6e651001000000020101020000000a6c"
    "6f73735f7370696b65000000000000f03f000000000000d03f6469676573742d316469676573742d"
    "320000000000000000000000000000000103000000020000000000b0d4acc66c1804000000020000"
    "00000000000000e0bf000000000000d8bf000000000000c0bf01000000000000000000184001"
)
"""A state as the release before stored it."""
COMMANDS = st.builds(ObservedCommand, st.uuids().map(str), U64, NAME, NAME, NAME, NAME)
SUMS = st.builds(
    Sums,
    packets=U32,
    losses=U32,
    loss_delta_total=FINITE,
    loss_delta_min=FINITE,
    loss_delta_max=FINITE,
    hooks=U32,
    hook_latency_total_ms=FINITE,
    critical=st.booleans(),
)
OPEN = {
    "observed_epochs": st.just(0),
    "observed_steps": st.just(0),
    "closed_early": st.just(value=False),
}
WINDOWS = st.builds(ObservationWindow, COMMANDS, U32, U64, U32, U32, SUMS, **OPEN)
SERIES = st.lists(
    st.floats(0.0, exclude_min=True, allow_infinity=False, width=32), max_size=KEPT
).map(tuple)
STATES = st.builds(
    RunState,
    last_validation_loss=st.none() | FINITE,
    statistics=st.dictionaries(
        st.sampled_from(METRICS), st.tuples(FINITE, st.floats(0.0, 1e30)), max_size=len(METRICS)
    ),
    mode=MODES,
    decided=st.lists(st.binary(min_size=8, max_size=8), max_size=MAX_DECIDED).map(tuple),
    newest_timestamp_ns=U64,
    newest_step=U64,
    latencies=st.builds(Latencies, SERIES, SERIES),
    windows=st.lists(WINDOWS, max_size=6).map(tuple),
)


def packet(
    loss: float = 0.5, *, epoch: int = 0, step: int = 0, at_ns: int = NOW_NS, **metrics: float
) -> leyline.SystemStatePacket:
    return leyline.SystemStatePacket(
        training_run_id="run-1",
        validation_loss=loss,
        current_epoch=epoch,
        global_step=step,
        timestamp_ns=at_ns,
        training_metrics=metrics,
    )


def command_id(digest: bytes) -> str:
    return str(uuid.UUID(bytes=digest.ljust(16, b"\0")))


def decided(
    state: RunState,
    given: leyline.SystemStatePacket,
    digest: bytes = b"digest-1",
    *,
    severity: Severity = Severity.INFO,
    mode: ConservativeMode = INACTIVE,
    now_ns: int = NOW_NS,
    epochs: int = 0,
    steps: int = 0,
) -> Advanced:
    """The state after a decision; with `epochs` or `steps` its command opens a window."""
    opened = None
    if epochs or steps:
        command = ObservedCommand(command_id(digest), now_ns)
        place = given.current_epoch, given.global_step
        opened = ObservationWindow(command, *place, epochs, steps)
    return advance(
        state,
        given,
        digest,
        mode=mode,
        severity=severity,
        now_ns=now_ns,
        window_max_age_s=3600.0,
        opened=opened,
    )


@given(STATES)
def test_a_stored_state_is_the_same_state(state: RunState) -> None:
    assert RunState.from_bytes(state.to_bytes()) == state


def test_the_largest_state_is_small() -> None:
    command = ObservedCommand(str(uuid.UUID(int=1)), NOW_NS, *("n" * 200,) * 4)
    window = ObservationWindow(command, 0, 0, 5, 0)
    state = RunState(
        last_validation_loss=0.5,
        statistics=dict.fromkeys(METRICS, (1.0, 1.0)),
        mode=ConservativeMode(active=True, reason="r" * 64),
        decided=(b"12345678",) * MAX_DECIDED,
        latencies=Latencies((1.0,) * KEPT, (1.0,) * KEPT),
        windows=(window,) * MAX_WINDOWS,
    )
    assert len(state.to_bytes()) <= 32 * 1024
    assert len(replace(state, windows=()).to_bytes()) <= 1280


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


def test_a_state_of_the_release_before_is_read_and_stored_anew() -> None:
    state = RunState.from_bytes(VERSION_1)
    command = ObservedCommand(str(uuid.UUID(int=1)), NOW_NS)
    sums = Sums(4, 2, -0.5, -0.375, -0.125, 1, 6.0, critical=True)
    assert state == RunState(
        last_validation_loss=0.5,
        statistics={"loss": (1.0, 0.25)},
        mode=ConservativeMode(active=True, reason="loss_spike", calm_steps=2),
        decided=(b"digest-1", b"digest-2"),
        newest_timestamp_ns=NOW_NS,
        heard=b"heardone",
        windows=(ObservationWindow(command, 3, 0, 2, 0, sums),),
    )
    assert state.to_bytes()[0] == 2
    assert RunState.from_bytes(state.to_bytes()) == state


@given(st.integers(0, 2000), st.integers(0, 255), st.integers(-40, 40))
def test_damage_to_one_of_the_release_before_is_the_same_error(
    position: int, value: int, shift: int
) -> None:
    damaged = bytearray(VERSION_1)
    damaged[1 + position % (len(damaged) - 1)] = value
    cut = bytes(damaged[:shift]) if shift < 0 else bytes(damaged) + b"\x00" * shift
    try:
        restored = RunState.from_bytes(cut)
    except StoredStateError:
        return
    assert RunState.from_bytes(restored.to_bytes()) == restored


@pytest.mark.parametrize("latency", [0.0, -1.0, float("nan"), float("inf")])
def test_a_stored_latency_that_is_none_is_damage(latency: float) -> None:
    state = replace(EMPTY, latencies=Latencies((latency,)))
    with pytest.raises(StoredStateError, match="latency"):
        RunState.from_bytes(state.to_bytes())


def test_names_that_are_too_long_are_cut_between_characters() -> None:
    command = ObservedCommand(str(uuid.UUID(int=1)), NOW_NS, "loss", "ü" * 99, "b" * 300)
    state = replace(EMPTY, windows=(ObservationWindow(command, 0, 0, 5, 0),))
    (window,) = RunState.from_bytes(state.to_bytes()).windows
    assert window.command == replace(command, seed_id="ü" * 48, blueprint_id="b" * 96)


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


def test_a_window_sees_what_follows_its_command_and_closes_by_epoch() -> None:
    state = decided(EMPTY, packet(1.0, epoch=3), b"digest-1", epochs=2).state
    state = fold(state, packet(0.75, epoch=4, hook_latency_ms=2.0))
    advanced = decided(state, packet(0.5, epoch=5, hook_latency_ms=4.0), b"digest-2")
    (window,) = advanced.closed
    assert advanced.state.windows == ()
    assert window.command.command_id == command_id(b"digest-1")
    assert (window.start_epoch, window.observed_epochs, window.observed_steps) == (3, 2, 2)
    sums = window.sums
    assert sums.loss_delta_total == -0.5
    assert (sums.loss_delta_min, sums.loss_delta_max) == (-0.25, -0.25)
    assert sums.hook_latency_total_ms == 6.0
    assert not sums.critical


def test_a_window_closes_by_steps_where_they_are_over_first() -> None:
    state = decided(EMPTY, packet(epoch=3, step=100), epochs=2, steps=10).state
    advanced = decided(state, packet(epoch=3, step=109), b"digest-2")
    assert advanced.closed == ()
    (window,) = decided(advanced.state, packet(epoch=3, step=113), b"digest-3").closed
    assert (window.observed_epochs, window.observed_steps) == (0, 13)
    assert not window.closed_early


def test_a_trainer_that_does_not_number_its_steps_is_counted_by_its_packets() -> None:
    state = decided(EMPTY, packet(), steps=3).state
    for n in range(2):
        advanced = decided(fold(state, packet()), packet(), bytes([n]) * 8)
        state = advanced.state
        assert [window.observed_steps for window in advanced.closed] == [4] * n


def test_a_packet_without_a_step_number_is_not_a_step_back() -> None:
    state = decided(EMPTY, packet(step=100, step_latency_ms=20.0), steps=10).state
    advanced = decided(state, packet(step_latency_ms=20.0), b"digest-2")
    assert (advanced.closed, advanced.events) == ((), ())
    assert advanced.state.newest_step == 100
    assert advanced.state.latencies.step == (20.0, 20.0)


def test_a_window_of_epochs_alone_does_not_close_by_steps() -> None:
    state = decided(EMPTY, packet(epoch=3, step=1), epochs=2).state
    assert decided(state, packet(epoch=4, step=10_000), b"digest-2").closed == ()


def test_a_command_at_every_step_has_its_whole_window() -> None:
    state, lengths = EMPTY, []
    for step in range(1, 200):
        digest = step.to_bytes(8, "big")
        advanced = decided(state, packet(step=step), digest, steps=MAX_WINDOWS)
        state = RunState.from_bytes(advanced.state.to_bytes())
        lengths += [(w.observed_steps, w.closed_early) for w in advanced.closed]
    assert lengths == [(MAX_WINDOWS, False)] * (199 - MAX_WINDOWS)


def test_a_critical_step_marks_the_windows_that_are_open() -> None:
    state = decided(EMPTY, packet(epoch=3), b"1" * 8, epochs=2).state
    state = decided(state, packet(epoch=3), b"2" * 8, epochs=2, severity=Severity.CRITICAL).state
    assert [window.sums.critical for window in state.windows] == [True, False]


def test_the_oldest_window_is_closed_early_when_there_are_too_many() -> None:
    state = EMPTY
    for n in range(MAX_WINDOWS):
        advanced = decided(state, packet(), n.to_bytes(8, "big"), epochs=2)
        assert advanced.closed == ()
        state = advanced.state
    advanced = decided(state, packet(), b"the last", epochs=2)
    (window,) = advanced.closed
    assert window.closed_early
    assert window.observed_steps == MAX_WINDOWS
    assert window.command.command_id == command_id((0).to_bytes(8, "big"))
    assert len(advanced.state.windows) == MAX_WINDOWS


@pytest.mark.parametrize(
    ("epoch", "step", "later_s", "reason"),
    [(2, 40, 1.0, "run_rewound"), (3, 29, 1.0, "run_rewound"), (3, 31, 3601.0, "expired")],
)
def test_a_window_that_can_say_nothing_is_given_up(
    epoch: int, step: int, later_s: float, reason: str
) -> None:
    state = decided(EMPTY, packet(epoch=3, step=30), epochs=2, steps=50).state
    now_ns = NOW_NS + int(later_s * SECOND_NS)
    advanced = decided(state, packet(epoch=epoch, step=step), b"digest-2", now_ns=now_ns)
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
        given_packet = packet(
            loss, epoch=epoch, step=1 + n * epoch, hook_latency_ms=loss, step_latency_ms=abs(loss)
        )
        if folds:
            kept, stored = fold(kept, given_packet), fold(stored, given_packet)
        else:
            digest = packet_digest(bytes([n]))
            ours = decided(kept, given_packet, digest, epochs=3, steps=4)
            theirs = decided(stored, given_packet, digest, epochs=3, steps=4)
            assert ours == theirs
            kept, stored = ours.state, theirs.state
        stored = RunState.from_bytes(stored.to_bytes())
        assert stored == kept


def test_digest_is_of_the_bytes() -> None:
    assert packet_digest(b"a") == packet_digest(b"a")
    assert packet_digest(b"a") != packet_digest(b"b")
    assert len(packet_digest(b"a")) == 8
