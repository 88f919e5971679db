"""Where the risk rules fire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where the rules fire; each field is the setting `TAMIYO_RISK_<FIELD>`.

    Losses in the run's own unit, scores, rates and coverage in [0, 1], the rest as named. A limit
    that is None is off; a ratio of 0 turns the comparison with the run's own median off.
    """

    max_loss_spike: float = 0.15
    loss_warning: float = 0.075
    loss_volatility: float = 0.1125
    grad_variance: float = 1.0
    grad_conflict: float = 0.5
    optimizer_lr_min: float = 0.0
    hook_budget_ms: float | None = None
    step_latency_high_ms: float | None = None
    hook_latency_rise_ratio: float = 2.5
    step_latency_rise_ratio: float = 2.5
    latency_rise_ms: float = 10.0
    latency_rise_steps: int = 8
    kasmina_apply_slow_ms: float = 30.0
    kasmina_finalize_slow_ms: float = 30.0
    isolation_violations: float = 0.0
    gpu_util_percent: float = 95.0
    gpu_mem_free_gb: float = 0.2
    cpu_util_percent: float = 95.0
    coverage_warn: float = 0.30
    coverage_crit: float = 0.10
    policy_risk_critical: float = 0.98
    policy_risk_elevated: float = 0.85
    policy_risk_signal: float = 0.5
    blueprint_quarantine: float = 0.8
    blueprint_risk: float = 0.5
