"""Attention over our graph's edges two ways, side by side, interleaved.

Per relation `GATConv` with edge attributes, as the reference network runs it, and one dense scaled
dot-product attention over all nodes with the edges as an additive bias. Run with
`python benchmarks/attention.py [--rounds N]`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tamiyo_svc.graph.schema import NODE_TYPES, RELATIONS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import GATConv, HeteroConv

_WIDTH = 128
_HEADS = 4
# A packet with four seeds and the sample catalogue's described blueprint.
_NODES = {"global": 1, "seed": 4, "blueprint": 8, "layer": 12, "activation": 12, "parameter": 8}


def sample_edges(generator: torch.Generator) -> dict[tuple[str, str, str], Tensor]:
    """All pairs of every relation, as the densest graph of these sizes has them."""
    edges = {}
    for source, relation, target in RELATIONS:
        rows = torch.arange(_NODES[source]).repeat_interleave(_NODES[target])
        columns = torch.arange(_NODES[target]).repeat(_NODES[source])
        edges[source, relation, target] = torch.stack([rows, columns])
    return edges


def main() -> None:
    """Measure and print the median and the 99th percentile of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    edges = sample_edges(generator)
    attributes = {
        relation: torch.randn(index.shape[1], 3, generator=generator)
        for relation, index in edges.items()
    }
    features = {
        kind: torch.randn(count, _WIDTH, generator=generator) for kind, count in _NODES.items()
    }
    sparse = HeteroConv(
        {
            relation: GATConv(
                (_WIDTH, _WIDTH),
                _WIDTH,
                heads=_HEADS,
                concat=False,
                edge_dim=3,
                add_self_loops=False,
            )
            for relation in RELATIONS
        },
        aggr="mean",
    ).eval()

    starts = dict(zip(NODE_TYPES, np.cumsum([0, *_NODES.values()]), strict=False))
    total = sum(_NODES.values())
    projection = torch.nn.Linear(_WIDTH, 3 * _HEADS * _WIDTH).eval()
    # A weight per relation and head turns three attributes into one additive term.
    edge_weight = torch.randn(len(RELATIONS), 3, _HEADS, generator=generator)

    def dense() -> Tensor:
        bias = torch.full((_HEADS, total, total), float("-inf"))
        for place, (relation, index) in enumerate(edges.items()):
            terms = attributes[relation] @ edge_weight[place]
            rows = index[1] + int(starts[relation[2]])
            columns = index[0] + int(starts[relation[0]])
            bias[:, rows, columns] = terms.T
        packed = torch.cat([features[kind] for kind in NODE_TYPES])
        query, key, value = (
            projection(packed).view(total, 3, _HEADS, _WIDTH).permute(1, 2, 0, 3).unbind(0)
        )
        found = torch.nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=bias[None]
        )
        return found.mean(1)

    forms: dict[str, Callable[[], object]] = {
        "GATConv per relation, edge attributes": lambda: sparse(
            features, edges, edge_attr_dict=attributes
        ),
        "dense SDPA, edges as additive bias": dense,
    }
    took: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 20):
            for name, form in forms.items():
                started = time.perf_counter()
                form()
                took[name].append((time.perf_counter() - started) * 1e3)
    result = {
        name: {
            "p50_ms": round(float(np.percentile(times[20:], 50)), 2),
            "p99_ms": round(float(np.percentile(times[20:], 99)), 2),
        }
        for name, times in took.items()
    }
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    print(json.dumps({"cpu": cpu, "torch": torch.__version__, "forms": result}, indent=1))


if __name__ == "__main__":
    main()
