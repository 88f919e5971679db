"""What a blueprint's graph metadata says, read from JSON that may say anything.

Nothing in it raises: what is out of range, not a number or of the wrong form is left out and
counted, unknown fields are ignored, and what exceeds a limit is cut from the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tamiyo_svc.catalog import Blueprint

# More entries than every pair of layers at the default limits adds nothing a graph could hold.
_MAX_ENTRIES: Final = 4096


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """How many nodes of each type a graph has at most."""

    layers: int = 64
    activations: int = 32
    parameters: int = 32
    seeds: int = 256
    blueprints: int = 32


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer; None is a value that is absent or unusable."""

    type: str | None
    activation: str | None
    depth: float | None
    latency_ms: float | None
    parameters: float | None
    dropout: float | None
    weight_norm: float | None
    gradient_norm: float | None


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation; None is a value that is absent or unusable."""

    type: str | None
    saturation: float | None
    gradient_flow: float | None
    cost: float | None
    nonlinearity: float | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tunable parameter; None is a value that is absent or unusable."""

    name: str
    min: float | None
    max: float | None
    span: float | None
    default: float | None


@dataclass(frozen=True, slots=True)
class Description:
    """A blueprint's metadata after reading; every index counts in the tuples here."""

    layers: tuple[Layer, ...] = ()
    activations: tuple[Activation, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    adjacency: tuple[tuple[int, int, float | None], ...] = ()
    """(source layer, target layer, strength)."""
    monitors_by_index: Mapping[int, tuple[tuple[int, float | None], ...]] = field(
        default_factory=dict
    )
    """Seed index -> (layer, weight)."""
    monitors_by_id: Mapping[str, tuple[tuple[int, float | None], ...]] = field(default_factory=dict)
    monitors_of_all: tuple[tuple[int, float | None], ...] = ()
    risk_max: float | None = None
    stage_min: float | None = None
    allowed_by_index: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Seed index -> parameters it may use."""
    allowed_by_id: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    may_blend: bool = False
    skipped: int = 0
    truncated: Mapping[str, int] = field(default_factory=dict)


def read_description(blueprint: Blueprint, limits: GraphLimits) -> Description:
    """Read a blueprint's graph metadata, or what its guard spec implies when there is none."""
    if blueprint.graph_metadata is not None:
        return _Reader(limits).read(blueprint.graph_metadata)
    if blueprint.guard_spec is not None:
        return _Reader(limits).read_guard_spec(blueprint.guard_spec)
    return Description()


class _Reader:
    def __init__(self, limits: GraphLimits) -> None:
        self._limits = limits
        self._skipped = 0
        self._truncated: dict[str, int] = {}

    def read(self, metadata: Any) -> Description:
        metadata = self._mapping(metadata)
        layers, layer_at = self._entries(metadata, "layers", self._limits.layers)
        activations, _ = self._entries(metadata, "activations", self._limits.activations)
        parameters, parameter_at = self._entries(metadata, "parameters", self._limits.parameters)
        read_parameters = tuple(self._parameter(entry) for entry in parameters)
        named = {entry.name: index for index, entry in enumerate(read_parameters) if entry.name}
        capabilities = self._mapping(metadata.get("capabilities"))
        monitors = self._mapping(metadata.get("monitors"))
        thresholds = self._mapping(monitors.get("thresholds"))
        of_all, by_index = self._monitored_layers(metadata, layer_at)
        for seed, entries in self._by_seed(monitors, "by_seed_index").items():
            if (index := self._index_key(seed)) is not None:
                found = tuple(self._monitored(entries, layer_at))
                by_index[index] = (*by_index.get(index, ()), *found)
        return Description(
            layers=tuple(self._layer(entry) for entry in layers),
            activations=tuple(self._activation(entry) for entry in activations),
            parameters=read_parameters,
            adjacency=self._adjacency(metadata, layer_at),
            monitors_by_index=by_index,
            monitors_by_id={
                seed: tuple(self._monitored(entries, layer_at))
                for seed, entries in self._by_seed(monitors, "by_seed_id").items()
            },
            monitors_of_all=of_all,
            risk_max=self._number(thresholds, "risk_max"),
            stage_min=self._number(thresholds, "stage_min"),
            allowed_by_index={
                index: self._allowed(entries, named, parameter_at)
                for seed, entries in self._by_seed(
                    capabilities, "allowed_parameters_by_seed_index"
                ).items()
                if (index := self._index_key(seed)) is not None
            },
            allowed_by_id={
                seed: self._allowed(entries, named, parameter_at)
                for seed, entries in self._by_seed(
                    capabilities, "allowed_parameters_by_seed_id"
                ).items()
            },
            may_blend=any(
                isinstance(method, str) and method
                for method in self._list(capabilities, "allowed_blending_methods")
            ),
            skipped=self._skipped,
            truncated=self._truncated,
        )

    def read_guard_spec(self, guard_spec: Any) -> Description:
        entries, _ = self._entries({"layers": guard_spec}, "layers", self._limits.layers)
        layers = []
        for depth, entry in enumerate(entries):
            sizes = [self._as_number(size) for size in self._list(entry, "shape")]
            elements = math.prod(size for size in sizes if size is not None)
            layers.append(
                Layer(
                    type=self._text(entry, "dtype"),
                    activation=None,
                    depth=float(depth),
                    latency_ms=None,
                    parameters=elements if sizes and 0 <= elements < math.inf else None,
                    dropout=None,
                    weight_norm=None,
                    gradient_norm=None,
                )
            )
        kept = layers[: self._limits.activations]
        if len(kept) < len(layers):
            self._truncated["activation"] = len(layers) - len(kept)
        return Description(
            layers=tuple(layers),
            activations=tuple(Activation("identity", None, None, None, None) for _ in kept),
            skipped=self._skipped,
            truncated=self._truncated,
        )

    def _layer(self, entry: Mapping[Any, Any]) -> Layer:
        return Layer(
            type=self._text(entry, "type"),
            activation=self._text(
                entry, "activation" if "activation" in entry else "activation_type"
            ),
            depth=self._number(entry, "depth", low=0.0),
            latency_ms=self._number(entry, "latency_ms", low=0.0),
            parameters=self._number(entry, "parameter_count", low=0.0),
            dropout=self._number(entry, "dropout_rate", low=0.0, high=1.0),
            weight_norm=self._number(entry, "weight_norm", low=0.0),
            gradient_norm=self._number(entry, "gradient_norm", low=0.0),
        )

    def _activation(self, entry: Mapping[Any, Any]) -> Activation:
        return Activation(
            type=self._text(entry, "type"),
            saturation=self._number(entry, "saturation_rate", low=0.0, high=1.0),
            gradient_flow=self._number(entry, "gradient_flow"),
            cost=self._number(entry, "computational_cost", low=0.0),
            nonlinearity=self._number(entry, "nonlinearity_strength"),
        )

    def _parameter(self, entry: Mapping[Any, Any]) -> Parameter:
        return Parameter(
            name=self._text(entry, "name") or "",
            min=self._number(entry, "min"),
            max=self._number(entry, "max"),
            span=self._number(entry, "span", low=0.0),
            default=self._number(entry, "default"),
        )

    def _adjacency(
        self, metadata: Mapping[Any, Any], layer_at: Mapping[int, int]
    ) -> tuple[tuple[int, int, float | None], ...]:
        edges = []
        for entry in self._list(self._mapping(metadata.get("adjacency")), "layer"):
            if (
                not isinstance(entry, Sequence)
                or isinstance(entry, str)
                or len(entry) not in (2, 3)
            ):
                self._skipped += 1
                continue
            source, target = (self._position(end, layer_at) for end in entry[:2])
            if source is not None and target is not None:
                edges.append(
                    (source, target, self._as_number(entry[2]) if len(entry) > 2 else None)
                )
        return tuple(edges)

    def _monitored_layers(
        self, metadata: Mapping[Any, Any], layer_at: Mapping[int, int]
    ) -> tuple[
        tuple[tuple[int, float | None], ...], dict[int, tuple[tuple[int, float | None], ...]]
    ]:
        """Entries are a layer (for every seed), or [seed index, layer] with or without a weight."""
        of_all: list[tuple[int, float | None]] = []
        by_index: dict[int, tuple[tuple[int, float | None], ...]] = {}
        for entry in self._list(metadata, "monitored_layers"):
            if not isinstance(entry, Sequence) or isinstance(entry, str):
                layer = self._position(entry, layer_at)
                if layer is not None:
                    of_all.append((layer, None))
            elif len(entry) not in (2, 3):
                self._skipped += 1
            else:
                seed = self._index_key(entry[0])
                found = tuple(self._monitored([entry[1:]], layer_at))
                if seed is not None and found:
                    by_index[seed] = (*by_index.get(seed, ()), *found)
        return tuple(of_all), by_index

    def _monitored(
        self, entries: Sequence[Any], layer_at: Mapping[int, int]
    ) -> list[tuple[int, float | None]]:
        found: list[tuple[int, float | None]] = []
        for entry in entries:
            weight = None
            if isinstance(entry, Sequence) and not isinstance(entry, str):
                if len(entry) not in (1, 2):
                    self._skipped += 1
                    continue
                weight = self._as_number(entry[1]) if len(entry) > 1 else None
                entry = entry[0]
            layer = self._position(entry, layer_at)
            if layer is not None:
                found.append((layer, weight))
        return found

    def _allowed(
        self, entries: Sequence[Any], named: Mapping[str, int], parameter_at: Mapping[int, int]
    ) -> tuple[int, ...]:
        found = set()
        for entry in entries:
            if isinstance(entry, str):
                position = named.get(entry)
                self._skipped += position is None
            else:
                position = self._position(entry, parameter_at)
            if position is not None:
                found.add(position)
        return tuple(sorted(found))

    def _entries(
        self, metadata: Mapping[Any, Any], key: str, limit: int
    ) -> tuple[list[Mapping[Any, Any]], dict[int, int]]:
        """The mappings of a list up to the limit, and where each place of the list went."""
        kept: list[Mapping[Any, Any]] = []
        positions: dict[int, int] = {}
        cut = 0
        for place, entry in enumerate(self._list(metadata, key)):
            if not isinstance(entry, Mapping):
                self._skipped += 1
            elif len(kept) < limit:
                positions[place] = len(kept)
                kept.append(entry)
            else:
                cut += 1
        if cut:
            self._truncated[key.removesuffix("s")] = cut
        return kept, positions

    def _by_seed(self, metadata: Mapping[Any, Any], key: str) -> dict[Any, Sequence[Any]]:
        lists = self._mapping(metadata.get(key))
        return {seed: self._list(lists, seed) for seed in list(lists)[:_MAX_ENTRIES]}

    def _mapping(self, value: Any) -> Mapping[Any, Any]:
        if isinstance(value, Mapping):
            return value
        self._skipped += value is not None
        return {}

    def _list(self, metadata: Mapping[Any, Any], key: Any) -> Sequence[Any]:
        value = metadata.get(key)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if len(value) > _MAX_ENTRIES:
                self._truncated["entries"] = (
                    self._truncated.get("entries", 0) + len(value) - _MAX_ENTRIES
                )
            return value[:_MAX_ENTRIES]
        self._skipped += value is not None
        return ()

    def _text(self, entry: Mapping[Any, Any], key: str) -> str | None:
        value = entry.get(key)
        if isinstance(value, str):
            return value or None
        self._skipped += value is not None
        return None

    def _number(
        self, entry: Mapping[Any, Any], key: str, low: float = -math.inf, high: float = math.inf
    ) -> float | None:
        value = entry.get(key)
        return None if value is None else self._as_number(value, low, high)

    def _as_number(
        self, value: Any, low: float = -math.inf, high: float = math.inf
    ) -> float | None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number) and low <= number <= high:
                return number
        self._skipped += 1
        return None

    def _position(self, value: Any, positions: Mapping[int, int]) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool) and value in positions:
            return positions[value]
        self._skipped += 1
        return None

    def _index_key(self, value: Any) -> int | None:
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        self._skipped += 1
        return None
