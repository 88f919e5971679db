"""Decisions replayed from a fixed start, on the real lane, graph and network, with fixed clocks."""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from support.bus import CATALOG, state_packet

from tamiyo_svc.adapters.lane import DeviceLane
from tamiyo_svc.adapters.metrics import Metrics
from tamiyo_svc.adapters.oona.commit import Committer
from tamiyo_svc.adapters.oona.connection import ServerClock
from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.health import BusHealth
from tamiyo_svc.adapters.oona.routing import TelemetryRouter
from tamiyo_svc.adapters.oona.run_store import RunStore
from tamiyo_svc.adapters.urza import UrzaCatalog
from tamiyo_svc.decision.record import PolicyIdentity, Runtime
from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
from tamiyo_svc.graph.vocabulary import Vocabularies
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import seal
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.evaluator import PolicyEvaluator, PolicyRequest, build_policy
from tamiyo_svc.policy.network import NetworkConfig
from tamiyo_svc.policy.proposal import Proposal
from tamiyo_svc.risk.breaker import BreakerPolicy
from tamiyo_svc.runs.state import EMPTY, RunState, packet_digest
from tamiyo_svc.service.evaluate import PacketPath
from tamiyo_svc.service.outcomes import Answer, Ledger, PathOptions, Received
from tamiyo_svc.service.state import ReplicaState
from tamiyo_svc.service.telemetry import TelemetryDispatch

START_NS = 1_760_000_000_000_000_000
KEYRING = Keyring(b"a secret for replays")
SMALL = NetworkConfig(sage_hidden_dim=16, gat_hidden_dim=8, attention_heads=2)
OPTIONS = PathOptions(step_timeout_ms=0, observation_window_epochs=2, observation_window_steps=20)
REQUESTS = ("", "demo-safe", "demo-bsds-high,demo-safe", "demo-quarantine", "demo-odd-metadata")


@dataclass
class Replayed:
    """What came of a replay: a digest over every byte sent and kept, by run and for all."""

    whole: Any = field(default_factory=hashlib.sha256)
    runs: dict[str, Any] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    indicators: set[frozenset[str]] = field(default_factory=set)
    answers: list[Answer] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        packet = answer.decision.packet
        run = self.runs.setdefault(packet.training_run_id, hashlib.sha256())
        for message in (answer.command, answer.telemetry, *answer.reports):
            sealed = seal(message, KEYRING)
            for digest in (self.whole, run):
                digest.update(sealed.payload + sealed.signature.encode())
        run.update(answer.state.to_bytes())
        self.whole.update(answer.state.to_bytes())
        self.reasons[answer.decision.verdict.reason] += 1
        self.events.update(event.event.value for event in answer.decision.events)
        self.answers.append(answer)
        self.indicators.add(frozenset(answer.telemetry.system_health.indicators))


def make_packets(count: int, runs: int) -> list[tuple[Any, str]]:
    """Packets of interleaved runs with the blueprints each asks for, the same every time.

    Losses wander, jump and are sometimes no numbers; seeds come, go and change stage.
    """
    dice = random.Random(20_260_101)
    losses = dict.fromkeys(range(runs), 0.5)
    packets = []
    for number in range(count):
        run = number % runs
        step = number // runs
        losses[run] = max(
            0.01, losses[run] + dice.gauss(-0.001, 0.02) + 0.3 * (dice.random() < 0.01)
        )
        loss = float("nan") if dice.random() < 0.002 else losses[run]
        packet = state_packet(f"run-{run}", step, seeds=dice.randrange(0, 5), loss=loss)
        packet.timestamp_ns = START_NS + number * 20_000_000
        packet.current_epoch = 1 + step // 50
        for seed in packet.seed_states:
            seed.stage = dice.randrange(0, 12)
            seed.risk_score = dice.random()
        packet.training_metrics["cpu_util_percent"] = dice.uniform(20, 96)
        packets.append((packet, dice.choice(REQUESTS)))
    return packets


async def replay(
    packets: Iterable[tuple[Any, str]],
    options: PathOptions = OPTIONS,
) -> Replayed:
    """Decide packets one after the other, each from the state the one before left."""
    policy = build_policy("bootstrap", SMALL)
    builder = GraphBuilder(GraphLimits(), Vocabularies())
    lane: DeviceLane[PolicyRequest, Proposal] = DeviceLane(
        lambda: PolicyEvaluator(builder, policy, clock=lambda: 0.0)
    )
    catalog = UrzaCatalog(f"sqlite:///{CATALOG}", 600.0)
    await catalog.refresh()
    metrics = Metrics()
    redis = Redis()  # Never connected: deciding touches nothing outside but the lane.
    committer = Committer(redis, "tamiyo")

    async def restore() -> None:
        return None

    now_ns = START_NS
    replica = ReplicaState(
        Runtime(PolicyIdentity(policy.policy_id, policy.version), replica="replay"),
        BreakerPolicy(),
        policy_untrained=True,
    )
    dispatch = TelemetryDispatch(TelemetryRouter("t", "e", 120), metrics, KEYRING)
    path = PacketPath(
        lane,
        catalog,
        RunStore(committer),
        committer,
        BusHealth(redis, "replay", restore),
        Ledger(dispatch, metrics, replica, KEYRING, options, lambda: now_ns),
        metrics,
        replica,
        KEYRING,
        ServerClock(),
        options,
        wall_clock_ns=lambda: now_ns,
        clock=lambda: 0.0,
    )
    await lane.start()
    replayed = Replayed()
    states: dict[str, RunState] = {}
    try:
        for packet, blueprints in packets:
            now_ns = packet.timestamp_ns + 1_000_000
            payload = packet.SerializeToString(deterministic=True)
            received = Received(
                Entry("oona.normal", "1-1", {}),
                leyline.SystemStatePacket.FromString(payload),
                {"blueprint_id": blueprints},
                packet_digest(payload),
                0.0,
            )
            answer = await path.decide(received, states.get(received.run_id, EMPTY))
            states[received.run_id] = RunState.from_bytes(answer.state.to_bytes())
            replayed.add(answer)
    finally:
        await path.close()
        await lane.close()
        catalog.close()
        await redis.aclose()
    return replayed


def main() -> None:
    """Print the digest of a replay of so many packets of so many runs."""
    count, runs = map(int, sys.argv[1:3])
    replayed = asyncio.run(replay(make_packets(count, runs)))
    sys.stdout.write(replayed.whole.hexdigest())


if __name__ == "__main__":
    main()
