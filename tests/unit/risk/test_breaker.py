from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.risk.breaker import (
    CLOSED,
    TRANSITIONS,
    Breaker,
    BreakerInput,
    BreakerPolicy,
    admit,
    record_failure,
    record_recovery,
    record_success,
)
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.taxonomy import BreakerName, BreakerState, Event, Severity

POLICY = BreakerPolicy(failures=3, cooldown_s=5.0, max_cooldown_s=15.0)
NAME = BreakerName.INFERENCE


def opened(now_s: float = 100.0) -> tuple[Breaker, FiredEvent | None]:
    breaker, event = CLOSED, None
    for _ in range(3):
        assert breaker.state is BreakerState.CLOSED
        breaker, event = record_failure(breaker, POLICY, NAME, now_s)
    return breaker, event


def test_three_failures_in_a_row_open_it() -> None:
    breaker, event = opened()
    assert breaker.state is BreakerState.OPEN
    assert event is not None
    assert (event.event, event.severity) == (Event.BREAKER_OPENED, Severity.CRITICAL)
    assert event.attributes["component"] == "inference"
    assert event.attributes["action"] == "opened"


def test_a_success_between_failures_starts_the_count_again() -> None:
    breaker = CLOSED
    for _ in range(2):
        breaker, _ = record_failure(breaker, POLICY, NAME, 0.0)
    breaker, _ = record_success(breaker, NAME)
    for _ in range(2):
        breaker, _ = record_failure(breaker, POLICY, NAME, 0.0)
    assert breaker.state is BreakerState.CLOSED


def test_an_open_breaker_admits_nothing_before_its_cooldown() -> None:
    breaker, _ = opened(100.0)
    assert admit(breaker, NAME, 104.99) == (breaker, False, None)


def test_one_probe_goes_after_the_cooldown() -> None:
    breaker, _ = opened(100.0)
    breaker, admitted, event = admit(breaker, NAME, 105.0)
    assert admitted
    assert breaker.state is BreakerState.HALF_OPEN
    assert event is not None
    assert event.event is Event.BREAKER_HALF_OPENED
    assert admit(breaker, NAME, 106.0)[1] is False


def test_a_lost_probe_is_replaced_after_another_cooldown() -> None:
    breaker, _, _ = admit(opened(100.0)[0], NAME, 105.0)
    again, admitted, event = admit(breaker, NAME, 110.0)
    assert admitted
    assert again.state is BreakerState.HALF_OPEN
    assert event is None


def test_a_successful_probe_closes_it() -> None:
    breaker, _, _ = admit(opened(100.0)[0], NAME, 105.0)
    breaker, event = record_success(breaker, NAME)
    assert breaker == CLOSED
    assert event is not None
    assert (event.event, event.severity) == (Event.BREAKER_CLOSED, Severity.INFO)


def test_failed_probes_double_the_cooldown_up_to_the_cap() -> None:
    breaker, now_s, seen = opened(100.0)[0], 100.0, []
    for _ in range(4):
        seen.append(breaker.cooldown_s)
        now_s += breaker.cooldown_s
        breaker, admitted, _ = admit(breaker, NAME, now_s)
        assert admitted
        breaker, event = record_failure(breaker, POLICY, NAME, now_s)
        assert event is not None
        assert event.severity is Severity.CRITICAL
    assert seen == [5.0, 10.0, 15.0, 15.0]


def test_late_results_do_not_move_an_open_breaker() -> None:
    breaker, _ = opened(100.0)
    assert record_success(breaker, NAME) == (breaker, None)
    later, event = record_failure(breaker, POLICY, NAME, 103.0)
    assert (later.state, later.since_s, event) == (BreakerState.OPEN, 100.0, None)


def test_only_the_listed_transitions_exist() -> None:
    """A closed breaker has no cool-down, and only a closed one can meet its last failure."""
    missing = {
        (state, given) for state in BreakerState for given in BreakerInput
    } - TRANSITIONS.keys()
    assert missing == {
        (BreakerState.CLOSED, BreakerInput.COOLED_DOWN),
        (BreakerState.OPEN, BreakerInput.LAST_FAILURE),
        (BreakerState.HALF_OPEN, BreakerInput.LAST_FAILURE),
    }


@given(st.binary(max_size=40))
def test_damaged_bytes_are_one_documented_error(data: bytes) -> None:
    try:
        breaker = Breaker.from_bytes(data)
    except StoredStateError:
        return
    assert breaker.to_bytes() == data or breaker.cooldown_s == 0.0


def test_truncated_bytes_are_refused() -> None:
    with pytest.raises(StoredStateError):
        Breaker.from_bytes(CLOSED.to_bytes()[:-1])


LEGAL = {(before, after) for (before, _), after in TRANSITIONS.items()}


class BreakerMachine(RuleBasedStateMachine):
    """Random calls against a model, with the breaker stored and read back between any two."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.breaker = CLOSED
        self.in_a_row = 0
        self.opened_at_s = 0.0

    def take(self, after: Breaker, event: FiredEvent | None) -> None:
        before = self.breaker
        assert (before.state, after.state) in LEGAL
        assert (event is not None) is (before.state is not after.state)
        if after.state is BreakerState.OPEN and before.state is not BreakerState.OPEN:
            assert event is not None
            assert event.severity is Severity.CRITICAL
            self.opened_at_s = self.now_s
        self.breaker = after

    @rule(seconds=st.floats(0.0, 20.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def is_asked(self) -> None:
        after, admitted, event = admit(self.breaker, NAME, self.now_s)
        if self.breaker.state is BreakerState.CLOSED:
            assert admitted
        if self.breaker.state is BreakerState.OPEN:
            cooled = self.now_s - self.opened_at_s >= self.breaker.cooldown_s
            assert admitted is cooled
        self.take(after, event)

    @rule()
    def call_succeeds(self) -> None:
        self.in_a_row = 0
        self.take(*record_success(self.breaker, NAME))

    @rule()
    def call_fails(self) -> None:
        was_closed = self.breaker.state is BreakerState.CLOSED
        self.in_a_row += 1
        self.take(*record_failure(self.breaker, POLICY, NAME, self.now_s))
        if was_closed:
            expected = self.in_a_row >= POLICY.failures
            assert (self.breaker.state is BreakerState.OPEN) is expected

    @rule()
    def is_seen_to_work(self) -> None:
        self.in_a_row = 0
        self.take(*record_recovery(self.breaker, NAME))
        assert self.breaker == CLOSED

    @precondition(lambda self: self.breaker.state is BreakerState.OPEN)
    @rule()
    def late_success_is_ignored(self) -> None:
        assert record_success(self.breaker, NAME) == (self.breaker, None)

    @rule()
    def is_stored_and_read_back(self) -> None:
        assert Breaker.from_bytes(self.breaker.to_bytes()) == self.breaker
        self.breaker = Breaker.from_bytes(self.breaker.to_bytes())

    @invariant()
    def cooldown_is_bounded_and_zero_when_closed(self) -> None:
        closed = self.breaker.state is BreakerState.CLOSED
        assert (self.breaker.cooldown_s == 0.0) is closed
        assert self.breaker.cooldown_s <= POLICY.max_cooldown_s


TestBreakerMachine = BreakerMachine.TestCase
