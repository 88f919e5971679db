"""Recorded packets decided again, offline: no Redis, no deadline, and the recording's own clock.

The same recording, policy, catalogue and settings give the same commands, byte for byte.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.connection import ServerClock, client
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.routing import TelemetryRouter
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.policy_store import PolicyStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.adapters.vocabulary_store import load_vocabularies
from tamiyo_svc.decision.record import PolicyIdentity, Runtime, command_id_for
from tamiyo_svc.errors import InvalidPacketError
from tamiyo_svc.graph.builder import GraphBuilder
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import EnvelopeRejectedError
from tamiyo_svc.policy.engines import Engines
from tamiyo_svc.policy.evaluator import PolicyEvaluator, PolicyRequest
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.breaker import BreakerPolicy
from tamiyo_svc.risk.mode import step_mode
from tamiyo_svc.runs.state import EMPTY, RunState, fold, is_duplicate
from tamiyo_svc.service.evaluate import PacketPath
from tamiyo_svc.service.forms import serving_forms
from tamiyo_svc.service.notices import alarm_event
from tamiyo_svc.service.options import graph_limits, path_options
from tamiyo_svc.service.outcomes import Ledger, Received
from tamiyo_svc.service.recording import RecordedNotice, RecordedPacket, Recording
from tamiyo_svc.service.settings import Settings
from tamiyo_svc.service.starting_policy import starting_policy
from tamiyo_svc.service.state import Emergency, ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch
from tamiyo_svc.taxonomy import Outcome

_NEVER: Final = sys.maxsize
_UNUSED_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Redecided:
    """A packet's command as decided now, and the recorded one if the recording has it."""

    received: Received
    command: leyline.AdaptationCommand
    recorded: leyline.AdaptationCommand | None


@dataclass(slots=True)
class Replay:
    """Every packet decided again in order, and how many ended otherwise.

    `before` are packets that the runs' recorded states already knew.
    """

    policy: PolicyIdentity
    decided: list[Redecided] = field(default_factory=list)
    others: Counter[Outcome] = field(default_factory=Counter)
    before: int = 0


class _RecordedClock:
    """Wall-clock nanoseconds of the moment that is replayed."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


async def replay(recording: Recording, settings: Settings) -> Replay:
    """Decide every recorded packet again, each run from the state it had.

    Where the recording tells of a run's decisions, packets without one that came before a decided
    one were superseded or expired then, and their metrics are only folded in, as they were.

    Raises:
        ConfigurationError: the policy or the vocabularies cannot be read.
    """
    clock = _RecordedClock()
    async with _offline(settings, clock) as offline:
        received = list(_received(recording, offline))
        skipped, last_answered = _landmarks(recording, received)
        states = dict(recording.states)
        for place, one in enumerate(received):
            if isinstance(one, RecordedNotice):
                offline.notice(one, states)
                continue
            run_id = one.run_id
            state = states.get(run_id, EMPTY)
            command_id = command_id_for(run_id, one.digest)
            if place < skipped.get(run_id, 0):
                offline.result.before += 1
            elif is_duplicate(state, one.digest, one.packet.timestamp_ns, settings.replay_window_s):
                offline.result.others[Outcome.DUPLICATE] += 1
            elif place < last_answered.get(run_id, 0) and command_id not in recording.answered:
                offline.result.others[Outcome.SUPERSEDED] += 1
                states[run_id] = fold(state, one.packet)
            else:
                recorded = recording.commands.get(command_id)
                clock.now_ns = one.entry.added_ms * 1_000_000
                if recorded is not None:
                    clock.now_ns = recorded.issued_at.ToNanoseconds()
                answer = await offline.path.decide(one, state)
                states[run_id] = answer.state
                offline.result.decided.append(Redecided(one, answer.command, recorded))
        return offline.result


@dataclass(slots=True)
class _Offline:
    path: PacketPath
    catalog: UrzaCatalog
    replica: ReplicaState
    cooldown_steps: int
    result: Replay

    def notice(self, one: RecordedNotice, states: dict[str, RunState]) -> None:
        """Take a safety sheet or an emergency as the service does."""
        match one.message:
            case leyline.BSDSIssued(bsds=sheet):
                if not sheet.HasField("issued_at"):
                    sheet.issued_at.FromMilliseconds(one.entry.added_ms)
                self.catalog.add_sheets([sheet])
            case leyline.EmergencySignal() as signal:
                if signal.level < leyline.EMERGENCY_LEVEL_CONSERVATIVE:
                    return
                if not signal.run_id:
                    self.replica.emergency = Emergency.of(signal)
                    return
                event = alarm_event(signal)
                state = states.get(signal.run_id, EMPTY)
                mode, _ = step_mode(
                    state.mode,
                    alarm=event.event.value,
                    severity=event.severity,
                    cooldown_steps=self.cooldown_steps,
                )
                states[signal.run_id] = replace(state, mode=mode)


def _received(recording: Recording, offline: _Offline) -> Iterable[Received | RecordedNotice]:
    """The incoming messages with their packets parsed; those that cannot be are counted."""
    for one in recording.incoming:
        if isinstance(one, RecordedNotice):
            yield one
            continue
        packet = _parsed(one, offline)
        if packet is not None:
            yield packet


def _parsed(one: RecordedPacket, offline: _Offline) -> Received | None:
    try:
        return offline.path.receive(one.entry, one.envelope, 0.0)
    except (EnvelopeRejectedError, InvalidPacketError):
        offline.result.others[Outcome.DEAD_LETTERED] += 1
        return None


def _landmarks(
    recording: Recording, received: list[Received | RecordedNotice]
) -> tuple[dict[str, int], dict[str, int]]:
    """By run: from where on packets are new to its recorded state, and its last decided one."""
    first_new: dict[str, int] = {}
    last_answered: dict[str, int] = {}
    for place, one in enumerate(received):
        if isinstance(one, RecordedNotice):
            continue
        state = recording.states.get(one.run_id)
        if state is not None and one.digest in state.decided:
            first_new[one.run_id] = place + 1
        if command_id_for(one.run_id, one.digest) in recording.answered:
            last_answered[one.run_id] = place
    return first_new, last_answered


@asynccontextmanager
async def _offline(settings: Settings, clock: _RecordedClock) -> AsyncIterator[_Offline]:
    """The path of a packet with everything outside it left unconnected."""
    vocabularies = load_vocabularies(settings.state_dir)
    store = PolicyStore(settings.state_dir)
    policy, _ = starting_policy(settings.policy, store, vocabularies)
    identity = PolicyIdentity(policy.policy_id, policy.version)
    # A breaker opens and closes by real time, of which there is none here.
    replica = ReplicaState(
        runtime=Runtime(policy=identity, step_timeout_ms=0.0, metadata_timeout_ms=0.0),
        breaker_policy=BreakerPolicy(_NEVER, settings.breaker_cooldown_s),
        operator_conservative=settings.conservative_mode,
        policy_untrained=policy.untrained,
    )
    catalog = UrzaCatalog(
        settings.urza_database_url,
        settings.metadata_refresh_s,
        optional=settings.catalog_is_optional,
    )
    keyring = settings.keyring() if settings.secret is not None else None
    metrics = Metrics(settings.input_streams)
    limits = graph_limits(settings)
    engines = Engines(serving_forms(settings))
    lane = DeviceLane[PolicyRequest, Proposal](
        lambda: PolicyEvaluator(
            GraphBuilder(limits, vocabularies),
            policy,
            settings.cpu_threads,
            clock=lambda: 0.0,
            engines=engines,
        ),
        max_batch=1,
    )
    options = replace(path_options(settings), step_timeout_ms=0.0, metadata_timeout_ms=0.0)

    async def restore() -> None:
        return

    # The client connects when it is first used, and `decide` never uses it.
    async with client(settings.redis_url, _UNUSED_TIMEOUT_S) as redis:
        committer = Committer(redis, settings.consumer_group)
        dispatch = TelemetryDispatch(
            TelemetryRouter(settings.telemetry_stream, settings.emergency_stream, _NEVER),
            metrics,
            keyring,
        )
        path = PacketPath(
            lane,
            catalog,
            RunStore(committer),
            committer,
            BusHealth(redis, settings.consumer_name, restore),
            Ledger(dispatch, metrics, replica, keyring, options, clock),
            metrics,
            replica,
            keyring,
            ServerClock(),
            options,
            wall_clock_ns=clock,
            clock=lambda: 0.0,
        )
        await catalog.refresh()
        await lane.start()
        try:
            yield _Offline(
                path, catalog, replica, settings.conservative_cooldown_steps, Replay(identity)
            )
        finally:
            await path.close()
            await lane.close()
            catalog.close()
