"""The one place where real parts are picked and joined."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tamiyo_svc.adapters.http import HealthServer
from tamiyo_svc.adapters.lane import DeviceLane, LaneWorker
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.connection import ServerClock, client
from tamiyo_svc.adapters.oona.consumer import StreamConsumer
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.outbox import Outbox
from tamiyo_svc.adapters.oona.routing import TelemetryRouter
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.adapters.vocabulary_store import load_vocabularies
from tamiyo_svc.decision.blend import BlendOptions
from tamiyo_svc.decision.command import CommandOptions
from tamiyo_svc.decision.record import PolicyIdentity, Runtime
from tamiyo_svc.errors import ConfigurationError, PolicyRejectedError
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.checkpoint import read_policy
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator, PolicyRequest, build_policy
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.breaker import BreakerPolicy
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.service.evaluate import PacketPath, PathOptions
from tamiyo_svc.service.intake import Intake, IntakeLimits
from tamiyo_svc.service.lifecycle import Service
from tamiyo_svc.service.notices import Inbox, NoticeBoard
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import Event, Severity

Worker = LaneWorker[PolicyRequest, Proposal]
WrapWorker = Callable[[Worker], Worker]

_BACKGROUND_CONNECTIONS = 4
_COMMIT_CONNECTIONS = 16


@asynccontextmanager
async def open_service(
    settings: Settings,
    metrics: Metrics,
    wrap_worker: WrapWorker = lambda worker: worker,
    wall_clock_ns: Callable[[], int] = time.time_ns,
) -> AsyncIterator[Service]:
    """Build a service on open connections; leaving the block closes them.

    `wrap_worker` may put something around what runs in the device lane.

    Raises:
        ConfigurationError: no secret, an unreadable policy or vocabulary, a port in use.
    """
    keyring = settings.keyring()
    vocabularies = load_vocabularies(settings.state_dir)
    policy = load_policy(settings.policy, vocabularies)
    replica = ReplicaState(
        runtime=Runtime(
            policy=PolicyIdentity(policy.policy_id, policy.version),
            device="cpu",
            replica=settings.consumer_name,
            step_timeout_ms=settings.step_timeout_ms,
            metadata_timeout_ms=settings.metadata_timeout_ms,
        ),
        breaker_policy=BreakerPolicy(
            settings.breaker_failures,
            settings.breaker_cooldown_s,
            settings.breaker_max_cooldown_s,
        ),
        operator_conservative=settings.conservative_mode,
        policy_untrained=policy.untrained,
    )
    metrics.policy_serving(policy.policy_id, policy.version, policy.digest)
    metrics.compile_enabled(enabled=False)
    catalog = UrzaCatalog(
        settings.urza_database_url,
        settings.metadata_refresh_s,
        lambda event, attributes: replica.report(FiredEvent(event, Severity.WARNING, attributes)),
    )
    lane = _lane(settings, policy, vocabularies, replica, metrics, wrap_worker)
    timeout_s = settings.commit_timeout_ms / 1e3
    # Reads block for `block_ms`; a shorter socket timeout would lose their replies.
    reader_timeout_s = settings.block_ms / 1e3 + 2.0
    async with (
        client(settings.redis_url, reader_timeout_s) as reader,
        client(settings.redis_url, timeout_s, _COMMIT_CONNECTIONS) as writer,
        client(settings.redis_url, timeout_s, _BACKGROUND_CONNECTIONS) as background,
    ):
        consumer = StreamConsumer(
            reader,
            background,
            (settings.emergency_stream, settings.normal_stream),
            settings.consumer_group,
            settings.consumer_name,
        )
        clock = ServerClock()

        async def restore() -> None:
            await consumer.ensure_groups()
            await clock.sync(background)

        health = BusHealth(background, settings.consumer_name, restore)
        committer = Committer(writer, settings.consumer_group)
        runs = RunStore(committer)
        dispatch = TelemetryDispatch(
            TelemetryRouter(
                settings.telemetry_stream,
                settings.emergency_stream,
                settings.emergency_max_per_min,
            ),
            metrics,
            keyring,
        )
        outbox = Outbox(committer, health)
        board = NoticeBoard(outbox, dispatch, replica, metrics, wall_clock_ns)
        inbox = Inbox(
            catalog,
            committer,
            runs,
            health,
            board,
            replica,
            settings.run_ttl_s,
            settings.conservative_cooldown_steps,
        )
        path = PacketPath(
            lane,
            catalog,
            runs,
            committer,
            health,
            dispatch,
            metrics,
            replica,
            keyring,
            clock,
            path_options(settings),
            wall_clock_ns,
        )
        intake = Intake(
            consumer,
            committer,
            health,
            path,
            metrics,
            keyring if settings.require_signatures else None,
            settings.dead_letter_stream,
            IntakeLimits(
                settings.read_count,
                settings.block_ms,
                settings.claim_idle_ms,
                settings.max_deliveries,
                settings.max_message_bytes,
            ),
            dict.fromkeys(
                (
                    leyline.BUS_MESSAGE_TYPE_BSDS_ISSUED,
                    leyline.BUS_MESSAGE_TYPE_BSDS_FAILED,
                    leyline.BUS_MESSAGE_TYPE_KERNEL_CATALOG_UPDATE,
                    leyline.BUS_MESSAGE_TYPE_EMERGENCY_SIGNAL,
                ),
                inbox.take,
            ),
        )
        service = Service(
            settings,
            background,
            lane,
            consumer,
            health,
            clock,
            intake,
            outbox,
            board,
            catalog,
            runs,
            metrics,
            replica,
            vocabularies,
        )
        with HealthServer(settings.http_host, settings.http_port, metrics, service) as http:
            service.http_port = http.port
            yield service


def load_policy(name: str | None, vocabularies: Vocabularies) -> Policy:
    """The policy to start with: built in, or read from a checkpoint file.

    Raises:
        ConfigurationError: the checkpoint cannot be read or is refused.
    """
    if name is None or name == "untrained":
        return build_policy("untrained")
    if name == "bootstrap":
        return build_policy("bootstrap")
    try:
        return read_policy(Path(name).read_bytes(), vocabularies)
    except OSError as error:
        raise ConfigurationError(
            f"TAMIYO_POLICY: got {name!r} ({error.strerror}), takes untrained, bootstrap or the "
            "path of a checkpoint"
        ) from None
    except PolicyRejectedError as error:
        raise ConfigurationError(f"TAMIYO_POLICY: {name!r} was refused: {error}") from None


def path_options(settings: Settings) -> PathOptions:
    """The settings that one packet's path looks at."""
    return PathOptions(
        step_timeout_ms=settings.step_timeout_ms,
        timeout_action=settings.timeout_action,
        state_max_age_ms=settings.state_max_age_ms,
        replay_window_s=settings.replay_window_s,
        conservative_cooldown_steps=settings.conservative_cooldown_steps,
        observation_window_epochs=settings.fr_obs_window_epochs,
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


def _lane(
    settings: Settings,
    policy: Policy,
    vocabularies: Vocabularies,
    replica: ReplicaState,
    metrics: Metrics,
    wrap_worker: WrapWorker,
) -> DeviceLane[PolicyRequest, Proposal]:
    limits = GraphLimits(
        layers=settings.max_layers,
        activations=settings.max_activations,
        parameters=settings.max_parameters,
        seeds=settings.max_seeds,
        blueprints=settings.max_blueprints,
    )

    def make_worker() -> Worker:
        builder = GraphBuilder(limits, vocabularies)
        return wrap_worker(PolicyEvaluator(builder, policy, settings.cpu_threads))

    def on_hung() -> None:
        hung_s = str(settings.lane_hang_s)
        event = FiredEvent(Event.EXECUTOR_HUNG, Severity.CRITICAL, {"hang_s": hung_s})
        replica.report(event)

    return DeviceLane(
        make_worker,
        max_batch=settings.max_batch,
        hang_s=settings.lane_hang_s,
        on_hung=on_hung,
        on_batch=metrics.observe_batch,
        on_late=metrics.late_result,
    )
