"""The small network that both predictors share: a picture (and a few numbers) in, a few numbers out.

Strided convolutions with GroupNorm halve the picture until it is at most 4x4; what is left is flattened and joined
with scalars and an embedding of the condition, and a two-layer perceptron ends in a layer that starts at zero: an
untrained predictor corrects nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.interfaces import TsAdaptError


class Encoder(nn.Module):
    """`(B, channels, H, W)`, scalars `(B, scalars)` and a condition -> `(B, outputs)`, zeros before training.

    classes   number of class labels (condition `class_labels`), 0 for none; one more row stands for "no label"
    text      width of prompt embeddings (condition `encoder_hidden_states`, averaged over tokens), 0 for none
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        scalars: int = 0,
        width: int = 32,
        hidden: int = 128,
        size: tuple[int, int] = (28, 28),
        classes: int = 0,
        text: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        high, wide, depth = size[0], size[1], 0
        while depth == 0 or max(high, wide) > 4:
            out = min(width * 2**depth, 4 * width)
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(min(8, out), out), nn.SiLU()]
            channels, depth = out, depth + 1
            high, wide = (high + 1) // 2, (wide + 1) // 2
        self.picture = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * high * wide, hidden))
        self.scalars = nn.Linear(scalars, hidden) if scalars else None
        self.classes = nn.Embedding(classes + 1, hidden) if classes else None
        self.text = nn.Linear(text, hidden) if text else None
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())

    def forward(
        self, picture: Tensor, scalars: Tensor | None = None, condition: Mapping[str, Any] | None = None
    ) -> Tensor:
        dtype = self.last.weight.dtype
        features = self.picture(picture.to(dtype))
        if self.scalars is not None:
            if scalars is None:
                raise TsAdaptError("this encoder was built with scalars; none were given")
            features = features + self.scalars(scalars.to(dtype))
        condition = condition or {}
        if self.classes is not None:
            labels = condition.get("class_labels")
            none = torch.full((len(picture),), self.classes.num_embeddings - 1, device=picture.device)
            features = features + self.classes(none if labels is None else labels.clamp(max=int(none[0])))
        if self.text is not None:
            prompts = condition.get("encoder_hidden_states")
            if prompts is not None:
                features = features + self.text(prompts.to(dtype).mean(1))
        out: Tensor = self.last(self.head(features))
        return out
