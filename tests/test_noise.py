"""Noise schedules: inversion, equality with diffusers' tables, gradients, the meaning of the ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from noise_schedules import SD
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import NoiseSchedule
from ts_adapt.noise import (
    BetaTable,
    ContinuousVP,
    Cosine,
    OnGrid,
    Preconditioned,
    RectifiedFlow,
    VarianceExploding,
    edm_sigma,
    time_of_edm_sigma,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": SD,
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": torch.linspace(0.001, 0.2, 50).tolist(), "num_train_timesteps": 50},
    "short": {"num_train_timesteps": 100, "beta_end": 0.2},
}
ZERO_SNR: dict[str, dict[str, Any]] = {
    name: {**CONFIGS[name], "rescale_betas_zero_snr": True} for name in ("linear", "scaled_linear", "squaredcos_cap_v2")
}


def diffusers_ddpm(config: dict[str, Any]) -> Any:
    return DDPMScheduler(**config)


NOISES: dict[str, NoiseSchedule] = {
    **{name: BetaTable.from_config(diffusers_ddpm(config).config) for name, config in CONFIGS.items()},
    **{f"zero_snr_{name}": BetaTable.from_config(config) for name, config in ZERO_SNR.items()},
    "vp": ContinuousVP(),
    "cosine": Cosine(),
    "edm": VarianceExploding(),
    "preconditioned": Preconditioned(),
    "arctan": Preconditioned(told="arctan"),
    "flow": RectifiedFlow(),
}
VP = sorted(set(NOISES) - {"edm", "preconditioned", "arctan", "flow"})
schedules = pytest.mark.parametrize("name", sorted(NOISES))


def inside(noise_schedule: NoiseSchedule, count: int = 301) -> torch.Tensor:
    """Times between the ends, the ends left out, where lambda may be infinite."""
    return torch.linspace(noise_schedule.t_min, noise_schedule.t_max, count + 2, dtype=torch.float64)[1:-1]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(NOISES)), st.floats(0.0005, 0.9995))
def test_time_inverts_log_snr(name: str, share: float) -> None:
    noise_schedule = NOISES[name]
    t = torch.tensor(noise_schedule.t_min + share * (noise_schedule.t_max - noise_schedule.t_min), dtype=torch.float64)
    torch.testing.assert_close(noise_schedule.time(noise_schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)


@schedules
def test_time_inverts_log_snr_at_the_ends(name: str) -> None:
    noise_schedule = NOISES[name]
    ends = torch.tensor([noise_schedule.t_max, noise_schedule.t_min], dtype=torch.float64)
    torch.testing.assert_close(noise_schedule.time(noise_schedule.log_snr(ends)), ends, rtol=1e-9, atol=1e-9)


@schedules
def test_log_snr_falls_and_is_that_of_alpha_and_sigma(name: str) -> None:
    noise_schedule = NOISES[name]
    t = inside(noise_schedule)
    assert isinstance(noise_schedule, NoiseSchedule)
    assert bool((noise_schedule.log_snr(t).diff() < 0).all())
    torch.testing.assert_close(
        noise_schedule.log_snr(t), torch.log(noise_schedule.alpha(t) / noise_schedule.sigma(t)), rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(
        edm_sigma(noise_schedule, t), noise_schedule.sigma(t) / noise_schedule.alpha(t), rtol=1e-7, atol=1e-12
    )
    torch.testing.assert_close(time_of_edm_sigma(noise_schedule, edm_sigma(noise_schedule, t)), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VP)
def test_vp_families_preserve_variance(name: str) -> None:
    t = inside(NOISES[name])
    square = NOISES[name].alpha(t).square() + NOISES[name].sigma(t).square()
    torch.testing.assert_close(square, torch.ones_like(square))


@schedules
def test_shapes_pass_through_in_float64(name: str) -> None:
    noise_schedule = NOISES[name]
    for shape in ((), (0,), (3,), (2, 4)):
        t = torch.full(shape, 0.5 * (noise_schedule.t_min + noise_schedule.t_max), dtype=torch.float32)
        for function in (
            noise_schedule.alpha,
            noise_schedule.sigma,
            noise_schedule.log_snr,
            lambda x: noise_schedule.time(noise_schedule.log_snr(x)),
        ):
            assert function(t).shape == shape and function(t).dtype == torch.float64


@schedules
def test_gradients(name: str) -> None:
    noise_schedule = NOISES[name]
    t = (inside(noise_schedule, 6) + 0.013 * (1 if isinstance(noise_schedule, BetaTable) else 0)).requires_grad_()
    eps = 1e-6 * (noise_schedule.t_max - noise_schedule.t_min)
    for function in (noise_schedule.alpha, noise_schedule.sigma, noise_schedule.log_snr):
        assert torch.autograd.gradcheck(function, t, eps=eps, atol=1e-6, rtol=1e-3)
    log_snr = noise_schedule.log_snr(t).detach().requires_grad_()
    assert torch.autograd.gradcheck(noise_schedule.time, log_snr, eps=1e-7, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_integers_reproduce_the_table_of_diffusers(name: str) -> None:
    table = diffusers_ddpm(CONFIGS[name]).alphas_cumprod.double()
    t = torch.arange(len(table))
    torch.testing.assert_close(NOISES[name].alpha(t).square(), table, rtol=2e-4, atol=1e-8)
    torch.testing.assert_close(NOISES[name].sigma(t).square(), 1 - table, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("name", sorted(ZERO_SNR))
def test_integers_reproduce_the_table_rescaled_to_zero_terminal_snr(name: str) -> None:
    scheduler: Any = DDIMScheduler(**ZERO_SNR[name])
    table = scheduler.alphas_cumprod.double()
    noise_schedule = BetaTable.from_config(ZERO_SNR[name])
    assert noise_schedule.zero_terminal_snr
    torch.testing.assert_close(noise_schedule.alpha(torch.arange(1000)).square(), table, rtol=2e-3, atol=1e-6)
    end = torch.tensor(noise_schedule.t_max)
    assert float(noise_schedule.log_snr(end)) == -math.inf
    assert float(noise_schedule.alpha(end)) == 0 and float(noise_schedule.sigma(end)) == 1
    assert float(noise_schedule.time(torch.tensor(-math.inf))) == noise_schedule.t_max


def test_lambda_is_linear_inside_a_cell_and_continuous_into_the_last() -> None:
    noise_schedule = NOISES["scaled_linear"]
    cell = noise_schedule.log_snr(torch.tensor([400.0, 400.25, 400.5, 401.0]))
    torch.testing.assert_close(cell[1:3], torch.lerp(cell[0], cell[3], torch.tensor([0.25, 0.5], dtype=torch.float64)))
    rescaled = NOISES["zero_snr_scaled_linear"]
    before, at, after = rescaled.log_snr(torch.tensor([998 - 1e-9, 998.0, 998 + 1e-9], dtype=torch.float64))
    torch.testing.assert_close(before, at)
    torch.testing.assert_close(after, at)


def test_gradients_are_finite_in_every_cell_of_a_zero_terminal_table() -> None:
    noise_schedule = NOISES["zero_snr_scaled_linear"]
    t = torch.tensor([10.5, 500.25, 997.5, 998.1, 998.9], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(noise_schedule.log_snr(t).sum(), t)
    assert bool((torch.isfinite(gradient) & (gradient < 0)).all())
    log_snr = noise_schedule.log_snr(t).detach().requires_grad_()
    (inverse,) = torch.autograd.grad(noise_schedule.time(log_snr).sum(), log_snr)
    torch.testing.assert_close(inverse, 1 / gradient)


def test_continuous_families_follow_their_equations() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(ContinuousVP().alpha(t), torch.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1))
    quarter = math.pi / 2
    alpha = torch.cos(quarter * (t + 0.008) / 1.008) / math.cos(quarter * 0.008 / 1.008)
    torch.testing.assert_close(Cosine().alpha(t), alpha)
    torch.testing.assert_close(VarianceExploding().sigma(t), t)
    torch.testing.assert_close(RectifiedFlow().alpha(t) + RectifiedFlow().sigma(t), torch.ones_like(t))


def test_flow_is_pure_noise_at_1_and_data_at_0() -> None:
    ends = torch.tensor([1.0, 0.0])
    assert RectifiedFlow().log_snr(ends).tolist() == [-math.inf, math.inf]


@schedules
def test_what_a_noise_schedule_alone_knows(name: str) -> None:
    """The sigma of other programs, there and back, the network's timestep, and the scale of pure noise."""
    noise_schedule = NOISES[name]
    t, flow = inside(noise_schedule), name == "flow"
    sigmas = noise_schedule.program_sigma(t)
    torch.testing.assert_close(sigmas, t if flow else edm_sigma(noise_schedule, t))
    torch.testing.assert_close(noise_schedule.time_of_program_sigma(sigmas), t, rtol=1e-9, atol=1e-9)
    assert noise_schedule.time_scale == (1000 if flow else 1)
    torch.testing.assert_close(noise_schedule.time_of_timestep(noise_schedule.timestep(t)), t, rtol=1e-9, atol=1e-9)
    expected = math.hypot(1, 80) if isinstance(noise_schedule, VarianceExploding) else 1
    assert noise_schedule.noise_scale == pytest.approx(expected, rel=1e-12)
    assert RectifiedFlow(time_scale=1.0).time_scale == 1


@schedules
def test_shares_of_the_times_are_even_as_the_network_knows_them(name: str) -> None:
    noise_schedule, share = NOISES[name], torch.linspace(0, 1, 9, dtype=torch.float64, requires_grad=True)
    t = noise_schedule.at_share(share)
    assert (t[0].item(), t[-1].item()) == pytest.approx((noise_schedule.t_min, noise_schedule.t_max), rel=1e-12)
    (slope,) = torch.autograd.grad(t.sum(), share)
    torch.testing.assert_close(noise_schedule.reach(t.detach(), 1.0), slope)


@schedules
def test_values_looked_up_on_a_grid_are_those_of_the_noise_schedule(name: str) -> None:
    noise_schedule = NOISES[name]
    times = inside(noise_schedule, 5)
    known = OnGrid(noise_schedule, times)
    assert isinstance(known, NoiseSchedule)
    off = times[1] + 1e-3 * (times[2] - times[1])
    for t in (times[0], times[3], off, times, times.flip(0)):
        for ask in ("alpha", "sigma", "log_snr", "program_sigma"):
            torch.testing.assert_close(getattr(known, ask)(t), getattr(noise_schedule, ask)(t), rtol=1e-12, atol=1e-12)
    t = times[2].clone().requires_grad_()
    assert torch.autograd.grad(known.log_snr(t), t)[0] < 0
    assert (known.t_min, known.t_max, known.time_scale) == (
        noise_schedule.t_min,
        noise_schedule.t_max,
        noise_schedule.time_scale,
    )


def test_a_noise_schedule_of_ones_own_has_the_rest_from_the_interface() -> None:
    class Doubled(NoiseSchedule):
        """EDM's with twice the noise at every t."""

        t_min, t_max = 0.01, 10.0

        def alpha(self, t: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(t, dtype=torch.float64)

        def sigma(self, t: torch.Tensor) -> torch.Tensor:
            return 2 * t.double()

        def log_snr(self, t: torch.Tensor) -> torch.Tensor:
            return -torch.log(2 * t.double())

        def time(self, log_snr: torch.Tensor) -> torch.Tensor:
            return torch.exp(-log_snr.double()) / 2

    noise_schedule, t = Doubled(), torch.tensor([8.0, 0.5])
    assert noise_schedule.program_sigma(t).tolist() == pytest.approx([16, 1])
    assert noise_schedule.time_of_program_sigma(torch.tensor([16.0, 1.0])).tolist() == pytest.approx([8, 0.5])
    assert (noise_schedule.time_scale, noise_schedule.noise_scale) == (1, pytest.approx(math.hypot(1, 20)))


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (torch.tensor([[0.1, 0.2]]), r"shape \(T,\)"),
        (torch.tensor([0.1]), r"shape \(T,\)"),
        (torch.tensor([0.1, 1.2]), r"lie in \(0, 1\)"),
        (torch.tensor([0.0, 0.2]), r"lie in \(0, 1\)"),
        (torch.tensor([1.0, 0.2]), "only the last"),
    ],
)
def test_bad_tables_are_refused(betas: torch.Tensor, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        BetaTable(betas)


def test_an_unknown_beta_schedule_is_refused() -> None:
    with pytest.raises(TsAdaptError, match="'sigmoid' is unknown"):
        BetaTable.from_config({"beta_schedule": "sigmoid"})
