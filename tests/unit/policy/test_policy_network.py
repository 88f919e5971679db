from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tamiyo_svc.graph.coverage import EMPTY_COVERAGE
from tamiyo_svc.graph.graph import Graph, pack
from tamiyo_svc.graph.schema import NODE_TYPES, NODE_WIDTHS, RELATIONS
from tamiyo_svc.policy.folded import fold
from tamiyo_svc.policy.network import (
    NetworkConfig,
    TamiyoNetwork,
    bootstrap,
    from_contract_name,
    to_contract_name,
    untrained,
)

_FILE = Path(__file__).parents[2] / "data" / "gnn_small.safetensors"
_GRAPHS = ("dense", "sparse", "empty_relations", "one_of_each")
_SMALL = NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4, attention_heads=2)


def _contract() -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(_FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


_TENSORS, _METADATA = _contract()


@pytest.fixture(scope="module")
def network() -> TamiyoNetwork:
    network = TamiyoNetwork(NetworkConfig(**json.loads(_METADATA["config"])))
    network.load_state_dict(
        {
            from_contract_name(name.removeprefix("weights/")): weight
            for name, weight in _TENSORS.items()
            if name.startswith("weights/")
        }
    )
    return network.eval()


def _graph(name: str) -> Graph:
    topology, features, attributes = pack(
        {kind: _TENSORS[f"{name}/x/{kind}"].numpy() for kind in NODE_TYPES},
        {r: _TENSORS[f"{name}/edge_index/{'__'.join(r)}"].numpy() for r in RELATIONS},
        {r: _TENSORS[f"{name}/edge_attr/{'__'.join(r)}"].numpy() for r in RELATIONS},
    )
    return Graph(
        topology, features, attributes, EMPTY_COVERAGE, (), (), (), (), truncated={}, skipped=0
    )


def _expected(name: str) -> dict[str, Tensor]:
    prefix = f"{name}/out/"
    return {key.removeprefix(prefix): _TENSORS[key] for key in _TENSORS if key.startswith(prefix)}


def test_the_schema_is_that_of_the_contract() -> None:
    assert [tuple(relation) for relation in json.loads(_METADATA["relations"])] == list(RELATIONS)
    assert json.loads(_METADATA["node_dims"]) == dict(NODE_WIDTHS)


@pytest.mark.parametrize("name", _GRAPHS)
def test_the_reference_gives_every_output_of_the_contract(
    network: TamiyoNetwork, name: str
) -> None:
    graph = _graph(name)

    with torch.no_grad():
        outputs = network(graph.x, graph.edge_index, graph.edge_attr)

    expected = _expected(name)
    assert outputs.keys() == expected.keys()
    for head, value in expected.items():
        torch.testing.assert_close(outputs[head], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", _GRAPHS)
def test_the_folded_form_gives_the_outputs_of_the_contract(
    network: TamiyoNetwork, name: str
) -> None:
    with torch.inference_mode():
        (outputs,) = fold(network).evaluate([_graph(name)])

    expected = _expected(name)
    assert outputs.keys() == expected.keys() - {"param_delta", "graph_embedding"}
    for head, values in outputs.items():
        assert values == pytest.approx(expected[head].flatten().tolist(), abs=1e-5)


def test_graphs_in_a_batch_do_not_touch_each_other(network: TamiyoNetwork) -> None:
    folded = fold(network)
    graphs = [_graph(name) for name in (*_GRAPHS, "dense")]

    with torch.inference_mode():
        together = folded.evaluate(graphs)
        alone = [folded.evaluate([graph])[0] for graph in graphs]

    for joint, single in zip(together, alone, strict=True):
        for head, values in single.items():
            assert joint[head] == pytest.approx(values, abs=1e-5)


def test_weight_names_map_both_ways(network: TamiyoNetwork) -> None:
    names = list(network.state_dict())

    assert [from_contract_name(to_contract_name(name)) for name in names] == names
    with pytest.raises(KeyError):
        from_contract_name("_unknown_head.weight")


def test_nodes_of_one_type_may_be_given_in_any_order(network: TamiyoNetwork) -> None:
    graph = _graph("sparse")
    order = torch.randperm(len(graph.x["seed"]), generator=torch.Generator().manual_seed(1))
    place = torch.argsort(order)
    x = {**graph.x, "seed": graph.x["seed"][order]}
    edges = {
        (source, name, target): torch.stack(
            [
                place[index[0]] if source == "seed" else index[0],
                place[index[1]] if target == "seed" else index[1],
            ]
        )
        for (source, name, target), index in graph.edge_index.items()
    }

    with torch.no_grad():
        outputs = network(x, edges, graph.edge_attr)

    torch.testing.assert_close(outputs["seed_scores"], _expected("sparse")["seed_scores"][order])
    torch.testing.assert_close(outputs["policy_logits"], _expected("sparse")["policy_logits"])


@pytest.mark.parametrize("build", [untrained, bootstrap])
def test_built_in_networks_are_the_same_every_time(build: type[TamiyoNetwork]) -> None:
    first, second = build(_SMALL), build(_SMALL)

    torch.random.manual_seed(5)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])


def test_building_a_network_leaves_the_global_generator_alone() -> None:
    torch.random.manual_seed(3)
    expected = torch.rand(1)
    torch.random.manual_seed(3)

    untrained(_SMALL)

    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("build", [untrained, bootstrap])
def test_built_in_networks_adjust_nothing_whatever_they_see(build: type[TamiyoNetwork]) -> None:
    graph = _graph("dense")

    with torch.no_grad():
        outputs = build(_SMALL)(graph.x, graph.edge_index, graph.edge_attr)

    for head in ("policy_params", "schedule_params", "value", "blending_logits", "seed_scores"):
        assert not outputs[head].any()


@pytest.mark.parametrize(
    "sizes",
    [
        {"sage_hidden_dim": 0},
        {"gat_hidden_dim": 2.5},
        {"policy_classes": 4},
        {"risk_classes": 1},
        {"edge_feature_dim": 4},
        {"schedule_output_dim": 1},
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        NetworkConfig(**sizes)


def test_a_network_that_is_released_has_let_go_of_its_weights() -> None:
    network = TamiyoNetwork(_SMALL)
    weights = [weakref.ref(weight) for weight in network.parameters()]

    network.release()

    assert [weight() for weight in weights] == [None] * len(weights)
