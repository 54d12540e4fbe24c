"""What a sampled image costs: floating-point operations, seconds, memory.

    flops        2 for each multiply-add of matrix products (of integers too), convolutions and attention, as torch
                 counts them; a MAC is half as much. Attention runs by torch's MATH backend for it, as the fused
                 kernels of the CPU count as 0
    seconds      the median over runs, behind one that warms up
    peak_memory  bytes in use at the worst moment beyond those before: of CUDA's allocator, and on the CPU of the
                 tensors that live between operations (what a kernel takes for itself is not seen)

Costs are those of one `solve()`, a call that samples a batch; of compiled networks, flops and the CPU's memory are
those without compilation.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ts_adapt.denoisers.execution import uncompiled

Solve = Callable[[], Any]


def count_flops(solve: Solve) -> int:
    """The floating-point operations of `solve`."""
    integer = {torch.ops.aten._int_mm: _integer_product}
    with uncompiled(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=integer) as counter:
        solve()
    return int(counter.get_total_flops())


def _integer_product(a: Sequence[int], b: Sequence[int], **_: Any) -> int:
    """Operations of the product of integer matrices of these shapes, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def seconds(solve: Solve, device: torch.device | str = "cpu", repeats: int = 3) -> float:
    """The median time of `repeats` runs of `solve`, behind one that warms up."""
    device = torch.device(device)
    taken = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        solve()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def peak_memory(solve: Solve, device: torch.device | str = "cpu") -> int:
    """Bytes that `solve` needs at its worst moment beyond what is in use when it begins."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        solve()
        return int(torch.cuda.max_memory_allocated(device) - before)
    allocations = Allocations()
    with uncompiled(), allocations:
        solve()
    return allocations.peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Allocations(TorchDispatchMode):
    """Follows the storages that operations make, from birth to death."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.add(storage)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
