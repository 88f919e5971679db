"""The network `tamiyo_gnn_v1` as it is defined, trained and exported.

GraphSAGE: Hamilton et al., "Inductive Representation Learning on Large Graphs", 2017. GAT:
Veličković et al., "Graph Attention Networks", 2018. The form that serves is in `folded`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from tamiyo_svc.graph.schema import EDGE_WIDTH, NODE_WIDTHS, RELATIONS, Relation
from tamiyo_svc.taxonomy import PolicyAction

with warnings.catch_warnings():
    # torch-geometric scripts classes while it is imported, which torch 2.13 deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import GATConv, HeteroConv, SAGEConv

ARCHITECTURE: Final = "tamiyo_gnn_v1"
"""Version of the architecture; a checkpoint of another one does not load."""

_DROPOUT: Final = 0.2
# Risk score 0.04: an untrained network has seen no risk, and the rules decide.
_NO_RISK_LOGIT: Final = 4.0
# Any fixed number: two processes must start from the same untrained weights.
_INITIAL_SEED: Final = 20_240_229
# Contract name prefix -> this module's.
_NAMES: Final[Mapping[str, str]] = {
    "_node_encoders.": "encoders.",
    "_sage_layers.": "sage.",
    "_gat_layers.": "gat.",
    "_policy_head.": "heads.policy.",
    "_param_head.": "heads.adjustment.",
    "_blending_head.": "heads.blending.",
    "_schedule_head.": "heads.schedule.",
    "_risk_head.": "heads.risk.",
    "_value_head.": "heads.value.",
    "_breaker_head.": "heads.breaker.",
    "_seed_score_head.": "heads.seed_score.",
    "_blueprint_score_head.": "heads.blueprint_score.",
}


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Sizes of the network."""

    sage_hidden_dim: int = 256
    gat_hidden_dim: int = 128
    attention_heads: int = 4
    policy_classes: int = 32
    blending_classes: int = 3
    schedule_output_dim: int = 2
    edge_feature_dim: int = EDGE_WIDTH
    risk_classes: int = 5
    param_vector_dim: int = 4

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if self.edge_feature_dim != EDGE_WIDTH:
            raise ValueError(f"edges have {EDGE_WIDTH} attributes, got {self.edge_feature_dim}")
        if (
            self.policy_classes < len(PolicyAction)
            or self.risk_classes < 2
            or self.schedule_output_dim < 2
        ):
            raise ValueError("too few policy classes, risk classes or schedule outputs")


class _Untemplated:
    """Convolutions without generated code.

    torch-geometric writes a Python file into the temporary folder for each class of convolution in
    each process and never removes it; without one it takes the same steps by its own methods.
    """

    def _set_jittable_templates(self, raise_on_error: bool = False) -> None:
        pass


class _SageConv(_Untemplated, SAGEConv):  # type: ignore[misc]
    pass


class _GatConv(_Untemplated, GATConv):  # type: ignore[misc]
    pass


class TamiyoNetwork(nn.Module):
    """Two GraphSAGE and two GAT layers over the heterogeneous graph, with heads.

    Per relation one convolution, mean over the relations that reach a type, then GELU and, where
    the widths agree, the layer's input.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        sage, gat = config.sage_hidden_dim, config.gat_hidden_dim
        self.encoders = nn.ModuleDict(
            {
                kind: nn.Sequential(nn.Linear(width, sage), nn.GELU(), nn.LayerNorm(sage))
                for kind, width in NODE_WIDTHS.items()
            }
        )
        self.sage = nn.ModuleList(
            HeteroConv(
                {relation: _SageConv((sage, sage), sage) for relation in RELATIONS}, aggr="mean"
            )
            for _ in range(2)
        )
        self.gat = nn.ModuleList(
            HeteroConv(
                {
                    relation: _GatConv(
                        (width, width),
                        gat,
                        heads=config.attention_heads,
                        concat=False,
                        edge_dim=config.edge_feature_dim,
                        add_self_loops=False,
                        dropout=_DROPOUT,
                    )
                    for relation in RELATIONS
                },
                aggr="mean",
            )
            for width in (sage, gat)
        )
        hidden = max(1, gat // 2)
        self.heads = nn.ModuleDict(
            {
                "policy": nn.Linear(gat, config.policy_classes),
                "adjustment": _two_layers(gat, hidden, config.param_vector_dim),
                "blending": nn.Linear(gat, config.blending_classes),
                "schedule": _two_layers(gat, hidden, config.schedule_output_dim),
                "risk": nn.Linear(gat, config.risk_classes),
                "value": nn.Linear(gat, 1),
                "breaker": nn.Linear(gat, 2),
                "seed_score": nn.Linear(gat, 1),
                "blueprint_score": nn.Linear(gat, 1),
            }
        )
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(
        self,
        x_dict: Mapping[str, Tensor],
        edge_index_dict: Mapping[Relation, Tensor],
        edge_attr_dict: Mapping[Relation, Tensor],
    ) -> dict[str, Tensor]:
        """Outputs by head name.

        `x_dict` has float32 (nodes, width) for every type, the other two int64 (2, edges) and
        float32 (edges, 3) for every relation; nodes and edges may be none. Heads of the graph have
        one row per `global` node, `seed_scores` and `blueprint_scores` one value per node.
        """
        hidden = {kind: encoder(x_dict[kind]) for kind, encoder in self.encoders.items()}
        edges = dict(edge_index_dict)
        for layer in self.sage:
            hidden = self._joined(layer(hidden, edges), hidden)
        attributes = dict(edge_attr_dict)
        for layer in self.gat:
            hidden = self._joined(layer(hidden, edges, edge_attr_dict=attributes), hidden)

        graph, heads = hidden["global"], self.heads
        parameters = torch.tanh(heads["adjustment"](graph))
        return {
            "policy_logits": heads["policy"](graph),
            "policy_params": parameters,
            "param_delta": parameters[:, :1],
            "blending_logits": heads["blending"](graph),
            "schedule_params": torch.tanh(heads["schedule"](graph)),
            "risk_logits": heads["risk"](graph),
            "value": heads["value"](graph),
            "breaker_logits": heads["breaker"](graph),
            "graph_embedding": graph,
            "seed_scores": heads["seed_score"](hidden["seed"]).squeeze(-1),
            "blueprint_scores": heads["blueprint_score"](hidden["blueprint"]).squeeze(-1),
        }

    def release(self) -> None:
        """Free modules and weights one by one; together they would keep the interpreter for
        milliseconds. The network is of no use then.
        """
        modules = list(self.modules())
        for module in modules:
            for name, _ in [*module.named_parameters(recurse=False), *module.named_children()]:
                delattr(module, name)
        while modules:
            modules.pop()

    def _joined(
        self, output: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        joined = {}
        for kind, value in output.items():
            value = nn.functional.gelu(value)
            if value.shape == before[kind].shape:
                value = value + before[kind]
            joined[kind] = self.dropout(value)
        return joined


class KeptNetwork:
    """A network that serves in another form already and stays on disk until it is needed itself.

    `load` reads it and raises whatever is wrong with it.
    """

    def __init__(self, load: Callable[[], TamiyoNetwork]) -> None:
        self._load = load
        self.loaded: TamiyoNetwork | None = None

    def load(self) -> TamiyoNetwork:
        """The network, read the first time."""
        if self.loaded is None:
            self.loaded = self._load()
        return self.loaded

    def release(self) -> None:
        """Free it if it was loaded."""
        if self.loaded is not None:
            self.loaded.release()
            self.loaded = None


Network = TamiyoNetwork | KeptNetwork
"""What an engine is made of."""


def loaded(network: Network) -> TamiyoNetwork:
    """The network itself, read from disk if need be."""
    return network.load() if isinstance(network, KeptNetwork) else network


def to_contract_name(name: str) -> str:
    """The name a weight of this module has in checkpoints.

    Raises:
        KeyError: no weight is called that.
    """
    return _renamed(name, {ours: theirs for theirs, ours in _NAMES.items()})


def from_contract_name(name: str) -> str:
    """The name in this module of a checkpoint's weight.

    Raises:
        KeyError: the contract has no such name.
    """
    return _renamed(name, _NAMES)


def untrained(config: NetworkConfig | None = None) -> TamiyoNetwork:
    """A network that knows nothing and says so: pause, no adjustment, no risk seen."""
    return _with_constant_heads(config or NetworkConfig(), {PolicyAction.PAUSE: 4.0})


def bootstrap(config: NetworkConfig | None = None) -> TamiyoNetwork:
    """A network that proposes the seed action wherever one is possible, else a zero adjustment."""
    preference = {PolicyAction.SEED: 8.0, PolicyAction.OPTIMIZER: 4.0}
    return _with_constant_heads(config or NetworkConfig(), preference)


def _with_constant_heads(
    config: NetworkConfig, preference: Mapping[PolicyAction, float]
) -> TamiyoNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_INITIAL_SEED)
        network = TamiyoNetwork(config)
    with torch.no_grad():
        heads: dict[str, Any] = {
            name: head[-1] if isinstance(head, nn.Sequential) else head
            for name, head in network.heads.items()
        }
        for head in heads.values():
            head.weight.zero_()
            head.bias.zero_()
        for action, logit in preference.items():
            heads["policy"].bias[action] = logit
        heads["risk"].bias[0] = _NO_RISK_LOGIT
    return network.eval()


def _two_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for prefix, other in prefixes.items():
        if name.startswith(prefix):
            return other + name[len(prefix) :]
    raise KeyError(name)
