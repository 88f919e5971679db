"""The folded network compiled ahead of time: the whole forward pass is one call of `compiled.cpp`.

The weights are data of that call, so another policy needs no compiler. They lie in one block of
memory in the order in which they are read, each matrix cut into panels of adjacent columns, which
is as near to streaming them as it gets.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tamiyo_svc.graph.graph import PACKED_WIDTH, Floats, Graph, Topology
from tamiyo_svc.graph.schema import NODE_TYPES, RELATIONS
from tamiyo_svc.policy.folding import (
    ATTENDED,
    Affine,
    FoldedWeights,
    Outputs,
    read_outputs,
)
from tamiyo_svc.policy.layout import RELATIONS_INTO, Slots, lay_out_slots
from tamiyo_svc.policy.network import NetworkConfig
from tamiyo_svc.taxonomy import WeightDtype

SOURCE: Final = Path(__file__).with_name("compiled.cpp")
"""What is compiled."""

_MAX_PLANS: Final = 256
_ALIGNMENT: Final = 64
_LARGEST_FP16: Final = float(np.finfo(np.float16).max)
# What is copied at once: some 0.05 ms, after which a thread that stands back gets to do so.
_COPIED_BYTES: Final = 128 << 10

Arrays = dict[str, npt.NDArray[Any]]


# Names of the wide projections by layer and type; empty where a layer computes none.
_SAGE: Final = tuple(tuple(f"sage.{place}.{kind}" for kind in NODE_TYPES) for place in range(2))
_GAT: Final = tuple(
    tuple(f"gat.{place}.{kind}" if kind in kinds else "" for kind in NODE_TYPES)
    for place, kinds in enumerate(ATTENDED)
)


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("k", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("is_fp16", ctypes.c_int32),
    )


class _AttentionLayer(ctypes.Structure):
    _fields_ = (
        ("scores", _Matrix),
        ("edges", ctypes.c_void_p),
        ("projections", ctypes.c_void_p),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        ("types", ctypes.c_int32),
        ("relations", ctypes.c_int32),
        ("features", ctypes.c_int32),
        ("sage_width", ctypes.c_int32),
        ("gat_width", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("hidden_column", ctypes.c_int32),
        ("fan_in", ctypes.c_void_p),
        ("relation_of", ctypes.c_void_p),
        ("encoder", _Matrix),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("sage", ctypes.c_void_p),
        ("gat", ctypes.c_void_p),
        ("node_heads", _Matrix),
        ("hidden_heads", _Matrix),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("counts", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("edges", ctypes.c_void_p),
        ("nodes", ctypes.c_int32),
        ("graphs", ctypes.c_int32),
    )


class Library:
    """The compiled functions; calling them releases the interpreter lock.

    Raises:
        OSError: the file is no library for this machine.
        AttributeError: it is another library.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.path = path
        self.evaluate = library.tamiyo_evaluate
        self.evaluate.argtypes = [ctypes.c_void_p] * 6
        self.evaluate.restype = None
        self.touch = library.tamiyo_touch
        self.touch.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self.touch.restype = ctypes.c_uint32
        self.panel = int(library.tamiyo_panel())
        self.end = library.tamiyo_end
        self.end.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint64, ctypes.c_int32]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Folded weights in the order and the formats in which they are read.

    Of a matrix there are `panels` (panels, in, panel) and `bias` (out).
    """

    config: NetworkConfig
    columns: Mapping[str, slice]
    arrays: Arrays

    def release(self) -> None:
        """Free the arrays one by one; together they would keep the interpreter."""
        while self.arrays:
            self.arrays.popitem()


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch's plan with the arrays it points into, and the sizes of its results."""

    plan: _Plan
    slots: Slots
    address: int
    scored: int


class CompiledNetwork:
    """Evaluates graphs; within 1e-5 of the network it came from with float32 weights.

    With float16 weights the wide projections read half the bytes; sums stay in float32, so the
    error is that of rounding each weight to 11 bits. A matrix that float16 has not the range for
    stays in float32. Plans are kept per topology, which makes it unfit for two threads at once.
    """

    def __init__(
        self,
        library: Library,
        weights: FoldedWeights | PackedWeights,
        dtype: WeightDtype = WeightDtype.FP32,
    ) -> None:
        """Take folded weights in a format, or packed ones in theirs."""
        packed = (
            weights if isinstance(weights, PackedWeights) else pack(weights, library.panel, dtype)
        )
        config, arrays = packed.config, packed.arrays
        self.config = config
        self._library = library
        self._columns = packed.columns
        self._parameters = config.param_vector_dim
        self._deep_width = len(arrays["hidden_heads.bias"])
        self._kept: list[object] = []
        wide = [name for names in (*_SAGE, *_GAT) for name in names if name]
        self._block = _Block(sum(_aligned(arrays[f"{name}.panels"].nbytes) for name in wide))
        sage = self._array(
            _Matrix, [self._matrix(arrays, name, is_wide=True) for names in _SAGE for name in names]
        )
        gat = [
            _AttentionLayer(
                self._matrix(arrays, f"gat.{place}.scores"),
                self._keep(arrays[f"gat.{place}.edges"].copy()),
                self._array(
                    _Matrix,
                    [
                        self._matrix(arrays, name, is_wide=True) if name else _Matrix()
                        for name in names
                    ],
                ),
            )
            for place, names in enumerate(_GAT)
        ]
        relation_of = np.zeros((len(NODE_TYPES), len(RELATIONS)), np.int32)
        for place, kind in enumerate(NODE_TYPES):
            relation_of[place, : len(RELATIONS_INTO[kind])] = RELATIONS_INTO[kind]
        self._network = _Network(
            types=len(NODE_TYPES),
            relations=len(RELATIONS),
            features=PACKED_WIDTH,
            sage_width=config.sage_hidden_dim,
            gat_width=config.gat_hidden_dim,
            heads=config.attention_heads,
            hidden_column=packed.columns["hidden"].start,
            fan_in=self._integers([len(RELATIONS_INTO[kind]) for kind in NODE_TYPES]),
            relation_of=self._integers(relation_of),
            encoder=self._matrix(arrays, "encoder"),
            scale=self._keep(arrays["scale"].copy()),
            shift=self._keep(arrays["shift"].copy()),
            sage=sage,
            gat=self._array(_AttentionLayer, gat),
            node_heads=self._matrix(arrays, "node_heads"),
            hidden_heads=self._matrix(arrays, "hidden_heads"),
        )
        self._address = ctypes.addressof(self._network)
        self._head_width = len(arrays["node_heads.bias"])
        self._plans: OrderedDict[tuple[Topology, ...], _Planned] = OrderedDict()

    @property
    def weight_bytes(self) -> int:
        """Size of what every evaluation streams."""
        return self._block.size

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph, each as if it were alone."""
        planned = self._plan(tuple(graph.topology for graph in graphs))
        if len(graphs) == 1:
            features, attributes = graphs[0].features, graphs[0].attributes
        else:
            features = np.concatenate([graph.features for graph in graphs])
            attributes = np.concatenate([graph.attributes for graph in graphs])
        values = np.empty((planned.scored, self._head_width), np.float32)
        deep = np.empty((len(graphs), self._deep_width), np.float32)
        self._library.evaluate(
            self._address,
            planned.address,
            _address(features),
            _address(attributes),
            _address(values),
            _address(deep),
        )
        return read_outputs(values.tolist(), deep.tolist(), graphs, self._columns, self._parameters)

    def touch(self, part: int, parts: int) -> None:
        """Read one of `parts` equal parts of the weights into the processor's caches."""
        size = self._block.size // parts
        self._library.touch(self._block.address + part * size, size)

    def _plan(self, topologies: tuple[Topology, ...]) -> _Planned:
        planned = self._plans.get(topologies)
        if planned is not None:
            self._plans.move_to_end(topologies)
            return planned
        slots = lay_out_slots(topologies)
        plan = _Plan(
            *(
                _address(array)
                for array in (slots.counts, slots.order, slots.starts, slots.sources, slots.edges)
            ),
            nodes=len(slots.order),
            graphs=len(topologies),
        )
        planned = _Planned(plan, slots, ctypes.addressof(plan), int(slots.counts[:3].sum()))
        self._plans[topologies] = planned
        if len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)
        return planned

    def _matrix(self, arrays: Arrays, name: str, *, is_wide: bool = False) -> _Matrix:
        """A matrix; a wide one goes into the block."""
        panels, bias = arrays[f"{name}.panels"], arrays[f"{name}.bias"]
        address = self._block.append(panels) if is_wide else self._keep(panels.copy())
        padded = np.zeros(panels.shape[0] * panels.shape[2], np.float32)
        padded[: len(bias)] = bias
        is_fp16 = panels.dtype == np.float16
        return _Matrix(address, self._keep(padded), panels.shape[1], len(bias), is_fp16)

    def _integers(self, values: npt.ArrayLike) -> int:
        return self._keep(np.ascontiguousarray(values, np.int32))

    def _keep(self, array: npt.NDArray[Any]) -> int:
        self._kept.append(array)
        return _address(array)

    def _array(self, kind: Any, members: Sequence[ctypes.Structure]) -> int:
        array = (kind * len(members))(*members)
        self._kept.append(array)
        return ctypes.addressof(array)


class _Block:
    """Page-aligned memory that is filled once; huge pages where the system has them."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Shared memory, the default, rarely has huge pages, and takes milliseconds to free.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(1, size), flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self.address = _address(self._bytes)
        self._filled = 0

    def append(self, array: npt.NDArray[Any]) -> int:
        """Copy an array behind what is there and return its address."""
        start, self._filled = self._filled, self._filled + _aligned(array.nbytes)
        source = array.reshape(-1).view(np.uint8)
        for place in range(0, array.nbytes, _COPIED_BYTES):
            self._copy(source[place : place + _COPIED_BYTES], start + place)
        return self.address + start

    def _copy(self, source: npt.NDArray[np.uint8], start: int) -> None:
        self._bytes[start : start + len(source)] = source


def pack(weights: FoldedWeights, panel: int, dtype: WeightDtype) -> PackedWeights:
    """Pack folded weights for a library's width of panels; nothing is shared with them.

    The wide projections are stored as `dtype`, unless they hold what float16 would turn into
    infinity.
    """
    arrays: Arrays = {}

    def add(name: str, affine: Affine, dtype: WeightDtype = WeightDtype.FP32) -> None:
        stored = _format(affine.weight, dtype)
        arrays[f"{name}.panels"] = _panels(affine.weight, panel).astype(stored, copy=False)
        arrays[f"{name}.bias"] = affine.bias.numpy().copy()

    for names, sage in zip(_SAGE, weights.sage, strict=True):
        for name, kind in zip(names, NODE_TYPES, strict=True):
            add(name, sage[kind], dtype)
    for place, (names, gat) in enumerate(zip(_GAT, weights.gat, strict=True)):
        for name, kind in zip(names, NODE_TYPES, strict=True):
            if name:
                add(name, gat.projections[kind], dtype)
        scores = gat.scores.T
        add(f"gat.{place}.scores", Affine(scores, torch.zeros(len(scores))))
        arrays[f"gat.{place}.edges"] = gat.edges.contiguous().numpy().copy()
    encoder = weights.encoder.T
    add("encoder", Affine(encoder, torch.zeros(len(encoder))))
    add("node_heads", weights.node_heads)
    add("hidden_heads", weights.hidden_heads)
    arrays["scale"] = weights.scale.numpy().copy()
    arrays["shift"] = weights.shift.numpy().copy()
    return PackedWeights(weights.config, weights.columns, arrays)


def _panels(weight: Tensor, panel: int) -> Floats:
    """(panels, in, panel) from (out, in), the last panel filled with zeros."""
    outputs, inputs = weight.shape
    count = -(-outputs // panel)
    padded = np.zeros((count * panel, inputs), np.float32)
    padded[:outputs] = weight.numpy()
    return np.ascontiguousarray(padded.reshape(count, panel, inputs).transpose(0, 2, 1))


def _format(weight: Tensor, dtype: WeightDtype) -> np.dtype[Any]:
    """How a matrix is stored: as asked, unless it holds what float16 would turn into infinity."""
    fits = float(weight.abs().amax()) <= _LARGEST_FP16
    return np.dtype(np.float16 if dtype is WeightDtype.FP16 and fits else np.float32)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
