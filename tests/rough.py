"""Denoisers that are rough in time between places where nobody looks, as networks trained at integer times are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser
from ts_adapt.denoisers.network import NetworkDenoiser


class Rough:
    """x0 + size sin(2 pi t' / period) cos(3 x_t), x0 of `denoiser` and t' what it is told: small, and steep in t'.

    period  a share of the range of the times
    """

    def __init__(self, denoiser: Any, period: float, size: float) -> None:
        self.denoiser, self.size = denoiser, size
        self.frequency = 2 * math.pi / (period * (denoiser.noise_schedule.t_max - denoiser.noise_schedule.t_min))

    def __getattr__(self, name: str) -> Any:
        if name == "denoiser":
            raise AttributeError(name)
        return getattr(self.denoiser, name)

    def __call__(self, x_t: Tensor, t: Tensor, *, model_time: Tensor | None = None, **given: Any) -> Tensor:
        told = torch.as_tensor(t if model_time is None else model_time, dtype=torch.float64)
        wave = (self.size * torch.sin(self.frequency * told)).reshape(-1, *[1] * (x_t.ndim - 1))
        x0: Tensor = self.denoiser(x_t, t, model_time=model_time, **given)
        return x0 + (wave * torch.cos(3 * x_t)).to(x0)


class Embedded(nn.Module):
    """The x0 of a mixture as a network of diffusers' kind: it is told timesteps by an embedding, whose fast part adds
    a wiggle of `size` to what its slow part says.

    size  of the wiggle; its period is 2 pi timesteps
    """

    def __init__(self, mixture: GaussianMixtureDenoiser, size: float) -> None:
        from diffusers.models.embeddings import Timesteps

        super().__init__()
        self.mixture, self.size = mixture, size
        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        embedding = self.time_proj(timestep)
        fast, slowest = embedding[:, 32], embedding[:, 63]
        t = torch.asin(slowest.double()) / 10_000 ** (-31 / 32) / 1000
        x0 = self.mixture(x, t.clamp(self.mixture.noise_schedule.t_min, self.mixture.noise_schedule.t_max))
        return x0 + self.size * fast.reshape(-1, 1, 1, 1).to(x0) * torch.cos(3 * x)


def embedded(mixture: GaussianMixtureDenoiser, size: float) -> NetworkDenoiser:
    """`Embedded` as a denoiser, told 1000 t."""
    return NetworkDenoiser(
        Embedded(mixture, size), mixture.noise_schedule, "sample", shape=mixture.shape, time_scale=1000.0
    )
