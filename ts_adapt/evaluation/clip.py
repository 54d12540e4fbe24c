"""How well images show what their prompts say: the CLIP score (Hessel et al. 2021, arXiv:2104.08718).

    score = cos(image features, text features)      as benchmarks of samplers report it, about 0.3 for good images

By any of `dual_encoders`; by the zoo's, which knows emoji and their names, it is about .7 for real pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ts_adapt import dual_encoders
from ts_adapt.errors import TsAdaptError

ClipScore = Callable[[Tensor, Sequence[str]], Tensor]
"""(images `(B, C, H, W)` in [-1, 1] with C 1 or 3, B prompts) -> `(B,)`."""


def clip_scorer(weights: str, device: torch.device | str = "cpu") -> ClipScore:
    """The CLIP score by the dual encoder called `weights`; TsAdaptError as of `dual_encoders.load`."""
    encoder = dual_encoders.load(weights, device, "evaluate.clip")

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) != len(prompts):
            raise TsAdaptError(f"there are {len(images)} images and {len(prompts)} prompts; give a prompt for each")
        return (encoder.rounded(images) * encoder.captions(prompts)).sum(1).float().cpu()

    return score
