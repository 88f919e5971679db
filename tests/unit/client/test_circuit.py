"""Back-off after failures."""

from __future__ import annotations

from tamiyo_svc.client.circuit import Circuit


def test_is_closed_at_first() -> None:
    assert Circuit().allows(0.0)


def test_refuses_until_the_delay_is_over() -> None:
    circuit = Circuit(first_delay_s=0.5)
    circuit.failed(10.0)
    assert not circuit.allows(10.49)
    assert circuit.allows(10.5)


def test_each_failure_doubles_the_delay_up_to_the_cap() -> None:
    circuit = Circuit(first_delay_s=1.0, max_delay_s=3.0)
    for now_s, delay_s in ((0.0, 1.0), (100.0, 2.0), (200.0, 3.0), (300.0, 3.0)):
        circuit.failed(now_s)
        assert not circuit.allows(now_s + delay_s - 0.01)
        assert circuit.allows(now_s + delay_s)


def test_a_success_starts_over() -> None:
    circuit = Circuit(first_delay_s=1.0)
    circuit.failed(0.0)
    circuit.failed(10.0)
    circuit.succeeded()
    assert circuit.allows(10.0)
    circuit.failed(20.0)
    assert circuit.allows(21.0)
