"""The folded network on a CUDA device: its stream, TF32, bfloat16, graphs, compiled if asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.policy.engines import Form
from tamiyo_svc.policy.folded import FoldedNetwork
from tamiyo_svc.policy.folding import Outputs, fold_weights
from tamiyo_svc.policy.layout import Bucket
from tamiyo_svc.policy.network import TamiyoNetwork
from tamiyo_svc.policy.padded import Choice, Forward, PaddedNetwork

Report = Callable[[Mapping[Bucket, Choice]], None]


class CudaNetwork:
    """Evaluates graphs on one device, on a stream of its own.

    Graphs that fit a bucket run padded, as a CUDA graph where that is faster on this device;
    `choices` says how each bucket is served.
    """

    def __init__(
        self,
        network: TamiyoNetwork,
        device: torch.device,
        clock: Callable[[], float],
        *,
        is_compiled: bool,
    ) -> None:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._padded = PaddedNetwork(
                FoldedNetwork(fold_weights(network), device, is_mixed=True),
                CudaGraphs(self._stream),
                clock,
                compile_forward=compiled if is_compiled else None,
            )
        self.choices = self._padded.choices

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph; waits for the device."""
        with torch.cuda.stream(self._stream):
            return self._padded.evaluate(graphs)


class CudaGraphs:
    """Records the work of one stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture what `run` starts; other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def wait(self) -> None:
        """Wait for all that was started on the stream."""
        self._stream.synchronize()


def compiled(forward: Forward, backend: str | Callable[..., Any] = "inductor") -> Forward:
    """The forward pass compiled once per bucket, each for its own fixed shapes.

    Weights are its data: later policies of the same sizes find it compiled.
    """
    compiled_forward: Forward = torch.compile(
        forward, backend=backend, dynamic=False, fullgraph=True
    )
    return compiled_forward


def cuda_forms(
    device: str,
    *,
    enable_compile: bool,
    clock: Callable[[], float],
    report: Report = lambda choices: None,
) -> list[Form]:
    """The forms on a CUDA device: compiled, unless that is off, then eager.

    `report` hears how the buckets of every network built are served.
    """
    target = torch.device(device)

    def build(network: TamiyoNetwork, *, is_compiled: bool) -> CudaNetwork:
        built = CudaNetwork(network, target, clock, is_compiled=is_compiled)
        report(built.choices)
        return built

    return [
        Form(device, is_compiled, partial(build, is_compiled=is_compiled))
        for is_compiled in ((True, False) if enable_compile else (False,))
    ]
