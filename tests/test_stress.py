"""Numbers under stress: every solver, grid and noise schedule by name, many steps and tiny ones, half precision, strong
guidance. What comes out is finite, or the error says why it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ts_adapt.assembly import CORRECTOR, SOLVERS, build_solver, steps_of
from ts_adapt.denoisers import Guided, NetworkDenoiser
from ts_adapt.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.noise import BetaTable, ContinuousVP, Cosine, RectifiedFlow, VarianceExploding
from ts_adapt.sampling import integrate
from ts_adapt.schedules.name import grid_names
from ts_adapt.schedules.resolve import build_grid

NOISES: dict[str, NoiseSchedule] = {
    "vp": ContinuousVP(),
    "table": BetaTable.from_config({}),
    "zero terminal SNR": BetaTable.from_config({"rescale_betas_zero_snr": True}),
    "cosine": Cosine(),
    "ve": VarianceExploding(),
    "flow": RectifiedFlow(),
}
NO_CORRECTOR = ("unipc", "heun", "ddpm")
NAMES = [*SOLVERS, *(name + CORRECTOR for name in SOLVERS if not name.startswith(NO_CORRECTOR))]
HIGHEST = list({name.partition("-")[0]: name for name in SOLVERS}.values())
"""The last solver of each family."""
MEANS = 1.5 * torch.randn(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LARGEST = 2 * float(MEANS.abs().max())


def start(noise_schedule: NoiseSchedule, batch: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(batch, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return (x * noise_schedule.sigma(torch.tensor(noise_schedule.t_max))).to(dtype)


def solve(
    name: str, noise_schedule: NoiseSchedule, grid: TimeGrid | Tensor, dtype: torch.dtype = torch.float32,
    denoiser: Any = None,
) -> Tensor:  # fmt: skip
    x = start(noise_schedule, 3, dtype)

    def step_noise(step: int) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(step)).to(dtype)

    denoiser = denoiser or GaussianMixtureDenoiser(noise_schedule, MEANS, torch.tensor([0.2, 0.1, 0.4]))
    with torch.inference_mode():
        return integrate(denoiser, build_solver(name, noise_schedule), grid, x, step_noise=step_noise).x


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(NAMES), st.sampled_from(grid_names()), st.sampled_from(sorted(NOISES)),
    st.sampled_from(["", "+native", "+rounded"]), st.integers(1, 16),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_every_combination_of_names_is_finite_or_explained(
    name: str, family: str, of: str, variant: str, steps: int, dtype: torch.dtype
) -> None:
    noise_schedule = NOISES[of]
    try:
        grid = build_grid(family + variant, noise_schedule, steps, rescale=True)
        x = solve(name, noise_schedule, grid, dtype=dtype)
    except TsAdaptError as error:
        assert len(str(error)) > 30
        return
    assert x.shape == (3, 2, 2) and x.dtype == dtype and bool(torch.isfinite(x).all())


@pytest.mark.parametrize(
    ("name", "of"),
    [
        *((name, "vp") for name in HIGHEST),
        ("dpmpp-2m", "vp"),
        ("unipc-3", "zero terminal SNR"),
        ("unipc-3", "flow"),
        ("ddim", "flow"),
    ],
)
def test_a_thousand_steps_reach_the_exact_solution(name: str, of: str) -> None:
    """Of the ODE for a Gaussian, in float32; a stochastic solver stays within the data."""
    noise_schedule = NOISES[of]
    denoiser = GaussianDenoiser(noise_schedule, MEANS[0], 0.25)
    steps = steps_of(build_solver(name, noise_schedule), 1000)
    grid = build_grid("linear", noise_schedule, steps)
    x = solve(name, noise_schedule, grid, denoiser=denoiser)
    if name == "ddpm":
        assert bool(torch.isfinite(x).all()) and float(x.abs().max()) < LARGEST
        return
    exact = denoiser.solution(start(noise_schedule, 3, torch.float64), grid.times[0], grid.times[-1])
    torch.testing.assert_close(x.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("of", ["vp", "zero terminal SNR", "flow"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_of_a_millionth(name: str, of: str) -> None:
    """On a grid of such steps alone a solver moves as far as one step over the same stretch; among long steps, where
    some of the published methods overshoot, the result is finite."""
    noise_schedule = NOISES[of]
    span = noise_schedule.t_max - noise_schedule.t_min
    for begin in (0.0, 0.6):
        times = noise_schedule.t_max - span * (begin + 1e-6 * torch.arange(8, dtype=torch.float64))
        x, once = (solve(name, noise_schedule, grid, dtype=torch.float64) for grid in (times, times[[0, -1]]))
        if name != "ddpm":
            torch.testing.assert_close(x, once, rtol=1e-3, atol=1e-3)
        assert bool(torch.isfinite(x).all())
    mixed = (
        noise_schedule.t_max - span * torch.tensor([0, 1e-6, 2e-6, 0.4, 0.4 + 1e-6, 0.7, 0.95 - 1e-6, 0.95]).double()
    )
    for dtype in (torch.float64, torch.float32):
        assert bool(torch.isfinite(solve(name, noise_schedule, mixed, dtype=dtype)).all())


@pytest.fixture(scope="module")
def conditional() -> Any:
    """A small network that knows three classes and none."""
    from tiny_networks import small

    torch.manual_seed(0)
    return small("UNet2DModel", num_class_embeds=4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["unipc-3", "dpmpp-2m", "ddim"])
def test_half_precision_is_close_to_single_under_guidance(
    conditional: Any, name: str, dtype: torch.dtype, scale: float
) -> None:
    """The network runs in half precision; coefficients stay float64, so that its own rounding is all that differs."""
    noise_schedule = NOISES["zero terminal SNR"]
    grid = build_grid("linear", noise_schedule, 6)
    x_T = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    found = {}
    for precision in (torch.float32, dtype):
        network = NetworkDenoiser(conditional.to(precision), noise_schedule, "v")
        guided = Guided(network, scale, {"class_labels": 3})
        condition = {"class_labels": torch.tensor([0, 1, 2, 0])}
        with torch.inference_mode():
            found[precision] = integrate(guided, build_solver(name, noise_schedule), grid, x_T, condition=condition).x
    conditional.float()
    assert bool(torch.isfinite(found[dtype]).all())
    apart = (found[dtype] - found[torch.float32]).norm() / found[torch.float32].norm()
    assert float(apart) < (0.02 if dtype == torch.float16 else 0.15)


def test_an_overflow_in_half_precision_is_explained(conditional: Any) -> None:
    noise_schedule = NOISES["zero terminal SNR"]
    network = NetworkDenoiser(conditional.half(), noise_schedule, "v")
    guided = Guided(network, 1e38, {"class_labels": 3})
    x_T = 1e4 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with pytest.raises(TsAdaptError, match=r"NaN or infinite value at step .*higher precision"):
        integrate(
            guided, build_solver("unipc-2", noise_schedule), build_grid("linear", noise_schedule, 3), x_T,
            condition={"class_labels": torch.tensor([0, 1])},
        )  # fmt: skip
    conditional.float()
    assert math.isfinite(float(next(conditional.parameters()).sum()))
