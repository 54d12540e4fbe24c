"""Learned weights on all that a solve has met so far (GS, arXiv:2510.17699), whatever the solver and its order.

In step i, from t to s with h = lambda_s - lambda_t, they are added to the solver's own x_s:

    x_s += (1 - e^-h) (b sigma_s eps_i + alpha_s (a_0 x0_i + sum_{k=1..i} a_k (x0_{i-k} - x0_i)))
    eps_i = (x_t - alpha_t x0_i) / sigma_t

GS weighs every past state x_j too. Here one state is enough: a deterministic solver's x_j are linear in x_T and in
x0_0 .. x0_{j-1}, so that x_t and x0_0 .. x0_i span all of them, and any combination is reached by one choice of b and
a. Whatever the solver does beneath, a corrector included, x_s can be any of them, and x_s is where the network looks
next. Weights on differences sum to zero by themselves: where the predictions agree they do nothing, and what they do
shrinks with the step twice. The DDIM step takes alpha_s (1 - e^-h) of x0, so that a weight of .1 is a tenth of what
the step takes in, at any noise level; b is the same share of the noise sigma_s eps that x_s has. Zeros change nothing.

The weights of a step are one row `(N + 1,)` or `(B, N + 1)`: b, a_0, a_1, ...; those of predictions not yet met wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import HISTORY, Node, NoiseSchedule
from ts_adapt.numerics import combine
from ts_adapt.solvers.coefficients import place


@dataclass(frozen=True)
class Past:
    """The `memory` of any solver, and the predictions x0 `(B, ...)` of all steps before, newest first."""

    memory: Any
    x0: tuple[Tensor, ...] = ()


def weighted(
    x_s: Tensor, x_t: Tensor, x0: Tensor, past: Sequence[Tensor], node: Node, next_node: Node,
    noise_schedule: NoiseSchedule,
) -> Tensor:  # fmt: skip
    """`x_s` with what the weights of `next_node` add; states and predictions `(B, ...)`, `past` newest first.

    Raises TsAdaptError for a row of another width.
    """
    row = next_node.held[HISTORY]
    if row.shape[-1] != next_node.steps + 1:
        raise TsAdaptError(
            f"the grid has {row.shape[-1]} weights of history a step, and its {next_node.steps} steps take "
            f"{next_node.steps + 1}; give one for the state and one for each prediction"
        )
    t, s = place(noise_schedule, node.t), place(noise_schedule, next_node.t)
    share = -torch.expm1(t.log_snr - s.log_snr)
    b, a_0, *later = row.to(share).unbind(-1)
    a = later[: len(past)]
    of_noise, of_data = share * s.sigma / t.sigma * b, share * s.alpha
    of_x0 = of_data * (a_0 - sum(a)) - t.alpha * of_noise
    terms = ((of_data * a_k, x0_k) for a_k, x0_k in zip(a, past, strict=True))
    return combine((torch.ones_like(share), x_s), (of_noise, x_t), (of_x0, x0), *terms)
