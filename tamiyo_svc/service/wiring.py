"""The one place where real parts are picked and joined."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import structlog

from tamiyo_svc.adapters.http import HealthServer
from tamiyo_svc.adapters.keep_warm import KeepWarm
from tamiyo_svc.adapters.lane import DeviceLane, LaneWorker
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.breaker_store import BreakerStore
from tamiyo_svc.adapters.oona.bulletin import Bulletin
from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.connection import ServerClock, client
from tamiyo_svc.adapters.oona.consumer import StreamConsumer
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.outbox import Outbox
from tamiyo_svc.adapters.oona.routing import TelemetryRouter
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.policy_store import KeptPolicy, Manifest, PolicyStore
from tamiyo_svc.adapters.tracing import open_tracing
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
from tamiyo_svc.policy.engines import Engines, EngineStatus
from tamiyo_svc.policy.evaluator import Policy, PolicyEvaluator, PolicyRequest, build_policy
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.breaker import BreakerPolicy
from tamiyo_svc.risk.events import FiredEvent
from tamiyo_svc.service.evaluate import PacketPath
from tamiyo_svc.service.forms import serving_forms
from tamiyo_svc.service.intake import Intake, IntakeLimits
from tamiyo_svc.service.lifecycle import Service
from tamiyo_svc.service.notices import Inbox, NoticeBoard
from tamiyo_svc.service.outcomes import Ledger, PathOptions
from tamiyo_svc.service.policy_loader import LoaderRequest
from tamiyo_svc.service.policy_updates import PolicyUpdates, UpdateOptions
from tamiyo_svc.service.serving import Serving
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import BreakerName, Event, Severity

Worker = LaneWorker[PolicyRequest, Proposal]
WrapWorker = Callable[[Worker], Worker]

log = structlog.get_logger("tamiyo.wiring")

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
    store = PolicyStore(settings.state_dir)
    policy, manifest = starting_policy(settings.policy, store, vocabularies)
    serving = Serving(policy)
    engines = Engines(serving_forms(settings))
    replica = ReplicaState(
        runtime=Runtime(
            policy=PolicyIdentity(policy.policy_id, policy.version),
            device=engines.status.device,
            compile_enabled=engines.status.is_compiled,
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
    metrics.compile_enabled(enabled=engines.status.is_compiled)
    loop = asyncio.get_running_loop()

    def on_engine_changed(status: EngineStatus) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(_engine_changed, replica, metrics, status)

    engines.on_change = on_engine_changed
    catalog = UrzaCatalog(
        settings.urza_database_url,
        settings.metadata_refresh_s,
        lambda event, attributes: replica.report(FiredEvent(event, Severity.WARNING, attributes)),
    )
    limits = graph_limits(settings)

    def make_evaluator(policy: Policy) -> PolicyEvaluator:
        return PolicyEvaluator(
            GraphBuilder(limits, vocabularies), policy, settings.cpu_threads, engines=engines
        )

    lane = _lane(
        settings,
        lambda: wrap_worker(serving.worker(make_evaluator)),
        replica,
        metrics,
        KeepWarm(lambda part, parts: engines.touch(serving.policy.network, part, parts)),
    )
    timeout_s = settings.commit_timeout_ms / 1e3
    # Reads block for `block_ms`; a shorter socket timeout would lose their replies.
    reader_timeout_s = settings.block_ms / 1e3 + 2.0
    async with (
        client(settings.redis_url, reader_timeout_s) as reader,
        client(settings.redis_url, timeout_s, _COMMIT_CONNECTIONS) as writer,
        client(settings.redis_url, timeout_s, _BACKGROUND_CONNECTIONS) as background,
        open_tracing(settings.otlp_endpoint, settings.consumer_name) as export_spans,
    ):
        consumer = StreamConsumer(
            reader,
            background,
            (settings.emergency_stream, settings.normal_stream),
            settings.consumer_group,
            settings.consumer_name,
        )
        clock = ServerClock()

        breakers = BreakerStore(background, settings.consumer_name, clock)
        restored = False

        async def restore() -> None:
            nonlocal restored
            await consumer.ensure_groups()
            await clock.sync(background)
            if not restored:
                replica.restore(await breakers.load())
                restored = True
            await inbox.refresh()

        def on_bus(reason: str | None) -> None:
            if reason is None:
                replica.recovered(BreakerName.BUS)
            else:
                replica.record(BreakerName.BUS, success=False, now_s=time.monotonic())
            metrics.breaker_state(BreakerName.BUS, replica.breakers[BreakerName.BUS].state)

        health = BusHealth(background, settings.consumer_name, restore)
        health.on_change = on_bus
        health.on_probe_failed = lambda: on_bus("probe failed")
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
            Bulletin(background),
            committer,
            runs,
            health,
            board,
            replica,
            settings.run_ttl_s,
            settings.conservative_cooldown_steps,
            settings.message_ttl_ms,
            clock.now_ms,
        )
        options = path_options(settings)
        path = PacketPath(
            lane,
            catalog,
            runs,
            committer,
            health,
            Ledger(dispatch, metrics, replica, keyring, options, wall_clock_ns, export_spans),
            metrics,
            replica,
            keyring,
            clock,
            options,
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
        updates = PolicyUpdates(
            update_options(settings),
            store,
            manifest,
            serving,
            lane,
            make_evaluator,
            vocabularies,
            replica,
            board,
            metrics,
            health,
            background,
            lambda: intake.is_busy,
        )
        replica.on_inference = updates.inference_ended
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
            inbox,
            breakers,
            updates,
            catalog,
            runs,
            metrics,
            replica,
            vocabularies,
        )
        with HealthServer(settings.http_host, settings.http_port, metrics, service) as http:
            service.http_port = http.port
            try:
                yield service
            finally:
                await path.close()


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


def starting_policy(
    name: str | None, store: PolicyStore, vocabularies: Vocabularies
) -> tuple[Policy, Manifest]:
    """The policy to start with, and what is kept on disk with that one as the current.

    Raises:
        ConfigurationError: a policy that was named cannot be read or is refused.
    """
    manifest = store.load()
    if name is None:
        for kept in (manifest.current, manifest.previous):
            if kept is None or not (kept.file or kept is manifest.current):
                continue
            try:
                return store.open(kept, vocabularies), manifest
            except PolicyRejectedError as error:
                log.warning("policy.kept_unusable", version=kept.version, error=str(error))
            # What was taken is lost, so the stream has to be read again from its beginning.
            manifest = Manifest(current=manifest.previous)
    policy = load_policy(name, vocabularies)
    file = "" if name in (None, "untrained", "bootstrap") else str(Path(str(name)).resolve())
    kept = KeptPolicy(policy.policy_id, policy.version, policy.digest, file)
    return policy, replace(manifest, current=kept, previous=None, shadow=None)


def update_options(settings: Settings) -> UpdateOptions:
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


def _engine_changed(replica: ReplicaState, metrics: Metrics, status: EngineStatus) -> None:
    """Take over what the engines say of themselves; runs on the event loop."""
    before = replica.runtime
    replica.runtime = replace(
        before,
        device=status.device,
        compile_enabled=status.is_compiled,
        compile_warm_ms=status.warm_ms,
        compile_fallbacks=status.fallbacks,
        compile_reason=status.reason,
    )
    metrics.compile_enabled(enabled=status.is_compiled)
    for _ in range(status.fallbacks - before.compile_fallbacks):
        metrics.compile_fallback()
    if status.warm_ms is not None:
        metrics.compile_warmed(status.warm_ms / 1e3)
    if status.fallbacks > before.compile_fallbacks:
        log.warning("engine.fell_back", device=status.device, reason=status.reason)


def graph_limits(settings: Settings) -> GraphLimits:
    """How large a graph may become."""
    return GraphLimits(
        layers=settings.max_layers,
        activations=settings.max_activations,
        parameters=settings.max_parameters,
        seeds=settings.max_seeds,
        blueprints=settings.max_blueprints,
    )


def _lane(
    settings: Settings,
    make_worker: Callable[[], Worker],
    replica: ReplicaState,
    metrics: Metrics,
    keep_warm: KeepWarm,
) -> DeviceLane[PolicyRequest, Proposal]:
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
        keep_warm=keep_warm if settings.keep_warm else None,
    )
