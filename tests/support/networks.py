"""Networks and graphs of any shape."""

from __future__ import annotations

import numpy as np
import torch

from tamiyo_svc.graph.coverage import EMPTY_COVERAGE
from tamiyo_svc.graph.graph import Graph, pack
from tamiyo_svc.graph.schema import NODE_TYPES, NODE_WIDTHS, RELATIONS
from tamiyo_svc.policy.network import NetworkConfig, TamiyoNetwork


def random_network(config: NetworkConfig, seed: int) -> TamiyoNetwork:
    """A network whose biases and norms are not the constants they start as."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TamiyoNetwork(config)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if weight.dim() == 1:
                    weight.copy_(torch.randn_like(weight) * 0.5 + ("2.weight" in name))
    return network.eval()


def random_graph(counts: tuple[int, ...], density: float, seed: int) -> Graph:
    """A graph with `counts` nodes per type and up to twice as many edges as pairs."""
    random = np.random.default_rng(seed)
    sizes = dict(zip(NODE_TYPES, counts, strict=True))
    x = {kind: random.normal(size=(size, NODE_WIDTHS[kind])) for kind, size in sizes.items()}
    edge_index, edge_attr = {}, {}
    for relation in RELATIONS:
        source, target = sizes[relation[0]], sizes[relation[2]]
        edges = int(density * source * target * random.integers(0, 3)) if source * target else 0
        edge_index[relation] = np.stack(
            [random.integers(0, max(1, source), edges), random.integers(0, max(1, target), edges)]
        )
        edge_attr[relation] = random.normal(size=(edges, 3))
    topology, features, attributes = pack(x, edge_index, edge_attr)
    return Graph(
        topology, features, attributes, EMPTY_COVERAGE, (), (), (), (), truncated={}, skipped=0
    )
