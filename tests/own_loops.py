"""A scheduler in a loop of one's own, as the documentation shows it, and `integrate` in its place."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from noise_schedules import SD
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.grids import fixed
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.sampling import integrate
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.file import LearnedGrid

CONFIG = DDIMScheduler(**SD).config
V_CONFIG = DDIMScheduler(prediction_type="v_prediction").config
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0).config
NOISE = BetaTable.from_config(CONFIG)
X_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Smooth(nn.Module):
    """A network whose answer depends on the state and on each row's time."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x + timestep.reshape(-1, 1, 1, 1) / 500)


def by_hand(schedule: LearnedScheduler, steps: int, x: Tensor = X_T, generator: Any = None, **options: Any) -> Tensor:
    """A loop of one's own, as the documentation shows it."""
    schedule.set_timesteps(steps, **options)
    for t in schedule.timesteps:
        timestep = schedule.network_timesteps(x)
        x = schedule.step(Smooth()(x, timestep), t, x, generator=generator).prev_sample
    return x


def our_own(schedule: LearnedScheduler, policy: Any, x: Tensor = X_T, **options: Any) -> Tensor:
    denoiser = NetworkDenoiser(Smooth(), schedule.noise_schedule, schedule.prediction, shape=(1, 4, 4))
    return integrate(denoiser, build_solver(schedule.config["solver"], schedule.noise_schedule), policy, x, **options).x


def grid(steps: int = 5, noise_schedule: Any = NOISE) -> TimeGrid:
    times = fixed.make("karras", noise_schedule, steps)
    return TimeGrid(torch.cat([times[:1], 0.9 * times[1:-1], times[-1:]]))


def learned(steps: int) -> LearnedGrid:
    return LearnedGrid(grid(steps), "unipc-3", steps, {"model": "tiny", "distance": "l2", "seed": steps})
