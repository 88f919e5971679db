"""Whether float16 weights decide as float32 ones do, over a recorded stream of packets.

`python -m benchmarks.agreement [--packets N]`; prints the largest error of every head and the
share of packets with the same action, seed and blueprint. The network's weights are random, with
heads that are made to choose every action now and then.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from benchmarks import workload
from tamiyo_svc.adapters.compiler import load_compiled
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.policy.compiled import CompiledNetwork, Library
from tamiyo_svc.policy.folding import Outputs, fold_weights
from tamiyo_svc.policy.network import TamiyoNetwork
from tamiyo_svc.policy.proposal import propose
from tamiyo_svc.taxonomy import WeightDtype

_BATCH: Final = 32
_HEAD_GAIN: Final = 8.0
_SAMPLE: Final = 64
_STAGES: Final = (
    leyline.SEED_STAGE_DORMANT,
    leyline.SEED_STAGE_GERMINATED,
    leyline.SEED_STAGE_TRAINING,
    leyline.SEED_STAGE_BLENDING,
    leyline.SEED_STAGE_SHADOWING,
    leyline.SEED_STAGE_PROBATIONARY,
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--packets", type=int, default=10_000)
    count = arguments.parse_args().packets
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        library = load_compiled(Path(folder))
    builder, candidates = workload.builder(), workload.blueprints()
    sample = [builder.build(varied(count + step), candidates, {}) for step in range(1, _SAMPLE + 1)]
    weights = fold_weights(decided(workload.network(), library, sample))
    exact, rounded = (CompiledNetwork(library, weights, dtype) for dtype in WeightDtype)
    errors: dict[str, float] = {}
    same = 0
    actions: Counter[str] = Counter()
    for start in range(0, count, _BATCH):
        packets = [varied(step) for step in range(start + 1, min(start + _BATCH, count) + 1)]
        graphs = [builder.build(packet, candidates, {}) for packet in packets]
        for packet, graph, mine, other in zip(
            packets, graphs, exact.evaluate(graphs), rounded.evaluate(graphs), strict=True
        ):
            for head, values in mine.items():
                worst = max(
                    (abs(a - b) for a, b in zip(values, other[head], strict=True)), default=0
                )
                errors[head] = max(errors.get(head, 0.0), worst)
            choice = targets(mine, packet, graph)
            actions[choice[0]] += 1
            same += choice == targets(other, packet, graph)
    console = Console(width=100)
    console.print(f"{count} packets, actions {dict(actions)}", highlight=False)
    for head, error in errors.items():
        console.print(f"{head}: largest error {error:.2e}", highlight=False)
    console.print(f"same action, seed and blueprint: {same / count:.4%}", highlight=False)


def decided(network: TamiyoNetwork, library: Library, sample: Sequence[Graph]) -> TamiyoNetwork:
    """The network with heads that tell packets apart and prefer no action on the average of them.

    Random heads give nearly the same logits whatever they see, so one action would always win.
    """
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith("heads.") and name.endswith("weight"):
                weight.mul_(_HEAD_GAIN)
        outputs = CompiledNetwork(library, fold_weights(network)).evaluate(sample)
        logits = torch.tensor([each["policy_logits"] for each in outputs])
        network.get_parameter("heads.policy.bias").sub_(logits.mean(dim=0))
    return network


def varied(step: int) -> leyline.SystemStatePacket:
    """A packet whose metrics and seeds wander over what trainers show."""
    chance = random.Random(step)
    packet = workload.packets(1)[0]
    packet.packet_id, packet.global_step = f"varied-{step}", step
    for name in ("loss", "gradient_norm", "samples_per_s", "hook_latency_ms"):
        packet.training_metrics[name] *= chance.lognormvariate(0.0, 0.7)
    packet.training_loss = packet.validation_loss = packet.training_metrics["loss"]
    for seed in packet.seed_states:
        seed.stage = chance.choice(_STAGES)
        seed.gradient_norm = chance.lognormvariate(0.0, 1.0)
        seed.learning_rate = 10 ** chance.uniform(-4, -1)
        seed.risk_score = chance.random()
        seed.age_epochs = chance.randrange(30)
    return packet


def targets(
    outputs: Outputs, packet: leyline.SystemStatePacket, graph: Graph
) -> tuple[str, int | None, int | None]:
    """What a decision comes down to."""
    proposal = propose(
        outputs,
        seeds=packet.seed_states,
        blend_allowed=graph.blend_allowed,
        blueprints=graph.blueprints,
        coverage=graph.coverage,
        truncated=graph.truncated,
        skipped_metadata=graph.skipped,
        build_ms=0.0,
        inference_ms=0.0,
    )
    return proposal.action.name, proposal.seed_index, proposal.blueprint_index


if __name__ == "__main__":
    main()
