"""What a diffusion network is trained on: times, and noisy data with what is to be predicted of them.

x_t = alpha_t x_0 + sigma_t eps        target: eps, or v = alpha_t eps - sigma_t x_0
"""

from __future__ import annotations

import torch
from torch import Tensor

from ts_adapt.noise import BetaTable
from ts_adapt.numerics import combine

PREDICTIONS = ("v_prediction", "epsilon")


def noised(
    x_0: Tensor, t: Tensor, noise_schedule: BetaTable, generator: torch.Generator, prediction: str = "v_prediction"
) -> tuple[Tensor, Tensor]:
    """x_t and what the network is to predict at real times t, one of PREDICTIONS."""
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    eps = torch.randn(x_0.shape, generator=generator)
    target = eps if prediction == "epsilon" else combine((alpha, eps), (-sigma, x_0))
    return combine((alpha, x_0), (sigma, eps)), target


def training_times(count: int, smooth: bool, generator: torch.Generator) -> Tensor:
    """Times `(count,)` for a batch, one from each of `count` equal parts of the schedule: real-valued or timesteps."""
    shares = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return 999 * shares if smooth else (1000 * shares).floor().clamp(max=999)


def validation_times(count: int, generator: torch.Generator) -> Tensor:
    """Real times `(count,)` that are spread evenly over the schedule, in a random order."""
    t = 999 * (torch.arange(count) + 0.5) / count
    return t[torch.randperm(count, generator=generator)]
