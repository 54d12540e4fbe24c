"""Data-parallel training: the processes that accelerate or torchrun started, P of them, work at the same batches.

    gradient of a batch = sum over processes of the gradient of its share         the same step as one process takes,
                                                                                  up to the rounding of the sum
All hold the same weights and decide by the same numbers; the first alone writes. One process is P = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from ts_adapt.distributed import rank, world


class Processes:
    """This process among the others, which `accelerator` has met."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def share(self, rows: Tensor) -> Tensor:
        """The part of `rows` that is this process's; it may be empty."""
        return rows.tensor_split(world())[rank()]

    def added(self, value: float) -> float:
        """The sum of all processes' values."""
        return float(self._sum(torch.tensor(value, dtype=torch.float64, device=self._accelerator.device)))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by the sum of all processes' gradients; one that is missing is zero."""
        learned = [p for p in parameters if p.requires_grad]
        own = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learned])
        for p, total in zip(learned, self._sum(own).split([p.numel() for p in learned]), strict=True):
            p.grad = total.view_as(p)

    def by_rows(self, compute: Callable[[Tensor], Tensor], rows: int, like: Tensor) -> Tensor:
        """`compute` of the indices 0 .. rows - 1, `(rows, ...)`, each process computing its share of them.

        like  gives the shape of a row, the precision and the device
        """
        whole = torch.zeros((rows, *like.shape), dtype=like.dtype, device=like.device)
        share = self.share(torch.arange(rows))
        if len(share):
            whole[share] = compute(share).to(whole)
        return self._sum(whole)

    def agree(self, module: nn.Module) -> None:
        """Give all processes the parameters and buffers of the first."""
        broadcast(dict(module.state_dict()))

    def _sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = self._accelerator.reduce(tensor, reduction="sum")
        return total
