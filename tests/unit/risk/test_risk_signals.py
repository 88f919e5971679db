from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.signals import Inference, Metadata, Signals, read_signals

NAN = math.nan
FLOATS = st.floats(width=32)
NAMES = st.sampled_from(
    ["loss", "loss_delta", "validation_loss", "grad_var", "x", "hook_latency_ms"]
)


def read(last: float | None = None, **fields: Any) -> Signals:
    blueprint = fields.pop("blueprint", None)
    return read_signals(
        leyline.SystemStatePacket(**fields),
        last,
        inference=Inference(),
        metadata=Metadata(),
        blueprint=blueprint,
    )


def test_loss_delta_is_against_the_last_validation_loss() -> None:
    signals = read(0.5, validation_loss=0.75, training_metrics={"loss_delta": 9.0})
    assert signals.loss_delta == 0.25


def test_the_first_packet_takes_the_trainers_loss_delta() -> None:
    signals = read(None, validation_loss=0.75, training_metrics={"loss_delta": 0.5})
    assert signals.loss_delta == 0.5


def test_a_loss_of_zero_is_absent() -> None:
    signals = read(0.5)
    assert signals.validation_loss is None
    assert signals.loss_delta is None
    assert signals.nonfinite_losses == ()


def test_the_metric_map_comes_before_the_field() -> None:
    signals = read(None, validation_loss=0.75, training_metrics={"validation_loss": 0.5})
    assert signals.validation_loss == 0.5


def test_a_nonfinite_metric_is_named_and_absent() -> None:
    signals = read(training_metrics={"grad_var": NAN, "hook_latency_ms": 3.0})
    assert signals.grad_var is None
    assert signals.hook_latency_ms == 3.0
    assert signals.nonfinite_inputs == ("grad_var",)


def test_nonfinite_losses_are_not_counted_as_other_inputs() -> None:
    signals = read(validation_loss=NAN, training_metrics={"loss": math.inf})
    assert signals.nonfinite_losses == ("loss", "validation_loss")
    assert signals.nonfinite_inputs == ()


def test_nonfinite_seed_and_hardware_values_are_named() -> None:
    signals = read(
        validation_accuracy=NAN,
        hardware_context={"temperature_celsius": math.inf},
        seed_states=[{"seed_id": "s", "gradient_norm": NAN, "metrics": {"alpha": -math.inf}}],
    )
    assert signals.nonfinite_inputs == (
        "s.alpha",
        "s.gradient_norm",
        "temperature_celsius",
        "validation_accuracy",
    )


def test_opposite_infinities_do_not_cancel() -> None:
    signals = read(training_metrics={"a": math.inf, "b": -math.inf})
    assert signals.nonfinite_inputs == ("a", "b")


def test_a_safety_sheet_supersedes_the_descriptors_risk() -> None:
    descriptor = leyline.BlueprintDescriptor(blueprint_id="b", risk=0.25)
    plain = read(blueprint=Blueprint(descriptor))
    sheet = read(blueprint=Blueprint(descriptor, bsds=leyline.BSDS(risk_score=0.75)))
    assert (plain.blueprint_risk, plain.risk_provenance) == (0.25, "descriptor")
    assert (sheet.blueprint_risk, sheet.risk_provenance) == (0.75, "bsds")
    assert read().risk_provenance == ""


@given(
    st.dictionaries(NAMES, FLOATS),
    FLOATS,
    FLOATS,
    st.none() | st.floats(-1e6, 1e6),
    st.lists(st.tuples(FLOATS, FLOATS), max_size=3),
)
def test_every_number_read_is_finite_and_every_other_is_named(
    metrics: dict[str, float],
    validation_loss: float,
    training_loss: float,
    last: float | None,
    seeds: list[tuple[float, float]],
) -> None:
    signals = read(
        last,
        training_metrics=metrics,
        validation_loss=validation_loss,
        training_loss=training_loss,
        seed_states=[{"gradient_norm": norm, "metrics": {"alpha": alpha}} for norm, alpha in seeds],
    )
    for name in Signals.__dataclass_fields__:
        value = getattr(signals, name)
        assert not isinstance(value, float) or math.isfinite(value)
    given_losses = [validation_loss, training_loss, metrics.get("loss", 0.0)]
    given_losses.append(metrics.get("validation_loss", 0.0))
    assert bool(signals.nonfinite_losses) is not all(map(math.isfinite, given_losses))
    others = [value for name, value in metrics.items() if "loss" != name != "validation_loss"]
    others += [value for pair in seeds for value in pair]
    assert len(signals.nonfinite_inputs) == sum(not math.isfinite(value) for value in others)
