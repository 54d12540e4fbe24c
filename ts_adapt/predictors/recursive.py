"""Recursive schedules: a network maps the state at t_i to the next time t_{i+1}, while sampling (ALD3's delta).

With u in [0, 1] the position of a time in log-SNR between the ends of the grid, the share of the rest that the next
step takes is predicted as a correction to the static grid's:

    r_i = sigmoid(logit(r_static,i) + f(x_t, x0, u_i, left_i))      u_{i+1} = u_i + r_i (1 - u_i)       u_N = 1

f sees the state, the x0 just computed there, the position and the share of steps left. It is zero before training, so
that an untrained predictor *is* the static grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.interfaces import Condition, Node, NoiseSchedule
from ts_adapt.numerics import finite_log_snr_range, scale
from ts_adapt.policies import StepByStep
from ts_adapt.predictors.encoder import Encoder

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
    """Predicts each next time as a correction to `static_times` `(N+1,)`, for samples of `shape` `(C, H, W)`."""

    kind = "recursive"

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
            2 * shape[0],
            1,
            scalars=3,
            width=width,
            hidden=hidden,
            size=(shape[1], shape[2]),
            classes=classes,
            text=text,
        )

    @property
    def steps(self) -> int:
        return self.static_times.shape[-1] - 1

    def share_logit(self, x_t: Tensor, x0: Tensor, t: Tensor, index: int | Tensor, condition: Condition) -> Tensor:
        """logit(r_i) `(B,)`, float64, for states `(B, C, H, W)` at `t` and step `index`, each `()` or `(B,)`."""
        batch = x_t.shape[0]
        index = torch.as_tensor(index, device=x_t.device).expand(batch)
        t = t.to(x_t.device).expand(batch)
        static = torch.logit(shares(self.static_times, self.noise))[index]
        norm = (self.noise.alpha(t).square() + self.noise.sigma(t).square()).rsqrt()
        u = positions(t, self.noise)
        left = (self.steps - index) / self.steps
        scalars = torch.stack([u, left, u * left], 1)
        picture = torch.cat([scale(norm, x_t), x0], 1)
        correction: Tensor = self.encoder(picture, scalars, condition)
        return static + correction.squeeze(1).double()

    def forward(self, x_t: Tensor, x0: Tensor, node: Node, condition: Condition) -> Node:
        """The next node; the last one is the end of the grid, exactly."""
        after = node.index + 1
        if after == self.steps:
            t_end = self.static_times[-1].expand(x_t.shape[0])
            return Node(after, self.steps, t_end)
        r = torch.sigmoid(self.share_logit(x_t, x0, node.t, node.index, condition)).clamp(MIN_SHARE, 1 - MIN_SHARE)
        u = positions(node.t, self.noise)
        return Node(after, self.steps, times_at(u + r * (1 - u), self.noise))

    def policy(self, first: int = 0) -> StepByStep:
        """The step policy that asks this network at every step, from node `first` of the static grid on."""
        return StepByStep(Node(first, self.steps, self.static_times[first]), self)
