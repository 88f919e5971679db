"""The folded network in torch operations: on a CPU without a compiler, and on CUDA.

`folding` says what was multiplied out. On a CPU the projections are packed for oneDNN.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tamiyo_svc.graph.graph import PACKED_WIDTH, Graph, Topology
from tamiyo_svc.graph.schema import NODE_TYPES
from tamiyo_svc.policy.folding import (
    ATTENDED,
    NEGATIVE_SLOPE,
    Affine,
    AttentionWeights,
    FoldedWeights,
    Outputs,
    fold_weights,
    read_outputs,
)
from tamiyo_svc.policy.layout import RELATIONS_INTO, Attention, Layout, lay_out, padded
from tamiyo_svc.policy.network import TamiyoNetwork

__all__ = ["FoldedNetwork", "Outputs", "Projection", "fold"]

_MAX_LAYOUTS: Final = 256
# Far below any score, and still finite after the slope: its share of a softmax is exactly 0.
_ABSENT: Final = -1e30
_CPU: Final = torch.device("cpu")


class Projection:
    """A constant affine map, its weights in the form the processor reads fastest."""

    def __init__(self, affine: Affine, device: torch.device, *, may_pack: bool) -> None:
        self.inputs = affine.weight.shape[1]
        self._bias = affine.bias.contiguous().to(device)
        self._weight = affine.weight.contiguous().to(device)
        self._is_packed = may_pack and bool(torch._C._has_mkldnn)
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
    edges: Tensor
    projections: dict[str, Projection]


class FoldedNetwork:
    """Evaluates graphs; equal to the network it came from within 1e-5 in float32.

    Layouts are kept per topology, which makes it unfit for two threads at once. With `is_mixed`
    matrices are multiplied in bfloat16. Copies to another device are pinned and do not block.
    """

    def __init__(
        self,
        weights: FoldedWeights,
        device: torch.device = _CPU,
        *,
        is_mixed: bool = False,
    ) -> None:
        config = weights.config
        self.config = config
        self.device = device
        self._is_mixed = is_mixed
        may_pack = device.type == "cpu" and not is_mixed
        self._sage_width, self._width = config.sage_hidden_dim, config.gat_hidden_dim
        self._attention_heads = config.attention_heads
        self._encoder, self._scale, self._shift = (
            tensor.to(device) for tensor in (weights.encoder, weights.scale, weights.shift)
        )
        self._sage = [
            {kind: Projection(affine, device, may_pack=may_pack) for kind, affine in layer.items()}
            for layer in weights.sage
        ]
        self._gat = [_attention_layer(layer, device, may_pack=may_pack) for layer in weights.gat]
        self._node_heads, self._hidden_heads = (
            (affine.weight.to(device), affine.bias.to(device))
            for affine in (weights.node_heads, weights.hidden_heads)
        )
        self._columns = weights.columns
        self._layouts: OrderedDict[tuple[Topology, ...], Layout] = OrderedDict()

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph, each as if it were alone. Call in inference mode."""
        layout = self._layout(tuple(graph.topology for graph in graphs))
        features = torch.from_numpy(
            np.concatenate(
                [*(graph.features for graph in graphs), np.zeros((1, PACKED_WIDTH), np.float32)]
            )
        )
        attributes = torch.from_numpy(
            graphs[0].attributes
            if len(graphs) == 1
            else np.concatenate([graph.attributes for graph in graphs])
        )
        if self.device.type != "cpu":
            features = features.pin_memory().to(self.device, non_blocking=True)
            attributes = attributes.pin_memory().to(self.device, non_blocking=True)
        values, deep = self.forward(layout, features, attributes)
        return self.read(values, deep, graphs)

    def forward(
        self, layout: Layout, features: Tensor, attributes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From a batch on the device to the head tables that `read` takes, on the device."""
        if not self._is_mixed:
            return self._heads(layout, self._hidden(layout, features, attributes))
        with torch.autocast(self.device.type, torch.bfloat16):
            return self._heads(layout, self._hidden(layout, features, attributes))

    def read(self, values: Tensor, deep: Tensor, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph: (scored nodes, columns) and (graphs, dimensions) of the heads."""
        return read_outputs(
            values.tolist(), deep.tolist(), graphs, self._columns, self.config.param_vector_dim
        )

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
                projection(torch.zeros(height, projection.inputs, device=self.device))
            height *= 2

    def release(self) -> None:
        """Free the projections one by one, as `FoldedWeights.release`; it is of no use then."""
        for layer in (*self._sage, *(layer.projections for layer in self._gat)):
            while layer:
                layer.popitem()

    def _layout(self, topologies: tuple[Topology, ...]) -> Layout:
        layout = self._layouts.get(topologies)
        if layout is None:
            layout = lay_out(topologies, ATTENDED).to(self.device)
            self._layouts[topologies] = layout
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        else:
            self._layouts.move_to_end(topologies)
        return layout

    def _hidden(self, layout: Layout, features: Tensor, attributes: Tensor) -> Tensor:
        if layout.order is not None:
            features = torch.cat([features[layout.order], features[-1:]])
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
        logits = hidden.new_full((len(attention.neighbours), heads), _ABSENT)
        edges = layer.edges.index_select(0, attention.relation)
        seen = torch.bmm(edges, attributes.index_select(0, attention.edge).unsqueeze(-1))
        # Autocast gives a product in bfloat16, and an assignment does not convert.
        logits[attention.place] = seen.squeeze(-1).to(logits.dtype)
        logits += table.index_select(0, attention.sources)
        logits += table.index_select(0, attention.targets)
        scores = functional.leaky_relu(logits, NEGATIVE_SLOPE)
        means = (_padded_means if attention.degree else _listed_means)(attention, scores, hidden)
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

    def _heads(self, layout: Layout, hidden: Tensor) -> tuple[Tensor, Tensor]:
        graphs, scored = layout.counts[0], sum(layout.counts[:3])
        values = functional.linear(hidden[:scored], *self._node_heads)
        first = functional.gelu(values[:graphs, self._columns["hidden"]])
        return values, torch.tanh(functional.linear(first, *self._hidden_heads))


def fold(network: TamiyoNetwork) -> FoldedNetwork:
    """Fold a network's present weights; later changes to it do not reach the folded form."""
    weights = fold_weights(network)
    folded = FoldedNetwork(weights)
    weights.release()
    return folded


def _padded_means(attention: Attention, scores: Tensor, hidden: Tensor) -> Tensor:
    """Every slot's neighbours weighted by the softmax of their scores: (slots, heads, width)."""
    shares = scores.view(attention.slots, attention.degree, -1).softmax(dim=1)
    neighbours = hidden.index_select(0, attention.neighbours)
    return torch.bmm(shares.transpose(1, 2), neighbours.view(attention.slots, attention.degree, -1))


def _listed_means(attention: Attention, scores: Tensor, hidden: Tensor) -> Tensor:
    """The same from a list of edges, for graphs that are too uneven to be padded."""
    slot = attention.slot
    top = scores.new_full((attention.slots, scores.shape[1]), _ABSENT)
    top = top.scatter_reduce(0, slot.unsqueeze(1).expand_as(scores), scores, "amax")
    shares = (scores - top.index_select(0, slot)).exp()
    total = shares.new_zeros(top.shape).index_add(0, slot, shares)
    shares = shares / total.index_select(0, slot)
    return torch.stack(
        [
            functional.embedding_bag(
                attention.neighbours,
                hidden,
                attention.offsets,
                mode="sum",
                per_sample_weights=share.contiguous(),
            )
            for share in shares.unbind(dim=1)
        ],
        dim=1,
    )


def _attention_layer(
    layer: AttentionWeights, device: torch.device, *, may_pack: bool
) -> _AttentionLayer:
    return _AttentionLayer(
        scores=layer.scores.to(device),
        edges=layer.edges.to(device),
        projections={
            kind: Projection(affine, device, may_pack=may_pack)
            for kind, affine in layer.projections.items()
        },
    )
