"""The static search: it improves on its start, never loses to it on validation, and honours LD3's two options."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import get_args

import pytest
import torch

from small_predictors import split
from ts_adapt.errors import TsAdaptError
from ts_adapt.grids import fixed
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import TimeGrid
from ts_adapt.search.journal import Journal
from ts_adapt.search.static import _smoothed_gradient, best_start, search_static
from ts_adapt.search.static_options import USED_BY_METHOD, Method, StaticOptions, Target

STEPS = 4


def starts(objective):
    noise_schedule = objective.denoiser.noise_schedule
    return {name: TimeGrid(fixed.make(name, noise_schedule, STEPS)) for name in ("linear", "log_snr", "karras")}


def search(objective, train, validation, grids=None, *, means=None, **options):
    """From `grids`, or those of `starts`."""
    grids, options = grids or starts(objective), StaticOptions(**options)
    return search_static(objective, train, validation, grids, options, means=means, progress=False)


@pytest.fixture
def learning(problem):
    """The objective, what is learned from and what validates."""
    objective, batch = problem
    return (objective, *split(batch))


@pytest.mark.parametrize("method", ["lbfgs", "adam", "smoothed"])
def test_learned_grid_beats_the_best_fixed_one_on_validation(learning, method):
    objective, _, validation = learning
    result = search(*learning, iterations=60, batch_size=16, method=method, corrections=[])
    _, means = best_start(objective, starts(objective), validation)
    assert result.start_distance == pytest.approx(min(means.values()))
    assert result.distance < 0.9 * result.start_distance
    assert float(objective.measure(result.grid, validation).mean()) == pytest.approx(result.distance, rel=1e-6)


def test_the_geometric_mean_goes_by_most_samples_where_a_few_are_far_off(problem):
    objective, batch = problem
    far = batch.target.clone()
    far[::8] += 5 * torch.randn(batch.target[0].shape, generator=torch.Generator().manual_seed(0))
    train, validation = split(replace(batch, target=far))
    left = {}
    for target in get_args(Target):
        result = search(objective, train, validation, method="lbfgs", iterations=40, target=target, corrections=[])
        distance = objective.measure(result.grid, validation).double()
        left[target] = distance.log().mean().exp().item(), distance.median().item()
        grids = starts(objective)
        name, _ = best_start(objective, grids, validation)
        most = 2 * objective.measure(grids[name], validation).double().median()
        capped = distance.clamp(max=most).mean().item()
        kept = {"mean": distance.mean().item(), "geometric": left[target][0], "capped": capped}
        assert result.distance == pytest.approx(kept[target], rel=1e-5)
    assert left["geometric"][0] < 0.9 * left["mean"][0]
    assert left["geometric"][1] < left["mean"][1] and left["capped"][1] < left["mean"][1]


@pytest.mark.parametrize("target", ["mean", "capped"])
def test_means_that_are_known_are_not_measured_again(learning, target):
    objective, _, validation = learning
    _, means = best_start(objective, starts(objective), validation)

    def counted(means):
        begun = objective.denoiser.evaluations
        result = search(*learning, method="adam", iterations=1, target=target, means=means)
        return result, objective.denoiser.evaluations - begun

    (given, less), (measured, more) = counted(means), counted(None)
    assert torch.equal(given.grid.times, measured.grid.times) and given.distance == measured.distance
    assert more - less == len(means) * STEPS


def test_result_is_never_worse_than_the_start(learning):
    result = search(*learning, method="adam", iterations=4, batch_size=4, lr=50.0, validate_every=1)
    assert result.distance <= result.start_distance


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
@pytest.mark.parametrize("correction", ["shift", "scale", "coefficients"])
def test_each_correction_lowers_the_distance_that_times_alone_reach(learning, correction, method):
    objective, train, _ = learning
    options = {"iterations": 60, "batch_size": 16, "method": method, "tolerance": 1e-7}
    plain = search(objective, train, train, corrections=[], **options)
    result = search(objective, train, train, {"static": plain.grid}, corrections=[correction], lr=0.005, **options)
    assert result.distance < 0.99 * plain.distance
    carried = {"shift": "model_times", "scale": "output_scale", "coefficients": "coefficients"}
    for name, field in carried.items():
        assert (getattr(result.grid, field) is not None) == (name == correction)


def test_soft_teacher_runs_and_still_improves(learning):
    result = search(*learning, iterations=30, batch_size=16, soft_teacher=True, method="adam", corrections=[])
    assert result.distance < result.start_distance


def test_lbfgs_ends_where_the_mean_is_flat_and_keeps_the_best_of_its_starts(learning):
    objective, train, _ = learning
    grids = starts(objective)

    def ended(**grids):
        options = {"method": "lbfgs", "iterations": 60, "tolerance": 1e-10, "starts": 3, "corrections": []}
        return search(objective, train, train, grids, **options)

    def slope(grid):
        space = GridSpace(objective.denoiser.noise_schedule, STEPS)
        z = space.numbers(grid).requires_grad_()
        return float(torch.autograd.grad(objective(space.grid(z), train).mean(), z)[0].norm())

    single = {name: ended(**{name: grid}) for name, grid in grids.items()}
    assert all(slope(result.grid) < 0.02 * slope(grids[name]) for name, result in single.items())
    assert ended(**grids).distance == pytest.approx(min(result.distance for result in single.values()))


@pytest.mark.parametrize("method", get_args(Method))
def test_an_option_that_no_result_of_a_method_records_changes_nothing_of_it(learning, method):
    few = {"iterations": 2, "evaluations": 10, "starts": 1, "batch_size": 8, "validate_every": 1}
    options = StaticOptions(method=method, corrections=[], **few)
    idle = {name for name, under in USED_BY_METHOD.items() if method not in under} - {"soft_teacher"}
    others = replace(options, **{name: 0.5 if name == "ema" else 2 * getattr(options, name) or 1 for name in idle})
    one, other = (search(*learning, **asdict(each)) for each in (options, others))
    assert others != options and one.curve == other.curve and torch.equal(one.grid.times, other.grid.times)


def test_smoothed_gradient_is_the_exact_one_of_a_smooth_loss(problem):
    """Where the loss is quadratic in the logits, smoothing changes nothing: the estimate converges to the gradient."""
    objective, batch = problem
    noise_schedule = objective.denoiser.noise_schedule
    goal = noise_schedule.log_snr(fixed.make("karras", noise_schedule, STEPS))

    class Quadratic:
        denoiser, solver = objective.denoiser, objective.solver

        def measure(self, grid, batch, size):
            return (noise_schedule.log_snr(grid.times) - goal).square().sum(-1)

    many = batch.rows(torch.arange(len(batch)).repeat(400))
    space = GridSpace(noise_schedule, STEPS)
    z = space.numbers(TimeGrid(fixed.make("log_snr", noise_schedule, STEPS))).requires_grad_()
    draws = torch.randn((len(many), STEPS), generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    _, estimate = _smoothed_gradient(Quadratic(), space.grid, z.detach(), many, 0.05, draws)
    exact = torch.autograd.grad((noise_schedule.log_snr(space.grid(z).times) - goal).square().sum(), z)[0]
    assert torch.nn.functional.cosine_similarity(estimate, exact, dim=0) > 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "smoothd"}, "did you mean 'smoothed'"),
        ({"soft_teacher": True}, "soft_teacher moves the starts"),
        ({"corrections": ["scal"]}, "did you mean 'scale'"),
    ],
)
def test_bad_options_are_refused(learning, options, message):
    with pytest.raises(TsAdaptError, match=message):
        search(*learning, **options)


def test_no_start_is_refused(learning):
    with pytest.raises(TsAdaptError, match="at least one grid"):
        search_static(*learning, {}, StaticOptions())


class Counting:
    """An objective that counts its evaluations, and is interrupted at one of them."""

    def __init__(self, objective, last=None):
        self.objective, self.last, self.asked = objective, last, 0
        self.denoiser, self.solver, self.is_differentiated = objective.denoiser, objective.solver, True

    def count(self):
        self.asked += 1
        if self.asked == self.last:
            raise KeyboardInterrupt

    def __call__(self, *arguments):
        self.count()
        return self.objective(*arguments)

    def measure(self, *arguments):
        self.count()
        return self.objective.measure(*arguments)


@pytest.mark.parametrize("method", ["lbfgs", "adam", "smoothed"])
def test_a_search_that_was_killed_goes_on_to_the_same_result(learning, method, tmp_path):
    objective, train, validation = learning
    grids = starts(objective)
    options = StaticOptions(method=method, iterations=12, corrections=["shift"])
    _, means = best_start(objective, grids, validation)

    def run(objective, journal=None):
        return search_static(objective, train, validation, grids, options, means=means, journal=journal, progress=False)

    whole, rest = Counting(objective), Counting(objective)
    unbroken = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(Counting(objective, last=whole.asked - 2), Journal(tmp_path / "j", "key"))
    resumed = run(rest, Journal(tmp_path / "j", "key"))
    assert rest.asked <= 4 < whole.asked
    assert resumed.curve == unbroken.curve
    assert torch.equal(resumed.grid.times, unbroken.grid.times)
    assert torch.equal(resumed.grid.model_times, unbroken.grid.model_times)
