"""One-shot schedules: a network maps the starting noise (and the condition) to a whole grid, before sampling.

    z_b = z_static + unit * f(x_T, c)_b        grid_b = GridSpace.grid(z_b)                      (ALD3; INDIS)

z holds the logits of the times and, where they are learned, the corrections that travel with a grid (`grids.space`).
f is zero before training, so that an untrained predictor *is* the static grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.between import among, mixed
from ts_adapt.interfaces import StepPolicy, TimeGrid
from ts_adapt.numerics import shorten_gradient
from ts_adapt.policies import FromNoise
from ts_adapt.predictors.predictor import Predictor
from ts_adapt.sampling import noise_scale


class OneShot(Predictor):
    """Predicts grids as corrections to static ones; see `Predictor`."""

    kind = "one-shot"
    pictures = 1
    every_step = False

    def shared(self, grid: TimeGrid) -> Tensor:
        space = self.space(grid.steps)
        numbers = (space.numbers(grid) - space.numbers(TimeGrid(grid.times))) / space.unit
        return torch.nn.functional.pad(numbers, (0, self.encoder.bias.shape[1] - space.size))[None]

    def standardise(self, steps: int, states: Tensor, x0: Tensor) -> None:
        self.encoder.standardise(self.places(steps).start, self._picture(states[:, 0]))

    def first_picture(self, x_T: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return self._picture(x_T)

    def _picture(self, x_T: Tensor) -> Tensor:
        return x_T / noise_scale(self.noise_schedule)

    def forward(self, x_T: Tensor, condition: Mapping[str, Any] | None = None, *, steps: int | None = None) -> TimeGrid:
        """The grids `(B, N+1)` for the starting noise `(B, C, H, W)`; `steps` is N, as in `policy`."""
        steps = self._steps(steps)
        space, static, picture = self.space(steps), self.static(steps), self._picture(x_T)

        def of(others: int) -> Tensor:
            widths = self.space(others).widths
            numbers = self.encoder(picture, self.places(others).start, condition)[:, : others * sum(widths)]
            blocks = numbers.split([others * width for width in widths], 1)
            rows = torch.cat([block.unflatten(1, (others, -1)) for block in blocks], -1)
            found = [mixed((part, rows[:, j]) for j, part in among(i, steps, others)) for i in range(steps)]
            parts = self.fitted(torch.stack(found, 1), others, steps).split(space.widths, -1)
            return torch.cat([part.flatten(1) for part in parts], 1)

        correction = shorten_gradient(mixed((share, of(others)) for others, share in self.near(steps)).double())
        return space.grid(space.numbers(TimeGrid(static)) + space.unit.to(correction.device) * correction)

    def policy(self, steps: int | None = None, first: int = 0) -> StepPolicy:
        """The step policy that asks this network once, at the start; TsAdaptError for a later `first`."""
        if first:
            raise TsAdaptError("a one-shot predictor looks at pure noise; it cannot begin inside a grid")
        steps = self._steps(steps)
        return self._complete(FromNoise(partial(self, steps=steps), self.static(steps)), steps)
