"""The small network that both predictors share: a picture and the step in, a few numbers out.

    h = silu(dense(conv(... silu(conv((picture - m_i) / s_i) + e_i)))) + condition        f = 10 b_i + W_i h

m_i and s_i are the mean and the standard deviation of every pixel at step i, measured before training: x0 at high noise
is the same grey picture for every sample but for a few thousandths, and these carry all there is to know. Strided
convolutions halve the picture until it is at most 4x4. b_i, what all samples share, learns ten times as fast as the
rest. b and W start at zero: an untrained predictor corrects nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BIAS_RATE = 10.0
LEAST_DEVIATION = 0.05
"""Of a pixel, as a share of its channel's largest: below it a pixel is noise of the arithmetic."""


class Encoder(nn.Module):
    """`(B, channels, H, W)`, the step and a condition -> `(B, outputs)`, zeros before training.

    steps    number of steps that it is asked at, each with a W_i and b_i of its own
    classes  number of class labels (condition `class_labels`), 0 for none; one more row stands for "no label"
    text     width of prompt embeddings (condition `encoder_hidden_states`, averaged over tokens), 0 for none
    """

    def __init__(
        self, channels: int, outputs: int, *, steps: int = 1, width: int = 24, hidden: int = 128,
        size: tuple[int, int] = (28, 28), classes: int = 0, text: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("mean", torch.zeros), ("deviation", torch.ones)):
            self.register_buffer(name, value(steps, channels, *size))
        self.mean: Tensor
        self.deviation: Tensor
        self.convolutions = nn.ModuleList()
        high, wide = size
        while not self.convolutions or max(high, wide) > 4:
            out = width * min(len(self.convolutions) + 1, 4)
            self.convolutions.append(nn.Conv2d(channels, out, 3, stride=2, padding=1))
            channels, high, wide = out, (high + 1) // 2, (wide + 1) // 2
        self.step = nn.Parameter(0.5 * torch.randn(steps, width))
        self.dense = nn.Linear(channels * high * wide, hidden)
        self.classes = nn.Embedding(classes + 1, hidden) if classes else None
        self.text = nn.Linear(text, hidden) if text else None
        self.weight = nn.Parameter(torch.zeros(steps, hidden, outputs))
        self.bias = nn.Parameter(torch.zeros(steps, outputs))

    @torch.no_grad()
    def standardise(self, step: int, pictures: Tensor) -> None:
        """Take m and s of `step` from `pictures` `(n, channels, H, W)`."""
        deviation = pictures.std(0)
        least = LEAST_DEVIATION * deviation.amax((-2, -1), keepdim=True)
        self.mean[step] = pictures.mean(0)
        self.deviation[step] = torch.where(least > 0, torch.maximum(deviation, least), 1.0)

    def forward(self, picture: Tensor, step: int | Tensor = 0, condition: Mapping[str, Any] | None = None) -> Tensor:
        """`step` is shared by the batch, or one of every row `(B,)`."""
        features = (picture.to(self.mean) - self.mean[step]) / self.deviation[step]
        for place, convolution in enumerate(self.convolutions):
            features = convolution(features)
            if place == 0:
                features = features + self.step[step][..., None, None]
            features = nn.functional.silu(features)
        features = self.dense(features.flatten(1))
        condition = condition or {}
        if self.classes is not None:
            labels = condition.get("class_labels")
            none = torch.full((len(picture),), self.classes.num_embeddings - 1, device=picture.device)
            features = features + self.classes(none if labels is None else labels.clamp(max=int(none[0])))
        if self.text is not None:
            prompts = condition.get("encoder_hidden_states")
            if prompts is not None:
                features = features + self.text(prompts.to(features.dtype).mean(1))
        features = nn.functional.silu(features)
        seen: Tensor = (features.unsqueeze(1) @ self.weight[step]).squeeze(1)
        return seen + BIAS_RATE * self.bias[step]


def shorten_gradient(numbers: Tensor, norm: float = 1.0) -> Tensor:
    """`numbers` `(B, P)` as they are; backward, each row's gradient is shortened to at most `norm`.

    A sample about to end in another mode has a gradient many times those of all others: it may not decide alone.
    """

    def shortened(gradient: Tensor) -> Tensor:
        gradient = torch.nan_to_num(gradient, posinf=0.0, neginf=0.0)
        length: Tensor = gradient.norm(dim=-1, keepdim=True)
        return gradient * (norm / length.clamp_min(norm))

    if numbers.requires_grad:
        numbers.register_hook(shortened)
    return numbers
