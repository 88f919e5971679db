"""A device's recorder on the CPU: the same operations on the same tensors, without the Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation; a replay repeats them into the memory that they used."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.operations.append((func, args, kwargs or {}, made))
        return result

    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            again = [
                leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)
            ]
            for tensor, value in zip(made, again, strict=True):
                if tensor.data_ptr() != value.data_ptr():
                    tensor.copy_(value)


class ReplayingDevice:
    """Records and replays, or fails to; its work has always ended."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.failure is not None:
            raise self.failure
        recording = RecordedOperations()
        with recording:
            run()
        return recording.replay

    def wait(self) -> None:
        pass
