from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.service.probation import Probation, ProbationState


def _record(probation: Probation, outcomes: str) -> ProbationState:
    for outcome in outcomes:
        probation.record(success=outcome == "+")
    return probation.state


def test_a_policy_that_works_passes_after_its_decisions() -> None:
    probation = Probation(decisions=4, failures=3, in_a_row=2)

    assert _record(probation, "+-+") is ProbationState.RUNNING
    assert probation.left == 1
    assert _record(probation, "+") is ProbationState.PASSED


def test_too_many_failures_fail_it_even_when_scattered() -> None:
    assert _record(Probation(100, failures=3, in_a_row=2), "-+-+-") is ProbationState.FAILED


def test_as_many_in_a_row_as_open_the_breaker_fail_it() -> None:
    assert _record(Probation(100, failures=10, in_a_row=3), "++---") is ProbationState.FAILED


def test_a_failure_with_the_last_decision_counts() -> None:
    assert _record(Probation(3, failures=1, in_a_row=3), "++-") is ProbationState.FAILED


@given(st.text("+-", max_size=50), st.text("+-", max_size=10))
def test_an_ending_is_final(outcomes: str, later: str) -> None:
    probation = Probation(10, 4, 3)
    state = _record(probation, outcomes)

    if state is not ProbationState.RUNNING:
        assert _record(probation, later) is state
    assert probation.seen <= 10
