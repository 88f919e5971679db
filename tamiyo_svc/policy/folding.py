"""The network with everything constant multiplied out, as plain matrices.

What folds, per layer: the mean over relations and the SAGE root weights become one matrix per
target type over the concatenated neighbourhoods; the GAT attention vectors join the projections
that precede them (heads x inputs); neighbours are averaged before they are projected, so that the
wide projection runs once per target node. The last layer is computed for `global`, `seed` and
`blueprint` alone, and in the layer before it nothing that these do not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from tamiyo_svc.graph.graph import COLUMNS, PACKED_WIDTH, TYPE_COLUMNS, Graph
from tamiyo_svc.graph.schema import NODE_TYPES, RELATIONS
from tamiyo_svc.policy.layout import RELATIONS_INTO
from tamiyo_svc.policy.network import NetworkConfig, TamiyoNetwork

_LAST: Final = ("global", "seed", "blueprint")
_READ_BY_LAST: Final = tuple(
    kind
    for kind in NODE_TYPES
    if kind in _LAST or any(source == kind and target in _LAST for source, _, target in RELATIONS)
)

ATTENDED: Final = (_READ_BY_LAST, _LAST)
"""The types that each GAT layer computes."""

NEGATIVE_SLOPE: Final = 0.2
"""Slope of the attention scores below 0."""

Outputs = dict[str, list[float]]
"""One graph's outputs by head name."""


@dataclass(frozen=True, slots=True)
class Affine:
    """A constant affine map: weight (out, in) as in `nn.Linear`, and bias (out)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """One GAT layer."""

    scores: Tensor
    """(in, 2 * relations * heads): as source, then as target."""
    edges: Tensor
    """(relations, heads, 3)."""
    projections: dict[str, Affine]


@dataclass(frozen=True, slots=True)
class FoldedWeights:
    """All constants of the folded network, float32."""

    config: NetworkConfig
    encoder: Tensor
    """(`PACKED_WIDTH`, width): the type columns carry the biases."""
    scale: Tensor
    """(types + 1, width): the norms' weights; 0 for the zero row."""
    shift: Tensor
    sage: tuple[dict[str, Affine], ...]
    gat: tuple[AttentionWeights, ...]
    node_heads: Affine
    """The first layers of all heads, side by side."""
    hidden_heads: Affine
    """The second layers, block by block."""
    columns: Mapping[str, slice]
    """Where each head stands in the columns of `node_heads`; `hidden` feeds `hidden_heads`."""

    def release(self) -> None:
        """Free the wide projections; together they would keep the interpreter for milliseconds."""
        for layer in (*self.sage, *(layer.projections for layer in self.gat)):
            while layer:
                layer.popitem()


def fold_weights(network: TamiyoNetwork) -> FoldedWeights:
    """Fold a network's present weights; nothing is shared with it."""
    with torch.no_grad():
        node_heads, hidden_heads, columns = _fold_heads(network)
        encoder, scale, shift = _fold_encoders(network)
        return FoldedWeights(
            config=network.config,
            encoder=encoder,
            scale=scale,
            shift=shift,
            sage=tuple(_fold_sage(layer) for layer in network.sage),
            gat=tuple(
                _fold_gat(layer, kinds) for layer, kinds in zip(network.gat, ATTENDED, strict=True)
            ),
            node_heads=node_heads,
            hidden_heads=hidden_heads,
            columns=columns,
        )


def read_outputs(
    values: Sequence[list[float]],
    deep: Sequence[list[float]],
    graphs: Sequence[Graph],
    columns: Mapping[str, slice],
    parameters: int,
) -> list[Outputs]:
    """Each graph's outputs out of the head tables of a batch.

    `values` has a row per `global`, then `seed`, then `blueprint` node, each in order of the
    graphs; `deep` a row per graph, of which the first `parameters` are the policy's.
    """
    counts = [graph.topology.counts for graph in graphs]
    seeds = len(graphs)
    blueprints = seeds + sum(count[1] for count in counts)
    seed_column = columns["seed_scores"].start
    blueprint_column = columns["blueprint_scores"].start
    results = []
    for place, count in enumerate(counts):
        row = values[place]
        outputs = {
            head: row[columns[head]]
            for head in (
                "policy_logits",
                "blending_logits",
                "risk_logits",
                "value",
                "breaker_logits",
            )
        }
        outputs["policy_params"] = deep[place][:parameters]
        outputs["schedule_params"] = deep[place][parameters:]
        outputs["seed_scores"] = [node[seed_column] for node in values[seeds : seeds + count[1]]]
        outputs["blueprint_scores"] = [
            node[blueprint_column] for node in values[blueprints : blueprints + count[2]]
        ]
        seeds, blueprints = seeds + count[1], blueprints + count[2]
        results.append(outputs)
    return results


def _fold_encoders(network: TamiyoNetwork) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix over packed rows, whose type columns carry the biases, and the norms by type."""
    width = network.config.sage_hidden_dim
    matrix = torch.zeros(PACKED_WIDTH, width)
    scale, shift = torch.zeros(len(NODE_TYPES) + 1, width), torch.zeros(len(NODE_TYPES) + 1, width)
    for place, kind in enumerate(NODE_TYPES):
        linear, _, norm = _parts(network.encoders[kind])
        matrix[COLUMNS[kind]] = linear.weight.T
        matrix[TYPE_COLUMNS.start + place] = linear.bias
        scale[place], shift[place] = norm.weight, norm.bias
    return matrix, scale, shift


def _fold_sage(layer: nn.Module) -> dict[str, Affine]:
    convolutions = _convolutions(layer)
    projections = {}
    for kind in NODE_TYPES:
        into = [convolutions[place] for place in RELATIONS_INTO[kind]]
        share = 1.0 / len(into)
        blocks = [conv.lin_l.weight for conv in into]
        blocks.append(torch.stack([conv.lin_r.weight for conv in into]).sum(dim=0))
        bias = torch.stack([conv.lin_l.bias for conv in into]).mean(dim=0)
        projections[kind] = Affine(torch.cat(blocks, dim=1) * share, bias)
    return projections


def _fold_gat(layer: nn.Module, kinds: Sequence[str]) -> AttentionWeights:
    convolutions = _convolutions(layer)
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    edges: list[Tensor] = []
    for conv in convolutions:
        heads, width = conv.heads, conv.out_channels
        for parts, linear, vector in (
            (sources, conv.lin_src, conv.att_src),
            (targets, conv.lin_dst, conv.att_dst),
            (edges, conv.lin_edge, conv.att_edge),
        ):
            weight = linear.weight.view(heads, width, -1)
            parts.append(torch.einsum("hci,hc->hi", weight, vector[0]))
    projections = {}
    for kind in kinds:
        into = [convolutions[place] for place in RELATIONS_INTO[kind]]
        blocks = [
            # (heads * width, in) to (width, heads * in): a slot's row is its heads, one by one.
            conv.lin_src.weight.view(conv.heads, conv.out_channels, -1)
            .transpose(0, 1)
            .reshape(conv.out_channels, -1)
            for conv in into
        ]
        weight = torch.cat(blocks, dim=1) / (len(into) * into[0].heads)
        bias = torch.stack([conv.bias for conv in into]).mean(dim=0)
        projections[kind] = Affine(weight, bias)
    return AttentionWeights(
        scores=torch.cat([*sources, *targets]).T.contiguous(),
        edges=torch.stack(edges),
        projections=projections,
    )


def _fold_heads(network: TamiyoNetwork) -> tuple[Affine, Affine, dict[str, slice]]:
    heads = network.heads
    adjustment, schedule = _parts(heads["adjustment"]), _parts(heads["schedule"])
    first = {
        "policy_logits": heads["policy"],
        "blending_logits": heads["blending"],
        "risk_logits": heads["risk"],
        "value": heads["value"],
        "breaker_logits": heads["breaker"],
        "seed_scores": heads["seed_score"],
        "blueprint_scores": heads["blueprint_score"],
        "adjustment": adjustment[0],
        "schedule": schedule[0],
    }
    columns: dict[str, slice] = {}
    stop = 0
    for name, linear in first.items():
        columns[name] = slice(stop, stop := stop + linear.out_features)
    columns["hidden"] = slice(columns["adjustment"].start, columns["schedule"].stop)
    return (
        Affine(
            torch.cat([linear.weight for linear in first.values()]),
            torch.cat([linear.bias for linear in first.values()]),
        ),
        Affine(
            torch.block_diag(  # type: ignore[no-untyped-call]
                adjustment[2].weight, schedule[2].weight
            ),
            torch.cat([adjustment[2].bias, schedule[2].bias]),
        ),
        columns,
    )


def _convolutions(layer: nn.Module) -> list[Any]:
    """A layer's convolutions in the order of `RELATIONS`."""
    by_relation: Any = layer.convs
    return [by_relation[relation] for relation in RELATIONS]


def _parts(sequence: nn.Module) -> list[Any]:
    return list(sequence.children())
