"""One-shot schedules: a network maps the starting noise (and the condition) to a whole time grid, before sampling.

    logits_b = logits_static + f(x_T, c)_b        times_b = times(logits_b)                      (ALD3; INDIS)

f is zero before training, so that an untrained predictor *is* the static grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.grids.parametric import logits_to_times, times_to_logits
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.policies import FromNoise
from ts_adapt.predictors.encoder import Encoder
from ts_adapt.sampling import noise_scale


class OneShot(nn.Module):
    """Predicts grids of N steps as corrections to `static_times` `(N+1,)`, for samples of `shape` `(C, H, W)`."""

    kind = "one-shot"

    def __init__(
        self, noise: NoiseSchedule, static_times: Tensor, shape: Sequence[int], *, width: int = 32,
        hidden: int = 128, classes: int = 0, text: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.noise = noise
        self.options: dict[str, Any] = dict(shape=list(shape), width=width, hidden=hidden, classes=classes, text=text)
        self.register_buffer("static_times", static_times.detach().to(torch.float64))
        self.static_times: Tensor
        self.encoder = Encoder(
            shape[0], self.steps, width=width, hidden=hidden, size=(shape[1], shape[2]), classes=classes, text=text
        )

    @property
    def steps(self) -> int:
        return self.static_times.shape[-1] - 1

    def forward(self, x_T: Tensor, condition: Mapping[str, Any] | None = None) -> TimeGrid:
        """The grids `(B, N+1)` for the starting noise `(B, C, H, W)`."""
        unit = x_T / noise_scale(self.noise)
        correction = self.encoder(unit, None, condition).double()
        return TimeGrid(logits_to_times(times_to_logits(self.static_times, self.noise) + correction, self.noise))

    def policy(self) -> FromNoise:
        """The step policy that asks this network once, at the start."""
        return FromNoise(lambda x_T, condition: self(x_T, condition))
