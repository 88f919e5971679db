"""Asking for a CUDA device where there is none: every packet is answered all the same."""

from __future__ import annotations

import pytest
import torch
from support.networks import random_graph, random_network

from tamiyo_svc.policy.cuda import cuda_forms
from tamiyo_svc.policy.engines import EAGER_CPU, Engines
from tamiyo_svc.policy.folded import fold
from tamiyo_svc.policy.network import NetworkConfig


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_both_cuda_forms_are_given_up_for_the_cpu() -> None:
    network = random_network(NetworkConfig(sage_hidden_dim=8, gat_hidden_dim=4), 1)
    graph = random_graph((1, 2, 1, 2, 1, 1), 1.0, 1)
    engines = Engines([*cuda_forms("cuda", enable_compile=True, clock=lambda: 0.0), EAGER_CPU])

    engines.warm_up(network, [[graph]], lambda: 0.0)

    assert (engines.status.device, engines.status.is_compiled) == ("cpu", False)
    assert engines.status.fallbacks == 2
    assert engines.status.reason
    with torch.inference_mode():
        assert engines.evaluate(network, [graph]) == fold(network).evaluate([graph])
