"""What every solver must do: per-sample grids, ends of infinite log-SNR, gradients to the times, learned weights."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from noise_schedules import PLAIN
from ts_adapt.assembly import steps_of
from ts_adapt.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Node, TimeGrid
from ts_adapt.noise import ContinuousVP, RectifiedFlow, VarianceExploding
from ts_adapt.sampling import integrate
from ts_adapt.solvers import DDIM, DEIS, IPNDM, Corrected, DPMSolverPP, Euler, Heun, UniP, UniPC

SOLVERS = {
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "2M": lambda n: DPMSolverPP(n, 2, lower_order_final=False),
    "3M": lambda n: DPMSolverPP(n, 3, lower_order_final=False),
    "3M exact": lambda n: DPMSolverPP(n, 3, lower_order_final=False, exact=True),
    "deis2": lambda n: DEIS(n, 2, lower_order_final=False),
    "deis3": lambda n: DEIS(n, 3),
    "unip2": lambda n: UniP(n, 2),
    "unipc1": lambda n: UniPC(n, 1),
    "unipc2 bh1": lambda n: UniPC(n, 2, "bh1", lower_order_final=False),
    "unipc3": lambda n: UniPC(n, 3, lower_order_final=False),
    "ipndm4": lambda n: IPNDM(n, 4),
    "ddim + unic2": lambda n: Corrected(DDIM(n), 2),
    "2M + unic1": lambda n: Corrected(DPMSolverPP(n, 2), 1, "bh1"),
    "deis3 + unic3": lambda n: Corrected(DEIS(n, 3), 3),
    "ipndm2 + unic2": lambda n: Corrected(IPNDM(n, 2), 2),
}
ONE_EVALUATION = {name: make for name, make in SOLVERS.items() if name != "heun"}
NEEDS_SIGMA = {"heun", "deis2", "deis3", "deis3 + unic3"}
NOISES = {name: PLAIN[name] for name in ("vp", "flow", "edm", "zero_snr")}


def mixture(noise_schedule):
    generator = torch.Generator().manual_seed(3)
    means = 1.5 * torch.randn(3, 2, 2, dtype=torch.float64, generator=generator)
    return GaussianMixtureDenoiser(noise_schedule, means, torch.tensor([0.2, 0.1, 0.4]))


def start(noise_schedule, batch=3, dtype=torch.float64):
    x = torch.randn(batch, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return (x * noise_schedule.sigma(torch.tensor(noise_schedule.t_max))).to(dtype)


def grid(noise_schedule, steps, last=0.02, skew=1.0):
    places = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** skew
    end = noise_schedule.t_min + last * (noise_schedule.t_max - noise_schedule.t_min)
    return noise_schedule.t_max + (end - noise_schedule.t_max) * places


def solved(make, noise_schedule, times, **options):
    """The mixture's solve from `start`, by the solver that `make` gives."""
    return integrate(mixture(noise_schedule), make(noise_schedule), times, start(noise_schedule), **options)


@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_batch_of_grids_is_the_runs_of_one(name, noise_schedule):
    solver, denoiser, x = SOLVERS[name](noise_schedule), mixture(noise_schedule), start(noise_schedule)
    times = torch.stack([grid(noise_schedule, 5, skew=skew) for skew in (0.7, 1.0, 1.4)])
    together = integrate(denoiser, solver, times, x).x
    assert denoiser.evaluations == 5 * solver.evaluations_per_step
    alone = [integrate(denoiser, solver, times[i], x[i : i + 1]).x for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("name", ONE_EVALUATION)
def test_one_step_is_ddim(name, noise_schedule):
    """There is no history in the first step, and nothing to correct."""
    one, reference = (solved(make, noise_schedule, grid(noise_schedule, 1)).x for make in (SOLVERS[name], DDIM))
    torch.testing.assert_close(one, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - NEEDS_SIGMA))
def test_flow_between_infinite_log_snr(name, steps):
    """alpha = 0 at the start, sigma = 0 at the end: finite states and finite gradients to states and times."""
    noise_schedule = RectifiedFlow()
    times = grid(noise_schedule, steps, last=0.0).requires_grad_()
    solution = solved(SOLVERS[name], noise_schedule, times, keep_trajectory=True)
    (gradient,) = torch.autograd.grad(solution.x.square().sum(), times)
    assert torch.isfinite(solution.states).all()
    assert torch.isfinite(gradient).all()
    if not name.startswith("ipndm"):
        torch.testing.assert_close(solution.x, solution.x0[:, -1])


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_terminal_snr_start_is_finite(name):
    noise_schedule = NOISES["zero_snr"]
    free = grid(noise_schedule, 4)[1:].requires_grad_()
    times = torch.cat([torch.tensor([noise_schedule.t_max], dtype=torch.float64), free])
    x = solved(SOLVERS[name], noise_schedule, times).x
    (gradient,) = torch.autograd.grad(x.sum(), free)
    assert torch.isfinite(x).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("noise_schedule", [NOISES["vp"], NOISES["flow"]], ids=["vp", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_to_the_times(name, noise_schedule):
    solver, denoiser, x = SOLVERS[name](noise_schedule), mixture(noise_schedule), start(noise_schedule, 2)
    pinned = noise_schedule.t_max * torch.ones(2, 1, dtype=torch.float64)
    free = torch.stack([grid(noise_schedule, 3, last=0.1, skew=skew)[1:] for skew in (0.8, 1.3)]).requires_grad_()

    def solve(free):
        return integrate(denoiser, solver, torch.cat([pinned, free], 1), x).x

    assert torch.autograd.gradcheck(solve, free)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_to_every_time_of_a_shared_grid(name):
    noise_schedule = NOISES["vp"]
    times = torch.linspace(0.9, 0.1, 4, dtype=torch.float64).requires_grad_()
    x = start(noise_schedule, 2)
    assert torch.autograd.gradcheck(
        lambda t: integrate(mixture(noise_schedule), SOLVERS[name](noise_schedule), t, x).x, times
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_tiny_steps_are_stable(name):
    """Steps of 1e-7 in t follow the tangent: as many of them as make one such step come to the same state."""
    noise_schedule = NOISES["vp"]
    denoiser = GaussianDenoiser(noise_schedule, torch.ones(2, 2), 0.5)
    times = 0.5 - 1e-7 * torch.arange(9, dtype=torch.float64)
    times[3:] -= 3e-8
    x = start(noise_schedule)
    end = integrate(denoiser, SOLVERS[name](noise_schedule), times, x).x
    torch.testing.assert_close(end, denoiser.solution(x, times[0], times[-1]), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_states_stay_float32_and_close(name):
    noise_schedule = NOISES["vp"]
    denoiser, solver, times = mixture(noise_schedule), SOLVERS[name](noise_schedule), grid(noise_schedule, 6)
    wide, narrow = (
        integrate(denoiser, solver, times, start(noise_schedule, dtype=dtype)).x
        for dtype in (torch.float64, torch.float32)
    )
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ONE_EVALUATION)
def test_memory_is_explicit(name):
    """A solve interrupted by another one, with the same solver object, is not disturbed."""
    noise_schedule = NOISES["vp"]
    solver, denoiser = SOLVERS[name](noise_schedule), mixture(noise_schedule)
    g = TimeGrid(grid(noise_schedule, 4))

    def step(index, x, memory):
        node = g.node(index)
        return solver.update(x, denoiser(x, node.t), node, g.node(index + 1), memory)

    pairs = [
        (start(noise_schedule), solver.init(start(noise_schedule))),
        (2 * start(noise_schedule), solver.init(start(noise_schedule))),
    ]
    for index in range(4):
        pairs = [step(index, *pair) for pair in pairs]
    for (x, memory), factor in zip(pairs, (1, 2), strict=True):
        assert dataclasses.is_dataclass(memory) and memory.__dataclass_params__.frozen
        torch.testing.assert_close(x, integrate(denoiser, solver, g, factor * start(noise_schedule)).x, rtol=0, atol=0)


def test_corrector_works_on_the_state_after_the_policy_saw_it():
    """integrate's trajectory holds predicted states; the corrected one is what the next step starts from."""
    noise_schedule = NOISES["vp"]
    g = TimeGrid(grid(noise_schedule, 2))
    denoiser, solver, x = mixture(noise_schedule), Corrected(DDIM(noise_schedule), 1), start(noise_schedule)
    x_1, memory = solver.update(x, denoiser(x, g.node(0).t), g.node(0), g.node(1), solver.init(x))
    x0_1 = denoiser(x_1, g.node(1).t)
    x_2, memory = solver.update(x_1, x0_1, g.node(1), g.node(2), memory)
    plain = DDIM(noise_schedule)
    assert not torch.allclose(memory.x, x_1)
    torch.testing.assert_close(x_2, plain.update(memory.x, x0_1, g.node(1), g.node(2), plain.init(x))[0])
    trajectory = integrate(mixture(noise_schedule), solver, g, x, keep_trajectory=True).states
    torch.testing.assert_close(trajectory[:, 1], x_1)


def test_lower_order_final_below_fifteen_steps_only():
    noise_schedule = NOISES["vp"]
    for steps, lowered in ((14, True), (15, False)):
        for kind in (DPMSolverPP, DEIS):
            on, off = (
                solved(partial(kind, order=3, lower_order_final=flag), noise_schedule, grid(noise_schedule, steps)).x
                for flag in (True, False)
            )
            assert torch.equal(on, off) is not lowered


@pytest.mark.parametrize(
    "noise_schedule", [ContinuousVP(), VarianceExploding(), RectifiedFlow()], ids=["vp", "ve", "flow"]
)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_steps_keep_the_variance(noise_schedule, eta):
    """x_s of a point mass, x0 = 0 known: x_t ~ N(0, sigma_t^2) must become N(0, sigma_s^2), for every eta."""
    solver = DDIM(noise_schedule, eta)
    t, s = (torch.tensor(share * noise_schedule.t_max, dtype=torch.float64) for share in (1.0, 0.4))
    draw = torch.randn(2, 200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x_t, z = noise_schedule.sigma(t) * draw[0], draw[1]
    x_s, _ = solver.update(x_t, torch.zeros_like(x_t), Node(0, 2, t), Node(1, 2, s), solver.init(x_t), z)
    assert float(x_s.std() / noise_schedule.sigma(s)) == pytest.approx(1, abs=0.01)
    assert torch.isfinite(x_s).all()


def test_ancestral_sampling_of_a_gaussian_has_its_variance():
    noise_schedule = ContinuousVP()
    denoiser = GaussianDenoiser(noise_schedule, torch.tensor([0.7]), 0.25)
    x = torch.randn(40_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def step_noise(step):
        return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))

    times = torch.linspace(1.0, 1e-3, 201, dtype=torch.float64)
    sample = integrate(denoiser, DDIM(noise_schedule, 1.0), times, x, step_noise=step_noise).x
    assert float(sample.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(sample.var()) == pytest.approx(0.25, abs=0.02)


def test_eta_one_to_and_from_infinite_log_snr_has_gradients():
    noise_schedule = RectifiedFlow()
    times = grid(noise_schedule, 3, last=0.0).requires_grad_()
    x = start(noise_schedule)
    solution = integrate(mixture(noise_schedule), DDIM(noise_schedule, 1.0), times, x, step_noise=lambda i: x)
    (gradient,) = torch.autograd.grad(solution.x.sum(), times)
    assert torch.isfinite(solution.x).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize("name", ONE_EVALUATION)
def test_learned_coefficients(name, per_sample):
    """Zero changes nothing; the gradient reaches every coefficient that has a value to weigh, in every row."""
    noise_schedule = NOISES["flow"]
    solver, x, times = ONE_EVALUATION[name](noise_schedule), start(noise_schedule), grid(noise_schedule, 5)
    if per_sample:
        times = times.expand(3, -1)
    c = torch.zeros(*times.shape[:-1], 5, solver.order, dtype=torch.float64, requires_grad=True)
    plain = integrate(mixture(noise_schedule), solver, TimeGrid(times), x).x
    with_zero = integrate(mixture(noise_schedule), solver, TimeGrid(times, coefficients=c), x).x
    torch.testing.assert_close(with_zero, plain, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(with_zero.square().sum(), c)
    met = torch.arange(5).unsqueeze(1) >= torch.arange(solver.order)
    assert (gradient[..., met] != 0).all()
    assert (gradient[..., ~met] == 0).all()


def test_a_learned_coefficient_is_a_share_of_the_first_order_weight():
    noise_schedule = NOISES["vp"]
    times, x = torch.tensor([0.8, 0.3], dtype=torch.float64), start(noise_schedule)
    c = torch.full((1, 1), 0.1, dtype=torch.float64)
    plain, moved = (solved(DDIM, noise_schedule, TimeGrid(times, coefficients=v)).x for v in (None, c))
    alpha, sigma = noise_schedule.alpha(times), noise_schedule.sigma(times)
    share = 0.1 * (alpha[1] - alpha[0] * sigma[1] / sigma[0])
    torch.testing.assert_close(moved - plain, share * mixture(noise_schedule)(x, times[0]))


def refusals():
    noise_schedule = ContinuousVP()
    x = start(noise_schedule)
    heun, ddim = Heun(noise_schedule), DDIM(noise_schedule, 0.5)
    a, b = Node(0, 1, torch.tensor(0.9)), Node(1, 1, torch.tensor(0.1))
    c = TimeGrid(grid(noise_schedule, 3), coefficients=torch.zeros(3, 2))
    return {
        "odd NFE": (lambda: steps_of(heun, 7), "take 6 or 8"),
        "no NFE": (lambda: steps_of(heun, 0), "at least 1"),
        "Heun has no update": (lambda: heun.update(x, x, a, b, heun.init(x)), "step"),
        "Heun has no coefficients": (lambda: integrate(mixture(noise_schedule), heun, c, x), "multistep"),
        "number of coefficients": (
            lambda: integrate(mixture(noise_schedule), DPMSolverPP(noise_schedule, 3), c, x),
            "takes 3",
        ),
        "DPM-Solver++ order": (lambda: DPMSolverPP(noise_schedule, 4), "2, 3"),
        "DEIS order": (lambda: DEIS(noise_schedule, 0), "1, 2, 3"),
        "UniPC order": (lambda: UniPC(noise_schedule, 4), "1, 2, 3"),
        "iPNDM order": (lambda: IPNDM(noise_schedule, 5), "1, 2, 3, 4"),
        "variant": (lambda: UniPC(noise_schedule, 2, "bh3"), "bh1"),
        "corrector order": (lambda: Corrected(DDIM(noise_schedule), 4), "corrector"),
        "corrected Heun": (lambda: Corrected(heun), "Heun"),
        "corrected noise": (lambda: Corrected(ddim), "deterministic"),
        "corrected twice": (lambda: Corrected(UniPC(noise_schedule)), "of its own"),
        "eta": (lambda: DDIM(noise_schedule, 1.5), "eta is 1.5"),
        "no noise": (lambda: ddim.update(x, x, a, b, ddim.init(x)), "needs noise"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refused(case):
    action, message = refusals()[case]
    with pytest.raises(TsAdaptError, match=message):
        action()


def test_heun_is_the_trapezoid_in_edm_variables():
    noise_schedule = ContinuousVP()
    times, x, denoiser = torch.tensor([0.7, 0.4], dtype=torch.float64), start(noise_schedule), mixture(noise_schedule)
    alpha, rho = noise_schedule.alpha(times), noise_schedule.sigma(times) / noise_schedule.alpha(times)
    y = x / alpha[0]
    slope = (y - denoiser(x, times[0])) / rho[0]
    guess = y + (rho[1] - rho[0]) * slope
    slope_end = (guess - denoiser(alpha[1] * guess, times[1])) / rho[1]
    expected = alpha[1] * (y + (rho[1] - rho[0]) * (slope + slope_end) / 2)
    torch.testing.assert_close(integrate(denoiser, Heun(noise_schedule), times, x).x, expected)
