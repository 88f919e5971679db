"""The conditions of the risk rules; each gives its event's attributes when it fires, else None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import c_float

from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.risk.events import number
from tamiyo_svc.risk.latency import Rise, find_rise
from tamiyo_svc.risk.safety_sheet import HANDLING_CLASSES, HAZARD_BANDS, PROVENANCES, UNKNOWN
from tamiyo_svc.risk.signals import ROLLBACK_DEADLINE, Signals
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.taxonomy import InferenceStatus

Attributes = Mapping[str, str]
Check = Callable[[Signals, Thresholds], Attributes | None]

_NAMED_INPUTS = 8


def above(signal: str, threshold: str) -> Check:
    """Fires when the signal lies above its threshold."""

    def check(signals: Signals, thresholds: Thresholds) -> Attributes | None:
        value: float | None = getattr(signals, signal)
        limit = _single(getattr(thresholds, threshold))
        return _compared(value, limit) if value is not None and value > limit else None

    return check


def at_least(signal: str, threshold: str) -> Check:
    """Fires when the signal reaches its threshold."""

    def check(signals: Signals, thresholds: Thresholds) -> Attributes | None:
        value: float | None = getattr(signals, signal)
        limit = _single(getattr(thresholds, threshold))
        return _compared(value, limit) if value is not None and value >= limit else None

    return check


def latency_high(kind: str, limit: str) -> Check:
    """Fires when a latency has risen and stays so, or lies above a limit that was set for it."""

    def check(signals: Signals, thresholds: Thresholds) -> Attributes | None:
        value: float | None = getattr(signals, f"{kind}_latency_ms")
        highest: float | None = getattr(thresholds, limit)
        if value is not None and highest is not None and value > _single(highest):
            return _compared(value, _single(highest))
        rise = _rise(kind, signals, thresholds)
        if value is None or rise is None or rise.steps < thresholds.latency_rise_steps:
            return None
        return _risen(value, rise)

    return check


def latency_rise(kind: str, limit: str) -> Check:
    """Fires when a latency has risen, while `latency_high` does not."""

    def check(signals: Signals, thresholds: Thresholds) -> Attributes | None:
        value: float | None = getattr(signals, f"{kind}_latency_ms")
        highest: float | None = getattr(thresholds, limit)
        rise = _rise(kind, signals, thresholds)
        if value is None or rise is None or rise.steps >= thresholds.latency_rise_steps:
            return None
        if highest is not None and value > _single(highest):
            return None
        return _risen(value, rise)

    return check


def _rise(kind: str, signals: Signals, thresholds: Thresholds) -> Rise | None:
    """How far the step's latency of that kind lies above the run's own level."""
    value: float | None = getattr(signals, f"{kind}_latency_ms")
    ratio: float = getattr(thresholds, f"{kind}_latency_rise_ratio")
    if value is None or ratio <= 0.0:
        return None
    return find_rise(getattr(signals.latencies, kind), value, ratio, thresholds.latency_rise_ms)


def _risen(value: float, rise: Rise) -> dict[str, str]:
    return {
        **_compared(value, rise.limit_ms),
        "median": number(rise.median_ms),
        "steps": str(rise.steps),
    }


def _single(limit: float) -> float:
    """The limit as a packet would carry it.

    Its numbers are float32: without this 0.2 reported would not be at most 0.2.
    """
    return c_float(limit).value


def _compared(value: float, limit: float) -> dict[str, str]:
    return {"value": number(value), "threshold": number(limit)}


def ended(status: InferenceStatus) -> Check:
    """Fires when the network's part of the step ended that way."""

    def check(signals: Signals, _: Thresholds) -> Attributes | None:
        inference = signals.inference
        if inference.status is not status:
            return None
        attributes = {"budget_ms": number(inference.budget_ms)}
        if inference.detail:
            attributes["detail"] = inference.detail
        return attributes

    return check


def check_metadata_timeout(signals: Signals, _: Thresholds) -> Attributes | None:
    """The catalogue's metadata missed its budget."""
    if not signals.metadata.timed_out:
        return None
    return {"budget_ms": number(signals.metadata.budget_ms)}


def emergency(*, rollback: bool) -> Check:
    """Fires on an emergency signal: that of the missed rollback deadline, or any other."""

    def check(signals: Signals, _: Thresholds) -> Attributes | None:
        for emergency in signals.emergencies:
            if (emergency.reason == ROLLBACK_DEADLINE) is rollback:
                return {
                    "reason": emergency.reason,
                    "origin": emergency.origin,
                    "level": emergency.level,
                }
        return None

    return check


def check_blueprint_quarantine(signals: Signals, thresholds: Thresholds) -> Attributes | None:
    """The selected blueprint is quarantine-only or as risky as one that should be."""
    risk = signals.blueprint_risk
    limit = _single(thresholds.blueprint_quarantine)
    if risk is None or not (signals.blueprint_quarantine_only or risk >= limit):
        return None
    return {
        **_compared(risk, limit),
        "quarantine_only": str(int(signals.blueprint_quarantine_only)),
        **_provenance(signals),
    }


def check_blueprint_risk(signals: Signals, thresholds: Thresholds) -> Attributes | None:
    """The selected blueprint is risky."""
    risk = signals.blueprint_risk
    limit = _single(thresholds.blueprint_risk)
    if risk is None or risk < limit:
        return None
    return {**_compared(risk, limit), **_provenance(signals)}


def check_handling_quarantine(signals: Signals, _: Thresholds) -> Attributes | None:
    """The safety sheet asks for quarantine."""
    bsds = signals.bsds
    if bsds is None or bsds.handling_class != leyline.HANDLING_CLASS_QUARANTINE:
        return None
    return {"value": HANDLING_CLASSES.get(bsds.handling_class, UNKNOWN), **_provenance(signals)}


def hazard_band(band: leyline.HazardBand) -> Check:
    """Fires when the safety sheet names that hazard band."""

    def check(signals: Signals, _: Thresholds) -> Attributes | None:
        bsds = signals.bsds
        if bsds is None or bsds.hazard_band != band:
            return None
        return {"value": HAZARD_BANDS.get(bsds.hazard_band, UNKNOWN), **_provenance(signals)}

    return check


def check_bsds_present(signals: Signals, _: Thresholds) -> Attributes | None:
    """The selected blueprint has a safety sheet."""
    bsds = signals.bsds
    if bsds is None:
        return None
    return {
        "hazard_band": HAZARD_BANDS.get(bsds.hazard_band, UNKNOWN),
        "handling_class": HANDLING_CLASSES.get(bsds.handling_class, UNKNOWN),
        "risk": number(bsds.risk_score),
        **_provenance(signals),
    }


def check_coverage_critical(signals: Signals, thresholds: Thresholds) -> Attributes | None:
    """So little of the graph was observed that the proposal means nothing."""
    coverage = signals.inference.coverage_mean
    if coverage is None or coverage > thresholds.coverage_crit:
        return None
    return _compared(coverage, thresholds.coverage_crit)


def check_coverage_low(signals: Signals, thresholds: Thresholds) -> Attributes | None:
    """Much of the graph was not observed, but not so much that it is critical."""
    coverage = signals.inference.coverage_mean
    if coverage is None or not thresholds.coverage_crit < coverage < thresholds.coverage_warn:
        return None
    return _compared(coverage, thresholds.coverage_warn)


def policy_risk(threshold: str) -> Check:
    """Fires when the policy's own risk score reaches the threshold."""

    def check(signals: Signals, thresholds: Thresholds) -> Attributes | None:
        score = signals.inference.policy_risk_score
        limit: float = getattr(thresholds, threshold)
        return _compared(score, limit) if score is not None and score >= limit else None

    return check


def check_loss_nonfinite(signals: Signals, _: Thresholds) -> Attributes | None:
    """A loss is NaN or infinite."""
    return _named(signals.nonfinite_losses)


def check_nonfinite_inputs(signals: Signals, _: Thresholds) -> Attributes | None:
    """Some input other than a loss is NaN or infinite."""
    return _named(signals.nonfinite_inputs)


def check_device_pressure(signals: Signals, thresholds: Thresholds) -> Attributes | None:
    """The accelerator is both busy and out of memory."""
    used, free = signals.gpu_util_percent, signals.gpu_mem_free_gb
    if used is None or free is None:
        return None
    if used < _single(thresholds.gpu_util_percent) or free > _single(thresholds.gpu_mem_free_gb):
        return None
    return {
        **_compared(used, thresholds.gpu_util_percent),
        "free_gb": number(free),
        "free_threshold_gb": number(thresholds.gpu_mem_free_gb),
    }


def check_conservative_mode(signals: Signals, _: Thresholds) -> Attributes | None:
    """The run or the whole service is in conservative mode."""
    if signals.conservative_reason is None:
        return None
    return {"reason": signals.conservative_reason, "action": "pause_triggered"}


def check_optimizer_hint(signals: Signals, thresholds: Thresholds) -> Attributes | None:
    """The learning rate has vanished while the loss rises."""
    rate, delta = signals.optimizer_lr, signals.loss_delta
    if rate is None or delta is None:
        return None
    if rate > thresholds.optimizer_lr_min or delta <= _single(thresholds.loss_warning):
        return None
    return {**_compared(delta, thresholds.loss_warning), "optimizer_lr": number(rate)}


def check_no_seeds(signals: Signals, _: Thresholds) -> Attributes | None:
    """The packet has no seed, so the network does not run."""
    return {"seeds": "0"} if signals.seeds == 0 else None


def check_no_seed_candidates(signals: Signals, _: Thresholds) -> Attributes | None:
    """There are seeds, but none that anything can be done with."""
    if signals.seeds == 0 or signals.seed_candidates > 0:
        return None
    return {"seeds": str(signals.seeds)}


def check_no_blueprint_candidates(signals: Signals, _: Thresholds) -> Attributes | None:
    """The catalogue was asked and had no blueprint to offer."""
    return {} if signals.metadata.candidates == 0 else None


def check_policy_untrained(signals: Signals, _: Thresholds) -> Attributes | None:
    """The policy has no trained weights."""
    return {} if signals.inference.policy_untrained else None


def _named(names: tuple[str, ...]) -> Attributes | None:
    if not names:
        return None
    return {"names": ",".join(names[:_NAMED_INPUTS]), "count": str(len(names))}


def _provenance(signals: Signals) -> dict[str, str]:
    attributes = {"risk_provenance": signals.risk_provenance}
    if signals.bsds is not None:
        attributes["provenance"] = PROVENANCES.get(signals.bsds.provenance, UNKNOWN)
    return attributes
