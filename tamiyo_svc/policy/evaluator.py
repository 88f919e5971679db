"""One job of the device lane: requests in, proposals out, in plain numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Literal

import torch

from tamiyo_svc.catalog import Blueprint
from tamiyo_svc.errors import InferenceError
from tamiyo_svc.graph.builder import GraphBuilder
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.graph.normalizer import Statistics
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.compiled import PackedWeights
from tamiyo_svc.policy.engines import Engines
from tamiyo_svc.policy.folding import Outputs
from tamiyo_svc.policy.network import (
    Network,
    NetworkConfig,
    TamiyoNetwork,
    bootstrap,
    loaded,
    untrained,
)
from tamiyo_svc.policy.proposal import Proposal, propose

# All outputs of the bootstrap policy are constants of the masks, whatever its size.
_BOOTSTRAP_CONFIG: Final = NetworkConfig(sage_hidden_dim=64, gat_hidden_dim=32, attention_heads=2)
_BUILT_IN: Final[Mapping[str, tuple[Callable[[NetworkConfig], TamiyoNetwork], NetworkConfig]]] = {
    "untrained": (untrained, NetworkConfig()),
    "bootstrap": (bootstrap, _BOOTSTRAP_CONFIG),
}
_WARM_UP_RUNS: Final = 3


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """One packet to decide; `statistics` are the run's from before it."""

    packet: leyline.SystemStatePacket
    blueprints: Sequence[Blueprint]
    statistics: Statistics


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """Weights ready to serve; `digest` is their SHA-256, as hex."""

    policy_id: str
    version: str
    digest: str
    untrained: bool
    weights: Network

    @property
    def network(self) -> TamiyoNetwork:
        """The network as it is defined; what serves may be made of the weights without it.

        Raises:
            PolicyRejectedError: its file is gone, damaged or not the one that was kept.
        """
        return loaded(self.weights)


class PolicyEvaluator:
    """Builds graphs and runs the policy on them, all in the one thread that calls it."""

    def __init__(
        self,
        builder: GraphBuilder,
        policy: Policy,
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        engines: Engines | None = None,
    ) -> None:
        self.policy = policy
        self._engines = engines or Engines()
        self._builder = builder
        self._threads = threads
        self._clock = clock

    def adopt(self, packed: PackedWeights) -> bool:
        """Take the policy's weights as another process packed and checked them; whether the form
        that serves takes them so.
        """
        return self._engines.adopt(self.policy.weights, packed)

    def warm_up(self, policy: Policy | None = None) -> None:
        """Run a policy, by default the serving one, on minimal graphs.

        Raises:
            InferenceError: it failed or produced an output that is not finite.
        """
        torch.set_num_threads(self._threads)
        seed = leyline.SeedState(seed_id="warm-up", stage=leyline.SEED_STAGE_DORMANT)
        packet = leyline.SystemStatePacket(packet_id="warm-up", seed_states=[seed])
        blueprint = Blueprint(leyline.BlueprintDescriptor(blueprint_id="warm-up"))
        alone = PolicyRequest(packet, (), {})
        joined = PolicyRequest(packet, (blueprint,), {})
        warming = policy or self.policy
        graphs = [self._builder.build(packet, found, {}) for found in ((), (blueprint,))]
        with torch.inference_mode():
            self._engines.warm_up(warming.weights, [graphs[:1], graphs[1:], graphs], self._clock)
        for _ in range(_WARM_UP_RUNS):
            for requests in ([alone], [joined], [alone, joined]):
                for result in self._evaluate(warming, requests):
                    if isinstance(result, InferenceError):
                        raise result

    def swap(self, policy: Policy) -> None:
        """Serve another policy from the next call on."""
        self.policy = policy

    def evaluate(self, requests: Sequence[PolicyRequest]) -> list[Proposal | InferenceError]:
        """Decide every request; one that fails yields its error and spares the others."""
        return self._evaluate(self.policy, requests)

    def _evaluate(
        self, policy: Policy, requests: Sequence[PolicyRequest]
    ) -> list[Proposal | InferenceError]:
        results: list[Proposal | InferenceError | None] = [None] * len(requests)
        built: list[tuple[int, Graph, float]] = []
        for place, request in enumerate(requests):
            started = self._clock()
            try:
                graph = self._builder.build(request.packet, request.blueprints, request.statistics)
            except Exception as error:
                results[place] = _failure("graph build", error)
            else:
                built.append((place, graph, (self._clock() - started) * 1e3))
        outputs = self._infer(policy, [graph for _, graph, _ in built])
        for (place, graph, build_ms), (output, inference_ms) in zip(built, outputs, strict=True):
            results[place] = (
                output
                if isinstance(output, InferenceError)
                else _proposal(requests[place], graph, output, build_ms, inference_ms)
            )
        return [result for result in results if result is not None]

    def _infer(
        self, policy: Policy, graphs: Sequence[Graph]
    ) -> list[tuple[Outputs | InferenceError, float]]:
        """Outputs and milliseconds of every graph; a batch that raises is taken apart."""
        if not graphs:
            return []
        started = self._clock()
        try:
            with torch.inference_mode():
                outputs = self._engines.evaluate(policy.weights, graphs)
        except Exception as error:
            if len(graphs) > 1:
                return [self._infer(policy, [graph])[0] for graph in graphs]
            return [(_failure("network", error), (self._clock() - started) * 1e3)]
        inference_ms = (self._clock() - started) * 1e3
        return [(output, inference_ms) for output in outputs]


def build_policy(
    name: Literal["untrained", "bootstrap"], config: NetworkConfig | None = None
) -> Policy:
    """Build one of the built-in policies; neither has trained weights."""
    build, usual = _BUILT_IN[name]
    network = build(config or usual)
    return Policy(
        policy_id=name,
        version=f"{name}-1",
        digest=weights_digest(network),
        untrained=True,
        weights=network,
    )


def weights_digest(network: TamiyoNetwork) -> str:
    """SHA-256 over the names and float32 bytes of all weights in name order, as hex."""
    digest = sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _proposal(
    request: PolicyRequest, graph: Graph, output: Outputs, build_ms: float, inference_ms: float
) -> Proposal | InferenceError:
    try:
        return propose(
            output,
            seeds=request.packet.seed_states[: graph.seed_count],
            blend_allowed=graph.blend_allowed,
            blueprints=graph.blueprints,
            coverage=graph.coverage,
            truncated=graph.truncated,
            skipped_metadata=graph.skipped,
            build_ms=build_ms,
            inference_ms=inference_ms,
        )
    except InferenceError as error:
        return error


def _failure(stage: str, error: Exception) -> InferenceError:
    failure = InferenceError(f"{stage} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
