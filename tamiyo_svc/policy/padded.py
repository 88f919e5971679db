"""The folded network over buckets of fixed size, whose work a device can record and replay.

Every batch that fits a bucket is padded to it: the same shapes at the same addresses, so that one
compiled kernel list serves all of them and starting it costs one launch instead of a hundred.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from tamiyo_svc.errors import in_brief
from tamiyo_svc.graph.graph import PACKED_WIDTH, Graph, Topology
from tamiyo_svc.graph.schema import EDGE_WIDTH, NODE_TYPES, RELATIONS
from tamiyo_svc.policy.folded import FoldedNetwork
from tamiyo_svc.policy.folding import ATTENDED, Outputs
from tamiyo_svc.policy.layout import Bucket, Layout, lay_out

BUCKETS: Final = (
    Bucket(counts=(1, 8, 4, 16, 8, 8), edges=512, degree=8),
    Bucket(counts=(1, 32, 16, 64, 32, 32), edges=4096, degree=32),
    Bucket(counts=(16, 64, 32, 128, 64, 64), edges=4096, degree=16),
)
"""A usual packet, one with many seeds and candidates, and a batch; the first that fits is taken."""

_EMPTY: Final = Topology((0,) * len(NODE_TYPES), np.zeros((2, 0), np.int64), (0,) * len(RELATIONS))
_HOST: Final = torch.device("cpu")
_MAX_PLACED: Final = 256
_TIMED_RUNS: Final = 20

Forward = Callable[[Layout, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Layout, features and edge attributes to the head tables, as `FoldedNetwork.forward`."""


class Recorder(Protocol):
    """What a device offers to repeat a piece of work without launching it part by part."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What repeats all that `run` does to fixed tensors, without running its Python again.

        May fail in any way; `run` can then still be called.
        """

    def wait(self) -> None:
        """Wait for all that was started."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a bucket is served, and the medians that decided it, in milliseconds.

    There are none where recording failed, for `reason`.
    """

    is_recorded: bool
    direct_ms: float | None
    recorded_ms: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """A batch's layout in a bucket, packed on the device."""

    stage: _Stage
    indices: Tensor
    shares: Tensor
    scored: Tensor
    """Rows of the first head table that belong to nodes, on the host."""


class PaddedNetwork:
    """Evaluates graphs in buckets, and those that fit none through the folded network.

    Every bucket runs directly and recorded when it is built, and is served in the faster way;
    `compile_forward` may replace the forward pass that both run. Layouts are kept per topology,
    which makes it unfit for two threads at once. Outputs are those of `folded` but for rounding.
    """

    def __init__(
        self,
        folded: FoldedNetwork,
        recorder: Recorder,
        clock: Callable[[], float],
        buckets: Sequence[Bucket] = BUCKETS,
        compile_forward: Callable[[Forward], Forward] | None = None,
    ) -> None:
        self._folded = folded
        self._recorder = recorder
        forward = compile_forward(folded.forward) if compile_forward else folded.forward
        with torch.inference_mode():
            self._stages = [_Stage(folded, bucket, forward) for bucket in buckets]
            self.choices = {stage.bucket: stage.settle(recorder, clock) for stage in self._stages}
        self._placed: OrderedDict[tuple[Topology, ...], _Placed | None] = OrderedDict()

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph, each as if it were alone. Call in inference mode."""
        placed = self._place(tuple(graph.topology for graph in graphs))
        if placed is None:
            return self._folded.evaluate(graphs)
        placed.stage.load(placed, graphs)
        placed.stage.run()
        values, deep = placed.stage.results(self._recorder)
        return self._folded.read(values[placed.scored], deep[: len(graphs)], graphs)

    def _place(self, topologies: tuple[Topology, ...]) -> _Placed | None:
        if topologies in self._placed:
            self._placed.move_to_end(topologies)
            return self._placed[topologies]
        fitting = (stage for stage in self._stages if stage.bucket.holds(topologies))
        stage = next(fitting, None)
        placed = None if stage is None else stage.place(topologies)
        self._placed[topologies] = placed
        if len(self._placed) > _MAX_PLACED:
            self._placed.popitem(last=False)
        return placed


class _Stage:
    """One bucket's tensors, at addresses that never change, and what runs on them."""

    def __init__(self, folded: FoldedNetwork, bucket: Bucket, forward: Forward) -> None:
        self.bucket = bucket
        self._device = device = folded.device
        empty = lay_out([_EMPTY], ATTENDED, bucket)
        indices, shares = _packed(empty)
        self._indices, self._shares = indices.to(device), shares.to(device)
        layout = _unpacked(empty, self._indices, self._shares)
        rows = [(bucket.nodes + 1, PACKED_WIDTH), (bucket.edges + 1, EDGE_WIDTH)]
        self._inputs, (features, attributes) = _joined(rows, device)
        self._host_inputs, host_inputs = _joined(rows, _HOST, pinned_for=device)
        self._host_features, self._host_attributes = (part.numpy() for part in host_inputs)
        shapes = [table.shape for table in forward(layout, features, attributes)]
        self._outputs, tables = _joined(shapes, device)
        self._host_outputs, self._host_tables = _joined(shapes, _HOST, pinned_for=device)

        def run() -> None:
            for table, result in zip(tables, forward(layout, features, attributes), strict=True):
                table.copy_(result)

        self.run: Callable[[], None] = run

    def settle(self, recorder: Recorder, clock: Callable[[], float]) -> Choice:
        """Record the work, and keep to that if it is faster."""
        direct = self.run
        direct()
        recorder.wait()
        try:
            recorded = recorder.record(direct)
            recorded()
            recorder.wait()
        except Exception as error:
            return Choice(
                is_recorded=False, direct_ms=None, recorded_ms=None, reason=in_brief(error)
            )
        times_ms: tuple[list[float], list[float]] = ([], [])
        for _ in range(_TIMED_RUNS):
            for run, taken_ms in zip((direct, recorded), times_ms, strict=True):
                started = clock()
                run()
                recorder.wait()
                taken_ms.append((clock() - started) * 1e3)
        direct_ms, recorded_ms = map(median, times_ms)
        if recorded_ms < direct_ms:
            self.run = recorded
        return Choice(self.run is recorded, direct_ms, recorded_ms)

    def place(self, topologies: Sequence[Topology]) -> _Placed:
        """Lay out a batch that fits."""
        indices, shares = _packed(lay_out(topologies, ATTENDED, self.bucket))
        present = np.sum([topology.counts[:3] for topology in topologies], axis=0)
        starts = np.cumsum([0, *self.bucket.counts[:2]])
        scored = np.concatenate(
            [start + np.arange(count) for start, count in zip(starts, present, strict=True)]
        )
        return _Placed(
            self,
            indices.to(self._device),
            shares.to(self._device),
            torch.from_numpy(scored),
        )

    def load(self, placed: _Placed, graphs: Sequence[Graph]) -> None:
        """Write a batch into the tensors; what is left of an earlier one is not read."""
        self._indices.copy_(placed.indices)
        self._shares.copy_(placed.shares)
        nodes = edges = 0
        for graph in graphs:
            self._host_features[nodes : nodes + len(graph.features)] = graph.features
            self._host_attributes[edges : edges + len(graph.attributes)] = graph.attributes
            nodes, edges = nodes + len(graph.features), edges + len(graph.attributes)
        self._inputs.copy_(self._host_inputs, non_blocking=True)

    def results(self, recorder: Recorder) -> list[Tensor]:
        """The head tables on the host, good until the next run."""
        self._host_outputs.copy_(self._outputs, non_blocking=True)
        recorder.wait()
        return self._host_tables


def _joined(
    shapes: Sequence[Sequence[int]], device: torch.device, pinned_for: torch.device = _HOST
) -> tuple[Tensor, list[Tensor]]:
    """Zeros that one copy moves, and the parts of them that have these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    whole = torch.zeros(sum(sizes), device=device, pin_memory=pinned_for.type != "cpu")
    starts = [0, *accumulate(sizes)]
    return whole, [
        whole[start : start + size].view(*shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


def _packed(layout: Layout) -> tuple[Tensor, Tensor]:
    """A layout's indices one after another, and its shares."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    layout.mapped(note)
    return (
        torch.cat([tensor for tensor in found if not tensor.is_floating_point()]),
        torch.cat([tensor for tensor in found if tensor.is_floating_point()]),
    )


def _unpacked(layout: Layout, indices: Tensor, shares: Tensor) -> Layout:
    """The layout whose tensors are parts of the packed ones."""
    starts = {True: 0, False: 0}

    def part(tensor: Tensor) -> Tensor:
        is_share = tensor.is_floating_point()
        start = starts[is_share]
        starts[is_share] = stop = start + len(tensor)
        return (shares if is_share else indices)[start:stop]

    return layout.mapped(part)
