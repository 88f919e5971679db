"""The CUDA forms on a real device."""

from __future__ import annotations

import pytest
import torch
from support.networks import random_graph, random_network

from tamiyo_svc.policy.cuda import cuda_forms
from tamiyo_svc.policy.engines import EAGER_CPU, Engines
from tamiyo_svc.policy.folded import fold
from tamiyo_svc.policy.network import NetworkConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("enable_compile", [False, True])
def test_the_device_answers_as_the_cpu_does(enable_compile: bool) -> None:
    network = random_network(NetworkConfig(), 3)
    folded = fold(network)
    graphs = [random_graph((1, 4, 8, 5, 2, 3), 0.7, 1), random_graph((1, 0, 0, 1, 1, 1), 1.0, 2)]
    engines = Engines([*cuda_forms("cuda", enable_compile=enable_compile), EAGER_CPU])

    with torch.inference_mode():
        for batch in (graphs[:1], graphs[1:], graphs):
            outputs = engines.evaluate(network, batch)
            for mine, expected in zip(outputs, folded.evaluate(batch), strict=True):
                for head, values in expected.items():
                    assert mine[head] == pytest.approx(values, abs=0.05)

    assert engines.status.device == "cuda"
    assert engines.status.fallbacks == 0
