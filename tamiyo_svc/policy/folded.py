"""The network as it serves: the same function with everything constant multiplied out.

What folds, per layer: the mean over relations and the SAGE root weights become one matrix per
target type over the concatenated neighbourhoods; the GAT attention vectors join the projections
that precede them (heads x inputs); neighbours are averaged before they are projected, so that the
wide projection runs once per target node. The last layer is computed for `global`, `seed` and
`blueprint` alone, and in the layer before it nothing that these do not read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tamiyo_svc.graph.graph import COLUMNS, PACKED_WIDTH, TYPE_COLUMNS, Graph, Topology
from tamiyo_svc.graph.schema import NODE_TYPES, RELATIONS
from tamiyo_svc.policy.layout import RELATIONS_INTO, Attention, Layout, lay_out, padded
from tamiyo_svc.policy.network import TamiyoNetwork

_MAX_LAYOUTS: Final = 256
_LAST: Final = ("global", "seed", "blueprint")
_READ_BY_LAST: Final = tuple(
    kind
    for kind in NODE_TYPES
    if kind in _LAST or any(source == kind and target in _LAST for source, _, target in RELATIONS)
)
_ATTENDED: Final = (_READ_BY_LAST, _LAST)
_NEGATIVE_SLOPE: Final = 0.2
# Far below any score, and still finite after the slope: its share of a softmax is exactly 0.
_ABSENT: Final = -1e30

Outputs = dict[str, list[float]]
"""One graph's outputs by head name."""


_Affine = tuple[Tensor, Tensor]


class Projection:
    """A constant affine map, its weights in the form the processor reads fastest."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """`weight` is (out, in) as in `nn.Linear`."""
        self.inputs = weight.shape[1]
        self._bias = bias.contiguous()
        self._weight = weight.contiguous()
        self._is_packed = bool(torch._C._has_mkldnn) and weight.device.type == "cpu"
        if self._is_packed:
            # The number of rows is a hint for the blocking; four is what most types have.
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, 4)

    def __call__(self, rows: Tensor) -> Tensor:
        """Map (rows, in) to (rows, out)."""
        if self._is_packed:
            mapped: Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self._weight, self._bias, "none", [], ""
            )
            return mapped
        return functional.linear(rows, self._weight, self._bias)


@dataclass(frozen=True, slots=True)
class _AttentionLayer:
    scores: Tensor
    """(in, 2 * relations * heads)."""
    edges: Tensor
    """(relations, heads, 3)."""
    projections: Mapping[str, Projection]


class FoldedNetwork:
    """Evaluates graphs; equal to the network it came from within 1e-5 in float32.

    Layouts are kept per topology, which makes it unfit for two threads at once.
    """

    def __init__(self, network: TamiyoNetwork) -> None:
        config = network.config
        self.config = config
        self._sage_width, self._width = config.sage_hidden_dim, config.gat_hidden_dim
        self._attention_heads = config.attention_heads
        self._encoder, self._scale, self._shift = _fold_encoders(network)
        self._sage = [_fold_sage(layer) for layer in network.sage]
        self._gat = [
            _fold_gat(layer, kinds) for layer, kinds in zip(network.gat, _ATTENDED, strict=True)
        ]
        self._node_heads, self._hidden_heads, self._columns = _fold_heads(network)
        self._layouts: OrderedDict[tuple[Topology, ...], Layout] = OrderedDict()

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph, each as if it were alone. Call in inference mode."""
        layout = self._layout(tuple(graph.topology for graph in graphs))
        features = np.concatenate(
            [*(graph.features for graph in graphs), np.zeros((1, PACKED_WIDTH), np.float32)]
        )
        attributes = (
            graphs[0].attributes
            if len(graphs) == 1
            else np.concatenate([graph.attributes for graph in graphs])
        )
        hidden = self._forward(layout, torch.from_numpy(features), torch.from_numpy(attributes))
        return self._outputs(hidden, graphs)

    def warm_up(self, most_nodes: int) -> None:
        """Compile what the projections need for up to `most_nodes` nodes of a type."""
        projections = [
            projection
            for layer in (*self._sage, *(layer.projections for layer in self._gat))
            for projection in layer.values()
        ]
        height = padded(1)
        while height <= padded(most_nodes):
            for projection in projections:
                projection(torch.zeros(height, projection.inputs))
            height *= 2

    def _layout(self, topologies: tuple[Topology, ...]) -> Layout:
        layout = self._layouts.get(topologies)
        if layout is None:
            layout = self._layouts[topologies] = lay_out(topologies, _ATTENDED)
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        else:
            self._layouts.move_to_end(topologies)
        return layout

    def _forward(self, layout: Layout, features: Tensor, attributes: Tensor) -> Tensor:
        if layout.order is not None:
            features[:-1] = features[layout.order]
        hidden = functional.gelu(features @ self._encoder)
        hidden = functional.layer_norm(hidden, (self._sage_width,))
        hidden = torch.addcmul(
            self._shift.index_select(0, layout.types),
            hidden,
            self._scale.index_select(0, layout.types),
        )
        for projections in self._sage:
            hidden = self._averaged(layout, hidden, projections)
        for layer, attention in zip(self._gat, layout.attention, strict=True):
            hidden = self._attended(layout, attention, layer, hidden, attributes)
        return hidden

    def _averaged(
        self, layout: Layout, hidden: Tensor, projections: Mapping[str, Projection]
    ) -> Tensor:
        rows, offsets, shares = layout.mean
        # A weighted sum takes a much faster kernel than mode "mean".
        means = functional.embedding_bag(
            rows, hidden, offsets, mode="sum", per_sample_weights=shares
        )
        output = hidden.new_zeros(hidden.shape)
        slot = 0
        for kind, count in zip(NODE_TYPES, layout.counts, strict=True):
            if count:
                height = padded(count)
                slots = height * (len(RELATIONS_INTO[kind]) + 1)
                block = means[slot : slot + slots].view(height, -1)
                output[layout.rows(kind)] = projections[kind](block)[:count]
                slot += slots
        return functional.gelu(output).add_(hidden)

    def _attended(
        self,
        layout: Layout,
        attention: Attention,
        layer: _AttentionLayer,
        hidden: Tensor,
        attributes: Tensor,
    ) -> Tensor:
        heads = self._attention_heads
        table = (hidden @ layer.scores).view(-1, heads)
        logits = hidden.new_full((attention.slots * attention.degree, heads), _ABSENT)
        edges = layer.edges.index_select(0, attention.relation)
        logits[attention.place] = torch.bmm(
            edges, attributes.index_select(0, attention.edge).unsqueeze(-1)
        ).squeeze(-1)
        logits += table.index_select(0, attention.sources)
        logits += table.index_select(0, attention.targets)
        shares = functional.leaky_relu(logits, _NEGATIVE_SLOPE)
        shares = shares.view(attention.slots, attention.degree, heads).softmax(dim=1)
        neighbours = hidden.index_select(0, attention.neighbours)
        means = torch.bmm(
            shares.transpose(1, 2), neighbours.view(attention.slots, attention.degree, -1)
        )
        output = hidden.new_zeros(len(hidden), self._width)
        slot = 0
        for kind in attention.kinds:
            rows = layout.rows(kind)
            count = rows.stop - rows.start
            if count:
                height = padded(count)
                slots = height * len(RELATIONS_INTO[kind])
                block = means[slot : slot + slots].view(height, -1)
                output[rows] = layer.projections[kind](block)[:count]
                slot += slots
        output = functional.gelu(output)
        return output + hidden if output.shape == hidden.shape else output

    def _outputs(self, hidden: Tensor, graphs: Sequence[Graph]) -> list[Outputs]:
        counts = [graph.topology.counts for graph in graphs]
        seeds = len(graphs)
        blueprints = seeds + sum(count[1] for count in counts)
        nodes = hidden[: blueprints + sum(count[2] for count in counts)]
        values = functional.linear(nodes, *self._node_heads)
        deep = torch.tanh(
            functional.linear(
                functional.gelu(values[: len(graphs), self._columns["hidden"]]), *self._hidden_heads
            )
        )
        table, deep_table = values.tolist(), deep.tolist()
        seed_column = self._columns["seed_scores"].start
        blueprint_column = self._columns["blueprint_scores"].start
        params = self.config.param_vector_dim
        results = []
        for place, count in enumerate(counts):
            row = table[place]
            outputs = {
                head: row[self._columns[head]]
                for head in (
                    "policy_logits",
                    "blending_logits",
                    "risk_logits",
                    "value",
                    "breaker_logits",
                )
            }
            outputs["policy_params"] = deep_table[place][:params]
            outputs["schedule_params"] = deep_table[place][params:]
            outputs["seed_scores"] = [node[seed_column] for node in table[seeds : seeds + count[1]]]
            outputs["blueprint_scores"] = [
                node[blueprint_column] for node in table[blueprints : blueprints + count[2]]
            ]
            seeds, blueprints = seeds + count[1], blueprints + count[2]
            results.append(outputs)
        return results


def fold(network: TamiyoNetwork) -> FoldedNetwork:
    """Fold a network's present weights; later changes to it do not reach the folded form."""
    with torch.no_grad():
        return FoldedNetwork(network)


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


def _fold_sage(layer: nn.Module) -> dict[str, Projection]:
    convolutions = _convolutions(layer)
    projections = {}
    for kind in NODE_TYPES:
        into = [convolutions[place] for place in RELATIONS_INTO[kind]]
        share = 1.0 / len(into)
        blocks = [conv.lin_l.weight for conv in into]
        blocks.append(torch.stack([conv.lin_r.weight for conv in into]).sum(dim=0))
        bias = torch.stack([conv.lin_l.bias for conv in into]).mean(dim=0)
        projections[kind] = Projection(torch.cat(blocks, dim=1) * share, bias)
    return projections


def _fold_gat(layer: nn.Module, kinds: Sequence[str]) -> _AttentionLayer:
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
        projections[kind] = Projection(weight, bias)
    return _AttentionLayer(
        scores=torch.cat([*sources, *targets]).T.contiguous(),
        edges=torch.stack(edges),
        projections=projections,
    )


def _fold_heads(network: TamiyoNetwork) -> tuple[_Affine, _Affine, dict[str, slice]]:
    """All first layers side by side, the second layers block by block, and where each head is."""
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
        (
            torch.cat([linear.weight for linear in first.values()]),
            torch.cat([linear.bias for linear in first.values()]),
        ),
        (
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
