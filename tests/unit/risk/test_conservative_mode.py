from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tamiyo_svc.errors import StoredStateError
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.risk.mode import INACTIVE, ConservativeMode, step_mode
from tamiyo_svc.taxonomy import Event, Severity

COOLDOWN = 4


def step(
    mode: ConservativeMode, severity: Severity = Severity.INFO, alarm: str | None = None
) -> tuple[ConservativeMode, FiredEvent | None]:
    return step_mode(mode, alarm=alarm, severity=severity, cooldown_steps=COOLDOWN)


def entered() -> ConservativeMode:
    mode, event = step(INACTIVE, Severity.HIGH, "loss_spike")
    assert event is not None
    assert (event.event, event.severity) == (Event.CONSERVATIVE_ENTERED, Severity.WARNING)
    assert event.attributes["reason"] == "loss_spike"
    return mode


def test_an_alarm_enters_and_says_why() -> None:
    assert entered() == ConservativeMode(active=True, reason="loss_spike")


def test_trouble_without_an_alarm_does_not_enter() -> None:
    assert step(INACTIVE, Severity.CRITICAL) == (INACTIVE, None)


def test_it_is_left_after_the_cooldown_and_not_before() -> None:
    mode = entered()
    for calm in range(1, COOLDOWN):
        mode, event = step(mode)
        assert (mode.active, mode.calm_steps, event) == (True, calm, None)
    mode, event = step(mode)
    assert mode == INACTIVE
    assert event is not None
    assert (event.event, event.severity) == (Event.CONSERVATIVE_EXITED, Severity.INFO)


def test_warnings_do_not_delay_leaving() -> None:
    mode = entered()
    for _ in range(COOLDOWN):
        mode, _ = step(mode, Severity.WARNING)
    assert mode == INACTIVE


def test_a_high_event_starts_the_cooldown_again() -> None:
    mode = entered()
    for _ in range(COOLDOWN - 1):
        mode, _ = step(mode)
    mode, event = step(mode, Severity.HIGH)
    assert (mode.active, mode.calm_steps, event) == (True, 0, None)


def test_an_alarm_at_the_last_step_stays_in_the_mode() -> None:
    mode = entered()
    for _ in range(COOLDOWN - 1):
        mode, _ = step(mode)
    mode, event = step(mode, Severity.CRITICAL, "loss_nonfinite")
    assert (mode.active, mode.calm_steps, event) == (True, 0, None)


def test_no_cooldown_leaves_one_step_after_entering() -> None:
    mode, event = step_mode(INACTIVE, alarm="x", severity=Severity.CRITICAL, cooldown_steps=0)
    assert mode.active
    assert event is not None
    assert event.event is Event.CONSERVATIVE_ENTERED
    mode, event = step_mode(mode, alarm=None, severity=Severity.INFO, cooldown_steps=0)
    assert mode == INACTIVE
    assert event is not None
    assert event.event is Event.CONSERVATIVE_EXITED


@given(st.text(max_size=200))
def test_a_long_reason_is_cut_and_survives_storage(reason: str) -> None:
    mode, _ = step(INACTIVE, Severity.CRITICAL, reason)
    assert reason.startswith(mode.reason)
    assert len(mode.to_bytes()) < 80
    assert ConservativeMode.from_bytes(mode.to_bytes()) == mode


@given(st.binary(max_size=40))
def test_damaged_bytes_are_one_documented_error(data: bytes) -> None:
    try:
        mode = ConservativeMode.from_bytes(data)
    except StoredStateError:
        return
    assert ConservativeMode.from_bytes(mode.to_bytes()) == mode


class ModeMachine(RuleBasedStateMachine):
    """Random steps, with the mode stored and read back between any two."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = INACTIVE
        self.calm = 0

    @rule(
        severity=st.sampled_from(Severity),
        alarm=st.none() | st.sampled_from(["loss_spike", "bp_quarantine"]),
    )
    def step_is_taken(self, severity: Severity, alarm: str | None) -> None:
        before = self.mode
        self.mode, event = step(before, severity, alarm)
        calm = alarm is None and severity < Severity.HIGH
        self.calm = self.calm + 1 if calm and before.active else 0
        if before.active:
            assert self.mode.active is (self.calm < COOLDOWN)
        else:
            assert self.mode.active is (alarm is not None)
        changed = before.active is not self.mode.active
        expected = Event.CONSERVATIVE_ENTERED if self.mode.active else Event.CONSERVATIVE_EXITED
        assert (event.event if event else None) == (expected if changed else None)

    @rule()
    def calm_run_leaves_exactly_once(self) -> None:
        events = []
        for _ in range(2 * COOLDOWN):
            self.mode, event = step(self.mode)
            if event is not None:
                events.append(event.event)
        assert events in ([], [Event.CONSERVATIVE_EXITED])
        assert self.mode == INACTIVE
        self.calm = 0

    @rule()
    def is_stored_and_read_back(self) -> None:
        restored = ConservativeMode.from_bytes(self.mode.to_bytes())
        assert restored == self.mode
        self.mode = restored

    @invariant()
    def inactive_has_nothing_to_remember(self) -> None:
        assert self.mode.active or self.mode == INACTIVE


TestModeMachine = ModeMachine.TestCase
