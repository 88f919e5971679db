"""The forms in which the network can serve, fastest first, and the fall from one to the next."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

from tamiyo_svc.errors import InferenceError, in_brief
from tamiyo_svc.graph.graph import Graph
from tamiyo_svc.policy.compiled import Library, PackedWeights
from tamiyo_svc.policy.folded import FoldedNetwork, fold
from tamiyo_svc.policy.folding import Outputs
from tamiyo_svc.policy.network import Network, TamiyoNetwork, loaded

# Far above what rounding weights to bfloat16 does, far below what a wrong kernel does.
_TOLERANCE: Final = 0.1
# Layers of the larger blueprints, or a batch of small graphs.
_WARM_UP_NODES: Final = 64


class Engine(Protocol):
    """One policy's network, ready to run."""

    def evaluate(self, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph, each as if it were alone."""


@runtime_checkable
class Touchable(Protocol):
    """An engine whose weights can be read without evaluating anything."""

    def touch(self, part: int, parts: int) -> None:
        """Read one of so many equal parts of the weights."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to run a network; `build` may take long and may fail in any way.

    `library` is what another process needs to pack weights for `build_packed`, which is quick.
    """

    device: str
    is_compiled: bool
    build: Callable[[TamiyoNetwork], Engine]
    build_packed: Callable[[PackedWeights], Engine] | None = None
    library: Library | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What serves now.

    `warm_ms` is how long the last warm-up of a compiled form took, None before the first one;
    `fallbacks` counts forms given up, `reason` says why the last one was.
    """

    device: str
    is_compiled: bool
    warm_ms: float | None = None
    fallbacks: int = 0
    reason: str = ""


EAGER_CPU: Final = Form("cpu", is_compiled=False, build=fold)
"""The form that is always there."""


class Engines:
    """Runs networks in the first form that works and stays with it.

    A form that raises, when it is built or while it runs, is given up for all policies as soon as
    a later one answers the same graphs; if none does, the graphs are at fault. `on_change` hears
    of every new status, in the thread that found it. Engines are kept as long as the network they
    belong to, and only in the form that serves: together they would be twice its size.
    """

    def __init__(
        self,
        forms: Sequence[Form] = (EAGER_CPU,),
        on_change: Callable[[EngineStatus], None] = lambda status: None,
    ) -> None:
        if not forms:
            raise ValueError("no form to serve in")
        self._forms = tuple(forms)
        self.on_change = on_change
        self._lock = threading.Lock()
        self._level = 0
        self._built: WeakKeyDictionary[Network, dict[int, Engine]] = WeakKeyDictionary()
        # Networks whose engine was found to agree with the folded one where it was packed.
        self._adopted: WeakSet[Network] = WeakSet()
        self.status = EngineStatus(forms[0].device, forms[0].is_compiled)

    @property
    def library(self) -> Library | None:
        """What weights can be packed for, if the serving form takes packed ones."""
        return self._forms[self._level].library

    def adopt(self, network: Network, packed: PackedWeights) -> bool:
        """Take a network's weights packed for the serving form, and checked, instead of building
        its engine; whether that form takes packed ones.
        """
        level = self._level
        build = self._forms[level].build_packed
        if build is None:
            return False
        engine = build(packed)
        with self._lock:
            self._built.setdefault(network, {})[level] = engine
            self._adopted.add(network)
        return True

    def evaluate(self, network: Network, graphs: Sequence[Graph]) -> list[Outputs]:
        """Outputs of every graph.

        Raises:
            Whatever the last form raises when no form can answer.
        """
        start = level = self._level
        failure: Exception | None = None
        while True:
            try:
                outputs = self.engine(network, level).evaluate(graphs)
            except Exception as error:
                failure = failure or error
                if level + 1 == len(self._forms):
                    raise
                level += 1
            else:
                if failure is not None:
                    self._fall(start, level, failure)
                return outputs

    def warm_up(
        self,
        network: Network,
        batches: Sequence[Sequence[Graph]],
        clock: Callable[[], float],
    ) -> None:
        """Build and run the serving form once on minimal batches; `clock` is in seconds.

        A form that disagrees with the folded network is given up like one that raises. Weights that
        came packed have been compared already.

        Raises:
            Whatever the last form raises when no form can answer.
        """
        while True:
            level = self._level
            form = self._forms[level]
            started = clock()
            try:
                engine = self.engine(network, level)
                if isinstance(engine, FoldedNetwork):
                    engine.warm_up(_WARM_UP_NODES)
                outputs = [engine.evaluate(graphs) for graphs in batches]
                warm_ms = (clock() - started) * 1e3
                if not isinstance(engine, FoldedNetwork) and network not in self._adopted:
                    folded = fold(loaded(network))
                    for mine, graphs in zip(outputs, batches, strict=True):
                        _check(mine, folded.evaluate(graphs))
                    folded.release()
            except Exception as error:
                if level + 1 == len(self._forms):
                    raise
                self._fall(level, level + 1, error)
            else:
                if form.is_compiled:
                    self._report(replace(self.status, warm_ms=warm_ms))
                return

    def engine(self, network: Network, level: int | None = None) -> Engine:
        """A policy's engine in the serving form, or in that of `level`."""
        level = self._level if level is None else level
        # Decisions come here and wait for nobody: a thread that stands back may have the lock.
        engine = self._built.get(network, {}).get(level)
        if engine is None:
            engine = self._forms[level].build(loaded(network))
            with self._lock:
                self._built.setdefault(network, {})[level] = engine
        return engine

    def touch(self, network: Network, part: int, parts: int) -> None:
        """Read one of so many parts of a policy's weights, where the serving form can."""
        engine = self.engine(network)
        if isinstance(engine, Touchable):
            engine.touch(part, parts)

    def _fall(self, start: int, level: int, failure: Exception) -> None:
        with self._lock:
            if self._level >= level:
                return
            fallen = level - max(start, self._level)
            self._level = level
            for built in self._built.values():
                for given_up in range(level):
                    built.pop(given_up, None)
        form = self._forms[level]
        self._report(
            EngineStatus(
                form.device,
                form.is_compiled,
                self.status.warm_ms,
                self.status.fallbacks + fallen,
                in_brief(failure),
            )
        )

    def _report(self, status: EngineStatus) -> None:
        self.status = status
        self.on_change(status)


def _check(outputs: Sequence[Outputs], expected: Sequence[Outputs]) -> None:
    for mine, theirs in zip(outputs, expected, strict=True):
        for head, values in theirs.items():
            for value, other in zip(mine[head], values, strict=True):
                agree = math.isclose(value, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
                # A policy that yields no numbers is refused by whoever reads them.
                if not agree and math.isfinite(other):
                    raise InferenceError(f"{head} is {value!r}, the folded network gives {other!r}")
