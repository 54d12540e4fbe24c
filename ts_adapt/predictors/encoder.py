"""The small network that both predictors share: a picture and the place it is from in, a few numbers out.

    h = silu(dense(conv(... silu(conv((picture - m_p) / s_p) + e_p)))) + condition        f = 10 b_p + W_p (k h)
    z = (log w - (log a + log b) / 2) sqrt(12) / (log b - log a)                          the scale w of guidance

A place p is where it is asked: a step i of a solve of N steps. The convolutions and the dense layer are shared by all
places, whatever their N; e_p, W_p and b_p are each place's own. m_p and s_p are the mean and the standard deviation of
every pixel there, measured before training: x0 at high noise is the same grey picture for every sample but for a few
thousandths, and these carry all there is to know. Strided convolutions halve the picture until it is at most 4x4. b_p,
what all samples share, learns ten times as fast as the rest. b and W start at zero: an untrained predictor corrects
nothing. k is 1 but in a training with dropout, where it is drawn for each sample and stays for all of its solve: 0 with
the probability p, else 1 / (1 - p) (Gal & Ghahramani 2016). z, where it is learned for scales from a to b, is part of
the condition; its mean is 0 and its deviation 1 over the log-uniform scales of training, and outside of a .. b it is
that of the nearer end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.errors import TsAdaptError

BIAS_RATE = 10.0
LEAST_DEVIATION = 0.05
"""Of a pixel, as a share of its channel's largest: below it a pixel is noise of the arithmetic."""


class Encoder(nn.Module):
    """`(B, channels, H, W)`, the place and a condition -> `(B, outputs)`, zeros before training.

    places   number of places that it is asked at
    classes  number of class labels (condition `class_labels`), 0 for none; one more row stands for "no label"
    text     width of prompt embeddings (condition `encoder_hidden_states`, averaged over tokens), 0 for none
    scales   a and b of the scales of guidance (condition `guidance_scale`, a number or `(B,)`), None for none
    """

    def __init__(
        self, channels: int, outputs: int, *, places: int = 1, width: int = 24, hidden: int = 128,
        size: tuple[int, int] = (28, 28), classes: int = 0, text: int = 0, scales: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("mean", torch.zeros), ("deviation", torch.ones)):
            self.register_buffer(name, value(places, channels, *size))
        self.mean: Tensor
        self.deviation: Tensor
        self.convolutions = nn.ModuleList()
        high, wide = size
        while not self.convolutions or max(high, wide) > 4:
            out = width * min(len(self.convolutions) + 1, 4)
            self.convolutions.append(nn.Conv2d(channels, out, 3, stride=2, padding=1))
            channels, high, wide = out, (high + 1) // 2, (wide + 1) // 2
        self.step = nn.Parameter(0.5 * torch.randn(places, width))
        self.dense = nn.Linear(channels * high * wide, hidden)
        self.classes = nn.Embedding(classes + 1, hidden) if classes else None
        self.text = nn.Linear(text, hidden) if text else None
        self.scales = scales
        self.guidance = nn.Linear(1, hidden) if scales else None
        self.weight = nn.Parameter(torch.zeros(places, hidden, outputs))
        self.bias = nn.Parameter(torch.zeros(places, outputs))
        self.kept: Tensor | None = None

    @contextmanager
    def dropping(self, kept: Tensor | None) -> Iterator[None]:
        """While the block runs, k is `kept` `(B, hidden)`; None: 1."""
        before, self.kept = self.kept, kept
        try:
            yield
        finally:
            self.kept = before

    @torch.no_grad()
    def standardise(self, place: int, pictures: Tensor) -> None:
        """Take m and s of `place` from `pictures` `(n, channels, H, W)`."""
        deviation = pictures.std(0)
        least = LEAST_DEVIATION * deviation.amax((-2, -1), keepdim=True)
        self.mean[place] = pictures.mean(0)
        self.deviation[place] = torch.where(least > 0, torch.maximum(deviation, least), 1.0)

    @torch.no_grad()
    def forget(self, places: slice, numbers: Tensor) -> None:
        """Answer `numbers` `(places, outputs)` at `places` for every sample, as before training."""
        self.weight[places] = 0
        self.bias[places] = (numbers / BIAS_RATE).to(self.bias)

    def seen(self, picture: Tensor, place: int) -> Tensor:
        """`picture` by the mean and the deviation of its place."""
        return (picture.to(self.mean) - self.mean[place]) / self.deviation[place]

    def features(self, seen: Tensor, place: int, condition: Mapping[str, Any] | None = None) -> Tensor:
        """k h `(B, hidden)`, of what `seen` returned."""
        features = seen
        for layer, convolution in enumerate(self.convolutions):
            features = convolution(features)
            if layer == 0:
                features = features + self.step[place][:, None, None]
            features = nn.functional.silu(features)
        features = self.dense(features.flatten(1))
        condition = condition or {}
        if self.classes is not None:
            labels = condition.get("class_labels")
            last = self.classes.num_embeddings - 1
            none = torch.full((len(seen),), last, device=seen.device)
            features = features + self.classes(none if labels is None else labels.clamp(max=last))
        if self.text is not None:
            prompts = condition.get("encoder_hidden_states")
            if prompts is not None:
                features = features + self.text(prompts.to(features.dtype).mean(1))
        if self.guidance is not None:
            features = features + self.guidance(self.standard(condition.get("guidance_scale")).to(features)[:, None])
        features = nn.functional.silu(features)
        return features if self.kept is None else self.kept * features

    def standard(self, scale: float | Tensor | None) -> Tensor:
        """z `(B,)` or `(1,)` of a scale; TsAdaptError where there is none."""
        low, high = self.scales or (1.0, 1.0)
        if scale is None:
            raise TsAdaptError(
                f"the predictor was learned for scales of guidance from {low:g} to {high:g}, and is not told which it "
                "is; give it guidance_scale in the condition, or a pipeline that says with which it is called"
            )
        log = torch.as_tensor(scale, dtype=torch.float64).reshape(-1).clamp(low, high).log()
        z: Tensor = (log - (math.log(low) + math.log(high)) / 2) * math.sqrt(12) / math.log(high / low)
        return z

    def forward(self, picture: Tensor, place: int = 0, condition: Mapping[str, Any] | None = None) -> Tensor:
        return self.answer(self.features(self.seen(picture, place), place, condition), place)

    def answer(self, features: Tensor, place: int) -> Tensor:
        """f `(B, outputs)` at `place`, of what `features` returned."""
        return features @ self.weight[place] + BIAS_RATE * self.bias[place]
