"""In what form a pipeline takes its starting noise, where that is not the form in which its loop has its states.

Some take pictures and pack them into tokens by themselves. A form is a shape, of as many numbers as a state has, and
where each of them comes to lie:

    state = noise.flatten()[places].reshape(state's shape)

It is found by noise that says its own places, digit by digit, as half precision holds small whole numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 128


@dataclass(frozen=True)
class Form:
    """shape, of one sample; places `(n,)` in it of the numbers of a state."""

    shape: tuple[int, ...]
    places: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The noise `(B, *shape)` that becomes the states `x` `(B, ...)`."""
        places = self.places.to(x.device)
        return torch.empty_like(x.flatten(1)).index_copy(1, places, x.flatten(1)).reshape(-1, *self.shape)


def form_of(shape: Sequence[int], begun: Callable[[Tensor], Tensor]) -> Form | None:
    """The form of noise of `shape`, one sample's; None where no permutation makes states of it.

    begun  noise `(1, *shape)` -> the state that the loop begins with
    """
    count = math.prod(shape)
    own = torch.arange(count)
    places, weight = torch.zeros(count, dtype=torch.int64), 1
    while weight < count:
        digit = (own // weight % BASE).float().reshape(1, *shape)
        state = begun(digit).flatten()
        if state.numel() != count:
            return None
        places += weight * state.round().long().cpu()
        weight *= BASE
    return Form(tuple(shape), places) if torch.equal(places.sort().values, own) else None
