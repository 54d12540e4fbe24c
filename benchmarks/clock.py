"""Clocks for what happens inside a larger work, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ts_adapt.distances import towards
from ts_adapt.interfaces import Distance


class Clock:
    """Adds up what lies between marks of beginning and end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []
        self.now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def mark(self) -> None:
        if self.device == "cpu":
            self.marks.append(self.now())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def spent(self) -> float:
        """Seconds between the pairs of marks since it was asked last."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks.clear()
        if self.device == "cpu":
            return sum(end - begin for begin, end in pairs)
        torch.cuda.synchronize()
        return 1e-3 * sum(begin.elapsed_time(end) for begin, end in pairs)

    def on(self, call: Callable[..., Tensor], *places: int) -> Callable[..., Tensor]:
        """`call` with its forward and backward passes on the clock; its tensors are the arguments at `places`."""

        def clocked(*arguments: Any) -> Tensor:
            inputs = dict(zip(places, Border.apply(self, *(arguments[place] for place in places)), strict=True))
            self.mark()
            out = call(*(inputs.get(place, argument) for place, argument in enumerate(arguments)))
            self.mark()
            return Border.apply(self, out)[0]

        return clocked


class Border(torch.autograd.Function):
    """The identity of several tensors; backward it marks the clock, as soon as the gradients of all are there."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock = clock
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.mark()
        return None, *gradients


class ClockedDistance:
    """`distance` on the clock."""

    def __init__(self, distance: Distance, clock: Clock) -> None:
        self.distance, self.clock = distance, clock

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.towards(y)(x)

    def towards(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        self.clock.mark()
        distance = towards(self.distance, y)
        self.clock.mark()
        return self.clock.on(distance, 0)
