"""The CUDA forms on a real device."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch
from support.networks import random_graph, random_network

from tamiyo_svc.policy.cuda import CudaGraphs, cuda_forms
from tamiyo_svc.policy.engines import EAGER_CPU, Engines
from tamiyo_svc.policy.folded import fold
from tamiyo_svc.policy.layout import Bucket
from tamiyo_svc.policy.network import NetworkConfig
from tamiyo_svc.policy.padded import Choice

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("enable_compile", [False, True])
def test_the_device_answers_as_the_cpu_does(enable_compile: bool) -> None:
    network = random_network(NetworkConfig(), 3)
    folded = fold(network)
    graphs = [
        random_graph((1, 4, 3, 5, 2, 3), 0.5, 1),
        random_graph((1, 0, 0, 1, 1, 1), 1.0, 2),
        random_graph((1, 40, 20, 80, 4, 4), 0.1, 3),
    ]
    chosen: list[Mapping[Bucket, Choice]] = []
    forms = cuda_forms(
        "cuda", enable_compile=enable_compile, clock=time.perf_counter, report=chosen.append
    )
    engines = Engines([*forms, EAGER_CPU])

    with torch.inference_mode():
        for batch in (graphs[:1], graphs[1:2], graphs[2:], graphs[:2], graphs):
            outputs = engines.evaluate(network, batch)
            for mine, expected in zip(outputs, folded.evaluate(batch), strict=True):
                for head, values in expected.items():
                    assert mine[head] == pytest.approx(values, abs=0.05)

    assert engines.status.device == "cuda"
    assert engines.status.fallbacks == 0
    assert [choice.reason for choice in chosen[0].values()] == [""] * len(chosen[0])


def test_a_recording_repeats_the_work_on_what_the_tensors_hold_by_then() -> None:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    recorder = CudaGraphs(stream)
    with torch.cuda.stream(stream):
        given, result = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")

        def run() -> None:
            result.copy_(given * 2.0)

        run()
        replay = recorder.record(run)
        given.fill_(3.0)
        replay()
        recorder.wait()

    assert result.tolist() == [6.0] * 4
