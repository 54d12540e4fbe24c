"""The learned weights on all that a solve has met: nothing at zero, any multistep step by the right ones."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from noise_schedules import PLAIN
from own_loops import by_hand, our_own
from ts_adapt import LearnedGrid, LearnedScheduler, integrate
from ts_adapt.assembly import SOLVERS, build_solver
from ts_adapt.denoisers.analytic import GaussianDenoiser, example_mixture
from ts_adapt.distances import l2
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.fixed import make
from ts_adapt.interfaces import HISTORY, Node, TimeGrid
from ts_adapt.noise import BetaTable
from ts_adapt.policies import FollowGrid
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.search.static import search_static
from ts_adapt.search.static_options import StaticOptions
from ts_adapt.solvers.coefficients import data_weights, first_order, half_weight, place

STEPS = 4
NOISES = {name: PLAIN[name] for name in ("vp", "flow", "edm", "zero_snr")}
CONFIG = DDIMScheduler().config
TABLE = BetaTable.from_config(CONFIG)


def problem(noise_schedule, shape=(8,), batch=3):
    """A Gaussian of several variances, and noise to start from."""
    variance = torch.linspace(0.2, 2.0, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    x = torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return GaussianDenoiser(noise_schedule, 0.5, variance, shape), noise_schedule.noise_scale * x


def inside(noise_schedule):
    """A grid that ends above sigma = 0, where every solver can go."""
    span = noise_schedule.t_max - noise_schedule.t_min
    return noise_schedule.t_min + torch.linspace(1, 0.05, STEPS + 1, dtype=torch.float64) * span


def random_weights(*rows, scale=0.1):
    return scale * torch.randn(*rows, STEPS, STEPS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weighed(times, weights):
    return TimeGrid.of(times, {HISTORY: weights})


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
def test_zeros_change_no_bit_and_others_do(noise_schedule, solver):
    denoiser, x_T = problem(noise_schedule)
    x_T, solver, times = x_T.float(), build_solver(solver, noise_schedule), inside(noise_schedule)
    step_noise = lambda step: torch.ones_like(x_T)  # noqa: E731
    plain, zeros, other = (
        integrate(denoiser, solver, grid, x_T, step_noise=step_noise).x
        for grid in (times, weighed(times, torch.zeros(STEPS, STEPS + 1)), weighed(times, random_weights()))
    )
    assert torch.equal(plain, zeros) and not torch.allclose(plain, other, rtol=1e-3)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("noise_schedule", NOISES.values(), ids=NOISES)
def test_the_right_weights_make_ddim_a_solver_of_higher_order(noise_schedule, order):
    """a_k = w_k / (alpha_s (1 - e^-h)) is DPM-Solver++."""
    denoiser, x_T = problem(noise_schedule)
    times, name = make("log_snr", noise_schedule, STEPS), {2: "dpmpp-2m", 3: "dpmpp-3m-exact"}[order]
    places, weights = [place(noise_schedule, t) for t in times], torch.zeros(STEPS, STEPS + 1, dtype=torch.float64)
    for i, (t, s) in enumerate(pairwise(places)):
        past = [before.log_snr for before in places[:i][::-1]][: min(order, STEPS - i) - 1]
        published = order == 2 and past
        found = [half_weight(t, s, past[0] - t.log_snr, "bh2")] if published else data_weights(t, s, past)
        for k, weight in enumerate(found, 1):
            weights[i, 1 + k] = weight / first_order(t, s)[1]
    ddim, higher = build_solver("ddim", noise_schedule), build_solver(name, noise_schedule)
    reached = integrate(denoiser, ddim, weighed(times, weights), x_T).x
    assert torch.allclose(reached, integrate(denoiser, higher, times, x_T).x, rtol=1e-10)
    assert not torch.allclose(reached, integrate(denoiser, ddim, times, x_T).x, rtol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "deis-3", "unipc-3"])
def test_any_combination_of_all_states_and_predictions_is_one_choice_of_weights(solver):
    """The weights of GS, one for each x_j and x0_j, reach nothing further."""
    noise_schedule = NOISES["vp"]
    denoiser, x_T = problem(noise_schedule, shape=(12,), batch=1)
    times, weights, solver = inside(noise_schedule), random_weights(), build_solver(solver, noise_schedule)

    def states(weights):
        found = integrate(denoiser, solver, weighed(times, weights), x_T, keep_trajectory=True)
        return found.states[0], found.x0[0]

    x, x0 = states(weights)
    generator = torch.Generator().manual_seed(2)
    for i in range(STEPS):
        moved = torch.cat([x[: i + 1], x0[: i + 1]]).T @ torch.randn(2 * i + 2, generator=generator).double()
        changes = []
        for column in range(i + 2):
            more = weights.clone()
            more[i, column] += 1
            changes.append(states(more)[0][i + 1] - x[i + 1])
        basis = torch.stack(changes, 1)
        found = torch.linalg.lstsq(basis, moved[:, None]).solution
        assert torch.allclose((basis @ found)[:, 0], moved, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", ["ddim", "unipc-2", "heun"])
def test_it_is_differentiable_in_weights_and_times(solver):
    noise_schedule = NOISES["vp"]
    denoiser, x_T = problem(noise_schedule, shape=(3,), batch=2)
    solver, times = build_solver(solver, noise_schedule), 0.99 * inside(noise_schedule)

    def end(times, weights):
        return integrate(denoiser, solver, weighed(times, weights), x_T).x

    assert torch.autograd.gradcheck(end, (times.requires_grad_(), random_weights(2).requires_grad_()))


def test_a_batch_of_weights_is_each_of_them_alone():
    denoiser, x_T = problem(NOISES["flow"])
    times, weights = make("log_snr", NOISES["flow"], STEPS), random_weights(3)
    solver = build_solver("unipc-2", NOISES["flow"])
    together = integrate(denoiser, solver, weighed(times, weights), x_T).x
    for row in range(3):
        alone = integrate(denoiser, solver, weighed(times, weights[row]), x_T[row : row + 1]).x
        assert torch.allclose(together[row], alone[0], rtol=1e-12)


def test_a_solve_that_begins_inside_weighs_what_it_has_met():
    denoiser, x_T = problem(NOISES["vp"])
    times, weights = make("log_snr", NOISES["vp"], STEPS), random_weights()
    unmet = weights.clone()
    for i in range(STEPS):
        unmet[i, i:] += 9.0  # of predictions that a solve from node 2 on has not met
    solver = build_solver("ddim", NOISES["vp"])
    ends = [integrate(denoiser, solver, FollowGrid(weighed(times, w), first=2), x_T).x for w in (weights, unmet)]
    assert torch.equal(*ends)
    assert not torch.allclose(ends[0], integrate(denoiser, solver, FollowGrid(times, first=2), x_T).x, rtol=1e-3)


@pytest.mark.parametrize("solver", ["ddim", "unipc-3", "heun"])
def test_a_step_without_weights_is_one_with_zeros_and_is_remembered(solver):
    class Some(FollowGrid):
        def next(self, x_t, x0, node, state):
            following, state = super().next(x_t, x0, node, state)
            if following.index == 2:
                others = {field: value for field, value in following.held.items() if field is not HISTORY}
                following = Node.of(following.index, following.steps, following.t, others)
            return following, state

    denoiser, x_T = problem(NOISES["vp"])
    times, weights = inside(NOISES["vp"]), random_weights(scale=0.3)
    zeros = weights.clone()
    zeros[1] = 0.0
    solver = build_solver(solver, NOISES["vp"])
    some, all_of_them = (
        integrate(denoiser, solver, schedule, x_T).x
        for schedule in (Some(weighed(times, weights)), FollowGrid(weighed(times, zeros)))
    )
    assert torch.equal(some, all_of_them)


def test_weights_of_another_number_of_steps_are_refused():
    denoiser, x_T = problem(NOISES["vp"])
    grid = weighed(make("log_snr", NOISES["vp"], STEPS), torch.zeros(STEPS, 3))
    with pytest.raises(TsAdaptError, match="has 3 weights of history a step, and its 4 steps take 5"):
        integrate(denoiser, build_solver("ddim", NOISES["vp"]), grid, x_T)


def test_a_search_of_weights_makes_ddim_far_better_than_a_solver_of_order_2():
    denoiser = example_mixture()
    noise_schedule = denoiser.noise_schedule
    x_T = noise_schedule.noise_scale * torch.randn(96, *denoiser.shape, generator=torch.Generator().manual_seed(3))
    fine = make("log_snr", noise_schedule, 60)
    target = integrate(denoiser, build_solver("dpmpp-3m-exact", noise_schedule), fine, x_T).x
    batch = Batch(torch.arange(96), x_T.double(), target.double(), {})
    train, validation, test = (batch.rows(slice(i, i + 32)) for i in (0, 32, 64))
    ddim, second = (Objective(denoiser, build_solver(name, noise_schedule), l2) for name in ("ddim", "dpmpp-2m"))
    found = {}
    for name, objective, corrections in (
        ("ddim", ddim, []), ("second order", second, []), ("history", ddim, ["history"]),
    ):  # fmt: skip
        options = StaticOptions(method="lbfgs", iterations=40, corrections=corrections)
        start = {"log_snr": TimeGrid(make("log_snr", noise_schedule, STEPS))}
        result = search_static(objective, train, validation, start, options, progress=False)
        found[name] = float(objective.measure(result.grid, test).median())
    assert found["history"] < 0.3 * found["ddim"] and found["history"] < 0.9 * found["second order"]


@pytest.mark.parametrize("solver", ["ddim", "unipc-2"])
def test_files_and_the_scheduler_carry_it(tmp_path: Path, solver: str) -> None:
    grid = weighed(make("log_snr", TABLE, STEPS), random_weights())
    LearnedGrid(grid, solver, STEPS).save(tmp_path / "grid.json", TABLE)
    learned = LearnedGrid.load(tmp_path / "grid.json", TABLE)
    LearnedScheduler.from_schedules([learned], CONFIG).save_pretrained(tmp_path / "scheduler")
    scheduler = LearnedScheduler.from_pretrained(tmp_path / "scheduler")
    for kept in (learned.grid, scheduler.source.grids[STEPS]):
        assert kept.held.keys() == {HISTORY} and torch.equal(kept.held[HISTORY], grid.held[HISTORY])

    found = by_hand(scheduler, STEPS)
    assert torch.allclose(found, our_own(scheduler, grid), atol=1e-5)
    assert not torch.allclose(found, our_own(scheduler, grid.times), atol=1e-2)
