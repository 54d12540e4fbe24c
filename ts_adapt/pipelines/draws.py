"""What a pipeline draws beside its starting noise: each sample's by its own number, whatever is drawn beside it.

    by generators       one for each sample, of the stream GIVEN of its number (`generator_for`)
    without             (B, ...) of B samples, and pictures or films (k B, C, H, W): row j is the next of sample
                        j mod B, by a generator of the stream FREE of its number

What else is drawn without, such as the noise (H, W) of a decoder's layer, is the same in every call. The shape alone
says which it is: a layer's that is as high as there are samples is taken for theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ts_adapt.sampling import generator_for

GIVEN, FREE = -2, -3
"""Streams that are neither the steps' nor the labels' (`teacher.generate`)."""
LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
DRAWN = {torch.randn, torch.rand, *LIKE}


def generators(numbers: Sequence[int], stream: int = GIVEN) -> list[torch.Generator]:
    """One for each sample."""
    return [generator_for(0, number, stream=stream) for number in numbers]


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Within the block what is drawn without a generator is always the same; outside nothing was drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


class OwnDraws(TorchFunctionMode):
    """Within the block what is drawn without a generator is the samples' own, by their `numbers`.

    shapes  of what was drawn, by generators or without
    free    whether some was drawn without
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self.streams = generators(numbers, FREE)
        self.shapes, self.free = list[torch.Size](), False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = function(*args, **(kwargs or {}))
        if function not in DRAWN:
            return drawn
        self.shapes.append(drawn.shape)
        if (kwargs or {}).get("generator") is not None:
            return drawn
        self.free, several = True, len(self.streams)
        many = len(drawn) if drawn.ndim else 0
        if not many or many % several or (drawn.ndim < 4 and many != several):
            return drawn
        draw = LIKE.get(function, function)
        rows = [draw(row.shape, generator=self.streams[j % several], dtype=row.dtype) for j, row in enumerate(drawn)]
        return torch.stack(rows).to(drawn.device)
