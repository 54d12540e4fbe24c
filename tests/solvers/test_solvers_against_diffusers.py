"""Equality with diffusers' schedulers on integer timesteps, given the same x0 at every step.

diffusers keeps its sigmas in float32; they are replaced by the float64 ones of the same betas. DPM-Solver and
Euler compute in float32 even so, whence their tolerance of 1e-6.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from noise_schedules import SD
from ts_adapt.interfaces import Denoiser
from ts_adapt.noise import BetaTable
from ts_adapt.sampling import integrate
from ts_adapt.solvers import DDIM, DEIS, DPMSolverPP, Euler, UniPC

CONFIG = {"num_train_timesteps": 1000, **SD}


class Toy(Denoiser):
    """A nonlinear x0 of x_t and the timestep."""

    def __init__(self, noise_schedule):
        self.noise_schedule, self.evaluations = noise_schedule, 0

    def __call__(self, x_t, t, *, model_time=None, output_scale=None, **condition):
        self.evaluations += 1
        return torch.tanh(x_t) * torch.cos(t / 300) + 0.3 * torch.sin(2 * x_t)

    def decode(self, x):
        return x


@pytest.fixture
def noise_schedule():
    return BetaTable.from_config(CONFIG)


def start(dtype=torch.float64):
    return torch.randn(3, 2, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def run_diffusers(scheduler, noise_schedule, steps, x):
    """The states of a solve by `scheduler` down to timestep 0, and the times it used."""
    scheduler.set_timesteps(steps)
    times = torch.cat([scheduler.timesteps.double(), torch.zeros(1, dtype=torch.float64)])
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = noise_schedule.sigma(times) / noise_schedule.alpha(times)
    toy, states = Toy(noise_schedule), [x]
    for t in scheduler.timesteps:
        scale_input = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
        scale_input(x, t)
        x = scheduler.step(toy(x, t.double()), t, x).prev_sample
        states.append(x)
    return torch.stack(states, 1), times


MULTISTEP = {
    "2M": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}, lambda n: DPMSolverPP(n, 2)),
    "2M heun": (
        diffusers.DPMSolverMultistepScheduler,
        {"solver_order": 2, "solver_type": "heun"},
        lambda n: DPMSolverPP(n, 2, exact=True),
    ),
    "2M to the end": (
        diffusers.DPMSolverMultistepScheduler,
        {"solver_order": 2, "lower_order_final": False},
        lambda n: DPMSolverPP(n, 2, lower_order_final=False),
    ),
    "3M": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}, lambda n: DPMSolverPP(n, 3)),
    "deis1": (diffusers.DEISMultistepScheduler, {"solver_order": 1}, lambda n: DEIS(n, 1)),
    "deis2": (diffusers.DEISMultistepScheduler, {"solver_order": 2}, lambda n: DEIS(n, 2)),
    "deis3": (diffusers.DEISMultistepScheduler, {"solver_order": 3}, lambda n: DEIS(n, 3)),
    **{
        f"unipc{order} {variant} {'lowered' if lowered else 'full'}": (
            diffusers.UniPCMultistepScheduler,
            {"solver_order": order, "solver_type": variant, "lower_order_final": lowered},
            lambda n, order=order, variant=variant, lowered=lowered: UniPC(n, order, variant, lowered),
        )
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
        for lowered in (True, False)
    },
}


@pytest.mark.parametrize("steps", [1, 2, 6, 20])
@pytest.mark.parametrize("case", MULTISTEP)
def test_multistep_solvers(case, steps, noise_schedule):
    cls, options, solver_of = MULTISTEP[case]
    if cls is not diffusers.DEISMultistepScheduler:  # which always ends at timestep 0
        options = {"final_sigmas_type": "sigma_min", **options}
    scheduler = cls(**CONFIG, prediction_type="sample", **options)
    theirs, times = run_diffusers(scheduler, noise_schedule, steps, start())
    toy = Toy(noise_schedule)
    ours = integrate(toy, solver_of(noise_schedule), times, start(), keep_trajectory=True).states
    assert toy.evaluations == steps
    tolerance = 1e-6 if cls is diffusers.DPMSolverMultistepScheduler else 1e-12
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta, noise_schedule):
    scheduler = diffusers.DDIMScheduler(**CONFIG, prediction_type="sample", clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = noise_schedule.alpha(torch.arange(1000)).square()
    scheduler.set_timesteps(10)
    steps = len(scheduler.timesteps) - 1  # its last step goes from timestep 0 to timestep 0
    draws = torch.randn(steps, *start().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    toy, x = Toy(noise_schedule), start()
    for i, t in enumerate(scheduler.timesteps[:steps]):
        extra = {"eta": eta, "variance_noise": draws[i]} if eta else {}
        x = scheduler.step(toy(x, t.double()), t, x, **extra).prev_sample
    times = scheduler.timesteps.double()
    ours = integrate(toy, DDIM(noise_schedule, eta), times, start(), step_noise=lambda i: draws[i]).x
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_euler(noise_schedule):
    scheduler = diffusers.EulerDiscreteScheduler(
        **CONFIG, prediction_type="original_sample", timestep_spacing="leading"
    )
    scheduler.set_timesteps(10)
    times = scheduler.timesteps.double()
    scheduler.sigmas = noise_schedule.sigma(times) / noise_schedule.alpha(times)
    toy, x = Toy(noise_schedule), start()
    ours = integrate(toy, Euler(noise_schedule), times, x).x
    y = x / noise_schedule.alpha(times[0])
    for t in scheduler.timesteps[:-1]:
        x0 = toy(scheduler.scale_model_input(y, t), t.double())
        y = scheduler.step(x0, t, y).prev_sample
    torch.testing.assert_close(ours, y * noise_schedule.alpha(times[-1]), rtol=1e-6, atol=1e-6)
