"""Orders of convergence on a Gaussian, whose probability-flow ODE has a known solution.

A multistep method of order p is given p exact values to start from (`ExactStart`): a first step of order 1 would
otherwise leave an error of order h^2. Grids are uniform in log-SNR, or repeat an uneven pattern of steps, so that
neighbouring steps stay uneven however fine the grid.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ts_adapt.denoisers.analytic import GaussianDenoiser
from ts_adapt.noise import ContinuousVP, VarianceExploding, time_of_edm_sigma
from ts_adapt.sampling import integrate
from ts_adapt.solvers import DDIM, DEIS, IPNDM, Corrected, DPMSolverPP, Euler, Heun, UniP, UniPC

NOISE = ContinuousVP()
RANGE = (-1.5, 1.5)


def gaussian(noise_schedule):
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    variance = torch.tensor([0.3, 1.5, 0.05], dtype=torch.float64)
    return GaussianDenoiser(noise_schedule, mean, variance)


def uniform(steps):
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def uneven(steps):
    pattern = torch.tensor([1.0, 1.6, 0.7, 1.2], dtype=torch.float64)
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), pattern.repeat(steps // 4).cumsum(0)])
    return edges / edges[-1]


def log_snr_grid(noise_schedule, places):
    return noise_schedule.time(RANGE[0] + (RANGE[1] - RANGE[0]) * places)


def edm_grid(noise_schedule, places):
    high, low = math.exp(0.7), math.exp(-0.7)
    return time_of_edm_sigma(noise_schedule, high + (low - high) * places)


class ExactStart:
    """`solver`, with exact states in place of its own in the first `steps` steps."""

    evaluations_per_step, needs_noise = 1, False

    def __init__(self, solver, denoiser, x_T, t_0, steps):
        self.solver, self.noise_schedule, self.order, self.steps = solver, solver.noise_schedule, solver.order, steps
        self.exact = lambda t: denoiser.solution(x_T, t_0, t)

    def init(self, x):
        return self.solver.init(x)

    def update(self, x_t, x0, node, next_node, memory, noise_schedule=None):
        x_s, memory = self.solver.update(x_t, x0, node, next_node, memory)
        if node.index < self.steps:
            if isinstance(self.solver, Corrected):
                memory = dataclasses.replace(memory, x=x_t)
            x_s = self.exact(next_node.t)
        return x_s, memory


def slope(solver_of, noise_schedule=NOISE, grid=log_snr_grid, places=uniform, start=0, counts=(64, 128)):
    denoiser = gaussian(noise_schedule)
    x_T = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in counts:
        times = grid(noise_schedule, places(steps))
        solver = solver_of(noise_schedule)
        if start:
            solver = ExactStart(solver, denoiser, x_T, times[0], start)
        x = integrate(denoiser, solver, times, x_T).x
        errors.append(float((x - denoiser.solution(x_T, times[0], times[-1])).square().mean().sqrt()))
    return math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])


# Order, and the number of exact starting states.
CASES = {
    "ddim": (DDIM, 1, 0),
    "euler": (Euler, 1, 0),
    "heun": (Heun, 2, 0),
    "2M": (lambda n: DPMSolverPP(n, 2), 2, 0),
    "2M exact": (lambda n: DPMSolverPP(n, 2, exact=True), 2, 0),
    "3M exact": (lambda n: DPMSolverPP(n, 3, exact=True), 3, 2),
    "3M exact, own start": (lambda n: DPMSolverPP(n, 3, exact=True), 2, 0),
    "deis1": (lambda n: DEIS(n, 1), 1, 0),
    "deis2": (lambda n: DEIS(n, 2), 2, 0),
    "deis3": (lambda n: DEIS(n, 3), 3, 2),
    "unip1": (lambda n: UniP(n, 1, lower_order_final=False), 1, 0),
    "unip2 bh1": (lambda n: UniP(n, 2, "bh1", lower_order_final=False), 2, 0),
    "unip2 bh2": (lambda n: UniP(n, 2, "bh2", lower_order_final=False), 2, 0),
    "unip3": (lambda n: UniP(n, 3, lower_order_final=False), 3, 2),
    # UniC of order p lifts a predictor of order p to p + 1. At order 1 the starting step is corrected already.
    "unipc1 bh1": (lambda n: UniPC(n, 1, "bh1", lower_order_final=False), 2, 0),
    "unipc1 bh2": (lambda n: UniPC(n, 1, "bh2", lower_order_final=False), 2, 0),
    "unipc2 bh1": (lambda n: UniPC(n, 2, "bh1", lower_order_final=False), 3, 1),
    "unipc2 bh2": (lambda n: UniPC(n, 2, "bh2", lower_order_final=False), 3, 1),
    "unipc3": (lambda n: UniPC(n, 3, lower_order_final=False), 4, 3),
    "ddim + unic1": (lambda n: Corrected(DDIM(n), 1, lower_order_final=False), 2, 0),
    "2M + unic2": (lambda n: Corrected(DPMSolverPP(n, 2), 2, lower_order_final=False), 3, 1),
    "deis2 + unic2": (lambda n: Corrected(DEIS(n, 2), 2, lower_order_final=False), 3, 1),
}


@pytest.mark.parametrize("places", [uniform, uneven], ids=["uniform", "uneven"])
@pytest.mark.parametrize("case", CASES)
def test_order_of_convergence(case, places):
    solver_of, order, start = CASES[case]
    assert slope(solver_of, places=places, start=start) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("noise_schedule", [ContinuousVP(), VarianceExploding()], ids=["vp", "ve"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_has_its_order_on_equal_steps_of_edm_sigma(order, noise_schedule):
    found = slope(lambda n: IPNDM(n, order), noise_schedule, grid=edm_grid, start=order - 1)
    assert found == pytest.approx(order, abs=0.2)


def test_ipndm_falls_to_order_one_on_uneven_steps():
    assert slope(lambda n: IPNDM(n, 3), grid=edm_grid, places=uneven, start=2) == pytest.approx(1, abs=0.2)


def test_published_3m_is_of_order_two():
    """Its term of second differences has half the weight of the exact integral."""
    assert slope(lambda n: DPMSolverPP(n, 3), start=2, counts=(256, 512)) == pytest.approx(2, abs=0.2)
