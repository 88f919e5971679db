"""A graph of 10,000 nodes and 50,000 edges, far beyond the default limits.

`python -m benchmarks.large`; every form that runs on this machine.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from rich.console import Console

from benchmarks import workload
from benchmarks.parts import engines
from tamiyo_svc.cli.measure import Distribution, WeightProbe, interleaved_ms, machine
from tamiyo_svc.graph.coverage import EMPTY_COVERAGE
from tamiyo_svc.graph.graph import Graph, pack
from tamiyo_svc.graph.schema import EDGE_WIDTH, NODE_TYPES, NODE_WIDTHS, RELATIONS

_NODES: Final = 10_000
_EDGES: Final = 50_000


def large_graph() -> Graph:
    """Nodes of all types alike, edges of all relations alike."""
    chance = np.random.default_rng(1)
    share = (_NODES - 1) // (len(NODE_TYPES) - 1)
    counts = dict.fromkeys(NODE_TYPES, share)
    counts["global"] = 1
    counts["seed"] += _NODES - sum(counts.values())
    x, edges, attributes = {}, {}, {}
    for kind, count in counts.items():
        x[kind] = chance.normal(size=(count, NODE_WIDTHS[kind]))
    for place, relation in enumerate(RELATIONS):
        count = _EDGES // len(RELATIONS) + (place < _EDGES % len(RELATIONS))
        ends = [chance.integers(0, counts[kind], count) for kind in (relation[0], relation[2])]
        edges[relation] = np.stack(ends)
        attributes[relation] = chance.normal(size=(count, EDGE_WIDTH))
    topology, features, packed = pack(x, edges, attributes)
    return Graph(
        topology, features, packed, EMPTY_COVERAGE, (), (), (), (), truncated={}, skipped=0
    )


def main() -> None:
    torch.set_num_threads(1)
    graph, network = large_graph(), workload.network()
    console = Console(width=100)
    nodes, edges = sum(graph.topology.counts), sum(graph.topology.edge_counts)
    console.print(f"{nodes} nodes, {edges} edges", highlight=False)
    with torch.inference_mode():
        probe = WeightProbe()
        calls = {
            name: lambda e=engine: e.evaluate([graph]) for name, engine in engines(network).items()
        }
        results = interleaved_ms({"probe: 28 MB streamed": probe, **calls}, 3, 3)
    for name, times in results.items():
        spread = Distribution.of(times)
        console.print(
            f"{name}: p50 {spread.p50:.1f} ms, max {spread.worst:.1f} ms", highlight=False
        )
    console.print(str(machine()), highlight=False)


if __name__ == "__main__":
    main()
