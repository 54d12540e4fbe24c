"""What a pipeline draws beside its starting noise: each sample's by its own seed and number, whatever is beside it.

    by generators       one for each sample, of the stream GIVEN of its seed and number (`generator_for`)
    without             (k B, ...) of B samples: row j is the next of sample j mod B, by a generator of the stream FREE

What else is drawn without, such as the noise (C, H, W) of a layer, is the same in every call. Which it is says a call
for one sample beside one for two (`Kinds`): what grows is theirs. Of what neither has drawn, as that of a decoder,
pictures and films are the samples', and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from ts_adapt.sampling import generator_for

GIVEN, FREE = -2, -3
"""Streams that are neither the steps' nor the labels' (`teacher.generate`)."""
LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
DRAWN = {torch.randn, torch.rand, *LIKE}


Sample = tuple[int, int]
"""The seed and the number of a sample."""


def generators(samples: Sequence[Sample], stream: int = GIVEN) -> list[torch.Generator]:
    """One for each sample."""
    return [generator_for(seed, number, stream=stream) for seed, number in samples]


@dataclass(frozen=True)
class Kinds:
    """own: the shapes of what is drawn for a sample; shared: of what is drawn once, however many there are."""

    own: frozenset[tuple[int, ...]] = frozenset()
    shared: frozenset[tuple[int, ...]] = frozenset()

    @classmethod
    def of(cls, one: Sequence[torch.Size], two: Sequence[torch.Size] | None) -> Self:
        """From the shapes of what a call for one sample draws, and of a call for two; None: it takes but one."""
        first = {tuple(shape) for shape in one if shape}
        if two is None:
            return cls(frozenset(shape for shape in first if shape[0] == 1))
        second = {tuple(shape) for shape in two if shape}
        return cls(frozenset(s for s in first if (2 * s[0], *s[1:]) in second), frozenset(first & second))

    def of_one(self, shape: tuple[int, ...], samples: int) -> bool:
        """Whether `shape` is of what is drawn for each of `samples`."""
        if not shape or not shape[0] or shape[0] % samples or shape in self.shared:
            return False
        return len(shape) > 3 or (shape[0] // samples, *shape[1:]) in self.own


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Within the block what is drawn without a generator is always the same; outside nothing was drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


class OwnDraws(TorchFunctionMode):
    """Within the block what is drawn without a generator for each of `samples` is their own, by `kinds`.

    shapes  of what was drawn, by generators or without
    free    whether some was drawn without
    """

    def __init__(self, samples: Sequence[Sample], kinds: Kinds = Kinds()) -> None:
        super().__init__()
        self.streams, self.kinds = generators(samples, FREE), kinds
        self.shapes, self.free = list[torch.Size](), False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = function(*args, **(kwargs or {}))
        if function not in DRAWN:
            return drawn
        self.shapes.append(drawn.shape)
        if (kwargs or {}).get("generator") is not None:
            return drawn
        self.free, several = True, len(self.streams)
        if not self.kinds.of_one(tuple(drawn.shape), several):
            return drawn
        draw = LIKE.get(function, function)
        rows = [draw(row.shape, generator=self.streams[j % several], dtype=row.dtype) for j, row in enumerate(drawn)]
        return torch.stack(rows).to(drawn.device)
