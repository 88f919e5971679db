"""What the ranks of a data-parallel run agree on; all make the same calls in the same order."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tamiyo_svc.errors import TamiyoError

_LOG: Final = logging.getLogger("tamiyo.client")
WITHIN_S: Final = 300.0
"""How long one rank waits for the others: longer than a checkpoint that only one of them writes
between its backward pass and the end of its step."""


class RanksApartError(TamiyoError):
    """The other ranks did not take part; nothing is changed together any more."""

    label = "ranks_apart"


class Ranks:
    """All ranks of this process's `torch.distributed` world, found when first needed.

    Small things are exchanged on the CPU over a gloo group of their own, so that a rank which does
    not come disturbs no collective of the training itself. Without other ranks everything is as
    this one says. After a rank has not come within `within_s` seconds, or half the limit of the
    default group if that is shorter, `apart` is true and every exchange raises at once.
    """

    def __init__(self, within_s: float = WITHIN_S) -> None:
        self.apart = False
        self._within_s = within_s
        # Whoever holds a group keeps its threads alive beyond destroy_process_group.
        self._group: weakref.ref[Any] | None = None

    @property
    def shared(self) -> bool:
        """Whether there are other ranks."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def rank(self) -> int:
        """This process's number, 0 where it is the only one."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def all_agree(self, fine: bool) -> bool:
        """Whether every rank says so.

        Raises:
            RanksApartError: a rank did not answer in time.
        """
        return self.average([float(fine)])[0] >= 1.0 if self.shared else fine

    def average(self, values: Sequence[float]) -> list[float]:
        """The means of all ranks' values.

        Raises:
            RanksApartError: a rank did not answer in time.
        """
        if not self.shared:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self._exchange(lambda group: dist.all_reduce(total, group=group))
        return [float(value) / dist.get_world_size() for value in total]

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every rank the mean of all ranks' gradients, none counting as zero.

        Raises:
            RanksApartError: a rank did not answer in time.
        """
        if not self.shared:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for alike in _alike([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in alike])
            self._exchange(lambda group, flat=flat: dist.all_reduce(flat, group=group), flat)
            flat /= dist.get_world_size()
            _spread(flat, alike)

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank what rank 0 has in these tensors.

        Raises:
            RanksApartError: a rank did not answer in time.
        """
        if not self.shared:
            return
        for alike in _alike(tensors):
            flat = torch.cat([tensor.flatten() for tensor in alike])
            self._exchange(lambda group, flat=flat: dist.broadcast(flat, 0, group=group), flat)
            _spread(flat, alike)

    def bytes_of_first(self, data: bytes) -> bytes:
        """What rank 0 gives; what the others give does not count.

        Raises:
            RanksApartError: a rank did not answer in time.
        """
        if not self.shared:
            return data
        size = torch.tensor([len(data)], dtype=torch.int64)
        self.take_from_first([size])
        if not int(size):
            return b""
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.take_from_first([content])
        return bytes(content.tolist())

    def _exchange(self, collective: Any, tensor: Tensor | None = None) -> None:
        if self.apart:
            raise RanksApartError("the ranks did not come together before")
        try:
            # Other devices have the backend, and the time limit, of the training itself.
            on_cpu = tensor is None or tensor.device.type == "cpu"
            collective(self._own_group() if on_cpu else None)
        except RuntimeError as error:
            self.apart = True
            _LOG.error(
                "the other ranks did not come within %g s, so that seeds stay as they are and "
                "commands are left alone from now on; every rank must call end_step at the same "
                "steps: %s",
                self._within_s,
                error,
            )
            raise RanksApartError(str(error)) from error

    def _own_group(self) -> Any:
        group = None if self._group is None else self._group()
        if group is None:
            self._within_s = min(self._within_s, _default_limit_s() / 2.0)
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._within_s))
            self._group = weakref.ref(group)
            self.apart = False
        return group


WORLD: Final = Ranks()
"""The ranks of this process."""


def _default_limit_s() -> float:
    """The time limit that the training's own group was made with; long where it does not tell."""
    try:
        world: Any = dist.group.WORLD
        options = world._get_backend(torch.device("cpu")).options
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return 2.0 * WITHIN_S


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by device and number format, in the same order on every rank."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
