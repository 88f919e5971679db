"""The folded network on a CUDA device: its own stream, TF32, bfloat16, compiled if asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.policy.engines import Form
from tamiyo_svc.policy.folded import FoldedNetwork
from tamiyo_svc.policy.folding import Outputs, fold_weights
from tamiyo_svc.policy.network import TamiyoNetwork


class CudaNetwork:
    """Evaluates graphs on one device, on a stream of its own."""

    def __init__(self, network: TamiyoNetwork, device: torch.device, *, is_compiled: bool) -> None:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._folded = FoldedNetwork(
                fold_weights(network),
                device,
                is_mixed=True,
                compile_forward=torch.compile if is_compiled else None,
            )

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph; waits for the device."""
        with torch.cuda.stream(self._stream):
            return self._folded.evaluate(graphs)


def cuda_forms(device: str, *, enable_compile: bool) -> list[Form]:
    """The forms on a CUDA device: compiled, unless that is off, then eager."""
    target = torch.device(device)

    def form(*, is_compiled: bool) -> Form:
        return Form(
            device,
            is_compiled,
            lambda network: CudaNetwork(network, target, is_compiled=is_compiled),
        )

    eager = form(is_compiled=False)
    return [form(is_compiled=True), eager] if enable_compile else [eager]
