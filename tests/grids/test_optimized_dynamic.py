"""GITS and OSS: dynamic programming against all subsets, Gaussians in closed form, planted kinks, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noise_schedules import PLAIN, assert_falls
from ts_adapt.denoisers.analytic import GaussianDenoiser, example_mixture
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.dynamic import COEFFICIENT, cheapest_path, gits, median, oss, step_costs
from ts_adapt.grids.fixed import make
from ts_adapt.interfaces import Node, NoiseSchedule
from ts_adapt.sampling import integrate
from ts_adapt.solvers import DDIM, UniPC


def exact_teacher(denoiser: GaussianDenoiser, places: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, x0 and times of the exact solution of a Gaussian, float64."""
    noise_schedule, times = denoiser.noise_schedule, make("karras", denoiser.noise_schedule, places)
    generator = torch.Generator().manual_seed(1)
    end = torch.randn((batch, *denoiser.shape), generator=generator, dtype=torch.float64)
    x_T = noise_schedule.alpha(times[0]) * denoiser.mean + end * noise_schedule.sigma(times[0])
    states = torch.stack([denoiser.solution(x_T, times[0], t) for t in times], 1)
    x0 = torch.stack([denoiser.posterior_mean(states[:, i], times[i]) for i in range(places)], 1)
    return states, x0, times


def mixture_teacher(places: int = 10, batch: int = 12) -> tuple[Any, Tensor, Tensor, Tensor]:
    mixture = example_mixture()
    x_T = torch.randn(batch, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    times = make("log_snr", mixture.noise_schedule, places)
    solution = integrate(mixture, UniPC(mixture.noise_schedule, order=3), times, x_T, keep_trajectory=True)
    assert solution.states is not None and solution.x0 is not None
    return mixture, solution.states, solution.x0, times


def kinked_teacher(noise_schedule: NoiseSchedule, kinks: list[int], places: int) -> tuple[Tensor, Tensor, Tensor]:
    """Trajectories that are straight in EDM's variables but for a turn to the same side at each of `kinks`."""
    times = make("karras", noise_schedule, places)
    alpha, sigma = noise_schedule.alpha(times), noise_schedule.sigma(times)
    rho = sigma / alpha
    y, angle, points, eps = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0.1, 1.0, 2.0]).double(), [], []
    for i in range(places, 0, -1):
        points.append(y)
        angle = angle + (0.4 if i in kinks else 0.0)
        eps.append(torch.stack([angle.cos(), angle.sin()], -1))
        y = y + (rho[i - 1] - rho[i]) * eps[-1]
    ys = torch.stack([*points, y][::-1], 1)
    directions = torch.stack(eps[::-1], 1)
    x0 = ys[:, :-1] - rho[:-1, None] * directions
    return ys * alpha[:, None], x0, times


def path_cost(costs: Tensor, path: list[int], coefficient: float) -> float:
    return sum(coefficient**n * float(costs[i, j]) for n, (i, j) in enumerate(itertools.pairwise(path)))


def all_paths(last: int, steps: int) -> list[list[int]]:
    return [[0, *inside, last] for inside in itertools.combinations(range(1, last), steps - 1)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.data(), st.sampled_from([0.7, 1.0, 1.15, 2.0]))
def test_no_path_is_cheaper_than_the_cheapest(last: int, data: st.DataObject, coefficient: float) -> None:
    steps = data.draw(st.integers(1, last))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    costs = torch.randn(last + 1, last + 1, generator=generator, dtype=torch.float64)
    path = cheapest_path(costs, steps, coefficient).tolist()
    assert path[0] == 0 and path[-1] == last and len(path) == steps + 1
    assert all(i < j for i, j in itertools.pairwise(path))
    least = min(path_cost(costs, other, coefficient) for other in all_paths(last, steps))
    assert path_cost(costs, path, coefficient) == pytest.approx(least, abs=1e-12)
    assert cheapest_path(1e-6 * costs, steps, coefficient).tolist() == path
    assert cheapest_path(costs.triu(1), steps, coefficient).tolist() == path


@pytest.mark.parametrize("schedule", sorted(PLAIN))
def test_costs_are_the_errors_of_ddim_in_the_variables_of_edm(schedule: str) -> None:
    noise_schedule = PLAIN[schedule]
    states, x0, times = exact_teacher(GaussianDenoiser(noise_schedule, torch.tensor([0.3, -0.5, 0.0]), 0.4), 7, 5)
    solver = DDIM(noise_schedule)
    costs = step_costs(states, x0, times, noise_schedule)
    y = states[:, 1:] / noise_schedule.alpha(times)[1:, None]
    chord = noise_schedule.alpha(times[0]) * y[:, -1] - states[:, 0]
    chord = chord / chord.norm(dim=-1, keepdim=True)

    def height(point: Tensor) -> Tensor:
        """Of the triangle over the chord, from its area."""
        return torch.linalg.cross(y[:, -1] - point, chord).norm(dim=-1)

    for i, j in itertools.combinations(range(8), 2):
        start, stop = (Node(index, 7, times[index]) for index in (i, j))
        reached, _ = solver.update(states[:, i], x0[:, i], start, stop, solver.init(states[:, i]))
        deviation = float((height(reached / noise_schedule.alpha(times[j])) - height(y[:, j - 1])).mean())
        assert float(costs[i, j]) == pytest.approx(deviation, rel=1e-6, abs=1e-9)
    assert not bool(costs.tril().any())
    best = min(all_paths(7, 3), key=lambda path: path_cost(costs, path, COEFFICIENT))
    assert torch.equal(gits(states, x0, times, 3, noise_schedule), times[best])


@pytest.mark.parametrize("schedule", ["table", "vp", "edm"])
@pytest.mark.parametrize("kinks", [[7], [3, 4], [2, 5, 9]])
def test_gits_puts_its_steps_where_the_trajectory_turns(schedule: str, kinks: list[int]) -> None:
    noise_schedule = PLAIN[schedule]
    states, x0, times = kinked_teacher(noise_schedule, kinks, 12)
    found = gits(states, x0, times, len(kinks) + 1, noise_schedule)
    torch.testing.assert_close(found, times[[0, *kinks, 12]])
    straight = step_costs(states, x0, times, noise_schedule)[kinks[-1] :, kinks[-1] :]
    assert float(straight.abs().max()) < 1e-9 * float(states.abs().max())


@pytest.mark.parametrize("schedule", sorted(PLAIN))
def test_gits_grids_have_the_shared_ends_and_the_teachers_times(schedule: str) -> None:
    noise_schedule = PLAIN[schedule]
    states, x0, times = exact_teacher(GaussianDenoiser(noise_schedule, torch.tensor([0.3, -0.5]), 0.4), 15, 4)
    for steps in (1, 4, 15):
        grid = gits(states.float(), x0.float(), times, steps, noise_schedule)
        assert_falls(grid, noise_schedule, steps)
        assert bool(torch.isin(grid, times).all())
    assert torch.equal(gits(states, x0, times, 15, noise_schedule), times)


def test_gits_knows_no_order_of_samples_and_no_scale() -> None:
    _, states, x0, times = mixture_teacher()
    noise_schedule = example_mixture().noise_schedule
    twice = states.repeat(2, 1, 1, 1, 1), x0.repeat(2, 1, 1, 1, 1)
    grid = gits(states, x0, times, 4, noise_schedule)
    for same in ((states.flip(0), x0.flip(0)), twice, (7 * states, 7 * x0)):
        assert torch.equal(gits(*same, times, 4, noise_schedule), grid)


def final_error(denoiser: Any, states: Tensor, times: Tensor, path: list[int]) -> Tensor:
    """|student - teacher|^2 of each sample at the end of DDIM over the places of `path`."""
    x = integrate(denoiser, DDIM(denoiser.noise_schedule), times[path], states[:, 0]).x
    return (x - states[:, -1]).flatten(1).square().mean(1)


@pytest.mark.parametrize("schedule", sorted(PLAIN))
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_oss_of_a_gaussian_is_the_best_of_all_subsets(schedule: str, steps: int) -> None:
    """In one dimension every DDIM step errs to the same side and keeps the order of states: the DP is exact."""
    denoiser = GaussianDenoiser(PLAIN[schedule], torch.tensor([0.2]), 0.5)
    states, _, times = exact_teacher(denoiser, 7, 5)
    grids = oss(denoiser, states, times, steps, denoiser.noise_schedule)
    errors = torch.stack([final_error(denoiser, states, times, path) for path in all_paths(7, steps)])
    for row in range(5):
        path = (times[:, None] == grids[row]).nonzero()[:, 0].tolist()
        reached = final_error(denoiser, states, times, path)[row]
        torch.testing.assert_close(reached, errors[:, row].min(), rtol=1e-6, atol=1e-14)


def test_oss_over_two_steps_is_the_best_of_all_for_each_sample() -> None:
    mixture, states, _, times = mixture_teacher()
    grids = oss(mixture, states, times, 2, mixture.noise_schedule)
    errors = torch.stack([final_error(mixture, states, times, path) for path in all_paths(10, 2)])
    assert torch.equal(grids[:, 1], times[1 + errors.argmin(0)])
    assert len(set(grids[:, 1].tolist())) > 1


def test_oss_keeps_the_nearest_state_at_every_place() -> None:
    """Against the recursion written out, one sample at a time."""
    mixture, states, _, times = mixture_teacher(places=8, batch=4)
    grids = oss(mixture, states, times, 4, mixture.noise_schedule)
    for row in range(4):
        kept = {0: (states[row : row + 1, 0], [0])}
        for _ in range(4):
            following: dict[int, tuple[float, Tensor, list[int]]] = {}
            for i, (z, path) in kept.items():
                for j in range(i + 1, 9):
                    x_s = integrate(mixture, DDIM(mixture.noise_schedule), times[[i, j]], z).x
                    error = float((x_s - states[row, j]).square().mean())
                    if j not in following or error < following[j][0]:
                        following[j] = (error, x_s, [*path, j])
            kept = {j: (x_s, path) for j, (_, x_s, path) in following.items()}
        assert torch.equal(grids[row], times[kept[8][1]])


@pytest.mark.parametrize("schedule", ["vp", "edm"])
def test_oss_puts_its_steps_where_the_trajectory_turns(schedule: str) -> None:
    noise_schedule, kinks = PLAIN[schedule], [3, 8]
    states, x0, times = kinked_teacher(noise_schedule, kinks, 12)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        """The teacher's direction at t, from wherever the student is."""
        i = int((times - t).abs().argmin())
        eps = (states[:, i] - noise_schedule.alpha(t) * x0[:, i]) / noise_schedule.sigma(t)
        return (x_t - noise_schedule.sigma(t) * eps) / noise_schedule.alpha(t)

    grids = oss(denoise, states, times, 3, noise_schedule)
    torch.testing.assert_close(grids, times[[0, *kinks, 12]].expand(3, -1))


@pytest.mark.parametrize("schedule", sorted(PLAIN))
def test_oss_grids_have_the_shared_ends_and_the_teachers_times(schedule: str) -> None:
    denoiser = GaussianDenoiser(PLAIN[schedule], torch.tensor([0.3, -0.5]), torch.tensor([0.1, 2.0]))
    states, _, times = exact_teacher(denoiser, 9, 4)
    for steps in (1, 3, 9):
        before = denoiser.evaluations
        grids = oss(denoiser, states.float(), times, steps, denoiser.noise_schedule)
        assert denoiser.evaluations - before == 1 + (steps - 1) * (9 - steps + 1)
        assert_falls(grids, denoiser.noise_schedule, steps)
        assert len(grids) == 4 and bool(torch.isin(grids, times).all())


def test_the_median_is_taken_place_by_place_and_falls_strictly() -> None:
    mixture, states, _, times = mixture_teacher()
    grids = oss(mixture, states, times, 4, mixture.noise_schedule)
    shared = median(grids)
    assert shared.shape == (5,) and bool((shared.diff() < 0).all()) and bool(torch.isin(shared, times).all())
    torch.testing.assert_close(median(grids[:3]), grids[:3].sort(0).values[1])
    torch.testing.assert_close(median(grids[:4]), grids[:4].sort(0).values[1])
    assert torch.equal(median(grids[torch.randperm(12)]), shared)


def test_both_beat_fixed_grids_on_the_mixture_and_the_grids_of_each_sample_those_for_all() -> None:
    mixture, states, x0, times = mixture_teacher(places=24, batch=64)

    def error(grid: Tensor) -> float:
        x = integrate(mixture, DDIM(mixture.noise_schedule), grid, states[:, 0]).x
        return float((x - states[:, -1]).square().mean())

    fixed = min(error(make(name, mixture.noise_schedule, 4)) for name in ("log_snr", "uniform"))
    own = oss(mixture, states, times, 4, mixture.noise_schedule)
    assert error(own) < error(gits(states, x0, times, 4, mixture.noise_schedule)) < fixed
    assert error(median(own)) < fixed


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; the teacher's 10 steps leave a choice of 1 to 10"),
        ({"steps": 11}, "steps is 11"),
        ({"states": lambda x: x[:, 1:]}, r"states have shape \(12, 10, 1, 4, 4\); expected \(B, 11, ...\)"),
        ({"states": lambda x: x[:0]}, r"states have shape \(0, 11, 1, 4, 4\).*B >= 1"),
        ({"states": lambda x: x[:, :, 0, 0, 0]}, r"states have shape \(12, 11\)"),
        ({"states": lambda x: x * NAN}, "states hold a NaN"),
        ({"times": lambda t: t[:-1]}, r"runs from 1 to .*; expected the ends|expected \(B, 10, ...\)"),
        ({"times": lambda t: t.expand(12, -1)}, r"times have shape \(12, 11\); expected \(M\+1,\)"),
        ({"times": lambda t: t.flip(0)}, "the teacher's time grid is not decreasing"),
        ({"times": lambda t: 0.9 * t + 0.001}, "the teacher runs from 0.901 to .*native=True"),
    ],
)
def test_bad_trajectories_are_refused(change: dict[str, Any], message: str) -> None:
    mixture, states, x0, times = mixture_teacher()
    steps = change.get("steps", 4)
    states, times = change.get("states", lambda x: x)(states), change.get("times", lambda t: t)(times)
    with pytest.raises(TsAdaptError, match=message):
        gits(states, x0, times, steps, mixture.noise_schedule)
    with pytest.raises(TsAdaptError, match=message):
        oss(mixture, states, times, steps, mixture.noise_schedule)


def test_other_bad_input_is_refused() -> None:
    mixture, states, x0, times = mixture_teacher()
    noise_schedule = mixture.noise_schedule
    for wrong, message in (
        (
            lambda: gits(states, x0[:, 1:], times, 4, noise_schedule),
            r"x0 .* shape \(12, 9, 1, 4, 4\); expected \(12, 10",
        ),
        (lambda: gits(states, x0 * NAN, times, 4, noise_schedule), "all finite"),
        (lambda: oss(lambda x, t: x * NAN, states, times, 4, noise_schedule), "denoiser's output holds a NaN"),
        (lambda: cheapest_path(torch.full((4, 4), NAN), 2), "costs of steps hold a NaN"),
    ):
        with pytest.raises(TsAdaptError, match=message):
            wrong()
