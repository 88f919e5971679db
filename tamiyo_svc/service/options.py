"""The settings as the parts of the service take them."""

from __future__ import annotations

from dataclasses import asdict

from tamiyo_svc.decision.blend import BlendOptions
from tamiyo_svc.decision.command import CommandOptions
from tamiyo_svc.graph.builder import GraphLimits
from tamiyo_svc.policy.compiled import Library
from tamiyo_svc.risk.breaker import BreakerPolicy
from tamiyo_svc.service.intake import IntakeLimits
from tamiyo_svc.service.outcomes import PathOptions
from tamiyo_svc.service.policy_loader import LoaderRequest
from tamiyo_svc.service.policy_updates import UpdateOptions
from tamiyo_svc.service.settings import Settings


def graph_limits(settings: Settings) -> GraphLimits:
    """How large a graph may become."""
    return GraphLimits(
        layers=settings.max_layers,
        activations=settings.max_activations,
        parameters=settings.max_parameters,
        seeds=settings.max_seeds,
        blueprints=settings.max_blueprints,
    )


def breaker_policy(settings: Settings) -> BreakerPolicy:
    """When a breaker opens and for how long."""
    return BreakerPolicy(
        settings.breaker_failures,
        settings.breaker_cooldown_s,
        settings.breaker_max_cooldown_s,
    )


def intake_limits(settings: Settings) -> IntakeLimits:
    """How much is read and held."""
    return IntakeLimits(
        settings.read_count,
        settings.block_ms,
        settings.claim_idle_ms,
        settings.max_deliveries,
        settings.max_message_bytes,
    )


def update_options(settings: Settings, library: Library | None = None) -> UpdateOptions:
    """The settings that policy updates look at."""
    secrets = None
    if settings.require_signatures:
        keys = (settings.secret, settings.secret_previous)
        secrets = tuple(key.get_secret_value() for key in keys if key is not None)
    return UpdateOptions(
        request=LoaderRequest(
            redis_url=settings.redis_url,
            stream=settings.policy_stream,
            after="0",
            folder=str(settings.state_dir),
            vocabularies={},
            secrets=secrets,
            verify_updates=settings.verify_updates,
            freshness_s=settings.update_freshness_s,
            limits=asdict(graph_limits(settings)),
            library=str(library.path) if library is not None else "",
            weight_dtype=settings.weight_dtype,
        ),
        replica=settings.consumer_name,
        step_timeout_ms=settings.step_timeout_ms,
        probation_decisions=settings.policy_probation_decisions,
        probation_failures=settings.policy_probation_failures,
        breaker_failures=settings.breaker_failures,
        pinned=settings.policy is not None,
    )


def path_options(settings: Settings) -> PathOptions:
    """The settings that one packet's path looks at."""
    return PathOptions(
        step_timeout_ms=settings.step_timeout_ms,
        metadata_timeout_ms=settings.metadata_timeout_ms,
        metadata_refresh_s=settings.metadata_refresh_s,
        timeout_action=settings.timeout_action,
        state_max_age_ms=settings.state_max_age_ms,
        replay_window_s=settings.replay_window_s,
        conservative_cooldown_steps=settings.conservative_cooldown_steps,
        observation_window_epochs=settings.fr_obs_window_epochs,
        observation_window_steps=settings.fr_obs_window_steps,
        window_max_age_s=settings.field_report_retention_hours * 3600,
        blueprint_candidates=settings.blueprint_candidates,
        run_ttl_s=settings.run_ttl_s,
        message_ttl_ms=settings.message_ttl_ms,
        command_stream=settings.command_stream,
        field_report_stream=settings.field_report_stream,
        thresholds=settings.thresholds(),
        command=CommandOptions(
            seed_operations=settings.seed_operations,
            max_lr_delta=settings.max_lr_delta,
            execution_deadline_ms=settings.command_deadline_ms,
            blend=BlendOptions(
                enabled=settings.enable_blend_mode_ann,
                default_mode=settings.blend_mode_default or "",
                gate_k=settings.blend_conf_gate_k,
                gate_tau=settings.blend_conf_gate_tau,
                alpha_lo=settings.blend_alpha_lo,
                alpha_hi=settings.blend_alpha_hi,
                alpha_vec_max=settings.blend_alpha_vec_max,
            ),
        ),
    )
