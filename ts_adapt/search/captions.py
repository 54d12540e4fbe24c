"""The loss that asks for the prompt: how badly an image shows what its sample was made to show.

    r_b = 1 - cos(f(image_b), g(prompt_b))      f, g: a dual encoder's (`dual_encoders`), in [0, 2]
    L_b = distance_b + weight r_b

A paired distance cannot be better than its teacher; what a prompt asks for can be shown better than the teacher does.
Alone this loss learns to please its network, which is why that network may not judge the result (`config`), and the
paired distance stays beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ts_adapt.dual_encoders import DualEncoder
from ts_adapt.errors import TsAdaptError
from ts_adapt.prompts import prompts_of
from ts_adapt.search.objective import Objective


@dataclass(frozen=True)
class Captions:
    """What the samples are asked to show: sample i the prompt i modulo their number, as `encoder` reads it."""

    encoder: DualEncoder
    prompts: Sequence[str]

    @torch.no_grad()
    def towards(self, index: Tensor) -> Callable[[Tensor], Tensor]:
        """Images `(B, C, H, W)` of the samples `index` `(B,)` -> r `(B,)`."""
        asked = self.encoder.captions(prompts_of(self.prompts, index.tolist()))
        return lambda images: 1 - (self.encoder.pictures(images) * asked).sum(1)


def asking(objective: Objective, captions: Captions | None, weight: float) -> Objective:
    """`objective` with `weight` r beside its distance; TsAdaptError without `captions`."""
    if captions is None:
        raise TsAdaptError(f"a caption loss of weight {weight:g} is that of prompts, and none were given; give some")

    def beside(index: Tensor) -> Callable[[Tensor], Tensor]:
        loss = captions.towards(index)
        return lambda images: weight * loss(images)

    return replace(objective, beside=beside)
