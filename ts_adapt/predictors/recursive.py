"""Recursive schedules: a network maps the state at t_i to the step from there, while sampling (ALD3's delta, widened).

With u in [0, 1] the position of a time in log-SNR between the ends of the grid, L the length between them and
f = f(x_t, x0, x0 - x0 of the step before, i):

    times         r_i = sigmoid(logit(r_static,i) + f_t)      u_{i+1} = u_i + r_i (1 - u_i)       u_N = 1
    shift         the model time of t_{i+1} is at u_{i+1} + f_d / L
    scale         the output scale at t_{i+1} is 1 + b tanh(f_o / b)
    coefficients  c_k = f_k, in the step from t_i to t_{i+1}

A step takes a share r of the rest that is left. The last three are learned where asked for; the last step ends at t_N
whatever f_t, and has coefficients only. f is zero before training: an untrained predictor *is* the static grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.grids.space import SCALE_BOUND, GridSpace
from ts_adapt.interfaces import Condition, Node, NoiseSchedule
from ts_adapt.numerics import finite_log_snr_range, scale
from ts_adapt.predictors.encoder import Encoder, shorten_gradient
from ts_adapt.predictors.one_shot import SMALL_UNIT

MIN_SHARE = 1e-4


def positions(times: Tensor, noise: NoiseSchedule) -> Tensor:
    """u in [0, 1] of `times` (any shape): 0 at t_max, 1 at t_min, linear in log-SNR between."""
    low, high = finite_log_snr_range(noise)
    return ((noise.log_snr(times).clamp(low, high) - low) / (high - low)).clamp(0, 1)


def times_at(u: Tensor, noise: NoiseSchedule) -> Tensor:
    """The inverse of `positions`, strictly inside the ends."""
    low, high = finite_log_snr_range(noise)
    return noise.time(low + u * (high - low))


def shares(times: Tensor, noise: NoiseSchedule) -> Tensor:
    """r_i = (u_{i+1} - u_i) / (1 - u_i) of grids `(..., N+1)`, for the N-1 steps that are free: `(..., N-1)`."""
    u = positions(times, noise)
    r = (u[..., 1:-1] - u[..., :-2]) / (1 - u[..., :-2])
    return r.clamp(MIN_SHARE, 1 - MIN_SHARE)


class Recursive(nn.Module):
    """Predicts each next step as a correction to `static_times` `(N+1,)`, for samples of `shape` `(C, H, W)`.

    corrections, order  as in `OneShot`
    """

    kind = "recursive"

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
        self.encoder = Encoder(
            3 * shape[0], self.space.size // self.steps, steps=self.steps, width=width, hidden=hidden,
            size=(shape[1], shape[2]), classes=classes, text=text,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return self.static_times.shape[-1] - 1

    def standardise(self, states: Tensor, x0: Tensor) -> None:
        """Measure the inputs on solves along the static grid: states and x0 `(n, N+1, ...)`, `(n, N, ...)`."""
        for i in range(self.steps):
            picture = self.picture(states[:, i], x0[:, i], x0[:, i - 1] if i else None, self.static_times[i])
            self.encoder.standardise(i, picture)

    def picture(self, x_t: Tensor, x0: Tensor, before: Tensor | None, t: Tensor) -> Tensor:
        """What the network sees `(B, 3 C, H, W)`; `before` is the x0 of the step before, None at the first."""
        norm = (self.noise.alpha(t).square() + self.noise.sigma(t).square()).rsqrt()
        return torch.cat([scale(norm, x_t), x0, torch.zeros_like(x0) if before is None else x0 - before], 1)

    def share(self, numbers: Tensor, step: int | Tensor) -> Tensor:
        """r_i `(B,)` of the network's numbers `(B, P)` at `step`, shared or one of every row."""
        static = torch.logit(shares(self.static_times, self.noise))[step]
        return torch.sigmoid(static + numbers[:, 0]).clamp(MIN_SHARE, 1 - MIN_SHARE)

    def forward(self, x_t: Tensor, x0: Tensor, before: Tensor | None, node: Node, condition: Condition) -> Node:
        """The next node; the last one is the end of the grid, exactly."""
        after, batch, space = node.index + 1, x_t.shape[0], self.space
        seen = self.picture(x_t, x0, before, node.t.to(x_t.device).expand(batch))
        numbers = shorten_gradient(self.encoder(seen, node.index, condition).double())
        _, d, o, c = numbers.split([1, int(space.shift), int(space.scale), space.order], 1)
        coefficients = SMALL_UNIT * c if space.order else None
        if after == self.steps:
            return Node(after, self.steps, self.static_times[-1].expand(batch), coefficients=coefficients)
        u = positions(node.t, self.noise).to(numbers.device)
        u = u + self.share(numbers, node.index) * (1 - u)
        t, model_time, output_scale = times_at(u, self.noise), None, None
        if space.shift:
            low, high = finite_log_snr_range(self.noise)
            model_time = times_at((u + d.squeeze(1) / (high - low)).clamp(0, 1), self.noise)
        if space.scale:
            output_scale = 1 + SCALE_BOUND * torch.tanh(SMALL_UNIT * o.squeeze(1) / SCALE_BOUND)
        return Node(after, self.steps, t, model_time, output_scale, coefficients)

    def policy(self, first: int = 0) -> AtEveryStep:
        """The step policy that asks this network at every step, from node `first` of the static grid on."""
        return AtEveryStep(self, first)


@dataclass(frozen=True)
class AtEveryStep:
    """Asks `predictor` for the step from every node. Its state: the condition, and the x0 of the step before."""

    predictor: Recursive
    first: int = 0

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        start = Node(self.first, self.predictor.steps, self.predictor.static_times[self.first])
        return start, (condition, None)

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        condition, before = state
        return self.predictor(x_t, x0, before, node, condition), (condition, x0)
