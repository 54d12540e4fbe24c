"""Fixed grids: shared ends, their defining equations, equality with the published originals."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from noise_schedules import NOISES, SD, assert_falls
from ts_adapt.assembly import SOLVERS, build_solver
from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import FIXED, NATIVE, make
from ts_adapt.interfaces import TimeGrid
from ts_adapt.noise import edm_sigma
from ts_adapt.numerics import validate_times
from ts_adapt.policies import FromNoise
from ts_adapt.sampling import integrate, noise_for
from ts_adapt.solvers import DDIM

CONTINUOUS = ["vp", "cosine", "edm", "flow"]
SHARED_RULE = {"linear": ["ddim", "trailing", "uniform"], "log_snr": ["exponential"]}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FIXED)), st.sampled_from(sorted(NOISES)), st.integers(1, 200))
def test_every_family_falls_strictly_between_the_shared_ends(name: str, schedule: str, steps: int) -> None:
    assert_falls(make(name, NOISES[schedule], steps), NOISES[schedule], steps)


@pytest.mark.parametrize("schedule", sorted(NOISES))
def test_names_that_differ_by_their_originals_only_are_one_grid_between_shared_ends(schedule: str) -> None:
    times = {name: tuple(make(name, NOISES[schedule], 9).tolist()) for name in FIXED}
    for name, others in SHARED_RULE.items():
        assert {times[other] for other in others} == {times[name]}
    assert len(set(times.values())) == len(set(FIXED.values())) < len(FIXED)


@pytest.mark.parametrize("schedule", ["sd", "vp", "cosine", "edm"])
def test_defining_equations(schedule: str) -> None:
    noise_schedule = NOISES[schedule]

    def assert_even(values: torch.Tensor) -> None:
        torch.testing.assert_close(values.diff(), values.diff().mean().expand(12), rtol=1e-6, atol=1e-10)

    assert_even(make("linear", noise_schedule, 12))
    assert_even(make("quadratic", noise_schedule, 12).sqrt())
    assert_even(noise_schedule.log_snr(make("log_snr", noise_schedule, 12)))
    assert_even(edm_sigma(noise_schedule, make("karras", noise_schedule, 12)) ** (1 / 7))
    share = (make("beta", noise_schedule, 12) - noise_schedule.t_min) / (noise_schedule.t_max - noise_schedule.t_min)
    assert_even(torch.as_tensor(scipy.stats.beta.cdf(share.clamp(0, 1).numpy(), 0.6, 0.6)))


@pytest.mark.parametrize(("schedule", "ends"), [("flow", (0, -1)), ("zero_snr", (0,)), ("edm_to_0", (-1,))])
@pytest.mark.parametrize("name", ["karras", "log_snr"])
def test_infinite_ends_are_pinned_outside_the_finite_rest(schedule: str, ends: tuple[int, ...], name: str) -> None:
    noise_schedule = NOISES[schedule]
    log_snr = noise_schedule.log_snr(make(name, noise_schedule, 6))
    assert all(math.isinf(float(log_snr[end])) for end in ends)
    assert bool(torch.isfinite(log_snr[1:-1]).all())


@pytest.mark.parametrize("steps", [1, 3, 5, 7, 10, 20, 50, 99])
@pytest.mark.parametrize(("name", "spacing"), [("ddim", "leading"), ("trailing", "trailing")])
def test_native_integers_equal_diffusers(steps: int, name: str, spacing: str) -> None:
    scheduler: Any = DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=name == "ddim", **SD)
    scheduler.set_timesteps(steps)
    times = make(name, NOISES["sd"], steps, native=True)
    assert times[:-1].tolist() == scheduler.timesteps.tolist()
    end = NOISES["sd"].alpha(times[-1]).square()
    assert float(end) == pytest.approx(float(scheduler.final_alpha_cumprod), rel=1e-6)


def test_a_solve_along_ddims_original_is_that_of_diffusers_to_sigma_0() -> None:
    denoiser = GaussianDenoiser(NOISES["sd"], torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 0.3))
    options = {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "leading"}
    scheduler: Any = DDIMScheduler(**SD, **options)
    scheduler.set_timesteps(10)
    x = noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.double()), int(t), x).prev_sample
    grid = make("ddim", NOISES["sd"], 10, native=True)
    torch.testing.assert_close(integrate(denoiser, DDIM(NOISES["sd"]), grid, noise).x, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 10, 25])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("karras", "use_karras_sigmas"),
        ("log_snr", "use_exponential_sigmas"),
        ("exponential", "use_exponential_sigmas"),
    ],
)
def test_native_sigmas_are_those_of_diffusers_or_the_timesteps_nearest_to_them(
    steps: int, name: str, option: str
) -> None:
    plain: Any = EulerDiscreteScheduler(**SD)
    scheduler: Any = EulerDiscreteScheduler(**SD, **{option: True})
    scheduler.set_timesteps(steps)
    times = make(name, NOISES["sd"], steps, native=True)
    if name == "exponential":
        torch.testing.assert_close(edm_sigma(NOISES["sd"], times), scheduler.sigmas.double(), rtol=2e-4, atol=0)
        return
    table = ((1 - plain.alphas_cumprod) / plain.alphas_cumprod).sqrt().numpy()
    nearest = [int(np.abs(table - sigma).argmin()) for sigma in scheduler.sigmas[:-1].numpy()]
    assert times[:-1].tolist() == nearest and float(NOISES["sd"].sigma(times[-1])) == 0


def test_sigma_0_is_the_end_of_a_grid_and_no_place_of_evaluation() -> None:
    noise_schedule = NOISES["sd"]
    beyond = torch.tensor([0.0, -0.5, -0.999, -1.0], dtype=torch.float64)
    assert bool((noise_schedule.log_snr(beyond).diff() > 0).all()) and float(noise_schedule.alpha(beyond[-1])) == 1
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(noise_schedule.log_snr(t), t)  # where all other grids end nothing has changed
    assert float(slope) == pytest.approx(float(noise_schedule.log_snr(torch.tensor(1.0)) - noise_schedule.log_snr(t)))
    for times in ([900.0, -0.5], [900.0, -0.5, -1.0], [900.0, -2.0]):
        with pytest.raises(TsAdaptError, match="outside the noise schedule"):
            validate_times(torch.tensor(times), noise_schedule)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_every_solver_reaches_sigma_0_of_a_table(name: str) -> None:
    noise_schedule = NOISES["sd"]
    denoiser = GaussianDenoiser(noise_schedule, torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 0.3))
    solver = build_solver(name, noise_schedule)
    x = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    grid = make("karras", noise_schedule, 12, native=True)
    noise = noise_for(0, range(8), x) if solver.needs_noise else None
    if name in ("heun", "deis-1", "deis-2", "deis-3"):  # whose coefficients are infinite there
        unknown = FromNoise(lambda x_T, condition: TimeGrid(grid))  # at its end only
        for schedule, known in ((grid, True), (unknown, False)):
            denoiser.evaluations = 0
            with pytest.raises(TsAdaptError, match="end the grid at sigma > 0"):
                integrate(denoiser, solver, schedule, x)
            assert (denoiser.evaluations == 0) == known
        return
    end = integrate(denoiser, solver, grid, x, step_noise=noise).x
    assert bool(torch.isfinite(end).all()) and float(end.mean()) == pytest.approx(0.5, abs=0.3)


def test_native_originals_that_reach_sigma_0_have_n_sigmas_and_a_0() -> None:
    for name, power in (("karras", 1 / 7), ("exponential", 0)):
        times = make(name, NOISES["edm_to_0"], 6, native=True)
        sigmas = times[:-1].pow(power) if power else times[:-1].log()
        torch.testing.assert_close(sigmas.diff(), sigmas.diff().mean().expand(5))
        assert float(times[-1]) == 0 and len(times) == 7


def test_native_linear_quadratic_and_beta_are_the_published_formulas() -> None:
    noise_schedule, steps = NOISES["sd"], 10
    assert make("linear", noise_schedule, steps, native=True).tolist() == [round(999 - i * 999 / 10) for i in range(11)]
    ramp = (np.linspace(0, math.sqrt(1000 * 0.8), steps) ** 2).astype(int) + 1
    assert make("quadratic", noise_schedule, steps, native=True).tolist() == [*ramp[::-1].tolist(), 0]
    quantiles = scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
    assert make("beta", noise_schedule, steps, native=True).tolist() == [*np.rint(quantiles * 999).tolist(), -1]
    for count in (2, 6, 7, 18, 54, 99):
        literal = [round(999 - i * 999 / count) for i in range(count + 1)]
        assert make("linear", noise_schedule, count, native=True).tolist() == literal


@pytest.mark.parametrize("schedule", sorted(NOISES))
def test_families_that_are_their_own_originals(schedule: str) -> None:
    for name in set(FIXED) - set(NATIVE):
        assert torch.equal(make(name, NOISES[schedule], 7, native=True), make(name, NOISES[schedule], 7))


@pytest.mark.parametrize(
    ("name", "schedule", "steps", "message"),
    [
        *((name, schedule, 5, f"native {name} .*leave native=True out")
          for name in ("linear", "ddim", "trailing", "quadratic", "beta") for schedule in CONTINUOUS),
        *((name, "sd", steps, f"native {name} grid over {steps} steps is twice the same time")
          for name, steps in (("linear", 1200), ("ddim", 1200), ("quadratic", 100), ("beta", 400))),
        *(("karras", "sd", steps, f"steps is {steps}") for steps in (0, -3)),
    ],
)  # fmt: skip
def test_originals_that_do_not_exist_are_refused(name: str, schedule: str, steps: int, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        make(name, NOISES[schedule], steps, native=True)


def test_an_unknown_name_lists_the_known_and_suggests_the_near() -> None:
    with pytest.raises(TsAdaptError, match="did you mean 'karras'") as error:
        make("karas", NOISES["sd"], 5)
    assert all(re.search(rf"\b{name}\b", str(error.value)) for name in FIXED)


def test_one_step_goes_from_end_to_end() -> None:
    for noise_schedule in NOISES.values():
        for name in FIXED:
            assert make(name, noise_schedule, 1).tolist() == [noise_schedule.t_max, noise_schedule.t_min]
