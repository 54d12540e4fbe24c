"""One-shot schedules: a network maps the starting noise (and the condition) to a whole grid, before sampling.

    z_b = z_static + unit * f(x_T, c)_b        grid_b = GridSpace.grid(z_b)                      (ALD3; INDIS)

z holds the logits of the times and, where they are learned, the corrections that travel with a grid (`grids.space`).
f is zero before training, so that an untrained predictor *is* the static grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.policies import FromNoise
from ts_adapt.predictors.encoder import Encoder, shorten_gradient
from ts_adapt.sampling import noise_scale

SMALL_UNIT = 0.2
"""Of output scales and coefficients: a change of 1 in them moves the solve much further than one in a logit does."""


class OneShot(nn.Module):
    """Predicts grids of N steps as corrections to `static_times` `(N+1,)`, for samples of `shape` `(C, H, W)`.

    corrections  what is learned beside the times: some of shift, scale, coefficients
    order        the solver's, for the number of coefficients
    """

    kind = "one-shot"

    def __init__(
        self, noise: NoiseSchedule, static_times: Tensor, shape: Sequence[int], *, corrections: Sequence[str] = (),
        order: int = 1, width: int = 24, hidden: int = 128, classes: int = 0, text: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.noise = noise
        self.options: dict[str, Any] = dict(
            shape=list(shape), corrections=list(corrections), order=order, width=width, hidden=hidden,
            classes=classes, text=text,
        )  # fmt: skip
        self.register_buffer("static_times", static_times.detach().to(torch.float64))
        self.static_times: Tensor
        self.space = GridSpace.learning(corrections, noise, self.steps, order)
        unit = torch.ones(self.space.size, dtype=torch.float64)
        unit[self.steps * (1 + self.space.shift) :] = SMALL_UNIT
        self.register_buffer("unit", unit, persistent=False)
        self.unit: Tensor
        self.encoder = Encoder(
            shape[0], self.space.size, width=width, hidden=hidden, size=(shape[1], shape[2]), classes=classes, text=text
        )

    @property
    def steps(self) -> int:
        return self.static_times.shape[-1] - 1

    def standardise(self, states: Tensor, x0: Tensor) -> None:
        """Measure the inputs on solves along the static grid: states and x0 `(n, N+1, ...)`, `(n, N, ...)`."""
        self.encoder.standardise(0, states[:, 0] / noise_scale(self.noise))

    def forward(self, x_T: Tensor, condition: Mapping[str, Any] | None = None) -> TimeGrid:
        """The grids `(B, N+1)` for the starting noise `(B, C, H, W)`."""
        correction = self.encoder(x_T / noise_scale(self.noise), 0, condition).double()
        static = self.space.numbers(TimeGrid(self.static_times))
        return self.space.grid(static + self.unit * shorten_gradient(correction))

    def policy(self) -> FromNoise:
        """The step policy that asks this network once, at the start."""
        return FromNoise(self)
