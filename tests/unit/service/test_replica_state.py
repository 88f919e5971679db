from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tamiyo_svc.decision.record import PolicyIdentity, Runtime
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.breaker import Breaker, BreakerPolicy
from tamiyo_svc.runs.state import EMPTY
from tamiyo_svc.service.state import INFERENCE_BREAKER_REASON, Emergency, ReplicaState
from tamiyo_svc.taxonomy import BreakerName, BreakerState, Event

INFERENCE, METADATA, BUS = BreakerName.INFERENCE, BreakerName.METADATA, BreakerName.BUS


def make_state(*, operator: bool = False) -> ReplicaState:
    runtime = Runtime(PolicyIdentity("p", "p-1"))
    return ReplicaState(runtime, BreakerPolicy(3, 5.0, 60.0), operator_conservative=operator)


def names(state: ReplicaState) -> list[Event]:
    return [event.event for event in state.take_unreported()]


def fail(state: ReplicaState, name: BreakerName, times: int = 3, now_s: float = 0.0) -> None:
    for _ in range(times):
        state.record(name, success=False, now_s=now_s)


def test_an_open_inference_breaker_turns_the_whole_service_conservative_once() -> None:
    state = make_state()
    fail(state, INFERENCE)
    assert names(state) == [Event.BREAKER_OPENED, Event.CONSERVATIVE_ENTERED]
    assert state.admit(INFERENCE, 5.0)
    # Others must not be decided without a proposal while the probe is on its way.
    assert not state.admit(INFERENCE, 5.0)
    assert state.conservative_reason() == INFERENCE_BREAKER_REASON
    fail(state, INFERENCE, 1, 5.1)
    assert names(state) == [Event.BREAKER_HALF_OPENED, Event.BREAKER_OPENED]
    assert state.admit(INFERENCE, 20.0)
    state.record(INFERENCE, success=True, now_s=20.1)
    assert names(state) == [
        Event.BREAKER_HALF_OPENED,
        Event.BREAKER_CLOSED,
        Event.CONSERVATIVE_EXITED,
    ]
    assert state.conservative_reason() is None


def test_the_operator_outranks_the_breaker_and_stays() -> None:
    state = make_state(operator=True)
    fail(state, INFERENCE)
    assert state.conservative_reason() == "operator"
    assert names(state) == [Event.BREAKER_OPENED]


def test_other_breakers_leave_runs_alone() -> None:
    state = make_state()
    fail(state, METADATA)
    fail(state, BUS)
    assert state.conservative_reason() is None
    assert names(state) == [Event.BREAKER_OPENED, Event.BREAKER_OPENED]


def test_a_recovered_bus_closes_its_breaker_without_a_probe_of_its_own() -> None:
    state = make_state()
    fail(state, BUS, 7)
    state.recovered(BUS)
    state.recovered(BUS)
    assert names(state) == [Event.BREAKER_OPENED, Event.BREAKER_CLOSED]
    assert state.breakers[BUS].failures == 0


def test_restored_breakers_go_on_where_they_were() -> None:
    before = make_state()
    fail(before, INFERENCE, 3, 100.0)
    after = make_state()
    after.restore({INFERENCE: before.breakers[INFERENCE]})
    assert after.conservative_reason() == INFERENCE_BREAKER_REASON
    assert names(after) == []
    assert not after.admit(INFERENCE, 104.9)
    assert after.admit(INFERENCE, 105.0)


def test_a_run_hears_of_an_emergency_until_it_remembers_its_mark() -> None:
    state = make_state()
    signal = leyline.EmergencySignal(reason="overheating", level=leyline.EMERGENCY_LEVEL_HALT)
    assert state.emergencies_for(EMPTY.heard) == ()
    state.emergency = Emergency.of(signal)
    assert state.emergencies_for(EMPTY.heard) == (signal,)
    assert state.emergencies_for(state.emergency.mark) == ()
    other = leyline.EmergencySignal(reason="fire", level=leyline.EMERGENCY_LEVEL_HALT)
    heard = state.emergency.mark
    state.emergency = Emergency.of(other)
    assert state.emergencies_for(heard) == (other,)


def test_events_given_back_come_first_again() -> None:
    state = make_state()
    fail(state, METADATA)
    taken = state.take_unreported()
    fail(state, BUS)
    state.give_back(taken)
    told = state.take_unreported()
    assert [event.attributes["component"] for event in told] == ["metadata", "bus"]


class ServiceMode(RuleBasedStateMachine):
    """Calls end well or badly and the replica restarts: entering and leaving alternate."""

    def __init__(self) -> None:
        super().__init__()
        self.state = make_state()
        self.now_s = 0.0
        self.told: list[Event] = []

    @rule(seconds=st.floats(0.0, 30.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(success=st.booleans())
    def a_call_is_tried(self, success: bool) -> None:
        if self.state.admit(INFERENCE, self.now_s):
            self.state.record(INFERENCE, success=success, now_s=self.now_s)

    @rule(success=st.booleans())
    def a_late_result_comes(self, success: bool) -> None:
        self.state.record(INFERENCE, success=success, now_s=self.now_s)

    @rule()
    def the_replica_restarts(self) -> None:
        self.tell()
        stored = self.state.breakers[INFERENCE].to_bytes()
        reason = self.state.conservative_reason()
        self.state = make_state()
        self.state.restore({INFERENCE: Breaker.from_bytes(stored)})
        assert self.state.conservative_reason() == reason
        assert names(self.state) == []

    def tell(self) -> None:
        self.told += [event for event in names(self.state) if event.value.startswith("conserv")]

    @invariant()
    def entering_and_leaving_alternate(self) -> None:
        self.tell()
        pairs = [Event.CONSERVATIVE_ENTERED, Event.CONSERVATIVE_EXITED]
        assert self.told == (pairs * len(self.told))[: len(self.told)]
        conservative = self.state.conservative_reason() is not None
        assert conservative is (len(self.told) % 2 == 1)
        open_ = self.state.breakers[INFERENCE].state is not BreakerState.CLOSED
        assert conservative is open_


TestServiceMode = ServiceMode.TestCase
